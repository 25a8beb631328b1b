// The list of memories of the API key.

import { listMemories } from "./api.js";
import { byId, element, timeOf } from "./dom.js";
import { addressOf } from "./open.js";

const [list, more] = [byId("memories"), byId("more")];
let current = null;

// Reloads the list and marks the open memory, which may not be stored yet.
export async function showList(name) {
  current = name;
  const page = await listMemories(null);
  const shown = page.data.map(entry);
  if (!page.data.some(({ id }) => id === name)) shown.unshift(entry({ id: name }));
  list.replaceChildren(...shown);
  list.scrollLeft = list.querySelector("[aria-current]").offsetLeft - list.offsetLeft; // on a narrow screen
  follow(page);
}

function follow({ has_more: hasMore, last_id: last }) {
  more.hidden = !hasMore;
  more.dataset.after = last;
}

// Appends the next page.
export async function showMore() {
  const page = await listMemories(more.dataset.after);
  for (const memory of page.data) {
    if (memory.id === current) list.firstChild.remove(); // until now it was shown above the others
    list.append(entry(memory));
  }
  follow(page);
}

function entry({ id, updated_at: updated }) {
  const link = element("a", { href: addressOf(id) });
  link.append(element("span", { textContent: id }));
  link.append(element("small", { textContent: updated === undefined ? "nothing stored yet" : timeOf(updated) }));
  if (id === current) link.ariaCurrent = "true";
  return element("li", {}, link);
}
