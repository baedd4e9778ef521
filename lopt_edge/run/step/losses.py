"""The losses that end a segment: the task loss over the vocabulary, LoPT's reconstruction loss, and LET's alignment.

All are written as sums over tokens times a coefficient that is known before the first backward (design law 5), and
run in tiles of tokens (as many as the plan says), so that no tensor of (tokens x vocabulary) ever exists.

Task loss: final norm, lm_head and cross-entropy over the supervised tokens only, exact. One pass over the vocabulary in
chunks gives the loss and the gradient together, with a running maximum m, normaliser z and weighted row sum (the online
softmax of FlashAttention, arXiv 2205.14135, with the lm_head's rows as values):
    p = exp(l - m);  z <- z e^(m_old - m) + sum p;  acc <- acc e^(m_old - m) + p W;   d loss / d h = acc / z - W[target]
so the lm_head is read once and multiplied twice, as plain cross-entropy does. A soft cap c (Gemma 2) turns the logit l
into c tanh(l / c) and multiplies the gradient by 1 - tanh^2; a logit factor (Granite) scales both.

Alignment (LET, arXiv 2602.05393): minus the cosine between a token's hidden state and a teacher's, summed over the tokens.

Reconstruction loss (LoPT, arXiv 2605.04913): aux head LayerNorm(d) -> Linear(d, d // 4) -> GELU -> Linear(d // 4, d) in
fp32, xavier-uniform with gain 0.1, zero bias; squared error against the block's detached input.

Shapes: B sequences, T tokens, N selected tokens, D hidden, V vocabulary rows of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lopt_edge.plan.facts.device_kinds import TRITON, kind_of
from lopt_edge.run.model.load import Model
from lopt_edge.run.model.vocabulary import Vocabulary
from lopt_edge.run.step.fused_vocabulary_loss import fused_cross_entropy


@dataclass(frozen=True)
class LogitForm:
    """The way in which a family turns h W^T into logits: first a factor, then a soft cap (None: no cap). `fused`: a chunk's
    softmax is one kernel of ours."""

    factor: float = 1.0
    soft_cap: float | None = None
    fused: bool = False


def logit_form(model: Model) -> LogitForm:
    """The logit form of a model's family, with the numbers of its config."""
    family = model.facts.family
    divisor, cap = family.logit_divisor, family.logit_cap
    factor = 1.0 / getattr(model.config, divisor) if divisor else 1.0
    factor = getattr(model.config, family.logit_factor) if family.logit_factor else factor
    return LogitForm(factor, getattr(model.config, cap, None) if cap else None, fused=model.kernels == TRITON)


def logits(model: Model, hidden_ND: Tensor) -> Tensor:
    """The logits (N, vocabulary) in fp32 of hidden states (N, D), for a few tokens (generation, checks)."""
    form = logit_form(model)
    with torch.no_grad():
        normed_ND = model.norm(hidden_ND)
        chunks = [
            (normed_ND @ rows_VD.t()).float()
            for _, rows_VD in model.lm_head.chunks(kind_of(hidden_ND.device.type).vocabulary_chunk)
        ]
    scores = _scaled(torch.cat(chunks, dim=1), form.factor)
    return scores if form.soft_cap is None else scores.div_(form.soft_cap).tanh_().mul_(form.soft_cap)


def task_loss(
    model: Model,
    hidden_ND: Tensor,
    targets_N: Tensor,
    *,
    each_N: Tensor | None = None,
    host_targets_N: Tensor | None = None,
) -> Tensor:
    """The summed cross-entropy (fp32 scalar) of hidden states (N, D) against targets (N,); differentiable in the former.

    `each_N` (fp32) takes each token's. `host_targets_N` are the targets on the host, if they are there, too: it reads their
    rows where the lm_head is on disk.
    """
    normed_ND, form = model.norm(hidden_ND), logit_form(model)
    loss: Tensor = _VocabularyLoss.apply(  # type: ignore[no-untyped-call]  # torch's apply has no types
        normed_ND, targets_N, model.lm_head, form, each_N, host_targets_N
    )
    return loss


class _VocabularyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        normed_ND: Tensor,
        targets_N: Tensor,
        lm_head: Vocabulary,
        form: LogitForm,
        each_N: Tensor | None,
        host_targets_N: Tensor | None,
    ) -> Tensor:
        loss, grad_ND = online_cross_entropy(
            normed_ND,
            targets_N,
            lm_head,
            form=form,
            need_grad=ctx.needs_input_grad[0],
            each_N=each_N,
            host_targets_N=host_targets_N,
        )
        ctx.save_for_backward(*(() if grad_ND is None else (grad_ND,)))
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_ND,) = ctx.saved_tensors
        return grad_ND * grads[0], None, None, None, None, None


