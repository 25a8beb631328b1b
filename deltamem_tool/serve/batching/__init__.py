"""One model for many rows: requests join and leave the batch between any two decode steps. No torch."""
