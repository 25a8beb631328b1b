"""How answers are scored, and how sure a mean is."""
