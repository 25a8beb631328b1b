// The states of a memory, as the heat maps need them.

// [{ layer, heads, rank, values }] in layer order. `values` has the H * R * R numbers of the first conversation.
export const statesOf = ({ shape: { heads, rank }, states }) =>
  [...states].map(([layer, values]) => ({ layer, heads, rank, values: values.subarray(0, heads * rank * rank) }));

// The difference between two lists of states; `before` is null for zeros.
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
