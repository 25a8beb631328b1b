// Small files that strangers wrote, read within limits.

export const MAX_JSON_BYTES = 8 * 2 ** 20;
const MAX_DEPTH = 64; // of objects and lists in each other; ours have 4
// NaN and infinity where they are no part of a string: transformers writes them.
const NOT_JSON = /("(?:[^"\\]|\\.)*")|-?Infinity|NaN/g;

/**
 * @param {Uint8Array} bytes
 * @param {{ finite?: boolean, limit?: number }} [options] finite: refuse NaN and infinity; or else they are null
 * @throws {Error} it is not UTF-8 or not JSON, too large or nested too deeply
 */
export function parseJson(bytes, { finite = true, limit = MAX_JSON_BYTES } = {}) {
  const text = decodeText(bytes, limit);
  const value = JSON.parse(finite ? text : text.replace(NOT_JSON, (match, string) => string ?? "null"));
  checkDepth(value, MAX_DEPTH);
  return value;
}

/** UTF-8, without a byte-order mark. */
export function decodeText(bytes, limit = MAX_JSON_BYTES) {
  if (bytes.length > limit) throw new Error(`it is larger than ${limit} bytes`);
  return new TextDecoder("utf-8", { fatal: true }).decode(bytes);
}

export const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);

function checkDepth(value, room) {
  if (typeof value === "number" && !Number.isFinite(value)) throw new Error("a number is too large");
  if (typeof value !== "object" || value === null) return;
  if (room === 0) throw new Error(`its objects and lists are nested deeper than ${MAX_DEPTH}`);
  for (const part of Object.values(value)) checkDepth(part, room - 1);
}
