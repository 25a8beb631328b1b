// Runs the model in its own thread, since a call would block the page. engine.js is the other side.

import {
  bestProvider,
  checkMemory,
  Conversation,
  DeltaMemError,
  fetchedFrom,
  memoryBytes,
  readMemory,
  WebModel,
} from "./library/index.js";

const RUNTIMES = { wasm: "ort-wasm-simd-threaded.wasm", webgpu: "ort-wasm-simd-threaded.asyncify.wasm" };
const SENTENCES = "sentencex_wasm_bg.wasm"; // present if the adapter writes by sentence
const MAX_RUNTIME_BYTES = 2 ** 27;
const UNPACKED_GRAPH = "model.wasm.onnx"; // a graph that is faster in WebAssembly; present if the model is quantised
const CACHE = "deltamem-model";

let model;
const conversations = new Map(); // by the memory's name
let abortController = new AbortController();

// The calls of engine.js by name. `onProgress` reports what happens while a call runs.
const calls = {
  // Loads the model. `requestedProvider` is the provider named in the page's address, or null.
  async load({ base, expected, requestedProvider }, onProgress) {
    const hasBoth = RUNTIMES.webgpu in expected.runtime;
    const provider = requestedProvider in RUNTIMES ? requestedProvider : hasBoth ? await bestProvider() : "wasm";
    try {
      model = await loadModel(base, expected, provider, onProgress);
    } catch (error) {
      if (provider === (requestedProvider ?? "wasm") || !(error instanceof DeltaMemError)) throw error;
      model = await loadModel(base, expected, "wasm", onProgress); // the model does not fit on the GPU
    }
    return { adapter: model.adapter, baseModel: model.baseModel, provider: model.provider };
  },

  // Starts a conversation with the memory of a file, or with an empty one.
  async begin({ name, bytes }) {
    conversations.set(name, new Conversation(model, bytes ? { memory: readMemory(bytes) } : {}));
  },

  // Checks a file that the user chose, and returns the bytes to store.
  async check({ bytes }) {
    const memory = readMemory(bytes, "The file");
    checkMemory(memory, model.memoryShape, model.adapter);
    return memoryBytes(memory);
  },

  // Answers a message. Reports each piece of the answer, and returns the memory file after it.
  async say({ name, content }, onProgress) {
    abortController = new AbortController();
    const conversation = conversations.get(name);
    const { signal } = abortController;
    const answer = await conversation.generate(content, {}, { onText: (piece) => onProgress({ piece }), signal });
    return { answer, context: conversation.context, bytes: await conversation.memoryBytes() };
  },

  // Ends the answer of `say`.
  async stop() {
    abortController.abort();
  },

  // Continues from the memory of a file, or from an empty one. With `isUndo`, the last turn is undone first.
  async put({ name, bytes, isUndo }) {
    const conversation = conversations.get(name);
    const undone = isUndo && (await conversation.undo());
    const memory = bytes ? readMemory(bytes) : model.emptyMemory();
    const isSame = String(memoryBytes(memory)) === String(await conversation.memoryBytes());
    if (!isSame) await conversation.setMemory(memory);
    return { undone };
  },
};

async function loadModel(base, expected, provider, onProgress) {
  const options = { cache: CACHE, onProgress };
  const readRuntime = fetchedFrom(new URL("runtime/", base), { ...options, expected: expected.runtime });
  const runtime = await readRuntime(RUNTIMES[provider], MAX_RUNTIME_BYTES);
  const sentences = SENTENCES in expected.runtime ? await readRuntime(SENTENCES, MAX_RUNTIME_BYTES) : undefined;
  const graph = provider === "wasm" && UNPACKED_GRAPH in expected.model ? UNPACKED_GRAPH : undefined;
  const readModel = fetchedFrom(new URL("model/", base), { ...options, expected: expected.model });
  return WebModel.load(readModel, { provider, runtime, graph, sentences });
}

onmessage = async ({ data: { id, call, argument } }) => {
  const onProgress = (progress) => postMessage({ id, progress });
  try {
    postMessage({ id, result: await calls[call](argument, onProgress) });
  } catch (error) {
    const { name, message, what = null, why, next } = error;
    postMessage({ id, error: { name, message, what, why, next } });
  }
};
