"""Micro-batches as tensors on the device, with the token totals of their accumulation window.

Loss coefficients are 1 / total: supervised tokens of the window for the task loss, non-padding tokens x hidden size for
the local losses, so that accumulation equals the one big batch (design law 5). Totals are counted before any forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lopt_edge.data import IGNORED, MicroBatch
from lopt_edge.plan.sizes import MicroBatchSize


@dataclass(frozen=True, eq=False)
class Batch:
    """ids (B, T); `supervised_N` flat positions (into B x T) whose next token is a target, `targets_N` those targets.

    `real_N` are the flat positions of non-padding tokens, or None when there is no padding. `examples` and `lengths` say
    which example of the data each row is, and how long.
    """

    ids_BT: Tensor
    supervised_N: Tensor
    targets_N: Tensor
    real_N: Tensor | None
    n_tokens: int
    lengths: tuple[int, ...] = ()
    examples: tuple[int, ...] = ()

    @property
    def n_supervised(self) -> int:
        return len(self.targets_N)

    @property
    def size(self) -> MicroBatchSize:
        """What the planner knows of it."""
        return MicroBatchSize(*self.ids_BT.shape, self.n_supervised, padded=self.real_N is not None)


@dataclass(frozen=True)
class Totals:
    """Token counts of one accumulation window."""

    supervised: int
    tokens: int


def make_batch(micro_batch: MicroBatch, device: torch.device, *, examples: Sequence[int] = ()) -> Batch:
    ids_BT = torch.tensor(micro_batch.input_ids, dtype=torch.int64)
    targets_flat = torch.tensor(micro_batch.targets, dtype=torch.int64).view(-1)
    supervised_N = (targets_flat != IGNORED).nonzero().squeeze(1)
    n_tokens = sum(micro_batch.lengths)
    real_N = None
    if n_tokens < ids_BT.numel():
        lengths_B = torch.tensor(micro_batch.lengths).unsqueeze(1)
        real_N = (torch.arange(ids_BT.shape[1]).unsqueeze(0) < lengths_B).view(-1).nonzero().squeeze(1).to(device)
    return Batch(
        ids_BT=ids_BT.to(device),
        supervised_N=supervised_N.to(device),
        targets_N=targets_flat[supervised_N].to(device),
        real_N=real_N,
        n_tokens=n_tokens,
        lengths=micro_batch.lengths,
        examples=tuple(examples),
    )


def window_totals(batches: Sequence[Batch]) -> Totals:
    return Totals(sum(batch.n_supervised for batch in batches), sum(batch.n_tokens for batch in batches))
