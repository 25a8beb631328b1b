// The page: which memory is open, the conversation with it, and what the buttons do.

import * as api from "./api.js";
import { connect, guardedBy, notice, saveAs } from "./controls.js";
import { byId, confirmed } from "./dom.js";
import { before } from "./history.js";
import { showList, showMore } from "./list.js";
import * as log from "./log.js";
import { addressOf, openName } from "./open.js";
import { showPicture, showVersions } from "./picture.js";

const MOST_TURNS = 100; // that are sent again; what they wrote is in the memory
const CHANGED = [409, 412]; // statuses that say that the memory is not as the page has it
const words = byId("words");

let model = null;
let memory; // what the server has of the open one: { version, digest, bytes }, or null; undefined until it was asked
let versions = [];
let answering = null; // the AbortController of a turn that is being answered
// The turns of each memory's conversation, [{ user, answer, report, about, first }]. They live as long as the page:
// after a reload there is the memory alone.
const talks = new Map();

const talk = () => talks.get(openName()) ?? [];
// The turn that made the memory what it is, if it is of this conversation.
const lastTurn = () => {
  const last = talk().at(-1);
  const made = versions.find(({ version }) => version === last?.report.version);
  return made !== undefined && made.digest === memory.digest ? last : null;
};

// What went wrong --------------------------------------------------------------------------------------------------

async function failed(error) {
  if (!(error instanceof api.ApiError)) throw error;
  if (error.status === 401) askForKey();
  else notice(error.message, "error");
  if (CHANGED.includes(error.status)) await refresh();
}

function askForKey() {
  if (api.hasKey()) notice("The API key is wrong.", "error");
  else notice("This server asks for an API key.");
  byId("key-form").hidden = false;
  byId("key").focus();
}

const guarded = guardedBy(failed);

// Showing ---------------------------------------------------------------------------------------------------------

// Reads the open memory, and shows it; unless another one is opened meanwhile.
async function refresh() {
  const name = openName();
  await showList(name);
  const stored = await api.getMemory(name);
  const history = stored === null ? [] : await api.listVersions(name);
  const earlier = before(history);
  const isKnown = earlier !== null && earlier.digest === memory?.digest; // a turn was added to what is shown
  const former = isKnown ? memory : earlier && (await api.getMemory(name, earlier.version));
  if (name !== openName()) return;
  [memory, versions] = [stored, history];
  showPicture(memory, former?.bytes ?? (lastTurn()?.first ? null : undefined));
  showVersions(versions, (version) => guarded(() => restore(version))());
  enable();
}

function enable() {
  for (const button of document.querySelectorAll("[data-changes]")) button.disabled = answering !== null;
  for (const id of ["fork", "save", "forget"]) byId(id).disabled ||= !memory;
  byId("save").disabled = !memory;
  byId("undo").disabled ||= before(versions) === null && !lastTurn()?.first;
  byId("send").hidden = answering !== null;
  byId("stop").hidden = answering === null;
}

async function open() {
  byId("name").textContent = openName();
  document.title = `${openName()} – deltamem`;
  [memory, versions] = [undefined, []];
  log.show([], "Loading …");
  await refresh();
  showTalk();
  words.focus();
}

function showTalk() {
  const note =
    memory === null
      ? "This memory is empty. Tell it something, reload the page, and ask."
      : "A new conversation: what was said before is in the memory alone.";
  log.show(talk(), talk().length ? null : note);
}

function beginTalk() {
  talks.delete(openName());
  showTalk();
}

// Turns -----------------------------------------------------------------------------------------------------------

async function send() {
  const user = words.value.trim();
  if (!user || answering || model === null) return;
  if (memory === undefined) await refresh();
  const turn = { user, answer: "", first: memory === null };
  const [name, digest, earlier] = [openName(), memory?.digest, talk()];
  const shown = log.add(user);
  words.value = "";
  answering = new AbortController();
  enable();
  try {
    turn.report = await api.complete(model.id, messagesOf(earlier, user), name, answering.signal, (piece) => {
      turn.answer += piece;
      shown.append(piece);
    });
  } catch (error) {
    shown.remove();
    if (name === openName()) words.value = user;
    if (error.name !== "AbortError") throw error;
    await refresh();
    const stored = await api.getMemory(name);
    notice(stored?.digest === digest ? "Stopped. The memory is as it was." : "Stopped too late: the memory has it.");
    return;
  } finally {
    answering = null;
    enable();
    words.focus();
  }
  turn.about = told(turn.report);
  shown.finish(turn.answer, turn.about);
  talks.set(name, [...earlier, turn]);
  await refresh();
  if (name === openName() && !shown.isShown) showTalk(); // another memory was opened meanwhile, and this one again
}

function told({ version, messages_written: written, messages_dropped: dropped, finish }) {
  const parts = [written ? `written as version ${version}` : "nothing was written"];
  if (dropped) parts.push(`the oldest ${dropped} messages are no longer in view`);
  if (finish === "length") parts.push("cut off at the limit");
  return parts.join(", ");
}

const messagesOf = (turns, user) => [
  ...turns.slice(-MOST_TURNS).flatMap((turn) => [
    { role: "user", content: turn.user },
    { role: "assistant", content: turn.answer },
  ]),
  { role: "user", content: user },
];

// What changes the memory -----------------------------------------------------------------------------------------

async function undo() {
  const [name, last, earlier] = [openName(), lastTurn(), before(versions)];
  if (earlier) await api.restoreMemory(name, earlier.version, api.etagOf(memory));
  else await api.deleteMemory(name, api.etagOf(memory));
  talks.set(name, last === null ? [] : talks.get(name).slice(0, -1));
  await refresh();
  showTalk();
}

async function restore(version) {
  await api.restoreMemory(openName(), version, api.etagOf(memory));
  await refresh();
  beginTalk();
}

async function fork() {
  byId("fork-name").value = "";
  if (!(await confirmed(byId("fork-dialog")))) return;
  const [copy, turns] = [byId("fork-name").value.trim(), talk()];
  await api.forkMemory(openName(), copy);
  talks.set(copy, turns);
  location.hash = addressOf(copy);
}

function save() {
  saveAs(openName(), memory.bytes);
}

async function load(file) {
  await api.putMemory(openName(), file, api.etagOf(memory));
  await refresh();
  beginTalk();
}

async function forget() {
  if (!(await confirmed(byId("forget-dialog")))) return;
  const name = openName();
  const { versions: deleted } = await api.deleteMemory(name);
  talks.delete(name);
  await refresh();
  showTalk();
  notice(`Forgotten, with ${deleted.length} ${deleted.length === 1 ? "version" : "versions"}.`);
}

// Start -----------------------------------------------------------------------------------------------------------

async function start() {
  byId("forget-key").hidden = !api.hasKey();
  model = await api.getModel();
  byId("key-form").hidden = true;
  document.querySelector("main").hidden = false;
  byId("model").textContent = model.id;
  await open();
}

async function useKey() {
  api.setKey(byId("key").value);
  byId("key").value = "";
  await start();
}

function forgetKey() {
  api.setKey(null);
  location.reload();
}

connect(guarded, { send, load, undo, fork, save, forget, more: showMore, begin: beginTalk, "forget-key": forgetKey });
byId("stop").onclick = () => answering?.abort();
byId("key-form").onsubmit = guarded(useKey);
window.onhashchange = guarded(open);
await guarded(start)();
