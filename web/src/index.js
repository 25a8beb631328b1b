// deltamem-web: models with an online associative memory in a browser. The memory stays there.

export { Conversation } from "./conversation.js";
export * from "./errors.js";
export { fetchedFrom } from "./folder.js";
export { INTERRUPTED, LENGTH, STOP_STRING, STOP_TOKEN } from "./generation.js";
export { checkMemory, emptyMemory, memoryBytes, readMemory } from "./memory.js";
export { bestProvider, WebModel } from "./model.js";
export { MemoryStore } from "./store.js";
export { VERSION } from "./version.js";
