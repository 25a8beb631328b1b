// The files of a model folder: fetched with progress, checked, and kept in the browser's Cache API.

import { ExportError, FetchError } from "./errors.js";
import { MANIFEST_FILE } from "./manifest.js";

const GRAPH_FILE = "model.onnx";
export const DATA_FILE = "model.onnx.data";
const REQUIRED = [MANIFEST_FILE, "tokenizer.json", "tokenizer_config.json", "generation_config.json"];
const OPTIONAL = ["chat_template.jinja"];
const MAX_GRAPH_BYTES = 256 * 2 ** 20;
const MAX_DATA_BYTES = 2 ** 32; // the address space of WebAssembly
const NOT_FOUND = [404, 410];

/**
 * Returns a file's content, or null if there is no such file. A file of more than `limit` bytes is rejected, so there is no
 * need to read all of it.
 *
 * @typedef {(name: string, limit: number) => Promise<Uint8Array | null>} ReadFile
 *
 * @typedef {object} Progress
 * @property {string} name of the file
 * @property {number} loaded bytes
 * @property {number | null} total bytes, if known
 *
 * @typedef {object} ExpectedFile
 * @property {number} bytes size
 * @property {string} sha256 hexadecimal
 * @property {string} [url] address, if the file is not below the base
 */

/**
 * Read every file that a model needs.
 *
 * @param {ReadFile} read
 * @param {string} [graphFile] file name of the graph
 * @returns {Promise<Record<string, Uint8Array>>} contents by file name, and `graph` and `weights`
 * @throws {ExportError} a file is missing or too large
 */
export async function readFolder(read, graphFile = GRAPH_FILE) {
  const files = {};
  for (const name of [...REQUIRED, ...OPTIONAL]) {
    const content = await readChecked(read, name, MAX_GRAPH_BYTES, OPTIONAL.includes(name));
    if (content !== null) files[name] = content;
  }
  const graph = await readChecked(read, graphFile, MAX_GRAPH_BYTES);
  const weights = await readChecked(read, DATA_FILE, MAX_DATA_BYTES);
  return { graph, weights, ...files };
}

// Reads a file, and checks that it exists and is not too large.
async function readChecked(read, name, limit, isOptional = false) {
  const content = await read(name, limit);
  if (content === null && !isOptional) {
    const next = "Create one with `deltamem export --target web`.";
    throw new ExportError("This is not a model folder.", `It lacks ${name}.`, next);
  }
  if (content !== null && content.length > limit) throw tooLargeError(name, limit);
  return content;
}

/**
 * Return a function that fetches the files below an address.
 *
 * @param {string | URL} base the address, with a trailing slash
 * @param {object} [options]
 * @param {string | null} [options.cache] name of the cache (Cache API) that keeps expected files; null keeps none
 * @param {Record<string, ExpectedFile>} [options.expected] by file name; a file with another content is rejected. Files
 *   that are not in it are requested each time, so that those of two exports are never mixed
 * @param {(progress: Progress) => void} [options.onProgress]
 * @param {AbortSignal} [options.signal]
 * @returns {ReadFile} throws FetchError if a file cannot be fetched or is not the expected one, and ExportError if it is
 *   larger than its limit
 */
export function fetchedFrom(base, { cache = "deltamem", expected = {}, onProgress = () => {}, signal } = {}) {
  return async (name, limit) => {
    const expectedFile = expected[name];
    const url = new URL(expectedFile?.url ?? name, new URL(base, globalThis.location?.href)).href;
    const isKept = cache !== null && expectedFile !== undefined;
    const storage = isKept ? await globalThis.caches?.open(cache).catch(() => null) : null;
    const cachedResponse = await storage?.match(url);
    if (cachedResponse) {
      const content = await readBody(cachedResponse, name, limit, onProgress);
      if (await isIntact(content, expectedFile)) return content;
    }
    const response = await request(url, name, signal);
    if (response === null) return null;
    const content = await readBody(response, name, limit, onProgress);
    if (!(await isIntact(content, expectedFile))) {
      throw new FetchError(
        `${name} is not the expected file.`,
        content.length === expectedFile.bytes
          ? "Its content has changed."
          : `It has ${content.length} of ${expectedFile.bytes} bytes.`,
        "Reload the page. If that does not help, its folder has to be published again.",
      );
    }
    await storage?.put(url, new Response(content)).catch(() => {}); // if the disk is full, it is fetched again next time
    return content;
  };
}

// Returns the response, or null if the host has no such file.
async function request(url, name, signal) {
  let response;
  try {
    response = await fetch(url, { signal, cache: "no-cache" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new FetchError(`${name} cannot be fetched.`, "Its host cannot be reached.", "Try again when you are online.");
  }
  if (NOT_FOUND.includes(response.status)) return null;
  if (response.ok) return response;
  throw new FetchError(`${name} cannot be fetched.`, `The host returned status ${response.status}.`, "Try again later.");
}

// Reads the content of a response. Stops with an error once there are more than `limit` bytes.
async function readBody(response, name, limit, onProgress) {
  const length = Number(response.headers.get("Content-Length"));
  const isPlain = length > 0 && !response.headers.get("Content-Encoding"); // otherwise it is the compressed length
  const total = isPlain ? length : null;
  const chunks = [];
  let loaded = 0;
  const reader = response.body.getReader();
  for (;;) {
    const { value, done } = await reader.read().catch(() => {
      throw new FetchError(`${name} cannot be fetched.`, "The connection broke.", "Try again.");
    });
    if (done) break;
    chunks.push(value);
    loaded += value.length;
    onProgress({ name, loaded, total });
    if (loaded > limit) {
      await reader.cancel();
      throw tooLargeError(name, limit);
    }
  }
  const content = new Uint8Array(loaded);
  let offset = 0;
  for (const chunk of chunks) {
    content.set(chunk, offset);
    offset += chunk.length;
  }
  return content;
}

// Returns whether a content is that of `expectedFile`, if there is one.
async function isIntact(content, expectedFile) {
  if (expectedFile === undefined) return true;
  if (content.length !== expectedFile.bytes) return false;
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", content));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("") === expectedFile.sha256;
}

const tooLargeError = (name, limit) =>
  new ExportError(`${name} is too large.`, `It has more than ${limit} bytes.`, "Use a smaller model.");
