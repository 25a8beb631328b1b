// Calls the model, which runs in a worker thread.

const WORKER = new URL("worker.js", document.baseURI).href;
// Only the page's two worker scripts may run.
const scriptPolicy = globalThis.trustedTypes?.createPolicy("deltamem", { createScriptURL }) ?? { createScriptURL };
const SERVICE = new URL("service.js", document.baseURI).href;
const blob = URL.createObjectURL(new Blob([`import ${JSON.stringify(WORKER)};`], { type: "text/javascript" }));

function createScriptURL(url) {
  if (url === blob || url === SERVICE) return url;
  throw new TypeError(`${url} is not a script of this page`);
}

/** An error from the model's thread: what failed, why, and what to do next. */
export class EngineError extends Error {
  constructor({ name, message, what, why, next }) {
    super(what === null ? message : [what, why, next].filter(Boolean).join(" "));
    this.name = name;
    this.isExpected = what !== null || name === "AbortError";
  }
}

// A worker from a blob inherits the policy of this page, so it cannot fetch from other hosts either.
const worker = new Worker(scriptPolicy.createScriptURL(blob), { type: "module" });
const pendingCalls = new Map();
let lastId = 0;

worker.onmessage = ({ data: { id, progress, result, error } }) => {
  const { resolve, reject, onProgress } = pendingCalls.get(id);
  if (progress !== undefined) return onProgress(progress);
  pendingCalls.delete(id);
  if (error === undefined) resolve(result);
  else reject(new EngineError(error));
};
worker.onerror = (event) => {
  const message = `The model's thread failed: ${event.message ?? "it could not be loaded"}`;
  for (const { reject } of pendingCalls.values()) reject(new EngineError({ name: "Error", message, what: null }));
  pendingCalls.clear();
};

/**
 * Run `call` of worker.js.
 *
 * @param {string} call
 * @param {object} [argument]
 * @param {(progress: object) => void} [onProgress] called with what the call reports while it runs
 * @returns {Promise<unknown>} its result
 * @throws {EngineError} the call failed
 */
export function callWorker(call, argument, onProgress = () => {}) {
  const id = ++lastId;
  return new Promise((resolve, reject) => {
    pendingCalls.set(id, { resolve, reject, onProgress });
    worker.postMessage({ id, call, argument });
  });
}

/** Cache the page for offline visits, if the browser allows it. */
export const cacheForOffline = () =>
  navigator.serviceWorker?.register(scriptPolicy.createScriptURL(SERVICE)).catch((error) => console.info(error.message));