def online_cross_entropy(
    normed_ND: Tensor,
    targets_N: Tensor,
    lm_head: Vocabulary,
    *,
    form: LogitForm,
    need_grad: bool,
    each_N: Tensor | None = None,
    host_targets_N: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The summed loss (fp32 scalar) and its gradient with respect to `normed_ND` (same dtype), in one pass.

    The gradient is None unless `need_grad`; `each_N` takes each token's loss.
    """
    n_tokens, dtype, device = normed_ND.shape[0], torch.float32, normed_ND.device
    if form.fused:
        return fused_cross_entropy(
            normed_ND,
            targets_N,
            lm_head,
            factor=form.factor,
            soft_cap=form.soft_cap,
            need_grad=need_grad,
            each_N=each_N,
            host_targets_N=host_targets_N,
        )
    maximum_N = torch.full((n_tokens, 1), -torch.inf, dtype=dtype, device=device)
    normaliser_N, target_N = (torch.zeros(n_tokens, 1, dtype=dtype, device=device) for _ in range(2))
    target_slope_N = torch.ones(n_tokens, 1, dtype=dtype, device=device)
    sum_ND = torch.zeros(normed_ND.shape, dtype=dtype, device=device) if need_grad else None
    for start, rows_VD in lm_head.chunks(kind_of(normed_ND.device.type).vocabulary_chunk):
        scores_NV = _scaled((normed_ND @ rows_VD.t()).float(), form.factor)
        slope_NV = None
        if form.soft_cap is not None:
            scores_NV.div_(form.soft_cap).tanh_()
            slope_NV = 1 - scores_NV.square() if need_grad else None
            scores_NV.mul_(form.soft_cap)
        column_N = targets_N.unsqueeze(1) - start
        inside_N = (column_N >= 0) & (column_N < len(rows_VD))
        column_N = column_N.clamp(0, len(rows_VD) - 1)
        target_N = torch.where(inside_N, scores_NV.gather(1, column_N), target_N)
        if slope_NV is not None:
            target_slope_N = torch.where(inside_N, slope_NV.gather(1, column_N), target_slope_N)
        new_maximum_N = torch.maximum(maximum_N, scores_NV.amax(1, keepdim=True))
        rescale_N = torch.exp(maximum_N - new_maximum_N)
        weights_NV = scores_NV.sub_(new_maximum_N).exp_()
        normaliser_N = normaliser_N * rescale_N + weights_NV.sum(1, keepdim=True)
        maximum_N = new_maximum_N
        if sum_ND is not None:
            if slope_NV is not None:
                weights_NV.mul_(slope_NV)
            sum_ND.mul_(rescale_N)
            if rows_VD.dtype == torch.float32:
                sum_ND.addmm_(weights_NV, rows_VD)
            else:
                sum_ND.add_(weights_NV.to(rows_VD.dtype) @ rows_VD)
        del scores_NV, weights_NV, slope_NV  # else they would live until the next chunk's are there
    losses_N = maximum_N + normaliser_N.log() - target_N
    loss = losses_N.sum()
    if each_N is not None:
        each_N.copy_(losses_N.squeeze(1))
    del losses_N
    if sum_ND is None:
        return loss, None
    target_rows_ND = lm_head.rows(targets_N, host_ids_N=host_targets_N).float()
    grad_ND = _scaled(sum_ND.div_(normaliser_N).sub_(target_rows_ND.mul_(target_slope_N)), form.factor)
    return loss, grad_ND.to(normed_ND.dtype)


def _scaled(tensor: Tensor, factor: float) -> Tensor:
    """The tensor, multiplied in its place; most families have no factor, and logits are large."""
    return tensor if factor == 1.0 else tensor.mul_(factor)


def alignment(hidden_ND: Tensor, teacher_ND: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    """Minus the summed cosines (fp32 scalar) times `scale`, and the gradient with respect to `hidden_ND` (its dtype).

    By hand, with c = cos(h, t):  d(-c) / dh = -t / (|h| |t|) + c h / |h|^2. LET (arXiv 2602.05393).
    """
    h_ND, t_ND = hidden_ND.float(), teacher_ND.float()
    h_N, t_N = (side.norm(dim=1, keepdim=True).clamp_min(1e-12) for side in (h_ND, t_ND))
    cosine_N = (h_ND * t_ND).sum(1, keepdim=True).div_(h_N * t_N)
    grad_ND = t_ND * (-scale / (h_N * t_N))
    grad_ND.addcmul_(h_ND, cosine_N * scale / h_N.square())
    return -scale * cosine_N.sum(), grad_ND.to(hidden_ND.dtype)


class ReconstructHead(nn.Module):
    """LoPT's aux head for hidden size D; parameters fp32, drawn on the CPU from the seed."""

    def __init__(self, hidden_size: int, *, seed: int) -> None:
        super().__init__()
        inner = max(1, hidden_size // 4)
        self.norm = nn.LayerNorm(hidden_size)
        self.down = nn.Linear(hidden_size, inner)
        self.activation = nn.GELU()
        self.up = nn.Linear(inner, hidden_size)
        generator = torch.Generator().manual_seed(seed)
        for linear in (self.down, self.up):
            nn.init.xavier_uniform_(linear.weight, gain=0.1, generator=generator)
            nn.init.zeros_(linear.bias)

    def forward(self, output_ND: Tensor, target_ND: Tensor) -> Tensor:
        """The squared error (fp32 scalar) of the reconstruction, summed over tokens and elements."""
        predicted_ND: Tensor = self.up(self.activation(self.down(self.norm(output_ND.float()))))
        return (predicted_ND - target_ND.float()).square().sum()
