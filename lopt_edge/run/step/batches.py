"""Micro-batches as tensors on the device, with the token totals of their accumulation window.

Loss coefficients are 1 / total: supervised tokens of the window for the task loss, non-padding tokens x hidden size for
the local losses, so that accumulation equals the one big batch (design law 5). Totals are counted before any forward.
Where the task loss is of preferences a batch has its `Choices`, and the totals count pairs (or labelled sequences).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from lopt_edge.data import IGNORED, MicroBatch
from lopt_edge.objectives.objective import Window as ChoiceTotals
from lopt_edge.plan.costs.sizes import MicroBatchSize
from lopt_edge.run.tiers.staging import Stage, brought


@dataclass(frozen=True)
class Choices:
    """The preferences among a micro-batch's sequences, an entry for each: whether it is preferred, its supervised tokens,
    and its summed log-probability under the reference (none where the objective reads none).

    `together` sequences in a row are a pair, the preferred one first. `baseline` is of the whole window (KTO).
    """

    preferred: tuple[bool, ...]
    n_targets: tuple[int, ...]
    together: int
    reference: tuple[float, ...] = ()
    baseline: float = 0.0

    @property
    def n_units(self) -> int:
        """The number of pairs, or of sequences where they are no pairs."""
        return len(self.preferred) // self.together

    @property
    def n_preferred_targets(self) -> int:
        """The supervised tokens of the preferred sequences."""
        return sum(n for n, preferred in zip(self.n_targets, self.preferred, strict=True) if preferred)


@dataclass(frozen=True, eq=False)
class Batch:
    """A micro-batch: token ids (B, T) on the host, which reads their rows, and on the device which positions are
    supervised; all tensors are int64.

    `supervised_N` are the flat positions (into B x T) whose next token is a target, `targets_N` those targets, `real_N` the
    flat positions of non-padding tokens (None: no padding). `examples` and `lengths` say which example of the data each row
    is, and how long; `n_tokens` is the sum of the lengths. `packed`: they lie in one row, one after the other. `choices`:
    which of them are preferred. `host_targets_N` are the targets on the host, which reads their rows where the lm_head is
    on disk (None: nobody kept them).
    """

    ids_BT: Tensor
    supervised_N: Tensor
    targets_N: Tensor
    real_N: Tensor | None
    n_tokens: int
    lengths: tuple[int, ...] = ()
    examples: tuple[int, ...] = ()
    packed: bool = False
    choices: Choices | None = None
    host_targets_N: Tensor | None = None

    @property
    def in_a_row(self) -> tuple[int, ...] | None:
        """The lengths of the sequences that lie in one row; None where each has a row of its own."""
        return self.lengths if self.packed else None

    def host_targets(self, tile: slice) -> Tensor | None:
        """The targets of a tile of the supervised tokens on the host, if they are there."""
        return None if self.host_targets_N is None else self.host_targets_N[tile]

    @property
    def n_supervised(self) -> int:
        """The number of supervised tokens."""
        return len(self.targets_N)

    @property
    def size(self) -> MicroBatchSize:
        """The size of the batch, as the planner counts it."""
        n_sequences, n_tokens = self.ids_BT.shape
        padded, scored = self.real_N is not None, 0 if self.choices is None else self.choices.together
        row = self.in_a_row or ()
        return MicroBatchSize(n_sequences, n_tokens, self.n_supervised, padded=padded, in_a_row=row, scored=scored)

    @property
    def places(self) -> tuple[slice, ...]:
        """Where each sequence lies among the flat positions (of B x T), padding included."""
        if not self.packed:
            n_tokens = self.ids_BT.shape[1]
            return tuple(slice(row * n_tokens, (row + 1) * n_tokens) for row in range(len(self.lengths)))
        ends = tuple(accumulate(self.lengths))
        return tuple(slice(end - length, end) for end, length in zip(ends, self.lengths, strict=True))


@dataclass(frozen=True)
class Totals:
    """The token counts of one accumulation window: supervised ones, and all but padding; of preferences those of `window`,
    too."""

    supervised: int
    tokens: int
    window: ChoiceTotals | None = None


def make_batch(
    micro_batch: MicroBatch,
    device: torch.device,
    *,
    examples: Sequence[int] = (),
    choices: Choices | None = None,
    stage: Stage | None = None,
) -> Batch:
    """The batch of a micro-batch of the data, on `device`; through `stage`, if there is one, so that a GPU's host waits for
    nothing."""
    ids_BT = torch.tensor(micro_batch.input_ids, dtype=torch.int64)
    targets_flat = torch.tensor(micro_batch.targets, dtype=torch.int64).view(-1)
    supervised_N = (targets_flat != IGNORED).nonzero().squeeze(1)
    targets_N, n_tokens = targets_flat[supervised_N], sum(micro_batch.lengths)
    real_N = None if micro_batch.packed else _real_positions(micro_batch.lengths, ids_BT.shape[1])
    return Batch(
        ids_BT=ids_BT,
        supervised_N=brought(stage, supervised_N, device),
        targets_N=brought(stage, targets_N, device),
        real_N=None if real_N is None else brought(stage, real_N, device),
        n_tokens=n_tokens,
        lengths=micro_batch.lengths,
        examples=tuple(examples),
        packed=micro_batch.packed,
        choices=choices,
        host_targets_N=targets_N,
    )


def sent(batch: Batch, stage: Stage) -> Batch:
    """A batch of the host, on the stage's device."""
    real_N, up = batch.real_N, partial(brought, stage, device=stage.device)
    supervised_N, targets_N = up(tensor=batch.supervised_N), up(tensor=batch.targets_N)
    return replace(
        batch, supervised_N=supervised_N, targets_N=targets_N, real_N=None if real_N is None else up(tensor=real_N)
    )


