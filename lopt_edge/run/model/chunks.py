"""A recurrence over the tokens that runs in chunks, one after the other, and whose graph keeps its inputs alone.

The state of each head goes from chunk to chunk. The backward runs the chunks again, keeping a state every so many of them,
and asks autograd for one chunk's gradients at a time, the last chunk first. What a chunk computes is its core's matter: a
gated delta rule (delta_net.py), a selective state space (mamba.py).

The rule: what lives inside is a chunk's worth, however long the sequence. A core's parameters are frozen and get no
gradient. Of several sequences in one row each begins with an empty state and sees no token before its own.

Shapes: B sequences, T tokens, W features of a token's values.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from lopt_edge.run.model.sequences import Sequences
from quant.sizes import DELTA_CHUNK as CHUNK
from quant.sizes import DELTA_STATES_APART as STATES_APART


class ChunkCore(Protocol):
    """What runs in chunks. Its first input sees `n_before` earlier tokens as well (a convolution's), the others none."""

    @property
    def n_before(self) -> int:
        """The earlier tokens that the first input of a chunk has."""

    @property
    def width(self) -> int:
        """The features of a token's values."""

    def first_state(self, n_sequences: int, device: torch.device) -> Tensor:
        """The state before the first token."""

    def chunk(self, parts: tuple[Tensor, ...], state: Tensor, /) -> tuple[Tensor, Tensor]:
        """The values (B, CHUNK, W) of one chunk, and the state after it. The last of `parts` (CHUNK, 1) is 0 for tokens
        behind the sequence's end."""


def _chunk(tensors: tuple[Tensor, ...], start: int, n_before: int) -> tuple[Tensor, ...]:
    """The inputs of the chunk that begins at token `start`: copies, with zeros where the sequence has no token; and last
    what is 0 for tokens behind the sequence's end."""
    n_real = min(CHUNK, tensors[0].shape[1] - start)
    found = []
    for at, tensor in enumerate(tensors):
        before = 0 if at else n_before
        copy = tensor.new_zeros(tensor.shape[0], before + CHUNK, tensor.shape[2])
        first = max(0, start - before)
        copy[:, before - (start - first) : before + n_real] = tensor[:, first : start + n_real]
        found.append(copy)
    real = tensors[0].new_zeros(CHUNK, 1)
    real[:n_real] = 1
    return (*found, real)


def in_chunks(core: ChunkCore, tensors: tuple[Tensor, ...], sequences: Sequences) -> Tensor:
    """The values (B, T, W) of a recurrence for its inputs (B, T, ...)."""
    y: Tensor = _Chunks.apply(core, sequences, *tensors)  # type: ignore[no-untyped-call]  # torch's apply has no types
    return y


class _Chunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, core: ChunkCore, sequences: Sequences, *tensors: Tensor) -> Tensor:
        ctx.core, ctx.sequences = core, sequences
        ctx.save_for_backward(*tensors)
        y = tensors[0].new_empty(*tensors[0].shape[:2], core.width)
        for rows in sequences:
            _run(core, tuple(tensor[:, rows] for tensor in tensors), y[:, rows])
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        found = [torch.zeros_like(tensor) for tensor in tensors]
        for rows in ctx.sequences:
            own = tuple(tensor[:, rows] for tensor in tensors)
            _gradient(ctx.core, own, grads[0][:, rows], [total[:, rows] for total in found])
        return (None, None, *found)


def _run(core: ChunkCore, tensors: tuple[Tensor, ...], y_BTW: Tensor) -> None:
    """Fill the values of one sequence, chunk by chunk."""
    state = core.first_state(len(y_BTW), y_BTW.device)
    for start in range(0, y_BTW.shape[1], CHUNK):
        state = run_chunk(core, tensors, start, state, y_BTW)


def _gradient(core: ChunkCore, tensors: tuple[Tensor, ...], g_BTW: Tensor, found: list[Tensor]) -> None:
    """Fill the gradients of one sequence, the last chunk first."""
    d_state = core.first_state(len(tensors[0]), tensors[0].device)
    for start, state in _backwards(core, tensors):
        d_state = chunk_gradient(core, tensors, start, state, (g_BTW, d_state), found)


def run_chunk(
    core: ChunkCore, tensors: tuple[Tensor, ...], start: int, state: Tensor, y_BTW: Tensor | None = None
) -> Tensor:
    """The state after the chunk that begins at token `start`; its values go to `y_BTW`."""
    part, after = core.chunk(_chunk(tensors, start, core.n_before), state)
    if y_BTW is not None:
        y_BTW[:, start : start + CHUNK] = part[:, : y_BTW.shape[1] - start]
    return after


def _backwards(core: ChunkCore, tensors: tuple[Tensor, ...]) -> Iterator[tuple[int, Tensor]]:
    """Yield the beginning of each chunk and the state before it, the last chunk first."""
    starts = list(range(0, tensors[0].shape[1], CHUNK))
    kept = {0: core.first_state(len(tensors[0]), tensors[0].device)}
    state = kept[0]
    last = starts[-1] // CHUNK // STATES_APART * STATES_APART
    for index in range(last):
        state = run_chunk(core, tensors, starts[index], state)
        if (index + 1) % STATES_APART == 0:
            kept[index + 1] = state
    del state
    for first in range(last, -1, -STATES_APART):
        states = [kept.pop(first)]
        for start in starts[first : first + STATES_APART - 1][: len(starts) - first - 1]:
            states.append(run_chunk(core, tensors, start, states[-1]))
        while states:
            yield starts[first + len(states) - 1], states.pop()


def chunk_gradient(
    core: ChunkCore,
    tensors: tuple[Tensor, ...],
    start: int,
    state: Tensor,
    gradients: tuple[Tensor, Tensor],
    found: list[Tensor],
) -> Tensor:
    """Add one chunk's gradients to `found`, and return that of the state before it.

    `gradients` are those of all values (B, T, W) and of the state after the chunk.
    """
    inputs = _chunk(tensors, start, core.n_before)
    leaves = [leaf.requires_grad_() for leaf in inputs[:-1]]
    state = state.detach().requires_grad_()
    with torch.enable_grad():
        y, after = core.chunk(inputs, state)
    g, d_after = gradients
    n_real, before = min(CHUNK, g.shape[1] - start), core.n_before
    d_y = torch.zeros_like(y)
    d_y[:, :n_real] = g[:, start : start + n_real]
    *parts, d_before = torch.autograd.grad((y, after), (*leaves, state), (d_y, d_after))
    first = max(0, start - before)
    found[0][:, first : start + n_real] += parts[0][:, before - (start - first) : before + n_real]
    for total, part in zip(found[1:], parts[1:], strict=True):
        total[:, start : start + n_real] = part[:, :n_real]
    return d_before
