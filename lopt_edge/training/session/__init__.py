"""One attempt at a run: what it has in hand, its loop, what it saves."""
