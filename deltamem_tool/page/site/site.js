// The page: the open memory, the conversation with it, and the buttons. Memories are stored in IndexedDB.

import { connectControls, createGuard, saveAs, showNotice } from "./controls.js";
import { byId, confirmDialog } from "./dom.js";
import { cacheForOffline, callWorker, EngineError } from "./engine.js";
import { formatBytes, showLayers } from "./layers.js";
import { DeltaMemError } from "./library/errors.js";
import { readMemory } from "./library/memory.js";
import { MemoryStore } from "./library/store.js";
import * as log from "./log.js";
import { showList } from "./memories.js";
import { currentName } from "./open.js";

const messageInput = byId("words");
const channel = new BroadcastChannel("deltamem"); // tells the other tabs which memory has changed

let store;
let adapter;
let answering = null; // the AbortController of the turn that is being answered
// The conversation with each memory: { record, unstoredBytes, turns: [{ user, answer, remark }] }. `record` is that of
// the store as this tab knows it, and `unstoredBytes` the memory file that could not be stored, or null.
const conversations = new Map();

const currentConversation = () => conversations.get(currentName());
const versionOf = (record) => record?.version ?? 0;

// Errors ----------------------------------------------------------------------------------------------------------

function showError(error) {
  const isExpected = error instanceof DeltaMemError || (error instanceof EngineError && error.isExpected);
  showNotice(error.message.replaceAll("\n", " "), "error");
  if (!isExpected) throw error;
}

const guard = createGuard(showError);

// Tabs take turns: each continues from what the previous one wrote.
const withLock = (name, action, options = {}) =>
  navigator.locks ? navigator.locks.request(`deltamem ${adapter} ${name}`, options, action) : action();

// Display ---------------------------------------------------------------------------------------------------------

// Shows the memory, and enables the buttons that can be used now.
function showMemory() {
  const isOpen = currentConversation() !== undefined; // if not, it is still being opened
  const isAnswering = answering !== null;
  for (const button of document.querySelectorAll("[data-changes]")) button.disabled = isAnswering || !isOpen;
  if (!isOpen) return;
  const { record, unstoredBytes } = currentConversation();
  const bytes = unstoredBytes ?? record?.bytes;
  const version = unstoredBytes ? "not stored" : `version ${versionOf(record)}`;
  byId("summary").textContent = bytes ? `${version}, ${formatBytes(bytes.length)}` : "Nothing is stored yet.";
  const former = unstoredBytes ? record?.bytes : record?.former.at(-1);
  showLayers(bytes ? readMemory(bytes) : null, former ? readMemory(former) : null);
  byId("save").disabled = !bytes;
  byId("undo").disabled ||= !bytes;
  byId("forget").disabled ||= !bytes;
  byId("send").hidden = isAnswering;
  byId("stop").hidden = !isAnswering;
}

function showConversation() {
  if (currentConversation() === undefined) return; // another memory was opened meanwhile
  const { record, turns } = currentConversation();
  log.showConversation(turns, !record);
}

// Reloads a memory, and the list. If another tab has changed the memory, the conversation continues from that.
async function refresh(name = currentName()) {
  const record = await store.get(name);
  const conversation = conversations.get(name);
  if (conversation === undefined) {
    await callWorker("begin", { name, bytes: record?.bytes });
    conversations.set(name, { record, unstoredBytes: null, turns: [] });
  } else if (versionOf(conversation.record) !== versionOf(record) || conversation.record?.updated !== record?.updated) {
    await callWorker("put", { name, bytes: record?.bytes ?? null });
    Object.assign(conversation, { record, unstoredBytes: null });
  }
  await showList(store, currentName());
  if (name === currentName()) showMemory();
}

async function open() {
  byId("name").textContent = currentName();
  document.title = `${currentName()} – deltamem`;
  showMemory();
  await refresh();
  showConversation();
  messageInput.focus();
}

async function beginConversation() {
  const name = currentName();
  const conversation = currentConversation();
  await callWorker("begin", { name, bytes: conversation.unstoredBytes ?? conversation.record?.bytes });
  conversation.turns = [];
  showConversation();
}

// Turns -----------------------------------------------------------------------------------------------------------

