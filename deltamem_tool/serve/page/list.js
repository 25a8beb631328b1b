// The list of memories of the API key.

import { listMemories } from "./api.js";
import { byId } from "./dom.js";
import { memoryEntry, showEntries } from "./memory_list.js";

const [list, more] = [byId("memories"), byId("more")];
let openName = null;

// Reloads the list and marks the open memory, which may not be stored yet, unless another one is opened meanwhile.
export async function showList(name) {
  openName = name;
  const page = await listMemories(null);
  if (name !== openName) return;
  const entries = page.data.map(entry);
  if (!page.data.some(({ id }) => id === name)) entries.unshift(entry({ id: name }));
  showEntries(entries);
  updateMore(page);
}

// Shows the button for the next page, if there is one.
function updateMore({ has_more: hasMore, last_id: lastId }) {
  more.hidden = !hasMore;
  more.dataset.after = lastId;
}

// Appends the next page, once if the button is pressed twice.
export async function showMore() {
  const { after } = more.dataset;
  const page = await listMemories(after);
  if (more.dataset.after !== after) return;
  for (const memory of page.data) {
    if (memory.id === openName) list.firstChild.remove(); // until now it was shown above the others
    list.append(entry(memory));
  }
  updateMore(page);
}

const entry = ({ id, updated_at: updated }) => memoryEntry(id, updated, id === openName);
