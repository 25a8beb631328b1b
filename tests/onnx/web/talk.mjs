// Has a conversation with the library of web/, for a test: node talk.mjs FOLDER < JSON
//
// Standard input has { options, actions } and standard output a result for each action. Bytes are in base64.
import { readFile } from "node:fs/promises";
import path from "node:path";
import { text } from "node:stream/consumers";
import { Conversation, DeltaMemError, readMemory, WebModel } from "./src/index.js";

const [folder] = process.argv.slice(2);
const { options, actions } = JSON.parse(await text(process.stdin));
const read = (name) => readFile(path.resolve(folder, name)).then((bytes) => new Uint8Array(bytes), nullIfMissing);
const results = [];
const unreleased = new Set(); // tensors that a call of the model has returned
let logits = [];
try {
  const { graph, ...rest } = options;
  const sentences = await readFile("node_modules/sentencex-wasm/sentencex_wasm_bg.wasm"); // fetch of Node takes no file
  const model = await WebModel.load(read, { graph, sentences });
  const step = model.step.bind(model);
  model.step = async (...call) => {
    const result = await step(...call);
    logits.push(Buffer.from(Float32Array.from(result.logits).buffer));
    for (const tensor of Object.values(result.past)) watch(tensor);
    return result;
  };
  const memory = rest.memory && readMemory(fromBase64(rest.memory));
  const conversation = new Conversation(model, { ...rest, ...(memory ? { memory } : {}) });
  for (const { say, sampling, undo, forget, load } of actions) {
    logits = [];
    const pieces = [];
    let answer;
    if (say !== undefined) answer = await conversation.generate(say, sampling, { onText: (piece) => pieces.push(piece) });
    if (undo) answer = { undone: await conversation.undo() };
    if (forget) await conversation.forget();
    if (load !== undefined) await conversation.setMemory(fromBase64(load));
    results.push({
      ...answer,
      pieces,
      context: conversation.context,
      messages: conversation.messages,
      unreleased: [...unreleased].filter((tensor) => !isKept(conversation, tensor)).length,
      logits: Buffer.concat(logits).toString("base64"),
      memory: Buffer.from(await conversation.memoryBytes()).toString("base64"),
    });
  }
} catch (error) {
  if (!(error instanceof DeltaMemError)) throw error;
  results.push({ error: error.name, what: error.what, why: error.why });
}
console.log(JSON.stringify(results));

function watch(tensor) {
  const dispose = tensor.dispose.bind(tensor);
  tensor.dispose = () => unreleased.delete(tensor) && dispose();
  unreleased.add(tensor);
}

function isKept({ _place, _before }, tensor) {
  return [_place, ..._before].some(({ past }) => past !== null && Object.values(past).includes(tensor));
}

function nullIfMissing(error) {
  if (error.code === "ENOENT") return null;
  throw error;
}

function fromBase64(base64) {
  return new Uint8Array(Buffer.from(base64, "base64"));
}
