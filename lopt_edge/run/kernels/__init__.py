"""Kernels of our own for a GPU, a file each, written in Triton; which of them a run takes, and how torch calls them."""
