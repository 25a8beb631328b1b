// Draws a layer's states as a heat map: one pixel per entry, enlarged by the style sheet. Rows are values, columns are keys.

const GAP = 1; // pixels between two heads
const MAX_ROW_WIDTH = 64; // maximum width in pixels at which heads are drawn in one row

// The colours of −1, 0 and 1, as the style sheet defines them for the light or the dark scheme.
export function colours(element) {
  const style = getComputedStyle(element);
  return ["--negative", "--zero", "--positive"].map((name) =>
    style.getPropertyValue(name).trim().split(/\s+/).map(Number),
  );
}

// Draws the states of a layer, `values` [heads, rank, rank], on `canvas`. Entries with the absolute value `limit` get the
// full colour.
export function drawHeatmap(canvas, { heads, rank, values }, limit, [negative, zero, positive]) {
  const columns = heads * (rank + GAP) <= MAX_ROW_WIDTH ? heads : Math.ceil(Math.sqrt(heads));
  canvas.width = columns * (rank + GAP) - GAP;
  canvas.height = Math.ceil(heads / columns) * (rank + GAP) - GAP;
  const context = canvas.getContext("2d");
  for (let head = 0; head < heads; head++) {
    const image = context.createImageData(rank, rank);
    for (let index = 0; index < rank * rank; index++) {
      const share = limit ? values[head * rank * rank + index] / limit : 0;
      const extreme = share < 0 ? negative : positive;
      const colour = zero.map((middle, channel) => Math.round(middle + Math.abs(share) * (extreme[channel] - middle)));
      image.data.set([...colour, 255], index * 4);
    }
    context.putImageData(image, (head % columns) * (rank + GAP), Math.floor(head / columns) * (rank + GAP));
  }
}
