// Reads and validates `deltamem_onnx.json`, the manifest of a model folder, as in deltamem_tool/onnx/manifest.py.

import { ExportError, firstLine } from "./errors.js";
import { isObject, parseJson } from "./json.js";

export const MANIFEST_FILE = "deltamem_onnx.json";
export const PAST = "past_key_values"; // prefix of the inputs that carry tensors from call to call
const FORMAT = "deltamem-onnx";
const READABLE_VERSIONS = [3, 4];

const MAX_VOCABULARY = 2 ** 22;
const MAX_SIZE = 2 ** 16; // heads and width of keys and values, and sizes of the base's own states
const MAX_LENGTH = 2 ** 24; // tokens
const MAX_LAYERS = 10_000;
const MAX_STATE_HEADS = 256;
const MAX_RANK = 64;
const MAX_SEGMENT = 4 * MAX_STATE_HEADS * MAX_RANK + 1;
const MAX_CONVOLUTIONS = 8;
const MAX_RECURRENT_AXES = 3;
const GRANULARITIES = ["token", "message", "sentence"];
const DTYPES = ["float32", "float16"]; // of keys and values, among those that ONNX Runtime Web supports

/**
 * @typedef {object} Layer
 * @property {number[] | null} key heads and width of its keys
 * @property {number[] | null} value heads and width of its values
 * @property {number[] | null} state [H, R, R] of its memory
 * @property {number[][]} convolutions sizes of the base's own convolution states
 * @property {number[] | null} recurrent size of the base's own recurrent state
 *
 * @typedef {object} Mechanism the options on which the write of an open segment depends
 * @property {"token" | "message" | "sentence"} granularity
 * @property {"standard" | "lambda_outside" | "no_lambda"} updateRule
 * @property {boolean} coupleLambda
 * @property {"row" | "head"} gates
 *
 * @typedef {object} Manifest
 * @property {string} adapter fingerprint of the adapter; memories of other adapters are rejected
 * @property {string | null} baseModel
 * @property {string} quantize
 * @property {Mechanism} mechanism
 * @property {number} vocabSize
 * @property {"float32" | "float16"} dtype of keys and values
 * @property {number} segment number of values that a layer keeps of an open segment; 0 if every token writes
 * @property {number | null} positions maximum number of tokens; null if the model has no limit
 * @property {Layer[]} layers
 */

/**
 * Read and validate a manifest.
 *
 * @param {Uint8Array} bytes content of the file
 * @returns {Manifest}
 * @throws {ExportError} the file is not a valid manifest, or is that of a graph that this library cannot run
 */
export function readManifest(bytes) {
  let content;
  try {
    content = parseJson(bytes);
  } catch (error) {
    throw disagreementError(`It is not valid JSON: ${firstLine(error)}`);
  }
  if (!isObject(content) || content.format !== FORMAT) throw disagreementError(`It does not say that its format is ${FORMAT}`);
  if (!READABLE_VERSIONS.includes(content.format_version)) {
    throw new ExportError(
      `This model folder is of format ${JSON.stringify(content.format_version)}.`,
      `This version of deltamem-web reads format ${READABLE_VERSIONS.at(-1)}.`,
      "Update deltamem-web, or export the adapter again.",
    );
  }
  const graph = content.interface;
  requireValid(isObject(graph), "interface");
  requireValid(Array.isArray(graph.layers) && graph.layers.length > 0 && graph.layers.length <= MAX_LAYERS, "interface.layers");
  const manifest = {
    adapter: readText(content, "adapter"),
    baseModel: content.base_model == null ? null : readText(content, "base_model"),
    quantize: readText(content, "quantize"),
    mechanism: readMechanism(content.mechanism),
    vocabSize: readCount(graph.vocab_size, MAX_VOCABULARY, "interface.vocab_size"),
    dtype: graph.dtype,
    segment: graph.segment === 0 ? 0 : readCount(graph.segment, MAX_SEGMENT, "interface.segment"),
    positions: graph.positions ? readCount(graph.positions, MAX_LENGTH, "interface.positions") : null,
    layers: graph.layers.map(readLayer),
  };
  requireValid(DTYPES.includes(manifest.dtype), "interface.dtype");
  const shapes = manifest.layers.flatMap(({ state }) => (state === null ? [] : [String(state)]));
  requireValid(shapes.length > 0 && new Set(shapes).size === 1, "layers.state");
  requireValid((manifest.mechanism.granularity === "token") === (manifest.segment === 0), "interface.segment");
  checkRunnable(graph);
  return manifest;
}

