// The memory file: the states of all layers as safetensors, bound to the adapter that wrote them. See
// deltamem_tool/memory/file.py.

import { MemoryStateError, firstLine } from "./errors.js";
import { isObject, parseJson } from "./json.js";
import { VERSION } from "./version.js";

const FORMAT = "deltamem-memory";
const FORMAT_VERSION = "1";
const MAX_HEADER_BYTES = 4 * 2 ** 20;
const MAX_FILE_BYTES = 2 ** 30;
const LENGTH_BYTES = 8; // of the length of the header, with which the file begins
const FLOAT_BYTES = 4;
const TENSOR = /^layers\.(0|[1-9][0-9]{0,5})\.(state|segment)$/;
const L2_EPS = 1e-6; // of a key's normalisation, as in deltamem_tool/config.py
const USE_ANOTHER = "Use the adapter that wrote it, or start from an empty memory.";

/**
 * @typedef {object} MemoryShape
 * @property {number[]} layers indices, ascending
 * @property {number} heads H, state heads
 * @property {number} rank R, rows and columns of a state
 * @property {number} width W, the number of values that a layer keeps of an open segment; 0 if every token writes
 *
 * @typedef {object} Memory
 * @property {string} adapter fingerprint of the adapter that wrote it
 * @property {number} rows number of conversations
 * @property {MemoryShape} shape
 * @property {Map<number, Float32Array>} states [rows, H, R, R] by layer
 * @property {Map<number, Float32Array>} segments [rows, W] by layer; empty if every token writes
 */

/**
 * An empty memory of one conversation: all zeros.
 *
 * @param {MemoryShape} shape
 * @param {string} adapter
 * @returns {Memory}
 */
export function emptyMemory(shape, adapter) {
  const zeros = (size) => new Map(size ? shape.layers.map((layer) => [layer, new Float32Array(size)]) : []);
  return { adapter, rows: 1, shape, states: zeros(shape.heads * shape.rank ** 2), segments: zeros(shape.width) };
}

/**
 * Read a memory from the bytes of a memory file.
 *
 * @param {ArrayBuffer | Uint8Array} file
 * @param {string} [name] name of the file in errors
 * @returns {Memory}
 * @throws {MemoryStateError} the file is damaged, has a newer format, is not a memory file, or contains NaN
 */
export function readMemory(file, name = "This file") {
  const bytes = file instanceof Uint8Array ? file : new Uint8Array(file);
  const { tensors, metadata, begin } = readHeader(bytes, name);
  if (metadata.format !== FORMAT) throw notMemoryFileError(name, "Its metadata does not say that it is");
  if (metadata.format_version !== FORMAT_VERSION) {
    const why = `This version of deltamem-web reads format ${FORMAT_VERSION}.`;
    throw new MemoryStateError(`${name} is of memory format ${metadata.format_version}.`, why, "Update deltamem-web.");
  }
  const parts = { state: new Map(), segment: new Map() };
  const shapes = { state: new Map(), segment: new Map() };
  for (const [tensor, { dtype, shape, from, to }] of tensors) {
    const match = TENSOR.exec(tensor);
    if (match === null || shape.length !== (match[2] === "state" ? 4 : 2) || dtype !== "F32") {
      throw damagedError(name, `Its tensor ${JSON.stringify(tensor)} is not a float32 state`);
    }
    const values = new Float32Array(bytes.slice(begin + from, begin + to).buffer);
    if (!values.every(Number.isFinite)) {
      throw damagedError(name, `The state ${JSON.stringify(tensor)} contains NaN or infinity`);
    }
    parts[match[2]].set(Number(match[1]), values);
    shapes[match[2]].set(Number(match[1]), shape);
  }
  if (!parts.state.size || typeof metadata.adapter !== "string") {
    throw damagedError(name, "It contains no states or no fingerprint");
  }
  const [[rows, heads, rank]] = shapes.state.values();
  const [, width] = shapes.segment.values().next().value ?? [rows, 0];
  const haveShape = (part, expected) => [...shapes[part].values()].every((shape) => String(shape) === String(expected));
  if (!haveShape("state", [rows, heads, rank, rank])) throw damagedError(name, "Its states are not square, or differ in size");
  const [layers, segmentLayers] = [parts.state, parts.segment].map((part) => [...part.keys()].sort((a, b) => a - b));
  const isComplete = segmentLayers.length === 0 || String(segmentLayers) === String(layers);
  if (!haveShape("segment", [rows, width]) || !isComplete) {
    throw damagedError(name, "Its layers disagree on their open segments");
  }
  const states = new Map(layers.map((layer) => [layer, parts.state.get(layer)]));
  const segments = new Map(segmentLayers.map((layer) => [layer, parts.segment.get(layer)]));
  return { adapter: metadata.adapter, rows, shape: { layers, heads, rank, width }, states, segments };
}

