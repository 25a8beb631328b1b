// The entries in the list of memories.

import { byId, element, formatTime } from "./dom.js";
import { addressOf } from "./open.js";

const list = byId("memories");

// Returns the entry of a memory. `updated` is in seconds since 1970; undefined if nothing is stored yet.
export function memoryEntry(name, updated, isOpen) {
  const time = updated === undefined ? "nothing stored yet" : formatTime(updated);
  const link = element("a", { href: addressOf(name) });
  link.append(element("span", { textContent: name }), element("small", { textContent: time }));
  if (isOpen) link.ariaCurrent = "true";
  return element("li", {}, link);
}

// Shows entries, and scrolls to that of the open memory.
export function showEntries(entries) {
  list.replaceChildren(...entries);
  list.scrollLeft = list.querySelector("[aria-current]").offsetLeft - list.offsetLeft; // on a narrow screen
}
