// In place of the library's own: the same packages, from the files beside it.

export { Template } from "../runtime/jinja.js";
export { Tokenizer } from "../runtime/tokenizers.min.mjs";

export const runtimes = {
  wasm: () => import("../runtime/ort.wasm.bundle.min.mjs"),
  webgpu: () => import("../runtime/ort.webgpu.bundle.min.mjs"),
};