async function send() {
  const user = messageInput.value.trim();
  if (!user || answering) return;
  const name = currentName();
  const entry = log.addTurn(user);
  messageInput.value = "";
  answering = new AbortController();
  const { signal } = answering;
  showMemory();
  const answer = async () => {
    await refresh(name);
    signal.throwIfAborted();
    conversations.get(name).turns.push(await generateAnswer(name, user, entry));
  };
  try {
    await withLock(name, answer, { signal });
  } catch (error) {
    entry.remove();
    if (name === currentName()) messageInput.value = user;
    if (error.name !== "AbortError") throw error;
    showNotice("Stopped. The memory has not changed.");
  } finally {
    answering = null;
    showMemory();
    messageInput.focus();
  }
  channel.postMessage(name);
  await showList(store, currentName());
  if (name === currentName() && !entry.isShown) showConversation(); // the user opened another memory and came back
}

// Returns the turn after its memory is stored. If that fails, the memory stays in this tab.
async function generateAnswer(name, user, entry) {
  let answer = "";
  const reply = await callWorker("say", { name, content: user }, ({ piece }) => {
    answer += piece;
    entry.append(piece);
  });
  const conversation = conversations.get(name);
  const parts = [];
  try {
    conversation.record = await store.put(name, reply.bytes, versionOf(conversation.record));
    conversation.unstoredBytes = null;
    navigator.storage?.persist?.(); // without this, a browser short of disk space may delete the memories
    parts.push(`written as version ${conversation.record.version}`);
  } catch (error) {
    if (!(error instanceof DeltaMemError)) throw error;
    conversation.unstoredBytes = reply.bytes;
    parts.push("not stored");
    showError(error);
  }
  if (reply.context.dropped) parts.push(`the oldest ${reply.context.dropped} messages have left the context`);
  if (reply.answer.why === "length") parts.push("cut off at the length limit");
  if (reply.answer.why === "interrupted") parts.push("stopped");
  const turn = { user, answer, remark: parts.join(", ") };
  entry.finish(turn.answer, turn.remark);
  return turn;
}

// Changes of the memory -------------------------------------------------------------------------------------------

// Applies `change` to the stored memory; the conversation continues from the result.
async function changeMemory(change) {
  const name = currentName();
  await withLock(name, async () => {
    const conversation = conversations.get(name);
    conversation.record = await change(name, versionOf(await store.get(name)), conversation);
    conversation.unstoredBytes = null;
  });
  channel.postMessage(name);
  await showList(store, currentName());
  showMemory();
  showConversation();
}

const undo = () =>
  changeMemory(async (name, version, conversation) => {
    const record = conversation.unstoredBytes === null ? await store.back(name, version) : conversation.record;
    const { undone } = await callWorker("put", { name, bytes: record?.bytes ?? null, isUndo: true });
    if (undone) conversation.turns.pop();
    return record;
  });

async function load(file) {
  const bytes = await callWorker("check", { bytes: new Uint8Array(await file.arrayBuffer()) });
  await changeMemory(async (name, version, conversation) => {
    const record = await store.put(name, bytes, version);
    await callWorker("begin", { name, bytes });
    conversation.turns.length = 0;
    return record;
  });
}

async function forget() {
  if (!(await confirmDialog(byId("forget-dialog")))) return;
  await changeMemory(async (name, version, conversation) => {
    await store.delete(name);
    await callWorker("begin", { name, bytes: null });
    conversation.turns.length = 0;
    return null;
  });
  showNotice("Forgotten.");
}

function save() {
  const { unstoredBytes, record } = currentConversation();
  saveAs(currentName(), unstoredBytes ?? record.bytes);
}

// Start -----------------------------------------------------------------------------------------------------------

async function start() {
  const files = await (await fetch("files.json", { cache: "no-cache" })).json();
  const requestedProvider = new URLSearchParams(location.search).get("provider");
  const loadedBytes = new Map(); // by file name
  const options = { base: document.baseURI, expected: files.expected, requestedProvider };
  const model = await callWorker("load", options, ({ name, loaded }) => {
    loadedBytes.set(name, loaded);
    const sum = [...loadedBytes.values()].reduce((total, bytes) => total + bytes, 0);
    byId("loaded").textContent = `${formatBytes(sum)}: ${name}`;
  });
  byId("loaded").textContent = "";
  ({ adapter } = model);
  store = await MemoryStore.open(adapter);
  const backend = model.provider === "webgpu" ? "WebGPU" : "WebAssembly";
  byId("model").textContent = [model.baseModel, backend].filter(Boolean).join(", ");
  byId("loading").hidden = true;
  document.querySelector("main").hidden = false;
  await open();
  await cacheForOffline();
}

connectControls(guard, { send, load, undo, save, forget, begin: beginConversation });
byId("stop").onclick = () => {
  answering?.abort(); // while it waits for another tab
  callWorker("stop");
};
window.onhashchange = guard(open);
channel.onmessage = guard(async () => {
  if (!answering && store) await refresh();
});
await guard(start)();
