// Which version an undo restores. A restored version is a new one with the digest of the old: undoing twice has to go
// two turns back, and not to the turn that was undone.

// The versions that led to the newest one, the newest last; `versions` as the server lists them, the newest first.
export function lineage(versions) {
  const line = [];
  for (const version of versions.toReversed()) {
    const place = line.findIndex(({ digest }) => digest === version.digest);
    line.splice(place < 0 ? line.length : place, Infinity, version);
  }
  return line;
}

// The version before the newest one; null where none is kept.
export const before = (versions) => lineage(versions).at(-2) ?? null;
