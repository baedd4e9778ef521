"""Other programs' quantised folders, laid out anew in blocks of our own (quant/gguf/types.py, `GROUPED`), without a loss.

A file here is one format: what its config says, which tensors make up a matrix, and the codes, scales and zero points in
them. laid_out.py makes blocks of those; folder.py writes the new folder.
"""
