"""The memory settings that fit, and the fastest of them."""
