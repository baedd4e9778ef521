"""What a decoder layer allocates, found out by running one: logs of a step, and the programs that they become."""