/**
 * Return a memory as the bytes of a memory file. The same states give the same bytes as in Python.
 *
 * @param {Memory} memory
 * @returns {Uint8Array}
 * @throws {MemoryStateError} the memory contains NaN or infinity, so that the file could not be read again
 */
export function memoryBytes({ adapter, rows, shape: { heads, rank, width }, states, segments }) {
  const tensors = [
    ...[...states].map(([layer, values]) => [`layers.${layer}.state`, [rows, heads, rank, rank], values]),
    ...[...segments].map(([layer, values]) => [`layers.${layer}.segment`, [rows, width], values]),
  ].sort(([a], [b]) => (a < b ? -1 : 1));
  const metadata = { adapter, deltamem_version: VERSION, format: FORMAT, format_version: FORMAT_VERSION };
  const header = { __metadata__: metadata };
  let end = 0;
  for (const [name, shape, values] of tensors) {
    if (!values.every(Number.isFinite)) {
      throw new MemoryStateError(
        `The memory contains NaN or infinity: ${name}.`,
        "It was not saved.",
        "Start from an earlier one.",
      );
    }
    header[name] = { dtype: "F32", shape, data_offsets: [end, (end += values.byteLength)] };
  }
  const text = new TextEncoder().encode(JSON.stringify(header));
  const begin = LENGTH_BYTES + Math.ceil(text.length / LENGTH_BYTES) * LENGTH_BYTES;
  const bytes = new Uint8Array(begin + end).fill(0x20, LENGTH_BYTES, begin);
  new DataView(bytes.buffer).setBigUint64(0, BigInt(begin - LENGTH_BYTES), true);
  bytes.set(text, LENGTH_BYTES);
  for (const [name, , values] of tensors) {
    bytes.set(new Uint8Array(values.buffer, values.byteOffset, values.byteLength), begin + header[name].data_offsets[0]);
  }
  return bytes;
}

// Reads the header of a safetensors file, whose tensors must follow each other without gaps up to the end of the file.
function readHeader(bytes, name) {
  const unreadableError = (why) => notMemoryFileError(name, `It cannot be read: ${why}`);
  if (bytes.length > MAX_FILE_BYTES) throw unreadableError(`it is larger than ${MAX_FILE_BYTES} bytes`);
  if (bytes.length < LENGTH_BYTES) throw unreadableError("it is truncated");
  const length = Number(new DataView(bytes.buffer, bytes.byteOffset).getBigUint64(0, true));
  const begin = LENGTH_BYTES + length;
  if (length > MAX_HEADER_BYTES || begin > bytes.length) {
    throw unreadableError("its header is too large, or the file is truncated");
  }
  let header;
  try {
    header = parseJson(bytes.subarray(LENGTH_BYTES, begin));
  } catch (error) {
    throw unreadableError(firstLine(error));
  }
  if (!isObject(header)) throw unreadableError("its header is not an object");
  const { __metadata__: metadata = {}, ...entries } = header;
  const isText = (value) => typeof value === "string";
  if (!isObject(metadata) || !Object.values(metadata).every(isText)) throw unreadableError("its metadata is not text");
  const tensors = Object.entries(entries).map(([tensor, entry]) => {
    const { dtype, shape, data_offsets: [from, to] = [] } = isObject(entry) ? entry : {};
    const isShape = Array.isArray(shape) && shape.every((size) => Number.isSafeInteger(size) && size >= 0);
    if (!isShape || ![from, to].every(Number.isSafeInteger)) throw unreadableError("its header is damaged");
    return [tensor, { dtype, shape, from, to }];
  });
  let end = 0;
  for (const [, { shape, from, to }] of tensors.toSorted(([, a], [, b]) => a.from - b.from)) {
    const size = shape.reduce((product, size) => product * size, FLOAT_BYTES);
    if (from !== end || to !== from + size) throw unreadableError("its header does not match its tensors");
    end = to;
  }
  if (begin + end !== bytes.length) throw unreadableError("the file is truncated, or longer than its header says");
  return { tensors, metadata, begin };
}

