// Whitespace and Unicode as Python defines them.

import { DataError } from "./errors.js";

const SPACES = "\\t-\\r\\x1c-\\x20\\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000";
const LEADING = new RegExp(`^[${SPACES}]+`);
const TRAILING = new RegExp(`[${SPACES}]+$`);

export const trimStart = (text) => text.replace(LEADING, "");
export const trim = (text) => trimStart(text).replace(TRAILING, "");
export const isBlank = (text) => trimStart(text) === "";

/**
 * Check that `text` is Unicode. The error calls it `name`.
 *
 * @throws {DataError} `text` contains half of a surrogate pair
 */
export function checkUnicode(text, name) {
  if (!text.isWellFormed()) {
    throw new DataError(`${name} is not Unicode text.`, "It contains half of a surrogate pair.", "Correct the text.");
  }
}
