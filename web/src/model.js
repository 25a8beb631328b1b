// Runs a model folder in ONNX Runtime Web. Pass the model to `Conversation`; one model serves many conversations.

import { DataError, ExportError, firstLine } from "./errors.js";
import { DATA_FILE, readFolder } from "./folder.js";
import { carriedTensors, disagreementError, MANIFEST_FILE, PAST, readManifest } from "./manifest.js";
import { emptyMemory } from "./memory.js";
import { runtimes } from "./packages.js";
import { sentenceSplitter } from "./sentences.js";
import { ChatText, readJson } from "./text.js";

const LOGITS = "logits";
const PRESENT = "present"; // prefix of the outputs that the next call takes as inputs

/** @typedef {Record<string, import("onnxruntime-common").Tensor>} Past KV cache and memory by input name; it is never changed */

/** A model folder in ONNX Runtime Web. Create it with `WebModel.load`. */
export class WebModel {
  /**
   * Load a model folder.
   *
   * @param {import("./folder.js").ReadFile} read returns the folder's files by name
   * @param {object} [options]
   * @param {"wasm" | "webgpu"} [options.provider] execution provider; see `bestProvider`
   * @param {string} [options.graph] file name of the graph; model.onnx by default
   * @param {Uint8Array} [options.runtime] the .wasm file of the provider's build; by default ONNX Runtime fetches it from
   *   its own folder
   * @param {Uint8Array} [options.sentences] sentencex_wasm_bg.wasm, fetched from its package by default; used only if the
   *   adapter writes by sentence
   * @returns {Promise<WebModel>}
   * @throws {ExportError} a file is missing or damaged, the files do not match, or ONNX Runtime cannot load the graph
   * @throws {FetchError} `read` of `fetchedFrom` cannot fetch a file
   */
  static async load(read, { provider = "wasm", graph: graphFile, runtime, sentences } = {}) {
    const { graph, weights, ...files } = await readFolder(read, graphFile);
    const manifest = readManifest(files[MANIFEST_FILE]);
    const text = await ChatText.load(files);
    const stopTokens = text.stopTokens(readJson(files, "generation_config.json").eos_token_id);
    const ort = await runtimes[provider]();
    ort.env.wasm.numThreads = 1;
    if (runtime !== undefined) ort.env.wasm.wasmBinary = runtime;
    let session;
    try {
      session = await ort.InferenceSession.create(graph, {
        executionProviders: [provider],
        externalData: [{ path: DATA_FILE, data: weights }],
        logSeverityLevel: 3,
        extra: { session: { disable_quant_qdq: "1" } }, // quantised weights become float32 once, not in every call
        preferredOutputLocation: provider === "webgpu" ? outputLocations(manifest) : "cpu",
      });
    } catch (error) {
      throw new ExportError(
        `ONNX Runtime cannot load this model on ${provider}.`,
        `${firstLine(error)}.`,
        "Fetch the folder again, or export the adapter again.",
      );
    }
    checkGraph(session.inputMetadata, manifest);
    const split = manifest.mechanism.granularity === "sentence" ? await sentenceSplitter(sentences) : null;
    return new WebModel(ort, session, manifest, text, stopTokens, provider, split);
  }

  constructor(ort, session, manifest, text, stopTokens, provider, split) {
    Object.assign(this, { text, stopTokens, provider, split });
    this._ort = ort;
    this._session = session;
    this._carried = carriedTensors(manifest);
    this._vocabSize = manifest.vocabSize;
    this.adapter = manifest.adapter;
    this.baseModel = manifest.baseModel;
    this.quantize = manifest.quantize;
    this.mechanism = manifest.mechanism;
    this.maxLength = manifest.positions;
    const layers = manifest.layers.flatMap(({ state }, layer) => (state === null ? [] : [layer]));
    const [heads, rank] = manifest.layers[layers[0]].state;
    /** @type {import("./memory.js").MemoryShape} */
    this.memoryShape = { layers, heads, rank, width: manifest.segment };
    /** Whether a past can be truncated. A hybrid's cannot: its layers keep more than keys and values. */
    this.takesBack = [...this._carried.values()].every(({ kind }) => kind !== "base");
    /** Token ids that may be generated. */
    this.ids = new Set([...text.ids, ...stopTokens]);
  }

  /** Release the model's resources. */
  async close() {
    await this._session.release();
  }

  /** Return a memory of zeros for one conversation. */
  emptyMemory() {
    return emptyMemory(this.memoryShape, this.adapter);
  }

  /**
   * Return a past without tokens that holds the given memory.
   *
   * @param {import("./memory.js").Memory} memory
   * @returns {Past}
   */
  start(memory) {
    const past = {};
    for (const [name, { sizes, type }] of this._carried) {
      const size = sizes.reduce((product, length) => product * length, 1);
      past[name] = this._tensor(type, type === "float16" ? new Uint16Array(size) : new Float32Array(size), [1, ...sizes]);
    }
    return this.withMemory(past, memory);
  }

