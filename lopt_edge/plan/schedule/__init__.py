"""The op list: written, rewritten, checked."""
