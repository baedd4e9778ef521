"""Other programs' quantised folders, laid out anew in blocks of our own (quant/gguf/types.py, `GROUPED`), without a loss.

kinds.py has what configs and headers say, without torch: which tensors make up a matrix, and in which blocks it will lie. A
file of a format has the codes, scales and zero points in those tensors; laid_out.py makes blocks of them, folder.py writes
the new folder.
"""
