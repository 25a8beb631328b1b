// The open memory. It is part of the address, so that a reload and the Back button lead to it.

const DEFAULT_NAME = "me";

export const currentName = () => new URLSearchParams(location.hash.slice(1)).get("memory") || DEFAULT_NAME;
export const addressOf = (name) => `#${new URLSearchParams({ memory: name })}`;
