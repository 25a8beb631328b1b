// The packages that the library needs. A page without a bundler replaces this file with its own.

export const jinja = () => import("@huggingface/jinja");
export const tokenizers = () => import("@huggingface/tokenizers");

/** Splits text into sentences. */
export const sentencex = () => import("sentencex-wasm");

/** The builds of ONNX Runtime, by provider. */
export const runtimes = {
  wasm: () => import("onnxruntime-web/wasm"),
  webgpu: () => import("onnxruntime-web/webgpu"),
};
