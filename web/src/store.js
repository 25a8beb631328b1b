// Stores named memories in the browser's IndexedDB, as memory files and separately for each adapter.

import { MemoryConflict, MemoryStateError } from "./errors.js";

const DATABASE = "deltamem";
const STORE = "memories";
const VERSION = 1;
const KEPT = 20; // number of earlier versions of a memory

/**
 * @typedef {object} Stored
 * @property {string} name
 * @property {number} version counts the changes, from 1
 * @property {number} updated milliseconds since 1970
 * @property {Uint8Array} bytes the memory file
 * @property {Uint8Array[]} former earlier versions of the file, the newest last
 */

/** The memories of one adapter. Those of other adapters are not visible. */
export class MemoryStore {
  /**
   * @param {string} adapter fingerprint
   * @returns {Promise<MemoryStore>}
   * @throws {MemoryStateError} the browser does not allow storage
   */
  static async open(adapter) {
    const request = indexedDB.open(DATABASE, VERSION);
    request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: ["adapter", "name"] });
    return new MemoryStore(adapter, await outcome(request, "The browser does not let this page store memories."));
  }

  constructor(adapter, database) {
    this._adapter = adapter;
    this._database = database;
    database.onversionchange = () => database.close();
  }

  close() {
    this._database.close();
  }

  /** @returns {Promise<Stored[]>} all memories, the most recently changed one first */
  async list() {
    const range = IDBKeyRange.bound([this._adapter], [this._adapter, []]);
    const all = await outcome(this._in("readonly").getAll(range), "The memories cannot be read.");
    return all.toSorted((one, other) => other.updated - one.updated);
  }

  /** @returns {Promise<Stored | null>} */
  async get(name) {
    return (await outcome(this._in("readonly").get([this._adapter, name]), `The memory ${name} cannot be read.`)) ?? null;
  }

  /**
   * Store a memory unless it has changed since the caller read it. The former version is kept.
   *
   * @param {string} name
   * @param {Uint8Array} bytes the memory file
   * @param {number} seen the version that the caller has read; 0 if there was none
   * @returns {Promise<Stored>}
   * @throws {MemoryConflict} another tab or window has changed it
   * @throws {MemoryStateError} the browser's storage is full
   */
  put(name, bytes, seen) {
    return this._change(name, seen, (before) => ({
      bytes,
      former: before === undefined ? [] : [...before.former, before.bytes].slice(-KEPT),
    }));
  }

  /**
   * Undo the last change. If there is no earlier version, the memory is deleted.
   *
   * @returns {Promise<Stored | null>}
   */
  back(name, seen) {
    return this._change(name, seen, ({ former }) =>
      former.length ? { bytes: former.at(-1), former: former.slice(0, -1) } : null,
    );
  }

  /** Delete a memory and all its earlier versions. */
  async delete(name) {
    await outcome(this._in("readwrite").delete([this._adapter, name]), `The memory ${name} cannot be deleted.`);
  }

  // Changes a memory in one transaction, completely or not at all.
  async _change(name, seen, change) {
    const what = `The memory ${name} was not stored.`;
    const store = this._in("readwrite");
    const before = await outcome(store.get([this._adapter, name]), what);
    if ((before?.version ?? 0) !== seen) {
      const why = "Another tab or window has changed it.";
      throw new MemoryConflict(what, why, "Load the memory again.");
    }
    const changed = change(before);
    if (changed === null) {
      await outcome(store.delete([this._adapter, name]), what);
      return null;
    }
    const stored = { adapter: this._adapter, name, version: seen + 1, updated: Date.now(), ...changed };
    const written = new Promise((resolve, reject) => {
      store.transaction.oncomplete = resolve;
      store.transaction.onabort = () => reject(failed(what, store.transaction.error));
    });
    await Promise.all([outcome(store.put(stored), what), written]);
    return stored;
  }

  _in(mode) {
    return this._database.transaction(STORE, mode).objectStore(STORE);
  }
}

function outcome(request, what) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(failed(what, request.error));
  });
}

function failed(what, error) {
  const isFull = error?.name === "QuotaExceededError";
  const why = isFull ? "The browser's storage is full." : `${error?.message ?? "The transaction was aborted"}.`;
  return new MemoryStateError(what, why, isFull ? "Save the memory as a file, and free some storage." : "Try again.");
}
