// The page: the open memory, the conversation with it, and the buttons.

import * as api from "./api.js";
import { connect, guardedBy, notice, saveAs } from "./controls.js";
import { byId, confirmed } from "./dom.js";
import { before } from "./history.js";
import { showList, showMore } from "./list.js";
import * as log from "./log.js";
import { addressOf, openName } from "./open.js";
import { showPicture, showVersions } from "./picture.js";

const MOST_TURNS = 100; // maximum number of turns that are sent again; what older ones wrote is in the memory
const CHANGED = [409, 412]; // statuses for a memory that has changed since the page loaded it
const words = byId("words");

let model = null;
let memory; // the open one as the server has it: { version, digest, bytes }; null if there is none, undefined until loaded
let versions = [];
let answering = null; // the AbortController of the turn that is being answered
// The turns of each memory's conversation, [{ user, answer, report, about, first }]. They last as long as the page: after
// a reload only the memory is left.
const talks = new Map();

const talk = () => talks.get(openName()) ?? [];
// The turn that wrote the current version of the memory, if it belongs to this conversation.
const lastTurn = () => {
  const last = talk().at(-1);
  const made = versions.find(({ version }) => version === last?.report.version);
  return made !== undefined && made.digest === memory.digest ? last : null;
};

// Errors ----------------------------------------------------------------------------------------------------------

async function failed(error) {
  if (!(error instanceof api.ApiError)) throw error;
  if (error.status === 401) askForKey();
  else notice(error.message, "error");
  if (CHANGED.includes(error.status)) await refresh();
}

function askForKey() {
  if (api.hasKey()) notice("The API key is wrong.", "error");
  else notice("This server requires an API key.");
  byId("key-form").hidden = false;
  byId("key").focus();
}

const guarded = guardedBy(failed);

// Display ---------------------------------------------------------------------------------------------------------

// Loads the open memory and shows it, unless another one was opened meanwhile.
async function refresh() {
  const name = openName();
  await showList(name);
  const stored = await api.getMemory(name);
  const history = stored === null ? [] : await api.listVersions(name);
  const earlier = before(history);
  const isKnown = earlier !== null && earlier.digest === memory?.digest; // the shown memory is the one before
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
      : "This is a new conversation. Earlier ones are only in the memory.";
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
    const isUnchanged = stored?.digest === digest;
    notice(isUnchanged ? "Stopped. The memory has not changed." : "Stopped too late: this turn is already in the memory.");
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
  if (name === openName() && !shown.isShown) showTalk(); // the user opened another memory and came back
}

function told({ version, messages_written: written, messages_dropped: dropped, finish }) {
  const parts = [written ? `written as version ${version}` : "nothing was written"];
  if (dropped) parts.push(`the oldest ${dropped} messages have left the context`);
  if (finish === "length") parts.push("cut off at the length limit");
  return parts.join(", ");
}

const messagesOf = (turns, user) => [
  ...turns.slice(-MOST_TURNS).flatMap((turn) => [
    { role: "user", content: turn.user },
    { role: "assistant", content: turn.answer },
  ]),
  { role: "user", content: user },
];

// Changes of the memory -------------------------------------------------------------------------------------------

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
  notice(`Forgotten: ${deleted.length} ${deleted.length === 1 ? "version" : "versions"} deleted.`);
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