def _real_positions(lengths: Sequence[int], n_tokens: int) -> Tensor | None:
    """The flat positions of what is no padding; None where there is no padding."""
    if sum(lengths) == len(lengths) * n_tokens:
        return None
    lengths_B = torch.tensor(lengths).unsqueeze(1)
    return (torch.arange(n_tokens).unsqueeze(0) < lengths_B).view(-1).nonzero().squeeze(1)


def as_message(batch: Batch, *, whole: bool = False) -> dict[str, Any]:
    """The JSON values of a batch that the later processes of a pipeline need: all but its token ids and its preferences;
    `whole`: with these, too, for a rank."""
    found: dict[str, Any] = {
        "n_tokens": batch.ids_BT.shape[1],
        "lengths": list(batch.lengths),
        "packed": batch.packed,
        "supervised": batch.supervised_N.tolist(),
        "targets": batch.targets_N.tolist(),
    }
    if whole:
        choices = None if batch.choices is None else asdict(batch.choices)
        found |= {"ids": batch.ids_BT.tolist(), "examples": list(batch.examples), "choices": choices}
    return found


def from_message(values: Mapping[str, Any], device: torch.device) -> Batch:
    """The batch that `as_message` described, on `device`; its token ids are zeros where it left them out."""
    lengths, n_tokens, packed = tuple(values["lengths"]), values["n_tokens"], values["packed"]
    real_N = None if packed else _real_positions(lengths, n_tokens)
    ids, choices = values.get("ids"), values.get("choices")
    if ids is None:
        ids_BT = torch.zeros(1 if packed else len(lengths), n_tokens, dtype=torch.int64)
    else:
        ids_BT = torch.tensor(ids, dtype=torch.int64)
    if choices is not None:
        listed: dict[str, Any] = {name: tuple(one) if isinstance(one, list) else one for name, one in choices.items()}
        choices = Choices(**listed)
    return Batch(
        ids_BT=ids_BT,
        supervised_N=torch.tensor(values["supervised"], dtype=torch.int64, device=device),
        targets_N=torch.tensor(values["targets"], dtype=torch.int64, device=device),
        real_N=None if real_N is None else real_N.to(device),
        n_tokens=sum(lengths),
        lengths=lengths,
        examples=tuple(values.get("examples", ())),
        packed=packed,
        choices=choices,
    )


def window_totals(batches: Sequence[Batch]) -> Totals:
    """The token counts of an accumulation window of these batches."""
    choices = [batch.choices for batch in batches if batch.choices is not None]
    window = None
    if choices:
        counts = (sum(one.n_units for one in choices), sum(one.n_preferred_targets for one in choices))
        window = ChoiceTotals(*counts, choices[0].baseline)
    return Totals(sum(batch.n_supervised for batch in batches), sum(batch.n_tokens for batch in batches), window)
