// Helpers for elements. Text stays text: nothing from a model or a user is parsed as HTML.

export const byId = (id) => document.getElementById(id);

// Creates an element. Children are elements or texts.
export function element(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

const TIME_FORMAT = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "short" });
// Formats a time in seconds since 1970.
export const formatTime = (seconds) => TIME_FORMAT.format(new Date(seconds * 1000));

// Opens a dialog, and resolves to whether the user confirms it.
export function confirmDialog(dialog) {
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) =>
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true }),
  );
}
