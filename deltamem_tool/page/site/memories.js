// The list of memories of this model.

import { memoryEntry, showEntries } from "./memory_list.js";

/** Show the list and mark the open memory, which may not be stored yet. */
export async function showList(store, openName) {
  const records = await store.list();
  if (!records.some(({ name }) => name === openName)) records.unshift({ name: openName });
  const inSeconds = (milliseconds) => (milliseconds === undefined ? undefined : milliseconds / 1000);
  showEntries(records.map(({ name, updated }) => memoryEntry(name, inSeconds(updated), name === openName)));
}