/**
 * Check that a memory belongs to an adapter and holds one conversation.
 *
 * @param {Memory} memory
 * @param {MemoryShape} shape shape of the adapter's memories
 * @param {string} adapter fingerprint of the adapter
 * @throws {MemoryStateError} the memory belongs to another adapter, does not fit, or holds several conversations
 */
export function checkMemory(memory, shape, adapter) {
  const difference = ["layers", "heads", "rank", "width"].find((part) => String(memory.shape[part]) !== String(shape[part]));
  if (difference !== undefined) {
    const why = `Its ${difference}: ${memory.shape[difference]}; the adapter's: ${shape[difference]}.`;
    throw new MemoryStateError("This memory does not fit the adapter.", why, USE_ANOTHER);
  }
  if (memory.adapter !== adapter) {
    const why = `It was written by the adapter ${memory.adapter.slice(0, 16)}…, this is ${adapter.slice(0, 16)}….`;
    throw new MemoryStateError("This memory belongs to another adapter.", why, USE_ANOTHER);
  }
  if (memory.rows !== 1) {
    const why = `This one holds ${memory.rows}.`;
    throw new MemoryStateError("A memory to start from must hold one conversation.", why, "Use a file with a single one.");
  }
}

/**
 * Return the memory after its open segments are written, as deltamem_tool/ops/numpy_write.py does. A segment without
 * tokens writes nothing.
 *
 * @param {Memory} memory the memory of one conversation
 * @param {import("./manifest.js").Mechanism} mechanism
 * @returns {Memory}
 */
export function endSegment(memory, mechanism) {
  const states = new Map(memory.states);
  for (const [layer, segment] of memory.segments) {
    states.set(layer, writeSegment(memory.shape, mechanism, states.get(layer), segment));
  }
  return { ...memory, states, segments: emptyMemory(memory.shape, memory.adapter).segments };
}

// Returns the state [H, R, R] after the write of an open segment [W]: S ← keep S − erase (S k) kᵀ + write v kᵀ, with the
// means over the segment's tokens. A segment holds the sums of keys [H, R], values [H, R] and gates, and its number of
// tokens. Gates act on rows.
function writeSegment({ heads, rank }, { updateRule, coupleLambda, gates }, state, segment) {
  const tokens = segment.at(-1);
  if (tokens === 0) return state;
  const newState = new Float32Array(state.length);
  const gateWidth = gates === "row" ? heads * rank : heads;
  const [keys, values, betas] = [0, heads * rank, 2 * heads * rank];
  const mean = (index) => segment[index] / tokens;
  for (let head = 0; head < heads; head++) {
    const k = Float64Array.from({ length: rank }, (_, j) => Math.tanh(mean(keys + head * rank + j)));
    const norm = Math.max(Math.hypot(...k), L2_EPS);
    for (let j = 0; j < rank; j++) k[j] /= norm;
    for (let i = 0; i < rank; i++) {
      const gate = gates === "row" ? head * rank + i : head;
      const write = sigmoid(mean(betas + gate));
      const decayed = sigmoid(coupleLambda ? -mean(betas + gate) : mean(betas + gateWidth + gate)); // λ
      const keep = updateRule === "no_lambda" ? 1 : decayed;
      const erase = updateRule === "lambda_outside" ? write * decayed : write;
      const row = (head * rank + i) * rank;
      const reading = k.reduce((sum, entry, j) => sum + state[row + j] * entry, 0);
      const change = write * mean(values + head * rank + i) - erase * reading;
      for (let j = 0; j < rank; j++) newState[row + j] = keep * state[row + j] + change * k[j];
    }
  }
  return newState;
}

const sigmoid = (x) => 0.5 * (1 + Math.tanh(0.5 * x)); // avoids exp(−x), which overflows

const notMemoryFileError = (name, why) => new MemoryStateError(`${name} is not a memory file.`, `${why}.`, "Use another file.");
const damagedError = (name, why) => new MemoryStateError(`${name} is damaged.`, `${why}.`, "Use another file.");
