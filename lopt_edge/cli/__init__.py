"""Words in, sentences out: the commands, their options, and what they print."""
