"""What a run will do, decided before it runs: model facts, segments, the op list. Never imports torch; a test holds it."""
