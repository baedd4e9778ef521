"""The task loss over the vocabulary (losses.py has its formula) with each chunk's softmax in one kernel.

What is carried from chunk to chunk lies in one tensor, and a chunk's products become its weights in their place
(run/kernels/cross_entropy.py), so that of (tokens x chunk) there is one tensor in the compute dtype, where torch's calls
make one in fp32 beside it. The sum over rows is made as there.

Shapes: N selected tokens, D hidden, V vocabulary rows of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lopt_edge.plan.facts.device_kinds import kind_of
from lopt_edge.run.kernels.operators import operators
from lopt_edge.run.model.vocabulary import Vocabulary

N_CARRIED = 5  # the greatest score, the sum, the target's score and its slope, the factor of earlier sums


def fused_cross_entropy(
    normed_ND: Tensor,
    targets_N: Tensor,
    lm_head: Vocabulary,
    *,
    factor: float,
    soft_cap: float | None,
    need_grad: bool,
    each_N: Tensor | None,
    host_targets_N: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """What `losses.online_cross_entropy` gives: the summed loss, and the gradient of `normed_ND` if it is needed."""
    carried_5N = torch.zeros(N_CARRIED, len(normed_ND), device=normed_ND.device)
    carried_5N[0].fill_(-torch.inf)
    carried_5N[3].fill_(1.0)
    sum_ND = torch.zeros(normed_ND.shape, dtype=torch.float32, device=normed_ND.device) if need_grad else None
    for start, rows_VD in lm_head.chunks(kind_of(normed_ND.device.type).vocabulary_chunk):
        scores_NV = normed_ND @ rows_VD.t()
        operators().vocabulary_chunk_(scores_NV, targets_N, carried_5N, start, factor, soft_cap or 0.0, need_grad)
        if sum_ND is not None:
            sum_ND.mul_(carried_5N[4].unsqueeze(1))
            if rows_VD.dtype == torch.float32:
                sum_ND.addmm_(scores_NV, rows_VD)
            else:
                sum_ND.add_(scores_NV @ rows_VD)
        del scores_NV  # else it would live until the next chunk's are there
    maximum_N, normaliser_N, target_N, slope_N = carried_5N[:4]
    losses_N = maximum_N + normaliser_N.log() - target_N
    loss = losses_N.sum()
    if each_N is not None:
        each_N.copy_(losses_N)
    if sum_ND is None:
        return loss, None
    rows_ND = lm_head.rows(targets_N, host_ids_N=host_targets_N).float().mul_(slope_N.unsqueeze(1))
    sum_ND.div_(normaliser_N.unsqueeze(1)).sub_(rows_ND)
    return loss, (sum_ND if factor == 1.0 else sum_ND.mul_(factor)).to(normed_ND.dtype)
