// What a model takes in onnxruntime-web, beside web_page.py: node web_speed.mjs FOLDER PROMPT DECODED REPEATS
//
// Prints seconds of processor time of a prompt of so many tokens, and of one token after it, as JSON: `first` is a token's
// the first time, before what the calls need has been compiled well.
import { existsSync } from "node:fs";
import { readFile } from "node:fs/promises";
import { WebModel } from "./src/index.js";

const [folder, ...numbers] = process.argv.slice(2);
const [prompt, decoded, repeats] = numbers.map(Number);
const missing = (error) => (error.code === "ENOENT" ? null : Promise.reject(error));
const read = (name) => readFile(`${folder}/${name}`).then((bytes) => new Uint8Array(bytes), missing);
const unpacked = "model.wasm.onnx"; // of a page
const model = await WebModel.load(read, existsSync(`${folder}/${unpacked}`) ? { graph: unpacked } : {});
const tokens = Array.from({ length: prompt }, (_, place) => ({ id: place % 100, writes: true, ends: false }));
const WARM_SECONDS = 5; // of the processor: V8 compiles what is called often once more, and better, beside the calls
const times = { prompt: [], token: [], first: null };
const secondsSince = (begin) => {
  const { user, system } = process.cpuUsage(begin);
  return (user + system) / 1e6;
};
const start = process.cpuUsage();
for (let repeat = 0; repeat < repeats; ) {
  const begin = process.cpuUsage();
  let { past } = await model.step(model.start(model.emptyMemory()), 0, tokens);
  const read = secondsSince(begin);
  const between = process.cpuUsage();
  for (let count = 0; count < decoded; count++) ({ past } = await model.step(past, prompt + count, tokens.slice(0, 1)));
  const token = secondsSince(between) / decoded;
  times.first ??= token;
  if (secondsSince(start) < WARM_SECONDS) continue;
  times.prompt.push(read);
  times.token.push(token);
  repeat++;
}
console.log(JSON.stringify(times));
