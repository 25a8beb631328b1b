// The model, in a thread of its own: a call of it would hold the page. What it is asked and says is in engine.js.

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
const SENTENCES = "sentencex_wasm_bg.wasm"; // there where the adapter writes by sentence
const MAX_RUNTIME_BYTES = 2 ** 27;
const UNPACKED = "model.wasm.onnx"; // the graph that is faster there, where the model is quantised
const CACHE = "deltamem-model";

let model;
const conversations = new Map(); // by the memory's name
let stop = new AbortController();

const calls = {
  // `wanted` is a provider that the address names, or null.
  async load({ base, expected, wanted }, report) {
    const hasBoth = RUNTIMES.webgpu in expected.runtime;
    const provider = wanted in RUNTIMES ? wanted : hasBoth ? await bestProvider() : "wasm";
    try {
      model = await load(base, expected, provider, report);
    } catch (error) {
      if (provider === (wanted ?? "wasm") || !(error instanceof DeltaMemError)) throw error;
      model = await load(base, expected, "wasm", report); // the GPU cannot hold it
    }
    const { adapter, baseModel, quantize } = model;
    return { adapter, baseModel, quantize, provider: model.provider };
  },

  // Begins a conversation with the memory of a file, or with none.
  async begin({ name, bytes }) {
    conversations.set(name, new Conversation(model, bytes ? { memory: readMemory(bytes) } : {}));
  },

  // What is to be stored of a file that somebody has chosen.
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

  // Goes on from the memory of a file, or from zeros; back to the turn before, if that is what it was then.
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
