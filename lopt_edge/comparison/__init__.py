"""`lopt-edge compare`: variants of one run, each in a process of its own, and what they came to."""
