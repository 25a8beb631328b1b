// The memory beside the chat: its states, what the last turn changed in them, and its earlier versions.

import { byId, element, timeOf } from "./dom.js";
import { colours, draw } from "./heatmap.js";
import { difference, largestOf, normOf, statesOf } from "./safetensors.js";

const CELL = 8; // the largest size of an entry in pixels
const [picture, history] = [byId("picture"), byId("history")];
const [nowPart, changePart] = picture.children;
let drawings = []; // the canvases, with what is drawn on them
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);

// `memory` is what is stored, or null. `former` is the file of the version before, null for zeros, or undefined where
// none is kept.
export function showPicture(memory, former) {
  picture.hidden = memory === null;
  byId("summary").textContent =
    memory === null ? "Nothing is stored yet." : `version ${memory.version}, ${sizeOf(memory.bytes.byteLength)}`;
  drawings = [];
  if (memory === null) return;
  const now = statesOf(memory.bytes);
  showPart(nowPart, now);
  changePart.hidden = former === undefined;
  if (former !== undefined) showPart(changePart, difference(now, former && statesOf(former)));
  drawAll();
}

function showPart(part, states) {
  const limit = largestOf(states);
  const layers = states.map((state) => {
    const [canvas, name, norm] = [element("canvas"), `layer ${state.layer}, `, `norm ${short(normOf(state))}`];
    canvas.role = "img";
    canvas.ariaLabel = `${name}${norm}, ${state.heads} of ${state.rank} × ${state.rank}`;
    drawings.push([canvas, state, limit]);
    return element("li", {}, element("small", {}, name, element("span", { textContent: norm })), canvas);
  });
  const [list, scale] = [part.querySelector(".layers"), part.querySelector(".scale")];
  list.replaceChildren(...layers);
  scale.replaceChildren(`−${short(limit)}`, element("i"), short(limit));
}

function drawAll() {
  const palette = colours(picture);
  for (const [canvas, state, limit] of drawings) {
    draw(canvas, state, limit, palette);
    canvas.style.maxWidth = `${canvas.width * CELL}px`;
    canvas.closest(".layers").style.setProperty("--least", `${(canvas.width * CELL) / 2}px`);
  }
}

// Calls `restore` with the version whose button is pressed.
export function showVersions(versions, restore) {
  history.hidden = versions.length < 2;
  byId("versions").replaceChildren(
    ...versions.slice(1).map(({ version, created_at: created }) => {
      const button = element("button", { type: "button", textContent: "Restore", onclick: () => restore(version) });
      button.dataset.changes = "";
      button.ariaLabel = `Restore version ${version}`;
      return element("li", {}, `version ${version}`, element("small", { textContent: timeOf(created) }), button);
    }),
  );
}

const short = (number) => String(Number(number.toPrecision(3)));
const sizeOf = (bytes) => (bytes < 1e6 ? `${(bytes / 1e3).toFixed(1)} kB` : `${(bytes / 1e6).toFixed(1)} MB`);
