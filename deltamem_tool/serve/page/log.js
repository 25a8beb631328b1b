// The conversation as it is shown.

import { byId, element } from "./dom.js";

const log = byId("log");
const NEAR = 40; // pixels from the end within which the log follows the answer

// Shows a conversation from its start, below a note if there is one.
export function show(turns, note) {
  log.replaceChildren(...(note === null ? [] : [element("li", { className: "note", textContent: note })]));
  for (const { user, answer, report } of turns) add(user).finish(answer, report);
}

// A turn whose answer is to come.
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
    finish(words, report) {
      text.textContent = words;
      about.textContent = told(report);
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

function told({ version, messages_written: written, messages_dropped: dropped, finish }) {
  const parts = [written ? `written as version ${version}` : "nothing was written"];
  if (dropped) parts.push(`the oldest ${dropped} messages are no longer in view`);
  if (finish === "length") parts.push("cut off at the limit");
  return parts.join(", ");
}
