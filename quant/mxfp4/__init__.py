"""MXFP4 in two tensors: where its matrices lie (stacks.py), and unpacking them (weight.py)."""
