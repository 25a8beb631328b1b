// Finds the characters of each token. @huggingface/tokenizers has no offsets, so the tokens are matched along the text.

import { DataError } from "./errors.js";

const ENCODER = new TextEncoder();
const BYTE_TOKEN = /^<0x([0-9A-F]{2})>$/; // of tokenizers with byte fallback
const SPACE = 0x20;

/**
 * Return the character range of each token.
 *
 * @param {string} text
 * @param {string[]} tokens tokens of `text`, as the vocabulary spells them
 * @param {object} tokenizerJson content of tokenizer.json
 * @returns {[number, number][]} ranges in UTF-16 units; tokens that share a character each cover the whole character
 * @throws {DataError} a token does not match the text at its position
 */
export function offsetsOf(text, tokens, tokenizerJson) {
  const bytes = ENCODER.encode(text);
  const ranges = characterRanges(text);
  const added = new Set(tokenizerJson.added_tokens.map(({ content }) => content));
  const bytesOf = isByteLevel(tokenizerJson.pre_tokenizer) ? byteLevelBytes : spaceBytes;
  let position = 0;
  return tokens.map((token) => {
    const piece = added.has(token) ? ENCODER.encode(token) : bytesOf(token);
    const start = [position, skipSpaces(bytes, position)].find((begin) => matchesAt(bytes, piece, begin));
    if (start === undefined && piece[0] === SPACE && matchesAt(bytes, piece.subarray(1), position)) {
      return consume(position, piece.length - 1); // the tokenizer adds a space before a text
    }
    if (start === undefined) throw unknownTokenError(token);
    return consume(start, piece.length);
  });

  // Moves on to the end of a token of `length` bytes, and returns its range.
  function consume(start, length) {
    position = start + length;
    const begin = ranges[start]?.[0] ?? text.length;
    return [begin, length ? ranges[position - 1][1] : begin];
  }
}

// Returns where the character of each byte of the text's UTF-8 begins and ends.
function characterRanges(text) {
  const ranges = [];
  let unit = 0;
  for (const character of text) {
    for (let count = ENCODER.encode(character).length; count > 0; count--) ranges.push([unit, unit + character.length]);
    unit += character.length;
  }
  return ranges;
}

const isByteLevel = (part) => part?.type === "ByteLevel" || Boolean(part?.pretokenizers?.some(isByteLevel));

// Byte-level tokenizers write each byte as a character: printable ones as themselves, the others as those from
// 256 on.
const BYTE_BY_CHARACTER = new Map();
for (let byte = 0, unprintable = 0; byte < 256; byte++) {
  const isPrintable = (byte > 0x20 && byte < 0x7f) || (byte > 0xa0 && byte !== 0xad);
  BYTE_BY_CHARACTER.set(String.fromCodePoint(isPrintable ? byte : 256 + unprintable++), byte);
}

function byteLevelBytes(token) {
  return Uint8Array.from(token, (character) => {
    if (!BYTE_BY_CHARACTER.has(character)) throw unknownTokenError(token);
    return BYTE_BY_CHARACTER.get(character);
  });
}

function spaceBytes(token) {
  const byte = BYTE_TOKEN.exec(token);
  return byte ? Uint8Array.of(Number.parseInt(byte[1], 16)) : ENCODER.encode(token.replaceAll("▁", " "));
}

const matchesAt = (bytes, piece, start) => piece.every((byte, index) => bytes[start + index] === byte);

function skipSpaces(bytes, position) {
  while (bytes[position] === SPACE || (bytes[position] >= 9 && bytes[position] <= 13)) position++;
  return position;
}

function unknownTokenError(token) {
  return new DataError(
    "The positions of this conversation's tokens in its text cannot be found.",
    `The tokenizer produces ${JSON.stringify(token)} from other characters.`,
    'Use an adapter of granularity "token", which needs no boundaries.',
  );
}
