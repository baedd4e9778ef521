"""One training step, run: the executor and what its ops compute."""
