"""GGUF files: their block types, their headers, and matrices that stay in blocks and are unpacked into a buffer.

`types` and `header` import no torch. Nothing is imported here.
"""
