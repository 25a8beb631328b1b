// The page: the open memory, the conversation with it, and the buttons. Memories are stored in IndexedDB.

import { connect, guardedBy, notice, saveAs } from "./controls.js";
import { byId, confirmed } from "./dom.js";
import { ask, EngineError, keepOffline } from "./engine.js";
import { showLayers, sizeOf } from "./layers.js";
import { DeltaMemError } from "./library/errors.js";
import { readMemory } from "./library/memory.js";
import { MemoryStore } from "./library/store.js";
import * as log from "./log.js";
import { showList } from "./memories.js";
import { openName } from "./open.js";

const words = byId("words");
const told = new BroadcastChannel("deltamem"); // tells the other tabs which memory has changed

let store;
let adapter;
let answering = false;
// What this tab knows about each memory: { stored, unstored, turns: [{ user, answer, about }] }. `unstored` is the memory
// file that could not be stored, or null.
const talks = new Map();

const talk = () => talks.get(openName());
const versionOf = (stored) => stored?.version ?? 0;

// Errors ----------------------------------------------------------------------------------------------------------

function failed(error) {
  const isExpected = error instanceof DeltaMemError || (error instanceof EngineError && error.isExpected);
  notice(error.message.replaceAll("\n", " "), "error");
  if (!isExpected) throw error;
}

const guarded = guardedBy(failed);

// Tabs take turns: each continues from what the previous one wrote.
const alone = (name, action) =>
  navigator.locks ? navigator.locks.request(`deltamem ${adapter} ${name}`, action) : action();

// Display ---------------------------------------------------------------------------------------------------------

function show() {
  if (talk() === undefined) return; // it is still being opened
  const { stored, unstored } = talk();
  const bytes = unstored ?? stored?.bytes;
  const version = unstored ? "not stored" : `version ${versionOf(stored)}`;
  byId("summary").textContent = bytes ? `${version}, ${sizeOf(bytes.length)}` : "Nothing is stored yet.";
  const former = unstored ? stored?.bytes : stored?.former.at(-1);
  showLayers(bytes ? readMemory(bytes) : null, former ? readMemory(former) : null);
  for (const button of document.querySelectorAll("[data-changes]")) button.disabled = answering;
  byId("save").disabled = !bytes;
  byId("undo").disabled ||= !bytes;
  byId("forget").disabled ||= !bytes;
  byId("send").hidden = answering;
  byId("stop").hidden = !answering;
}

function showTalk() {
  const { stored, turns } = talk();
  const note = stored
    ? "This is a new conversation. Earlier ones are only in the memory."
    : "This memory is empty. Tell it something, reload the page, and ask.";
  log.show(turns, turns.length ? null : note);
}

// Reloads the open memory and the list. If another tab has changed the memory, the conversation continues from that.
async function refresh() {
  const name = openName();
  const stored = await store.get(name);
  const known = talks.get(name);
  if (known === undefined) {
    await ask("begin", { name, bytes: stored?.bytes });
    talks.set(name, { stored, unstored: null, turns: [] });
  } else if (versionOf(known.stored) !== versionOf(stored) || known.stored?.updated !== stored?.updated) {
    await ask("put", { name, bytes: stored?.bytes ?? null });
    Object.assign(known, { stored, unstored: null });
  }
  await showList(store, name);
  if (name === openName()) show();
}

async function open() {
  byId("name").textContent = openName();
  document.title = `${openName()} – deltamem`;
  await refresh();
  showTalk();
  words.focus();
}

async function beginTalk() {
  const name = openName();
  const known = talk();
  await ask("begin", { name, bytes: known.unstored ?? known.stored?.bytes });
  known.turns = [];
  showTalk();
}

// Turns -----------------------------------------------------------------------------------------------------------

