// Finds the version that an undo restores. Restoring a version creates a new one with the same digest. Undoing twice has to
// go back two turns, and not to the turn that was undone.

// The versions that led to the newest one, the newest last. `versions` is the server's list, the newest first.
export function lineage(versions) {
  const line = [];
  for (const version of versions.toReversed()) {
    const place = line.findIndex(({ digest }) => digest === version.digest);
    line.splice(place < 0 ? line.length : place, Infinity, version);
  }
  return line;
}

// The version before the newest one; null if it is not kept.
export const before = (versions) => lineage(versions).at(-2) ?? null;
