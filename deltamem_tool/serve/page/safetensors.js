// The states in a memory file: layers.{i}.state, float32 [1, H, R, R], with one row for each conversation.

const LENGTH_BYTES = 8;

// [{ layer, heads, rank, values }] in the order of the layers; `values` has H * R * R numbers.
export function statesOf(file) {
  const begin = LENGTH_BYTES + Number(new DataView(file).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(file.slice(LENGTH_BYTES, begin)));
  const states = [];
  for (const [name, tensor] of Object.entries(header)) {
    const match = /^layers\.(\d+)\.state$/.exec(name);
    if (match === null) continue; // the metadata, or an open segment
    const [, heads, rank] = tensor.shape;
    const [from, to] = tensor.data_offsets;
    const values = new Float32Array(file.slice(begin + from, begin + to)).subarray(0, heads * rank * rank);
    states.push({ layer: Number(match[1]), heads, rank, values });
  }
  return states.sort((one, other) => one.layer - other.layer);
}

// What was added to `before`; null for zeros.
export function difference(after, before) {
  if (before === null) return after;
  return after.map((state, layer) => ({
    ...state,
    values: state.values.map((value, place) => value - before[layer].values[place]),
  }));
}

export const normOf = ({ values }) => Math.sqrt(values.reduce((sum, value) => sum + value * value, 0));

export const largestOf = (states) =>
  states.reduce((largest, { values }) => values.reduce((a, b) => Math.max(a, Math.abs(b)), largest), 0);
