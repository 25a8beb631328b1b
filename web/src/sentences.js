// Texts in sentences, by the library that Python's side splits with, too; it is fetched for adapters that write by sentence.

import { sentencex } from "./packages.js";

/**
 * @typedef {(text: string) => string[]} Split pieces of the text, in their order
 *
 * @param {Uint8Array} [binary] sentencex_wasm_bg.wasm, where it is not to be fetched from beside the package
 * @returns {Promise<Split>} for English
 */
export async function sentenceSplitter(binary) {
  const { default: start, segment } = await sentencex();
  await start(binary === undefined ? undefined : { module_or_path: binary });
  return (text) => segment("en", text);
}
