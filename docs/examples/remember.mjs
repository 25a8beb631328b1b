// A folder of `deltamem export --target web`, in a browser or in Node. It needs onnxruntime-web and @huggingface/tokenizers.
import { Tokenizer } from "@huggingface/tokenizers";

// The folder whose files `read` gives by name, for "wasm" or "webgpu": each has a build of its own.
export async function load(read, provider = "wasm") {
  const ort = await (provider === "webgpu" ? import("onnxruntime-web/webgpu") : import("onnxruntime-web/wasm"));
  ort.env.wasm.numThreads = 1; // a page that is cross-origin isolated can have more
  const json = async (name) => JSON.parse(new TextDecoder().decode(await read(name)));
  const tokenizer = new Tokenizer(await json("tokenizer.json"), await json("tokenizer_config.json"));
  const { eos_token_id } = await json("generation_config.json"); // an id, or a list of them
  const { layers } = (await json("deltamem_onnx.json")).interface; // a hybrid has recurrent states of its own, too
  const memory = layers.flatMap(({ state }, i) => (state ? [`past_key_values.${i}.recurrent_state`] : []));
  const session = await ort.InferenceSession.create(new Uint8Array(await read("model.onnx")), {
    executionProviders: [provider],
    externalData: [{ path: "model.onnx.data", data: new Uint8Array(await read("model.onnx.data")) }],
    preferredOutputLocation: provider === "webgpu" ? "gpu-buffer" : "cpu", // what is carried stays on the GPU
  });
  return { ort, tokenizer, session, memory, stop: [eos_token_id].flat() };
}

// The answer to `prompt` from an empty context and `states`, and the states after it.
export async function answer({ ort, tokenizer, session, memory, stop }, prompt, states = {}) {
  let past = {};
  for (const { name, type, shape } of session.inputMetadata.filter(({ name }) => name.startsWith("past_key_values."))) {
    const dims = [1, ...shape.slice(1).map((size) => (typeof size === "number" ? size : 0))];
    const zeros = new (type === "float16" ? Uint16Array : Float32Array)(dims.reduce((a, b) => a * b));
    past[name] = states[name] ?? new ort.Tensor(type, zeros, dims);
  }
  const generated = [];
  let seen = 0;
  for (let tokens = tokenizer.encode(prompt, { add_special_tokens: false }).ids; generated.length < 64; ) {
    seen += tokens.length;
    const { logits, ...present } = await session.run({
      input_ids: new ort.Tensor("int64", BigInt64Array.from(tokens, BigInt), [1, tokens.length]),
      attention_mask: new ort.Tensor("int64", new BigInt64Array(seen).fill(1n), [1, seen]),
      write_mask: new ort.Tensor("bool", new Uint8Array(tokens.length).fill(1), [1, tokens.length]),
      ...past,
    });
    for (const name in past) if (past[name] !== states[name]) past[name].dispose(); // memory of a GPU is not collected
    const renamed = ([name, tensor]) => [name.replace("present", "past_key_values"), tensor];
    past = Object.fromEntries(Object.entries(present).map(renamed));
    const scores = await logits.getData(true);
    const token = scores.indexOf(scores.reduce((a, b) => Math.max(a, b)));
    if (stop.includes(token)) break;
    generated.push(token);
    tokens = [token];
  }
  const kept = {};
  for (const name in past) memory.includes(name) ? (kept[name] = past[name]) : past[name].dispose();
  return { text: tokenizer.decode(generated), states: kept };
}

// The states in a memory file, an ArrayBuffer of safetensors.
export function statesOf({ ort }, file) {
  const begin = 8 + Number(new DataView(file).getBigUint64(0, true));
  const header = Object.entries(JSON.parse(new TextDecoder().decode(file.slice(8, begin))));
  const tensors = header.filter(([name]) => /^layers\.\d+\.state$/.test(name));
  return Object.fromEntries(
    tensors.map(([name, { shape, data_offsets: [from, to] }]) => [
      `past_key_values.${name.split(".")[1]}.recurrent_state`,
      new ort.Tensor("float32", new Float32Array(file.slice(begin + from, begin + to)), shape),
    ]),
  );
}

// node remember.mjs FOLDER PROMPT…: every prompt is a conversation of its own; what they share is the states.
if (globalThis.process?.argv[1]?.endsWith("remember.mjs")) {
  const { readFile } = await import("node:fs/promises");
  const [folder, ...prompts] = process.argv.slice(2);
  const model = await load((name) => readFile(`${folder}/${name}`));
  let text, states;
  for (const words of prompts) {
    ({ text, states } = await answer(model, `<|user|>${words}<|end|><|assistant|>`, states));
    console.log(text);
  }
}