function checkRunnable(graph) {
  for (const [unfit, what] of [
    [graph.genai, "onnxruntime-genai"],
    [graph.max_length, "keys and values of a fixed length"],
    [graph.logits !== "last", "logits of every position"],
  ]) {
    if (unfit) throw new ExportError(`This model folder is for ${what}.`, "", "Export the adapter with --target web.");
  }
}

function readMechanism(content) {
  requireValid(isObject(content), "mechanism");
  requireValid(GRANULARITIES.includes(content.granularity), "mechanism.granularity");
  requireValid(["standard", "lambda_outside", "no_lambda"].includes(content.update_rule), "mechanism.update_rule");
  requireValid(typeof content.couple_lambda === "boolean", "mechanism.couple_lambda");
  requireValid(["row", "head"].includes(content.gates), "mechanism.gates");
  const { granularity, update_rule: updateRule, couple_lambda: coupleLambda, gates } = content;
  return { granularity, updateRule, coupleLambda, gates };
}

function readLayer(content) {
  requireValid(isObject(content), "layers");
  const { convolutions = [], recurrent = null } = content;
  const layer = {
    key: readSizes(content.key, [MAX_SIZE, MAX_SIZE], "layers.key"),
    value: readSizes(content.value, [MAX_SIZE, MAX_SIZE], "layers.value"),
    state: readSizes(content.state, [MAX_STATE_HEADS, MAX_RANK, MAX_RANK], "layers.state"),
  };
  requireValid((layer.key === null) === (layer.value === null), "layers.value");
  requireValid(layer.state === null || layer.state[1] === layer.state[2], "layers.state");
  requireValid(Array.isArray(convolutions) && convolutions.length <= MAX_CONVOLUTIONS, "layers.convolutions");
  layer.convolutions = convolutions.map((shape) => readSizes(shape ?? [], [MAX_SIZE, MAX_SIZE], "layers.convolutions"));
  requireValid(recurrent === null || (recurrent.length > 0 && recurrent.length <= MAX_RECURRENT_AXES), "layers.recurrent");
  layer.recurrent = readSizes(recurrent, Array(recurrent?.length ?? 0).fill(MAX_SIZE), "layers.recurrent");
  return layer;
}

/**
 * Return the tensors that are carried from call to call, by the name of the input.
 *
 * @param {Manifest} manifest
 * @returns {Map<string, { kind: "cache" | "base" | "state" | "segment", layer: number, sizes: number[], type: string }>}
 *   sizes: those of one conversation; the second one of a cache, its number of tokens, is 0
 */
export function carriedTensors({ layers, segment, dtype }) {
  const tensors = new Map();
  layers.forEach((layer, index) => {
    const add = (part, kind, sizes, type = "float32") =>
      tensors.set(`${PAST}.${index}.${part}`, { kind, layer: index, sizes, type });
    for (const part of ["key", "value"]) {
      if (layer[part] !== null) add(part, "cache", [layer[part][0], 0, layer[part][1]], dtype);
    }
    layer.convolutions.forEach((sizes, number) => add(number ? `conv_state_${number}` : "conv_state", "base", sizes));
    if (layer.recurrent !== null) add(layer.state === null ? "recurrent_state" : "ssm_state", "base", layer.recurrent);
    if (layer.state !== null) {
      add("recurrent_state", "state", layer.state);
      if (segment) add("segment", "segment", [segment]);
    }
  });
  return tensors;
}

function readSizes(content, most, name) {
  if (content === null || content === undefined) return null;
  requireValid(Array.isArray(content) && content.length === most.length, name);
  return content.map((size, axis) => readCount(size, most[axis], name));
}

function readCount(value, most, name) {
  requireValid(Number.isInteger(value) && value > 0 && value <= most, name);
  return value;
}

function readText(content, name) {
  requireValid(typeof content[name] === "string" && content[name] !== "", name);
  return content[name];
}

function requireValid(isValid, name) {
  if (!isValid) throw disagreementError(`Its value for ${name} is not valid`);
}

/** Return the error for a manifest that does not match the graph or this version. */
export function disagreementError(why) {
  return new ExportError(
    `${MANIFEST_FILE} does not match the graph or this version of deltamem.`,
    `${why}.`,
    "Export the model again.",
  );
}
