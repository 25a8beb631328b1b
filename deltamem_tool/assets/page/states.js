// The states of a memory as the heat maps take them.

// [{ layer, heads, rank, values }] in the order of the layers; `values` has H * R * R numbers, of the first conversation.
export const statesOf = ({ shape: { heads, rank }, states }) =>
  [...states].map(([layer, values]) => ({ layer, heads, rank, values: values.subarray(0, heads * rank * rank) }));

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
