"""A model's files: found, fetched, quantised, tokenized."""
