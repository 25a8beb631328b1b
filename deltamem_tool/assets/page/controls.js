// The notice at the top of a page, and the buttons and fields that every page has.

import { byId, element } from "./dom.js";
import { addressOf } from "./open.js";

const clearNotice = () => byId("notice").replaceChildren();

// Shows a notice. `kind` is a class of the style sheet: "note" or "error".
export function showNotice(text, kind = "note") {
  const close = element("button", { type: "button", textContent: "Dismiss", onclick: clearNotice });
  byId("notice").replaceChildren(element("p", { className: kind, textContent: text }), close);
}

// Returns a function that turns an action into an event handler. `showError` is called with what the action throws.
export const createGuard = (showError) => (action) => async (event) => {
  event?.preventDefault();
  clearNotice();
  try {
    await action();
  } catch (error) {
    await showError(error);
  }
};

// Offers the bytes of a memory as a file.
export function saveAs(name, bytes) {
  const address = URL.createObjectURL(new Blob([bytes]));
  element("a", { href: address, download: `${name}.safetensors` }).click();
  URL.revokeObjectURL(address);
}

// Connects the buttons in `actions`, by id, and the fields. `guard` is that of `createGuard`, and `load` is called with the
// chosen file.
export function connectControls(guard, { send, load, ...actions }) {
  for (const [id, action] of Object.entries(actions)) byId(id).onclick = guard(action);
  byId("load").onclick = () => byId("file").click();
  byId("file").onchange = guard(async () => {
    const [file] = byId("file").files;
    byId("file").value = ""; // so that the same file can be chosen again
    await load(file);
  });
  byId("composer").onsubmit = guard(send);
  byId("words").onkeydown = (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    byId("composer").requestSubmit();
  };
  byId("new-form").onsubmit = guard(() => {
    location.hash = addressOf(byId("new-name").value.trim());
    byId("new-name").value = "";
  });
}