  /**
   * Return the past with the same tokens and another memory.
   *
   * @param {Past} past
   * @param {import("./memory.js").Memory} memory
   * @returns {Past}
   */
  withMemory(past, memory) {
    const newPast = { ...past };
    for (const [name, { kind, layer, sizes }] of this._carried) {
      const values = { state: memory.states, segment: memory.segments }[kind]?.get(layer);
      if (values !== undefined) newPast[name] = this._tensor("float32", Float32Array.from(values), [1, ...sizes]);
    }
    return newPast;
  }

  /**
   * Feed tokens.
   *
   * @param {Past} past the past, which holds `length` tokens
   * @param {number} length
   * @param {import("./generation.js").Token[]} tokens
   * @returns {Promise<{ logits: Float32Array, past: Past }>} the logits [V] after the last token, and the new past
   * @throws {DataError} a token id is outside the model's vocabulary
   */
  async step(past, length, tokens) {
    const unknownToken = tokens.find(({ id }) => id >= this._vocabSize);
    if (unknownToken) throw new DataError(`The model has no token ${unknownToken.id}.`, "", "Use the tokenizer of this model.");
    const boolTensor = (key) => this._tensor("bool", Uint8Array.from(tokens, (token) => token[key]), [1, tokens.length]);
    const totalLength = length + tokens.length;
    const { [LOGITS]: logits, ...present } = await this._session.run({
      input_ids: this._tensor("int64", BigInt64Array.from(tokens, ({ id }) => BigInt(id)), [1, tokens.length]),
      attention_mask: this._tensor("int64", new BigInt64Array(totalLength).fill(1n), [1, totalLength]),
      write_mask: boolTensor("writes"),
      ...(this.memoryShape.width ? { segment_end: boolTensor("ends") } : {}),
      ...past,
    });
    const pastEntries = Object.entries(present).map(([name, tensor]) => [name.replace(PRESENT, PAST), tensor]);
    return { logits: await logits.getData(true), past: Object.fromEntries(pastEntries) };
  }

  /**
   * Return a copy of the memory: states and open segments.
   *
   * @param {Past} past
   * @returns {Promise<import("./memory.js").Memory>}
   */
  async memory(past) {
    const memory = this.emptyMemory();
    for (const [name, { kind, layer }] of this._carried) {
      const arrays = { state: memory.states, segment: memory.segments }[kind];
      arrays?.set(layer, Float32Array.from(await past[name].getData()));
    }
    return memory;
  }

  /**
   * Return `past` truncated to its first `length` tokens. Its memory stays as it is. `takesBack` must be true.
   *
   * @param {Past} past
   * @param {number} length
   * @returns {Promise<Past>}
   */
  async take(past, length) {
    const shorter = { ...past };
    for (const [name, { kind, type }] of this._carried) {
      if (kind !== "cache") continue;
      const [, heads, columns, width] = past[name].dims;
      const values = await past[name].getData();
      const prefix = new values.constructor(heads * length * width);
      for (let head = 0; head < heads; head++) {
        const start = head * columns * width;
        prefix.set(values.subarray(start, start + length * width), head * length * width);
      }
      shorter[name] = this._tensor(type, prefix, [1, heads, length, width]);
    }
    return shorter;
  }

  /**
   * Release the GPU memory of `pasts`, except for tensors that `kept` has too.
   *
   * @param {Past[]} pasts
   * @param {Past[]} [kept]
   */
  release(pasts, kept = []) {
    const tensors = new Set(pasts.flatMap(Object.values));
    for (const tensor of kept.flatMap(Object.values)) tensors.delete(tensor);
    for (const tensor of tensors) tensor.dispose();
  }

  _tensor(type, values, dims) {
    return new this._ort.Tensor(type, values, dims);
  }
}

/**
 * Return "webgpu" if the browser has a GPU for it, else "wasm".
 *
 * @returns {Promise<"wasm" | "webgpu">}
 */
export async function bestProvider() {
  const adapter = await globalThis.navigator?.gpu?.requestAdapter().catch(() => null);
  return adapter && !adapter.info?.isFallbackAdapter ? "webgpu" : "wasm";
}

// Tensors that are passed from call to call stay on the GPU.
function outputLocations(manifest) {
  const names = [...carriedTensors(manifest).keys()].map((name) => name.replace(PAST, PRESENT));
  return { [LOGITS]: "cpu", ...Object.fromEntries(names.map((name) => [name, "gpu-buffer"])) };
}

// Checks that the graph has exactly the inputs that the manifest describes.
function checkGraph(inputs, manifest) {
  const carried = carriedTensors(manifest);
  const expected = new Map([
    ["input_ids", "int64"],
    ["attention_mask", "int64"],
    ["write_mask", "bool"],
    ...(manifest.segment ? [["segment_end", "bool"]] : []),
    ...[...carried].map(([name, { type }]) => [name, type]),
  ]);
  for (const { name, type, shape } of inputs) {
    if (expected.get(name) !== type) throw disagreementError(`The graph has an input ${name} of type ${type}`);
    const { sizes } = carried.get(name) ?? {};
    if (sizes && !sizes.every((size, axis) => size === 0 || size === shape[axis + 1])) {
      throw disagreementError(`The graph's input ${name} is [${shape}]`);
    }
    expected.delete(name);
  }
  if (expected.size) throw disagreementError(`The graph has no input ${[...expected.keys()][0]}`);
}
