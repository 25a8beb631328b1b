// Which memory is open: the address says it, so that a reload and the button Back lead to it.

const DEFAULT_NAME = "me";

export const openName = () => new URLSearchParams(location.hash.slice(1)).get("memory") || DEFAULT_NAME;
export const addressOf = (name) => `#${new URLSearchParams({ memory: name })}`;
