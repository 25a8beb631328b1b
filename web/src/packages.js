// The packages that the library needs. A page without a bundler has a file of its own in place of this one.

export const jinja = () => import("@huggingface/jinja");
export const tokenizers = () => import("@huggingface/tokenizers");

/** Splits texts into sentences. */
export const sentencex = () => import("sentencex-wasm");

/** ONNX Runtime has a build for each provider. */
export const runtimes = {
  wasm: () => import("onnxruntime-web/wasm"),
  webgpu: () => import("onnxruntime-web/webgpu"),
};
