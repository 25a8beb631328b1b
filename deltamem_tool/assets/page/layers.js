// Shows a memory's states and what the last turn changed in them, with one heat map per layer.

import { byId, element } from "./dom.js";
import { colours, drawHeatmap } from "./heatmap.js";
import { difference, largestOf, normOf, statesOf } from "./states.js";

const CELL = 8; // maximum size of an entry in pixels
const picture = byId("picture");
const [currentPart, changePart] = picture.children;
let drawings = []; // [canvas, state, limit] of every heat map
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);

// `memory` is a memory as the library reads it, or null. `former` is the one before it: null for zeros, undefined if it is
// not kept.
export function showLayers(memory, former) {
  picture.hidden = memory === null;
  drawings = [];
  if (memory === null) return;
  const current = statesOf(memory);
  showPart(currentPart, current);
  changePart.hidden = former === undefined;
  if (former !== undefined) showPart(changePart, difference(current, former && statesOf(former)));
  drawAll();
}

// Shows states in one part of the picture, with the scale that they share.
function showPart(part, states) {
  const limit = largestOf(states);
  const layers = states.map((state) => {
    const [canvas, name, norm] = [element("canvas"), `layer ${state.layer}, `, `norm ${formatNumber(normOf(state))}`];
    canvas.role = "img";
    canvas.ariaLabel = `${name}${norm}, ${state.heads} of ${state.rank} × ${state.rank}`;
    drawings.push([canvas, state, limit]);
    return element("li", {}, element("small", {}, name, element("span", { textContent: norm })), canvas);
  });
  const [list, scale] = [part.querySelector(".layers"), part.querySelector(".scale")];
  list.replaceChildren(...layers);
  scale.replaceChildren(`−${formatNumber(limit)}`, element("i"), formatNumber(limit));
}

function drawAll() {
  const palette = colours(picture);
  for (const [canvas, state, limit] of drawings) {
    drawHeatmap(canvas, state, limit, palette);
    canvas.style.maxWidth = `${canvas.width * CELL}px`;
    canvas.closest(".layers").style.setProperty("--least", `${(canvas.width * CELL) / 2}px`);
  }
}

const formatNumber = (number) => String(Number(number.toPrecision(3)));
export const formatBytes = (bytes) => (bytes < 1e6 ? `${(bytes / 1e3).toFixed(1)} kB` : `${(bytes / 1e6).toFixed(1)} MB`);
