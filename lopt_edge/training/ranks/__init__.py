"""Data parallel: several processes, each with the whole model, share every step."""
