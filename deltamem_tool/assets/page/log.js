// Shows the conversation.

import { byId, element } from "./dom.js";

const log = byId("log");
const NEAR = 40; // the log follows the answer if it is scrolled to within this many pixels of the end

// Shows a conversation from its start, with a note above it if there is one. `about` is the remark below a turn.
export function show(turns, note) {
  log.replaceChildren(...(note === null ? [] : [element("li", { className: "note", textContent: note })]));
  for (const { user, answer, about } of turns) add(user).finish(answer, about);
}

// Adds a turn whose answer is still to come.
export function add(user) {
  log.querySelector(".note")?.remove();
  const text = element("p");
  const about = element("small");
  const answer = element("li", { className: "answer", ariaBusy: "true" }, who("Model"), text, about);
  const items = [element("li", { className: "user" }, who("You"), element("p", { textContent: user })), answer];
  log.append(...items);
  log.scrollTop = log.scrollHeight;
  return {
    append(piece) {
      const follows = log.scrollHeight - log.scrollTop - log.clientHeight < NEAR;
      text.append(piece);
      if (follows) log.scrollTop = log.scrollHeight;
    },
    finish(words, told) {
      text.textContent = words;
      about.textContent = told;
      answer.ariaBusy = "false";
      log.scrollTop = log.scrollHeight;
    },
    get isShown() {
      return answer.isConnected;
    },
    remove() {
      for (const item of items) item.remove();
    },
  };
}

const who = (name) => element("b", { textContent: name });
