// Finds the characters of each token. @huggingface/tokenizers has no offsets, so the tokens are matched along the text.

import { DataError } from "./errors.js";

const ENCODER = new TextEncoder();
const BYTE_TOKEN = /^<0x([0-9A-F]{2})>$/; // of tokenizers with byte fallback
const SPACE = 0x20;

/**
 * @param {string} text
 * @param {string[]} tokens
 * @param {object} description content of tokenizer.json
 * @returns {[number, number][]} ranges in UTF-16 units; tokens that share a character each cover the whole character
 * @throws {DataError} a token does not match the text at its position
 */
export function offsetsOf(text, tokens, description) {
  const bytes = ENCODER.encode(text);
  const units = unitsOf(text);
  const added = new Set(description.added_tokens.map(({ content }) => content));
  const bytesOf = isByteLevel(description.pre_tokenizer) ? byteLevelBytes : spaceBytes;
  let place = 0;
  return tokens.map((token) => {
    const piece = added.has(token) ? ENCODER.encode(token) : bytesOf(token);
    const start = [place, afterSpaces(bytes, place)].find((at) => startsWith(bytes, piece, at));
    if (start === undefined && piece[0] === SPACE && startsWith(bytes, piece.subarray(1), place)) {
      return taken(place, piece.length - 1); // the tokenizer adds a space before a text
    }
    if (start === undefined) throw unknown(token);
    return taken(start, piece.length);
  });

  function taken(start, length) {
    place = start + length;
    return length ? [units[start][0], units[place - 1][1]] : [units[start]?.[0] ?? text.length, units[start]?.[0] ?? text.length];
  }
}

// Where the character of each byte of the text's UTF-8 begins and ends.
function unitsOf(text) {
  const units = [];
  let unit = 0;
  for (const character of text) {
    for (let count = ENCODER.encode(character).length; count > 0; count--) units.push([unit, unit + character.length]);
    unit += character.length;
  }
  return units;
}

const isByteLevel = (part) => part?.type === "ByteLevel" || Boolean(part?.pretokenizers?.some(isByteLevel));

// Byte-level tokenizers write each byte as a character: printable ones as themselves, the others as those from 256 on.
const BYTES = new Map();
for (let byte = 0, others = 0; byte < 256; byte++) {
  const isPrintable = (byte > 0x20 && byte < 0x7f) || (byte > 0xa0 && byte !== 0xad);
  BYTES.set(String.fromCodePoint(isPrintable ? byte : 256 + others++), byte);
}

const byteLevelBytes = (token) => Uint8Array.from(token, (character) => BYTES.get(character) ?? unknown(token));

function spaceBytes(token) {
  const byte = BYTE_TOKEN.exec(token);
  return byte ? Uint8Array.of(Number.parseInt(byte[1], 16)) : ENCODER.encode(token.replaceAll("▁", " "));
}

const startsWith = (bytes, piece, at) => piece.every((byte, place) => bytes[at + place] === byte);

function afterSpaces(bytes, place) {
  while (bytes[place] === SPACE || (bytes[place] >= 9 && bytes[place] <= 13)) place++;
  return place;
}

function unknown(token) {
  return new DataError(
    "The positions of this conversation's tokens in its text cannot be found.",
    `The tokenizer produces ${JSON.stringify(token)} from other characters.`,
    'Use an adapter of granularity "token", which needs no boundaries.',
  );
}
