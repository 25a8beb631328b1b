// The page: the open memory, the conversation with it, and the buttons.

import * as api from "./api.js";
import { connectControls, createGuard, saveAs, showNotice } from "./controls.js";
import { byId, confirmDialog } from "./dom.js";
import { previousVersion } from "./history.js";
import { showList, showMore } from "./list.js";
import * as log from "./log.js";
import { addressOf, currentName } from "./open.js";
import { showPicture, showVersions } from "./picture.js";

const MAX_TURNS = 100; // maximum number of turns that are sent again; what older ones wrote is in the memory
const CONFLICT_STATUSES = [409, 412]; // statuses for a memory that has changed since the page loaded it
const messageInput = byId("words");

let model = null;
let memory; // the open one as the server has it: { version, digest, bytes }; null if there is none, undefined until loaded
let versions = [];
let answering = null; // the AbortController of the turn that is being answered
// The turns of each memory's conversation, [{ user, answer, report, remark, isFirst }]. `isFirst` is whether nothing was
// stored before. They last as long as the page: after a reload only the memory is left.
const conversations = new Map();

const currentTurns = () => conversations.get(currentName()) ?? [];
// The turn that wrote the current version of the memory, if it belongs to this conversation.
const lastTurn = () => {
  const last = currentTurns().at(-1);
  const turnVersion = versions.find(({ version }) => version === last?.report.version);
  return turnVersion !== undefined && turnVersion.digest === memory.digest ? last : null;
};

// Errors ----------------------------------------------------------------------------------------------------------

async function showError(error) {
  if (!(error instanceof api.ApiError)) throw error;
  if (error.status === 401) askForKey();
  else showNotice(error.message, "error");
  if (CONFLICT_STATUSES.includes(error.status)) await refresh();
}

function askForKey() {
  if (api.hasKey()) showNotice("The API key is wrong.", "error");
  else showNotice("This server requires an API key.");
  byId("key-form").hidden = false;
  byId("key").focus();
}

const guard = createGuard(showError);

// Display ---------------------------------------------------------------------------------------------------------

// Loads the open memory and shows it, unless another one was opened meanwhile.
async function refresh() {
  const name = currentName();
  await showList(name);
  const storedMemory = await api.getMemory(name);
  const history = storedMemory === null ? [] : await api.listVersions(name);
  const earlier = previousVersion(history);
  const isKnown = earlier !== null && earlier.digest === memory?.digest; // the shown memory is the one before
  const former = isKnown ? memory : earlier && (await api.getMemory(name, earlier.version));
  if (name !== currentName()) return;
  [memory, versions] = [storedMemory, history];
  showPicture(memory, former?.bytes ?? (lastTurn()?.isFirst ? null : undefined));
  showVersions(versions, (version) => guard(() => restore(version))());
  updateControls();
}

// Enables the buttons that can be used now: none changes a memory that is not loaded yet, or that a turn is changing.
function updateControls() {
  const isBusy = answering !== null || memory === undefined;
  for (const button of document.querySelectorAll("[data-changes]")) button.disabled = isBusy;
  for (const id of ["fork", "save", "forget"]) byId(id).disabled ||= !memory;
  byId("save").disabled = !memory;
  byId("undo").disabled ||= previousVersion(versions) === null && !lastTurn()?.isFirst;
  byId("send").hidden = answering !== null;
  byId("stop").hidden = answering === null;
}

async function open() {
  byId("name").textContent = currentName();
  document.title = `${currentName()} – deltamem`;
  [memory, versions] = [undefined, []];
  log.showTurns([], "Loading …");
  updateControls();
  await refresh();
  showConversation();
  messageInput.focus();
}

function showConversation() {
  log.showConversation(currentTurns(), memory === null);
}

function beginConversation(name = currentName()) {
  conversations.delete(name);
  showConversation();
}

// Turns -----------------------------------------------------------------------------------------------------------

