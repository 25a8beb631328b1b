// Shows the turns of a conversation.

import { byId, element } from "./dom.js";

const log = byId("log");
const EMPTY_NOTE = "This memory is empty. Tell it something, reload the page, and ask.";
const NEW_NOTE = "This is a new conversation. Earlier ones are only in the memory.";
const NEAR = 40; // the log follows the answer if it is scrolled to within this many pixels of the end

// Shows the conversation with a memory from its start. Without turns, a note says what the model knows.
export function showConversation(turns, isEmpty) {
  showTurns(turns, turns.length ? null : isEmpty ? EMPTY_NOTE : NEW_NOTE);
}

// Shows turns [{ user, answer, remark }], with a note above them if there is one. `remark` is shown below a turn.
export function showTurns(turns, note) {
  log.replaceChildren(...(note === null ? [] : [element("li", { className: "note", textContent: note })]));
  for (const { user, answer, remark } of turns) addTurn(user).finish(answer, remark);
}

// Adds a turn whose answer is still to come, and returns what changes it: `append` a piece of the answer, `finish` it with
// its whole text and a remark, or `remove` the turn.
export function addTurn(user) {
  log.querySelector(".note")?.remove();
  const text = element("p");
  const remark = element("small");
  const answer = element("li", { className: "answer", ariaBusy: "true" }, speaker("Model"), text, remark);
  const items = [element("li", { className: "user" }, speaker("You"), element("p", { textContent: user })), answer];
  log.append(...items);
  log.scrollTop = log.scrollHeight;
  return {
    append(piece) {
      const follows = log.scrollHeight - log.scrollTop - log.clientHeight < NEAR;
      text.append(piece);
      if (follows) log.scrollTop = log.scrollHeight;
    },
    finish(answerText, remarkText) {
      text.textContent = answerText;
      remark.textContent = remarkText;
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

const speaker = (name) => element("b", { textContent: name });
