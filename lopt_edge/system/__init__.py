"""The operating system: memory, files, locks, signals. No torch."""
