"""Micro-batches as tensors on the device, with the token totals of their accumulation window.

Loss coefficients are 1 / total: supervised tokens of the window for the task loss, non-padding tokens x hidden size for
the local losses, so that accumulation equals the one big batch (design law 5). Totals are counted before any forward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lopt_edge.data import IGNORED, MicroBatch
from lopt_edge.plan.costs.sizes import MicroBatchSize


@dataclass(frozen=True, eq=False)
class Batch:
    """A micro-batch: token ids (B, T) on the host, which reads their rows, and on the device which positions are
    supervised; all tensors are int64.

    `supervised_N` are the flat positions (into B x T) whose next token is a target, `targets_N` those targets, `real_N` the
    flat positions of non-padding tokens (None: no padding). `examples` and `lengths` say which example of the data each row
    is, and how long; `n_tokens` is the sum of the lengths. `packed`: they lie in one row, one after the other.
    """

    ids_BT: Tensor
    supervised_N: Tensor
    targets_N: Tensor
    real_N: Tensor | None
    n_tokens: int
    lengths: tuple[int, ...] = ()
    examples: tuple[int, ...] = ()
    packed: bool = False

    @property
    def in_a_row(self) -> tuple[int, ...] | None:
        """The lengths of the sequences that lie in one row; None where each has a row of its own."""
        return self.lengths if self.packed else None

    @property
    def n_supervised(self) -> int:
        """The number of supervised tokens."""
        return len(self.targets_N)

    @property
    def size(self) -> MicroBatchSize:
        """The size of the batch, as the planner counts it."""
        n_sequences, n_tokens = self.ids_BT.shape
        padded = self.real_N is not None
        return MicroBatchSize(n_sequences, n_tokens, self.n_supervised, padded=padded, in_a_row=self.in_a_row or ())


@dataclass(frozen=True)
class Totals:
    """The token counts of one accumulation window: supervised ones, and all but padding."""

    supervised: int
    tokens: int


def make_batch(micro_batch: MicroBatch, device: torch.device, *, examples: Sequence[int] = ()) -> Batch:
    """The batch of a micro-batch of the data, on `device`."""
    ids_BT = torch.tensor(micro_batch.input_ids, dtype=torch.int64)
    targets_flat = torch.tensor(micro_batch.targets, dtype=torch.int64).view(-1)
    supervised_N = (targets_flat != IGNORED).nonzero().squeeze(1)
    n_tokens = sum(micro_batch.lengths)
    real_N = None if micro_batch.packed else _real_positions(micro_batch.lengths, ids_BT.shape[1])
    return Batch(
        ids_BT=ids_BT,
        supervised_N=supervised_N.to(device),
        targets_N=targets_flat[supervised_N].to(device),
        real_N=None if real_N is None else real_N.to(device),
        n_tokens=n_tokens,
        lengths=micro_batch.lengths,
        examples=tuple(examples),
        packed=micro_batch.packed,
    )


def _real_positions(lengths: Sequence[int], n_tokens: int) -> Tensor | None:
    """The flat positions of what is no padding; None where there is no padding."""
    if sum(lengths) == len(lengths) * n_tokens:
        return None
    lengths_B = torch.tensor(lengths).unsqueeze(1)
    return (torch.arange(n_tokens).unsqueeze(0) < lengths_B).view(-1).nonzero().squeeze(1)


def as_message(batch: Batch) -> dict[str, Any]:
    """The JSON values of a batch that the later processes of a pipeline need: all but its token ids."""
    return {
        "n_tokens": batch.ids_BT.shape[1],
        "lengths": list(batch.lengths),
        "packed": batch.packed,
        "supervised": batch.supervised_N.tolist(),
        "targets": batch.targets_N.tolist(),
    }


def from_message(values: Mapping[str, Any], device: torch.device) -> Batch:
    """The batch that `as_message` described, on `device`; its token ids are zeros."""
    lengths, n_tokens, packed = tuple(values["lengths"]), values["n_tokens"], values["packed"]
    real_N = None if packed else _real_positions(lengths, n_tokens)
    return Batch(
        ids_BT=torch.zeros(1 if packed else len(lengths), n_tokens, dtype=torch.int64),
        supervised_N=torch.tensor(values["supervised"], dtype=torch.int64, device=device),
        targets_N=torch.tensor(values["targets"], dtype=torch.int64, device=device),
        real_N=None if real_N is None else real_N.to(device),
        n_tokens=sum(lengths),
        lengths=lengths,
        packed=packed,
    )


def window_totals(batches: Sequence[Batch]) -> Totals:
    """The token counts of an accumulation window of these batches."""
    return Totals(sum(batch.n_supervised for batch in batches), sum(batch.n_tokens for batch in batches))