async function send() {
  const user = words.value.trim();
  if (!user || answering) return;
  const name = openName();
  const shown = log.add(user);
  words.value = "";
  answering = true;
  show();
  try {
    await alone(name, async () => {
      await refresh();
      talks.get(name).turns.push(await answered(name, user, shown));
    });
  } catch (error) {
    shown.remove();
    if (name === openName()) words.value = user;
    if (error.name !== "AbortError") throw error;
    notice("Stopped. The memory has not changed.");
  } finally {
    answering = false;
    show();
    words.focus();
  }
  told.postMessage(name);
  await showList(store, openName());
  if (name === openName() && !shown.isShown) showTalk(); // the user opened another memory and came back
}

async function answered(name, user, shown) {
  let answer = "";
  const said = await ask("say", { name, content: user }, ({ piece }) => {
    answer += piece;
    shown.append(piece);
  });
  const known = talks.get(name);
  const parts = [];
  try {
    known.stored = await store.put(name, said.bytes, versionOf(known.stored));
    known.unstored = null;
    navigator.storage?.persist?.(); // without this, a browser short of disk space may delete the memories
    parts.push(`written as version ${known.stored.version}`);
  } catch (error) {
    if (!(error instanceof DeltaMemError)) throw error;
    known.unstored = said.bytes;
    parts.push("not stored");
    failed(error);
  }
  if (said.context.dropped) parts.push(`the oldest ${said.context.dropped} messages have left the context`);
  if (said.answer.why === "length") parts.push("cut off at the length limit");
  if (said.answer.why === "interrupted") parts.push("stopped");
  const turn = { user, answer, about: parts.join(", ") };
  shown.finish(turn.answer, turn.about);
  return turn;
}

// Changes of the memory -------------------------------------------------------------------------------------------

// Applies `change` to the stored memory; the conversation continues from the result.
async function changed(change) {
  const name = openName();
  await alone(name, async () => {
    const known = talks.get(name);
    known.stored = await change(name, versionOf(await store.get(name)), known);
    known.unstored = null;
  });
  told.postMessage(name);
  await showList(store, openName());
  show();
  showTalk();
}

const undo = () =>
  changed(async (name, version, known) => {
    const stored = known.unstored === null ? await store.back(name, version) : known.stored;
    const { undone } = await ask("put", { name, bytes: stored?.bytes ?? null, isUndo: true });
    if (undone) known.turns.pop();
    return stored;
  });

async function load(file) {
  const bytes = await ask("check", { bytes: new Uint8Array(await file.arrayBuffer()) });
  await changed(async (name, version, known) => {
    const stored = await store.put(name, bytes, version);
    await ask("begin", { name, bytes });
    known.turns.length = 0;
    return stored;
  });
}

async function forget() {
  if (!(await confirmed(byId("forget-dialog")))) return;
  await changed(async (name, version, known) => {
    await store.delete(name);
    await ask("begin", { name, bytes: null });
    known.turns.length = 0;
    return null;
  });
  notice("Forgotten.");
}

function save() {
  const { unstored, stored } = talk();
  saveAs(openName(), unstored ?? stored.bytes);
}

// Start -----------------------------------------------------------------------------------------------------------

async function start() {
  const files = await (await fetch("files.json", { cache: "no-cache" })).json();
  const wanted = new URLSearchParams(location.search).get("provider");
  const loaded = new Map();
  const model = await ask("load", { base: document.baseURI, expected: files.expected, wanted }, ({ name, ...progress }) => {
    loaded.set(name, progress);
    const sum = [...loaded.values()].reduce((all, { loaded }) => all + loaded, 0);
    byId("loaded").textContent = `${sizeOf(sum)}: ${name}`;
  });
  byId("loaded").textContent = "";
  ({ adapter } = model);
  store = await MemoryStore.open(adapter);
  const computes = model.provider === "webgpu" ? "WebGPU" : "WebAssembly";
  byId("model").textContent = [model.baseModel, computes].filter(Boolean).join(", ");
  byId("loading").hidden = true;
  document.querySelector("main").hidden = false;
  await open();
  await keepOffline();
}

connect(guarded, { send, load, undo, save, forget, begin: beginTalk });
byId("stop").onclick = () => ask("stop");
window.onhashchange = guarded(open);
told.onmessage = guarded(async () => {
  if (!answering && store) await refresh();
});
await guarded(start)();
