"""Which tokens belong to which segment of a chat: what sequence-state write needs."""
