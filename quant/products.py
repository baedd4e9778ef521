"""Products of half precision that are summed or left in fp32, by the product itself where the device can.

cuBLAS multiplies matrices in half precision into an fp32 result, and adds to one. So on a CUDA device a sum over blocks
takes no product in half precision beside it, and no further pass over the sum. Elsewhere the product is made first, in half
precision, and then added. In fp32 every device adds by the product itself.

The rule: whoever predicts bytes asks `adds_apart` (sizes.py), which says where a product is made first. AMD's library is
not asked for an fp32 result: what it can do there is untested.
"""

from __future__ import annotations

import torch
from torch import Tensor


def add_product(sum_: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1.0) -> None:
    """Add alpha a b to `sum_`, a matrix in fp32, rows or columns of a larger one too."""
    if a.dtype == torch.float32:
        sum_.addmm_(a, b, alpha=alpha)
    elif _widens(a):
        torch.addmm(sum_, a, b, out_dtype=torch.float32, alpha=alpha, out=sum_)
    else:
        sum_.add_(a @ b, alpha=alpha)


def product_in_fp32(a: Tensor, b: Tensor) -> Tensor:
    """The product a b in fp32 of matrices in half precision; of others in their own."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if _widens(a) else (a @ b).to(torch.float32)


def _widens(a: Tensor) -> bool:
    return a.is_cuda and torch.version.hip is None
