// deltamem-web: language models with an online associative memory, in the browser. The memory never leaves it.

export { Conversation } from "./conversation.js";
export * from "./errors.js";
export { fetchedFrom } from "./folder.js";
export { INTERRUPTED, LENGTH, STOP_STRING, STOP_TOKEN } from "./generation.js";
export { checkMemory, emptyMemory, memoryBytes, readMemory } from "./memory.js";
export { bestProvider, WebModel } from "./model.js";
export { MemoryStore } from "./store.js";
export { VERSION } from "./version.js";
