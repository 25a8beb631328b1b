// Parts of the library of web/, for a test: node parts.mjs PART < JSON, a result for each entry of a list.
import { readFile } from "node:fs/promises";
import { text } from "node:stream/consumers";
import { fetchedFrom } from "./src/folder.js";
import { DeltaMemError, memoryBytes, readMemory, VERSION, WebModel } from "./src/index.js";
import { endSegment } from "./src/memory.js";
import { Random } from "./src/random.js";
import { sentenceSplitter } from "./src/sentences.js";
import { Sampler, samplingOf } from "./src/sampling.js";
import { ChatText } from "./src/text.js";

const base64 = (bytes) => Buffer.from(bytes).toString("base64");
const bytesOf = (text) => new Uint8Array(Buffer.from(text, "base64"));

const parts = {
  version: () => VERSION,
  // A memory file, read and written again; `mechanism`: with its open segments written.
  memory: ({ file, mechanism }) => {
    const memory = readMemory(bytesOf(file));
    return base64(memoryBytes(mechanism ? endSegment(memory, mechanism) : memory));
  },
  random: ({ seed, count }) => {
    const random = new Random(seed);
    return Array.from({ length: count }, () => random.next());
  },
  // Tokens drawn one after the other from the same logits.
  sampling: ({ logits, context, ids, options, count }) => {
    const sampler = new Sampler(samplingOf(options), context, new Set(ids));
    return Array.from({ length: count }, () => sampler.pick(Float32Array.from(logits)));
  },
  // Files of a model folder, in base64: what the tokenizer makes of texts, and the template of messages.
  text: async ({ files, texts, messages }) => {
    const content = Object.fromEntries(Object.entries(files).map(([name, file]) => [name, bytesOf(file)]));
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
  // What loading a folder says; files that are null are missing.
  load: async ({ files }) => {
    await WebModel.load(async (name) => (files[name] == null ? null : bytesOf(files[name])));
  },
  // What fetching a file says.
  fetch: async ({ base, name, limit, expected }) => {
    const content = await fetchedFrom(base, { cache: null, expected: expected ? { [name]: expected } : {} })(name, limit);
    return content && content.length;
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
