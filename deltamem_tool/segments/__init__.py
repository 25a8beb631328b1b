"""Assign the tokens of a chat to segments (messages or sentences), as sequence-state write needs."""
