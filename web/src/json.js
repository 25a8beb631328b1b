// Reads small untrusted files within limits.

const MAX_JSON_BYTES = 8 * 2 ** 20;
const MAX_DEPTH = 64; // of nested objects and lists; the files of this project have 4
// NaN and infinity outside of strings: transformers writes them.
const NOT_JSON = /("(?:[^"\\]|\\.)*")|-?Infinity|NaN/g;

/**
 * Parse JSON.
 *
 * @param {Uint8Array} bytes
 * @param {object} [options]
 * @param {boolean} [options.finite] reject NaN and infinity instead of reading them as null
 * @param {number} [options.limit] maximum size in bytes
 * @returns {unknown}
 * @throws {Error} the bytes are not UTF-8 or not JSON, or are too large or nested too deeply
 */
export function parseJson(bytes, { finite = true, limit = MAX_JSON_BYTES } = {}) {
  const text = decodeText(bytes, limit);
  const value = JSON.parse(finite ? text : text.replace(NOT_JSON, (match, string) => string ?? "null"));
  checkDepth(value, MAX_DEPTH);
  return value;
}

/**
 * Decode UTF-8. A byte-order mark is left out.
 *
 * @param {Uint8Array} bytes
 * @param {number} [limit] maximum size in bytes
 * @returns {string}
 * @throws {Error} the bytes are not UTF-8, or are too large
 */
export function decodeText(bytes, limit = MAX_JSON_BYTES) {
  if (bytes.length > limit) throw new Error(`it is larger than ${limit} bytes`);
  return new TextDecoder("utf-8", { fatal: true }).decode(bytes);
}

export const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);

function checkDepth(value, depth) {
  if (typeof value === "number" && !Number.isFinite(value)) throw new Error("a number is too large");
  if (typeof value !== "object" || value === null) return;
  if (depth === 0) throw new Error(`its objects and lists are nested deeper than ${MAX_DEPTH}`);
  for (const part of Object.values(value)) checkDepth(part, depth - 1);
}
