// What a model takes in onnxruntime-web, beside web_page.py: node web_speed.mjs FOLDER PROMPT DECODED REPEATS
//
// Prints seconds of processor time of a prompt of so many tokens, and of one token after it, as JSON.
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
const WARM = 5; // times: V8 compiles what is called often once more, and better
const times = { prompt: [], token: [] };
for (let repeat = -WARM; repeat < repeats; repeat++) {
  const begin = process.cpuUsage();
  let { past } = await model.step(model.start(model.emptyMemory()), 0, tokens);
  const read = process.cpuUsage(begin);
  const between = process.cpuUsage();
  for (let count = 0; count < decoded; count++) ({ past } = await model.step(past, prompt + count, tokens.slice(0, 1)));
  const answered = process.cpuUsage(between);
  if (repeat < 0) continue;
  times.prompt.push((read.user + read.system) / 1e6);
  times.token.push((answered.user + answered.system) / 1e6 / decoded);
}
console.log(JSON.stringify(times));
