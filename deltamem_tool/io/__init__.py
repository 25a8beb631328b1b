"""Files, names and versions: what every room reads and writes with."""
