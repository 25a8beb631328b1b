// Which characters of a text its tokens are. @huggingface/tokenizers does not say, so tokens are laid along the text.

import { DataError } from "./errors.js";

const ENCODER = new TextEncoder();
const BYTE_TOKEN = /^<0x([0-9A-F]{2})>$/; // of tokenizers that fall back to bytes
const SPACE = 0x20;

/**
 * @param {string} text
 * @param {string[]} tokens
 * @param {object} description tokenizer.json
 * @returns {[number, number][]} UTF-16 units; tokens that share a character each have it whole
 * @throws {DataError} a token is not what the text has at its place
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
      return taken(place, piece.length - 1); // a space that the tokenizer puts before a text
    }
    if (start === undefined) throw unknown(token);
    return taken(start, piece.length);
  });

  function taken(start, length) {
    place = start + length;
    return length ? [units[start][0], units[place - 1][1]] : [units[start]?.[0] ?? text.length, units[start]?.[0] ?? text.length];
  }
}

// Of each byte of the text's UTF-8, where its character begins and ends.
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

// The characters by which byte-level tokenizers write bytes: printable ones for themselves, the others from 256 on.
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
    "Where the tokens of this conversation are in its text cannot be told.",
    `The tokenizer makes ${JSON.stringify(token)} of other characters.`,
    'Use an adapter of granularity "token", which needs no boundaries.',
  );
}
