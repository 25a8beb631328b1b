// The packages that the library needs. A page without a bundler has a file of its own in place of this one.

export { Template } from "@huggingface/jinja";
export { Tokenizer } from "@huggingface/tokenizers";

/** ONNX Runtime has a build for each provider. */
export const runtimes = {
  wasm: () => import("onnxruntime-web/wasm"),
  webgpu: () => import("onnxruntime-web/webgpu"),
};
