// Finds the version that an undo restores. Restoring a version creates a new one with the same digest. Undoing twice has to
// go back two turns, and not to the turn that was undone.

// Returns the versions that led to the newest one, the newest last. `versions` is the server's list, the newest first.
function lineage(versions) {
  const chain = [];
  for (const version of versions.toReversed()) {
    const index = chain.findIndex(({ digest }) => digest === version.digest);
    chain.splice(index < 0 ? chain.length : index, Infinity, version);
  }
  return chain;
}

// Returns the version before the newest one; null if it is not kept.
export const previousVersion = (versions) => lineage(versions).at(-2) ?? null;
