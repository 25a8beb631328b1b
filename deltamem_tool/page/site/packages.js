// Replaces the library's packages.js: the same packages, from files of the page.

export const jinja = () => import("../runtime/jinja.js");
export const tokenizers = () => import("../runtime/tokenizers.min.mjs");
export const sentencex = () => import("../runtime/sentencex_wasm.js");

export const runtimes = {
  wasm: () => import("../runtime/ort.wasm.bundle.min.mjs"),
  webgpu: () => import("../runtime/ort.webgpu.bundle.min.mjs"),
};
