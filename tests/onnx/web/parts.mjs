// Parts of the library of web/, for a test: node parts.mjs PART < JSON, a result for each entry of a list.
import { readFile } from "node:fs/promises";
import { text } from "node:stream/consumers";
import { fetchedFrom } from "./src/folder.js";
import { DeltaMemError, memoryBytes, readMemory, VERSION, WebModel } from "./src/index.js";
import { endSegment } from "./src/memory.js";
import { Random } from "./src/random.js";
import { sentenceSplitter } from "./src/sentences.js";
import { createSampling, Sampler } from "./src/sampling.js";
import { ChatText } from "./src/text.js";

const toBase64 = (bytes) => Buffer.from(bytes).toString("base64");
const fromBase64 = (text) => new Uint8Array(Buffer.from(text, "base64"));

const parts = {
  version: () => VERSION,
  // A memory file, read and written again; with `mechanism`, after its open segments are written.
  memory: ({ file, mechanism }) => {
    const memory = readMemory(fromBase64(file));
    return toBase64(memoryBytes(mechanism ? endSegment(memory, mechanism) : memory));
  },
  random: ({ seed, count }) => {
    const random = new Random(seed);
    return Array.from({ length: count }, () => random.next());
  },
  // Tokens drawn in turn from the same logits.
  sampling: ({ logits, context, ids, options, count }) => {
    const sampler = new Sampler(createSampling(options), context, new Set(ids));
    return Array.from({ length: count }, () => sampler.pick(Float32Array.from(logits)));
  },
  // Token ids and offsets of texts, and renderings of messages; `files` are those of a model folder, in base64.
  text: async ({ files, texts, messages }) => {
    const content = Object.fromEntries(Object.entries(files).map(([name, file]) => [name, fromBase64(file)]));
    const chat = await ChatText.load(content);
    return {
      ids: texts.map((text) => chat.encode(text)),
      offsets: texts.map((text) => chat.offsets(text)),
      rendered: messages.map((messages) => chat.render(messages)),
      stop: [...chat.stopTokens(null)],
    };
  },
  // The sentences of texts.
  sentences: async (texts) => {
    const split = await sentenceSplitter(await readFile("node_modules/sentencex-wasm/sentencex_wasm_bg.wasm"));
    return texts.map(split);
  },
  // Loads a folder, for its errors; files that are null are missing.
  load: async ({ files }) => {
    await WebModel.load(async (name) => (files[name] == null ? null : fromBase64(files[name])));
  },
  // Fetches a file, and returns its size.
  fetch: async ({ base, name, limit, expected }) => {
    const content = await fetchedFrom(base, { cache: null, expected: expected ? { [name]: expected } : {} })(name, limit);
    return content && content.length;
  },
  // Fetches a file twice into a cache, with another content at the host the second time, and returns both contents.
  fetchAgain: async ({ contents, expected }) => {
    const kept = new Map();
    const storage = { match: async (url) => kept.get(url)?.clone(), put: async (url, response) => kept.set(url, response) };
    globalThis.caches = { open: async () => storage };
    const read = fetchedFrom("http://host/", expected ? { expected: { file: expected } } : {});
    const fetched = [];
    for (const content of contents) {
      globalThis.fetch = async () => new Response(content);
      fetched.push(new TextDecoder().decode(await read("file", 1000)));
    }
    return fetched;
  },
};

const [part] = process.argv.slice(2);
const results = [];
for (const argument of JSON.parse(await text(process.stdin))) {
  try {
    results.push((await parts[part](argument)) ?? null);
  } catch (error) {
    if (!(error instanceof DeltaMemError)) throw error;
    results.push({ error: error.name, message: error.message });
  }
}
console.log(JSON.stringify(results));
