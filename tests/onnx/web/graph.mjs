// Runs a folder's graph in onnxruntime-web, for a test: node graph.mjs FOLDER wasm|webgpu
//
// Every message, from standard input and to standard output, is its header's length (uint32), the header, and the bytes
// of its tensors. The header is JSON: [[name, type, dims, bytes], …]. The first message out is empty: the graph is loaded.
import fs from "node:fs";
import path from "node:path";

const ARRAYS = { float32: Float32Array, float16: globalThis.Float16Array ?? Uint16Array, int64: BigInt64Array, bool: Uint8Array };
const [folder, provider] = process.argv.slice(2);
if (provider === "webgpu") await provideWebGpu();
const ort = await import(provider === "webgpu" ? "onnxruntime-web/webgpu" : "onnxruntime-web");
ort.env.wasm.numThreads = 1;
const data = "model.onnx.data";
const session = await ort.InferenceSession.create(fs.readFileSync(path.join(folder, "model.onnx")), {
  executionProviders: [provider],
  externalData: [{ path: data, data: fs.readFileSync(path.join(folder, data)) }],
  logSeverityLevel: 3,
});
send({});

let pending = Buffer.alloc(0);
const input = process.stdin[Symbol.asyncIterator]();
for (let feeds; (feeds = await receive()); ) send(await session.run(feeds));
process.exit(0); // Dawn's threads would keep it alive

async function receive() {
  const length = await take(4);
  if (!length) return null;
  const feeds = {};
  for (const [name, type, dims, bytes] of JSON.parse(await take(length.readUInt32LE()))) {
    const content = new Uint8Array(await take(bytes)).buffer; // a copy, aligned
    feeds[name] = new ort.Tensor(type, new ARRAYS[type](content), dims);
  }
  return feeds;
}

async function take(bytes) {
  while (pending.length < bytes) {
    const { value, done } = await input.next();
    if (done) return null;
    pending = Buffer.concat([pending, value]);
  }
  const chunk = pending.subarray(0, bytes);
  pending = pending.subarray(bytes);
  return chunk;
}

function send(tensors) {
  const values = Object.entries(tensors).map(([name, { type, dims, data }]) => {
    return { header: [name, type, dims, data.byteLength], bytes: new Uint8Array(data.buffer, data.byteOffset, data.byteLength) };
  });
  const header = Buffer.from(JSON.stringify(values.map((value) => value.header)));
  const length = Buffer.alloc(4);
  length.writeUInt32LE(header.length);
  process.stdout.write(Buffer.concat([length, header, ...values.map((value) => value.bytes)]));
}

// navigator.gpu as browsers have it, by Dawn over a Vulkan driver.
async function provideWebGpu() {
  const { create, globals } = await import("webgpu");
  Object.assign(globalThis, globals);
  const dawn = create([]);
  const gpu = { wgslLanguageFeatures: dawn.wgslLanguageFeatures, requestAdapter };
  Object.defineProperty(globalThis, "navigator", { value: { gpu, userAgent: "node" }, configurable: true });
  if (!(await requestAdapter())) {
    console.error("no WebGPU adapter");
    process.exit(3);
  }
  // Dawn's binding for Node, unlike a browser, takes no view of memory that WebAssembly's threads share.
  const { writeBuffer } = GPUQueue.prototype;
  GPUQueue.prototype.writeBuffer = function (buffer, offset, view, start = 0, size = view.length - start) {
    return writeBuffer.call(this, buffer, offset, view.slice(start, start + size));
  };

  // Without subgroups: SwiftShader's have 4 lanes, for which ONNX Runtime's flash attention is wrong. It takes 8 and more.
  async function requestAdapter(...options) {
    const adapter = await dawn.requestAdapter(...options);
    if (!adapter) return null;
    const features = new Set([...adapter.features].filter((name) => !name.startsWith("subgroup")));
    const get = (target, name) => {
      if (name === "features") return features;
      return typeof target[name] === "function" ? target[name].bind(target) : target[name];
    };
    return new Proxy(adapter, { get });
  }
}
