"""4-bit storage of weight matrices: sizes, file headers, packing, and a linear layer that computes on the packed form.

A leaf package: it never imports lopt_edge. `sizes` and `headers` do not import torch, so that a planner can use them;
`nf4`, `linear` and `files` do. Nothing is imported here, so that `import quant.sizes` stays free of torch.
"""
