// Stores named memories in the browser's IndexedDB, as memory files and separately for each adapter.

import { MemoryConflict, MemoryStateError } from "./errors.js";

const DATABASE = "deltamem";
const STORE = "memories";
const VERSION = 1;
const MAX_FORMER = 20; // number of earlier versions of a memory

/**
 * @typedef {object} MemoryRecord
 * @property {string} adapter fingerprint
 * @property {string} name
 * @property {number} version counts the changes, from 1
 * @property {number} updated milliseconds since 1970
 * @property {Uint8Array} bytes the memory file
 * @property {Uint8Array[]} former earlier versions of the file, the newest last
 */

/** The memories of one adapter. Those of other adapters are not visible. */
export class MemoryStore {
  /**
   * Open the store in the browser's database.
   *
   * @param {string} adapter fingerprint
   * @returns {Promise<MemoryStore>}
   * @throws {MemoryStateError} the browser does not allow storage
   */
  static async open(adapter) {
    const request = indexedDB.open(DATABASE, VERSION);
    request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: ["adapter", "name"] });
    return new MemoryStore(adapter, await resultOf(request, "The browser does not let this page store memories."));
  }

  constructor(adapter, database) {
    this._adapter = adapter;
    this._database = database;
    database.onversionchange = () => database.close();
  }

  /** Close the connection to the database. */
  close() {
    this._database.close();
  }

  /**
   * Return all memories, the most recently changed one first.
   *
   * @returns {Promise<MemoryRecord[]>}
   * @throws {MemoryStateError} the database cannot be read
   */
  async list() {
    const range = IDBKeyRange.bound([this._adapter], [this._adapter, []]);
    const records = await resultOf(this._objectStore("readonly").getAll(range), "The memories cannot be read.");
    return records.toSorted((a, b) => b.updated - a.updated);
  }

  /**
   * Return a memory, or null if there is none of this name.
   *
   * @param {string} name
   * @returns {Promise<MemoryRecord | null>}
   * @throws {MemoryStateError} the database cannot be read
   */
  async get(name) {
    const request = this._objectStore("readonly").get([this._adapter, name]);
    return (await resultOf(request, `The memory ${name} cannot be read.`)) ?? null;
  }

  /**
   * Store a memory unless it has changed since the caller read it. The former version is kept.
   *
   * @param {string} name
   * @param {Uint8Array} bytes the memory file
   * @param {number} expectedVersion version that the caller has read; 0 if there was none
   * @returns {Promise<MemoryRecord>}
   * @throws {MemoryConflict} another tab or window has changed it
   * @throws {MemoryStateError} the browser's storage is full
   */
  put(name, bytes, expectedVersion) {
    return this._change(name, expectedVersion, (current) => ({
      bytes,
      former: current === undefined ? [] : [...current.former, current.bytes].slice(-MAX_FORMER),
    }));
  }

  /**
   * Undo the last change. If there is no earlier version, the memory is deleted. If there is no memory, nothing happens.
   *
   * @param {string} name
   * @param {number} expectedVersion version that the caller has read
   * @returns {Promise<MemoryRecord | null>} the restored version; null if there is no memory any more
   * @throws {MemoryConflict} another tab or window has changed it
   * @throws {MemoryStateError} the browser's storage is full
   */
  back(name, expectedVersion) {
    return this._change(name, expectedVersion, ({ former = [] } = {}) =>
      former.length ? { bytes: former.at(-1), former: former.slice(0, -1) } : null,
    );
  }

  /** Delete a memory and all its earlier versions. */
  async delete(name) {
    await resultOf(this._objectStore("readwrite").delete([this._adapter, name]), `The memory ${name} cannot be deleted.`);
  }

  // Changes a memory in one transaction, completely or not at all. `change` returns the new bytes and earlier versions, or
  // null to delete the memory.
  async _change(name, expectedVersion, change) {
    const what = `The memory ${name} was not stored.`;
    const store = this._objectStore("readwrite");
    const current = await resultOf(store.get([this._adapter, name]), what);
    if ((current?.version ?? 0) !== expectedVersion) {
      const why = "Another tab or window has changed it.";
      throw new MemoryConflict(what, why, "Load the memory again.");
    }
    const newValues = change(current);
    if (newValues === null) {
      await resultOf(store.delete([this._adapter, name]), what);
      return null;
    }
    const record = { adapter: this._adapter, name, version: expectedVersion + 1, updated: Date.now(), ...newValues };
    const commit = new Promise((resolve, reject) => {
      store.transaction.oncomplete = resolve;
      store.transaction.onabort = () => reject(storageError(what, store.transaction.error));
    });
    await Promise.all([resultOf(store.put(record), what), commit]);
    return record;
  }

  _objectStore(mode) {
    return this._database.transaction(STORE, mode).objectStore(STORE);
  }
}

// Resolves to the result of an IndexedDB request.
function resultOf(request, what) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(storageError(what, request.error));
  });
}

function storageError(what, error) {
  const isFull = error?.name === "QuotaExceededError";
  const why = isFull ? "The browser's storage is full." : `${error?.message ?? "The transaction was aborted"}.`;
  return new MemoryStateError(what, why, isFull ? "Save the memory as a file, and free some storage." : "Try again.");
}
