// What graphs take in onnxruntime-web, beside web_products.py: node web_products.mjs SIZE WARM REPEATS FILE...
//
// Prints the milliseconds of the processor of a call with one row, and of one with 64, as JSON by file.
import { readFile } from "node:fs/promises";
import * as ort from "onnxruntime-web/wasm";

const [size, warm, repeats] = process.argv.slice(2, 5).map(Number);
ort.env.wasm.numThreads = 1;
const found = {};
for (const file of process.argv.slice(5)) {
  const session = await ort.InferenceSession.create(await readFile(file), { logSeverityLevel: 3 });
  found[file] = [];
  for (const rows of [1, 64]) {
    const x = new ort.Tensor("float32", Float32Array.from({ length: rows * size }, (_, place) => Math.sin(place)), [rows, size]);
    const times = [];
    for (let call = 0; call < warm + repeats; call++) {
      const begin = process.cpuUsage();
      await session.run({ x });
      const { user, system } = process.cpuUsage(begin);
      if (call >= warm) times.push((user + system) / 1e3);
    }
    found[file].push(times.sort((one, other) => one - other)[repeats >> 1]);
  }
  await session.release();
}
console.log(JSON.stringify(found));
