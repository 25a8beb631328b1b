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
const UNPACKED = "model.wasm.onnx"; // a graph that is faster in WebAssembly; present if the model is quantised
const CACHE = "deltamem-model";

let model;
const conversations = new Map(); // by the memory's name
let stop = new AbortController();

const calls = {
  // `wanted` is the provider named in the page's address, or null.
  async load({ base, expected, wanted }, report) {
    const hasBoth = RUNTIMES.webgpu in expected.runtime;
    const provider = wanted in RUNTIMES ? wanted : hasBoth ? await bestProvider() : "wasm";
    try {
      model = await load(base, expected, provider, report);
    } catch (error) {
      if (provider === (wanted ?? "wasm") || !(error instanceof DeltaMemError)) throw error;
      model = await load(base, expected, "wasm", report); // the model does not fit on the GPU
    }
    const { adapter, baseModel, quantize } = model;
    return { adapter, baseModel, quantize, provider: model.provider };
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

  async say({ name, content }, report) {
    stop = new AbortController();
    const conversation = conversations.get(name);
    const answer = await conversation.generate(content, {}, { onText: (piece) => report({ piece }), signal: stop.signal });
    return { answer, context: conversation.context, bytes: await conversation.memoryBytes() };
  },

  async stop() {
    stop.abort();
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

async function load(base, expected, provider, report) {
  const file = RUNTIMES[provider];
  const options = { cache: CACHE, onProgress: report };
  const read = fetchedFrom(new URL("runtime/", base), { ...options, expected: expected.runtime });
  const runtime = await read(file, MAX_RUNTIME_BYTES);
  const sentences = SENTENCES in expected.runtime ? await read(SENTENCES, MAX_RUNTIME_BYTES) : undefined;
  const graph = provider === "wasm" && UNPACKED in expected.model ? UNPACKED : undefined;
  const files = fetchedFrom(new URL("model/", base), { ...options, expected: expected.model });
  return WebModel.load(files, { provider, runtime, graph, sentences });
}

onmessage = async ({ data: { id, call, argument } }) => {
  const report = (progress) => postMessage({ id, progress });
  try {
    postMessage({ id, result: await calls[call](argument, report) });
  } catch (error) {
    const { name, message, what = null, why, next } = error;
    postMessage({ id, error: { name, message, what, why, next } });
  }
};
