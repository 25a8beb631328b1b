// The memory beside the chat: its states, what the last turn changed in them, and its earlier versions.

import { byId, element, timeOf } from "./dom.js";
import { colours, draw } from "./heatmap.js";
import { difference, largestOf, normOf, statesOf } from "./safetensors.js";

const [picture, layers, history] = [byId("picture"), byId("layers"), byId("history")];
let drawn = () => {}; // draws again, in the colours of another scheme
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawn());

// `memory` is what is stored, or null. `former` is the file of the version before, null for zeros, or undefined where
// none is kept.
export function showPicture(memory, former) {
  picture.hidden = memory === null;
  byId("summary").textContent =
    memory === null ? "Nothing is stored yet." : `version ${memory.version}, ${sizeOf(memory.bytes.byteLength)}`;
  if (memory === null) return;
  const now = statesOf(memory.bytes);
  const change = former === undefined ? [] : difference(now, former && statesOf(former));
  picture.classList.toggle("single", former === undefined);
  const pairs = [now, change].map((states) => [states, largestOf(states)]);
  layers.replaceChildren();
  const drawings = [];
  for (const place of now.keys()) {
    const row = element("tr");
    for (const [states, limit] of pairs.filter(([states]) => states.length)) {
      const [canvas, text] = [element("canvas"), labelOf(states[place])];
      canvas.role = "img";
      canvas.ariaLabel = `${text}, ${states[place].heads} of ${states[place].rank} × ${states[place].rank}`;
      drawings.push([canvas, states[place], limit]);
      row.append(element("td", {}, element("small", { textContent: text }), canvas));
    }
    layers.append(row);
  }
  for (const [number, scale] of picture.querySelectorAll(".scale").entries()) {
    const limit = short(pairs[number][1]);
    scale.replaceChildren(`−${limit}`, element("i"), limit);
  }
  drawn = () => {
    const palette = colours(picture);
    for (const [canvas, states, limit] of drawings) draw(canvas, states, limit, palette);
  };
  drawn();
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

const labelOf = (state) => `layer ${state.layer}, norm ${short(normOf(state))}`;
const short = (number) => String(Number(number.toPrecision(3)));
const sizeOf = (bytes) => (bytes < 1e6 ? `${(bytes / 1e3).toFixed(1)} kB` : `${(bytes / 1e6).toFixed(1)} MB`);
