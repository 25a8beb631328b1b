// Replaces packages.js if the packages come from a CDN, and only runs the files that were tested. An import map could check
// them too, but does not apply to workers. The files are cached like the model, for offline visits.

import { FetchError } from "./errors.js";
import { fetchedFrom } from "./folder.js";

const FILES = {}; // filled in by `deltamem page`: address, size and SHA-256 by name
const MAX_BYTES = 2 ** 24;
const read = fetchedFrom(import.meta.url, { cache: "deltamem-model", expected: FILES });

async function importModule(name) {
  const content = await read(name, MAX_BYTES);
  if (content === null) throw new FetchError(`${name} cannot be fetched.`, "The CDN does not have it.", "Try again later.");
  const address = URL.createObjectURL(new Blob([content], { type: "text/javascript" }));
  return import(address).finally(() => URL.revokeObjectURL(address));
}

export const jinja = () => importModule("jinja.js");
export const tokenizers = () => importModule("tokenizers.min.mjs");
export const sentencex = () => importModule("sentencex_wasm.js");

export const runtimes = {
  wasm: () => importModule("ort.wasm.bundle.min.mjs"),
  webgpu: () => importModule("ort.webgpu.bundle.min.mjs"),
};
