// Splits text into sentences with the library that the Python package uses. It is only fetched for adapters that write by
// sentence.

import { sentencex } from "./packages.js";

/**
 * @typedef {(text: string) => string[]} Split returns the pieces of a text, in order
 */

/**
 * Return a function that splits English text into sentences.
 *
 * @param {Uint8Array} [binary] sentencex_wasm_bg.wasm; by default it is fetched from the package's folder
 * @returns {Promise<Split>}
 */
export async function sentenceSplitter(binary) {
  const { default: init, segment } = await sentencex();
  await init(binary === undefined ? undefined : { module_or_path: binary });
  return (text) => segment("en", text);
}
