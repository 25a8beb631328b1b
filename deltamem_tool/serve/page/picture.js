// Shows the memory beside the chat: its states, what the last turn changed in them, and its earlier versions.

import { byId, element, formatTime } from "./dom.js";
import { formatBytes, showLayers } from "./layers.js";
import { readMemory } from "./memory.js";

const historySection = byId("history");

// Shows a memory. `memory` is the stored one, or null. `former` is the version before it: null for zeros, undefined if it is
// not kept.
export function showPicture(memory, former) {
  byId("summary").textContent =
    memory === null ? "Nothing is stored yet." : `version ${memory.version}, ${formatBytes(memory.bytes.byteLength)}`;
  showLayers(memory && readMemory(memory.bytes), former && readMemory(former));
}

// Lists the earlier versions. `restore` is called with the version whose button is pressed.
export function showVersions(versions, restore) {
  historySection.hidden = versions.length < 2;
  byId("versions").replaceChildren(
    ...versions.slice(1).map(({ version, created_at: createdAt }) => {
      const button = element("button", { type: "button", textContent: "Restore", onclick: () => restore(version) });
      button.dataset.changes = "";
      button.ariaLabel = `Restore version ${version}`;
      return element("li", {}, `version ${version}`, element("small", { textContent: formatTime(createdAt) }), button);
    }),
  );
}
