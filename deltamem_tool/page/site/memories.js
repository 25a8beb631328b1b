// The list of memories of this model.

import { byId, element, timeOf } from "./dom.js";
import { addressOf } from "./open.js";

/** Show the list and mark the open memory, which may not be stored yet. */
export async function showList(store, current) {
  const stored = await store.list();
  const all = stored.some(({ name }) => name === current) ? stored : [{ name: current }, ...stored];
  const entries = all.map(({ name, updated }) => {
    const time = updated === undefined ? "nothing stored yet" : timeOf(updated / 1000);
    const link = element("a", { href: addressOf(name) });
    link.append(element("span", { textContent: name }), element("small", { textContent: time }));
    if (name === current) link.ariaCurrent = "true";
    return element("li", {}, link);
  });
  const list = byId("memories");
  list.replaceChildren(...entries);
  list.scrollLeft = list.querySelector("[aria-current]").offsetLeft - list.offsetLeft; // on a narrow screen
}
