// In place of the library's own: the same packages, from the files beside it.

export const jinja = () => import("../runtime/jinja.js");
export const tokenizers = () => import("../runtime/tokenizers.min.mjs");
export const sentencex = () => import("../runtime/sentencex_wasm.js");

export const runtimes = {
  wasm: () => import("../runtime/ort.wasm.bundle.min.mjs"),
  webgpu: () => import("../runtime/ort.webgpu.bundle.min.mjs"),
};
