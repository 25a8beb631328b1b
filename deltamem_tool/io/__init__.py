"""Files, names and versions: helpers that the rest of the package reads and writes with."""
