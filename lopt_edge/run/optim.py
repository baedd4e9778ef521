"""AdamW over parameter groups, one group a segment; clipping per segment or over all; the schedule.

torch's AdamW (fused: one pass, no temporary copies), moments in fp32. A parameter without gradient is skipped by AdamW,
one with a zero gradient is not: momentum and decay still move it. The rule: nothing is updated unless every gradient of
the step is finite (one bad batch leaves no trace), so norms are taken before the first update of a step. When a group is
updated and with which learning rate is the plan's and the caller's business.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lopt_edge.errors import RunError


def learning_rate(step: int, *, n_steps: int, peak: float, schedule: str, warmup_ratio: float) -> float:
    """The rate of step `step` (from 1): linear warm-up over ceil(ratio x steps), then cosine or linear to 0."""
    n_warmup = math.ceil(warmup_ratio * n_steps)
    if step <= n_warmup:
        return peak * step / n_warmup
    if schedule == "constant":
        return peak
    progress = (step - 1 - n_warmup) / max(1, n_steps - n_warmup)
    return peak * (1 - progress) if schedule == "linear" else peak * 0.5 * (1 + math.cos(math.pi * progress))


class NotFinite(RunError):
    """A gradient of the step is infinite or NaN; nothing was updated."""


class SegmentOptimizer:
    """One AdamW per training segment, by segment index. `clip` 0 turns clipping off."""

    def __init__(
        self,
        parameters: Mapping[int, Sequence[nn.Parameter]],
        *,
        weight_decay: float = 0.0,
        clip: float = 1.0,
        clip_scope: str = "segment",
    ) -> None:
        self.parameters = {segment: list(group) for segment, group in parameters.items()}
        self.clip, self.clip_scope = clip, clip_scope
        self.adamw = {
            segment: torch.optim.AdamW(group, lr=0.0, weight_decay=weight_decay, fused=True)
            for segment, group in self.parameters.items()
        }
        self.norms: dict[int, float] = {}

    def measure(self, *, loss_scale: float = 1.0) -> None:
        """Divide all gradients by the loss scale and take every segment's norm.

        Raises NotFinite, before any update, if one is infinite or NaN.
        """
        if loss_scale != 1.0:
            for parameter in (p for group in self.parameters.values() for p in group if p.grad is not None):
                parameter.grad.mul_(1.0 / loss_scale)
        self.norms = {segment: _norm(group) for segment, group in self.parameters.items()}
        for segment, norm in self.norms.items():
            if not math.isfinite(norm):
                raise NotFinite(
                    f"the gradient of segment {segment} is not finite; nothing was updated",
                    fix="lower --lr (and --lr-local); in float16, compute in bfloat16 or float32",
                )

    def step(self, segment: int, *, lr: float) -> None:
        """Clip (against the norms of `measure`), update and free the gradients of one segment."""
        norm = self.norms[segment]
        if self.clip_scope == "global":
            norm = math.sqrt(sum(value * value for value in self.norms.values()))
        adamw = self.adamw[segment]
        if self.clip and norm > self.clip:
            factor = self.clip / (norm + 1e-6)  # torch.nn.utils.clip_grad_norm_'s guard
            for parameter in self.parameters[segment]:
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)
        for group in adamw.param_groups:
            group["lr"] = lr
        adamw.step()
        adamw.zero_grad(set_to_none=True)

    def drop_gradients(self) -> None:
        for adamw in self.adamw.values():
            adamw.zero_grad(set_to_none=True)


def _norm(parameters: Sequence[nn.Parameter]) -> float:
    squares: list[Tensor] = [p.grad.float().square().sum() for p in parameters if p.grad is not None]
    return math.sqrt(torch.stack(squares).sum().item()) if squares else 0.0
