"""What is said of each token where a memory writes by segments (a message, a sentence)."""

# What a token is to the segments of a conversation: it only reads, it belongs to one, or it is its last.
OUTSIDE, INSIDE, LAST = 0, 1, 2
