// Calls the server's public API. Addresses are relative to the page, which a proxy may serve under another path.

const KEY = "deltamem-key"; // in sessionStorage, which ends with the tab
const MEDIA_TYPE = "application/vnd.safetensors";

// An error of the server, or of the connection to it.
export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status; // 0 if there was no answer
  }
}

export const setKey = (key) => (key ? sessionStorage.setItem(KEY, key) : sessionStorage.removeItem(KEY));
export const hasKey = () => sessionStorage.getItem(KEY) !== null;

const memoryPath = (name) => `v1/memories/${encodeURIComponent(name)}`;
const jsonRequest = (body) => ({ body: JSON.stringify(body), headers: { "Content-Type": "application/json" } });
// Returns headers with which a change only succeeds if the memory is still as the page has it. A null etag means that there
// is none yet.
const ifUnchanged = (etag) => (etag === null ? { "If-None-Match": "*" } : { "If-Match": etag });

// Returns the response of the server; its errors become an ApiError.
async function request(path, { headers, ...options } = {}) {
  const key = sessionStorage.getItem(KEY);
  const authorization = key === null ? {} : { Authorization: `Bearer ${key}` };
  let response;
  try {
    response = await fetch(path, { cache: "no-store", ...options, headers: { ...headers, ...authorization } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The server cannot be reached.");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new ApiError(response.status, body?.error?.message ?? `The server answered with status ${response.status}.`);
}

export const getModel = async () => (await (await request("v1/models")).json()).data[0];

export async function listMemories(after) {
  return (await request(after === null ? "v1/memories" : `v1/memories?after=${encodeURIComponent(after)}`)).json();
}

// Returns a version of a memory as a memory file, or null if there is none.
export async function getMemory(name, version = null) {
  try {
    const response = await request(version === null ? memoryPath(name) : `${memoryPath(name)}?version=${version}`);
    const { headers } = response;
    const digest = headers.get("ETag").replaceAll('"', "");
    return { version: Number(headers.get("X-Deltamem-Version")), digest, bytes: await response.arrayBuffer() };
  } catch (error) {
    if (error.status === 404) return null;
    throw error;
  }
}

export const etagOf = (memory) => (memory === null ? null : `"${memory.digest}"`);

export const listVersions = async (name) => (await (await request(`${memoryPath(name)}/versions`)).json()).data;

export const putMemory = (name, file, etag) =>
  request(memoryPath(name), { method: "PUT", body: file, headers: { "Content-Type": MEDIA_TYPE, ...ifUnchanged(etag) } });

export const deleteMemory = async (name, etag = null) =>
  (await request(memoryPath(name), { method: "DELETE", headers: etag === null ? {} : ifUnchanged(etag) })).json();

export const forkMemory = (name, id) => request(`${memoryPath(name)}/fork`, { method: "POST", ...jsonRequest({ id }) });

export function restoreMemory(name, version, etag) {
  const { body, headers } = jsonRequest({ version });
  return request(`${memoryPath(name)}/restore`, { method: "POST", body, headers: { ...headers, ...ifUnchanged(etag) } });
}

// Passes the pieces of the answer to `onPiece`, and returns the server's report on the memory after it, with the reason why
// the answer ended.
export async function complete(model, messages, memory, signal, onPiece) {
  const body = { model, messages, user: memory, stream: true };
  const response = await request("v1/chat/completions", { method: "POST", signal, ...jsonRequest(body) });
  let report = null;
  for await (const { error, choices, deltamem } of readEvents(response.body)) {
    if (error) throw new ApiError(response.status, error.message);
    const [{ delta, finish_reason: finishReason }] = choices;
    if (delta.content) onPiece(delta.content);
    if (finishReason) report = { ...deltamem, finishReason };
  }
  if (report === null) throw new ApiError(0, "The connection broke before the answer was complete.");
  return report;
}

// Yields the data of server-sent events.
async function* readEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let chunk;
    try {
      chunk = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      return; // the connection broke
    }
    if (chunk.done) return;
    const lines = (rest + chunk.value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: {")) yield JSON.parse(line.slice("data: ".length));
    }
  }
}
