// The states of a memory, as the heat maps need them.

// Returns [{ layer, heads, rank, values }] in layer order. `values` has the heads * rank * rank numbers of the first
// conversation.
export const statesOf = ({ shape: { heads, rank }, states }) =>
  [...states].map(([layer, values]) => ({ layer, heads, rank, values: values.subarray(0, heads * rank * rank) }));

// Returns the difference between two lists of states; `former` is null for zeros.
export function difference(current, former) {
  if (former === null) return current;
  return current.map((state, layer) => ({
    ...state,
    values: state.values.map((value, index) => value - former[layer].values[index]),
  }));
}

// Returns the Frobenius norm of a state.
export const normOf = ({ values }) => Math.sqrt(values.reduce((sum, value) => sum + value * value, 0));

// Returns the largest absolute value in a list of states.
export const largestOf = (states) =>
  states.reduce((largest, { values }) => values.reduce((a, b) => Math.max(a, Math.abs(b)), largest), 0);
