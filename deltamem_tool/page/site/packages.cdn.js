// In place of packages.js where the packages come from a CDN: only the files that were tested are run. Import maps, which
// could say so too, do not reach a thread. The page keeps them as it keeps the model, for visits without a network.

import { FetchError } from "./errors.js";
import { fetchedFrom } from "./folder.js";

const FILES = {}; // written here when the page is made: address, size and SHA-256 by name
const MAX_BYTES = 2 ** 24;
const read = fetchedFrom(import.meta.url, { cache: "deltamem-model", expected: FILES });

async function moduleOf(name) {
  const content = await read(name, MAX_BYTES);
  if (content === null) throw new FetchError(`${name} cannot be fetched.`, "The CDN does not have it.", "Try again later.");
  const address = URL.createObjectURL(new Blob([content], { type: "text/javascript" }));
  return import(address).finally(() => URL.revokeObjectURL(address));
}

export const jinja = () => moduleOf("jinja.js");
export const tokenizers = () => moduleOf("tokenizers.min.mjs");
export const sentencex = () => moduleOf("sentencex_wasm.js");

export const runtimes = {
  wasm: () => moduleOf("ort.wasm.bundle.min.mjs"),
  webgpu: () => moduleOf("ort.webgpu.bundle.min.mjs"),
};