async function send() {
  const [name, user] = [currentName(), messageInput.value.trim()];
  if (!user || answering || model === null) return;
  if (memory === undefined) {
    await refresh();
    // Meanwhile the message may have been sent already, or another memory opened.
    if (memory === undefined || name !== currentName() || messageInput.value.trim() !== user) return;
  }
  const turn = { user, answer: "", isFirst: memory === null };
  const [digest, earlier] = [memory?.digest, currentTurns()];
  const entry = log.addTurn(user);
  messageInput.value = "";
  answering = new AbortController();
  updateControls();
  try {
    turn.report = await api.complete(model.id, messagesOf(earlier, user), name, answering.signal, (piece) => {
      turn.answer += piece;
      entry.append(piece);
    });
  } catch (error) {
    entry.remove();
    if (name === currentName()) messageInput.value = user;
    if (error.name !== "AbortError") throw error;
    await refresh();
    const storedMemory = await api.getMemory(name);
    const isUnchanged = storedMemory?.digest === digest;
    const tooLate = "Stopped too late: this turn is already in the memory.";
    showNotice(isUnchanged ? "Stopped. The memory has not changed." : tooLate);
    return;
  } finally {
    answering = null;
    updateControls();
    messageInput.focus();
  }
  turn.remark = describeReport(turn.report);
  entry.finish(turn.answer, turn.remark);
  conversations.set(name, [...earlier, turn]);
  await refresh();
  if (name === currentName() && !entry.isShown) showConversation(); // the user opened another memory and came back
}

// Returns the remark below a turn, from the server's report.
function describeReport({ version, messages_written: writtenCount, messages_dropped: droppedCount, finishReason }) {
  const parts = [writtenCount ? `written as version ${version}` : "nothing was written"];
  if (droppedCount) parts.push(`the oldest ${droppedCount} messages have left the context`);
  if (finishReason === "length") parts.push("cut off at the length limit");
  return parts.join(", ");
}

const messagesOf = (turns, user) => [
  ...turns.slice(-MAX_TURNS).flatMap((turn) => [
    { role: "user", content: turn.user },
    { role: "assistant", content: turn.answer },
  ]),
  { role: "user", content: user },
];

// Changes of the memory -------------------------------------------------------------------------------------------

async function undo() {
  const [name, last, earlier] = [currentName(), lastTurn(), previousVersion(versions)];
  if (earlier) await api.restoreMemory(name, earlier.version, api.etagOf(memory));
  else await api.deleteMemory(name, api.etagOf(memory));
  conversations.set(name, last === null ? [] : conversations.get(name).slice(0, -1));
  await refresh();
  showConversation();
}

async function restore(version) {
  const name = currentName();
  await api.restoreMemory(name, version, api.etagOf(memory));
  await refresh();
  beginConversation(name);
}

async function fork() {
  byId("fork-name").value = "";
  if (!(await confirmDialog(byId("fork-dialog")))) return;
  const [copy, turns] = [byId("fork-name").value.trim(), currentTurns()];
  await api.forkMemory(currentName(), copy);
  conversations.set(copy, turns);
  location.hash = addressOf(copy);
}

function save() {
  saveAs(currentName(), memory.bytes);
}

async function load(file) {
  const name = currentName();
  await api.putMemory(name, file, api.etagOf(memory));
  await refresh();
  beginConversation(name);
}

async function forget() {
  if (!(await confirmDialog(byId("forget-dialog")))) return;
  const name = currentName();
  const { versions: deleted } = await api.deleteMemory(name);
  conversations.delete(name);
  await refresh();
  showConversation();
  showNotice(`Forgotten: ${deleted.length} ${deleted.length === 1 ? "version" : "versions"} deleted.`);
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

connectControls(guard, {
  send,
  load,
  undo,
  fork,
  save,
  forget,
  more: showMore,
  begin: beginConversation,
  "forget-key": forgetKey,
});
byId("stop").onclick = () => answering?.abort();
byId("key-form").onsubmit = guard(useKey);
window.onhashchange = guard(open);
await guard(start)();
