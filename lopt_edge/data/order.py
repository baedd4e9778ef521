"""The order of an epoch and the batches in it.

A window is what one optimizer step sees: `batch_size * grad_accum` sequences, cut into micro-batches. The shuffle is a
function of (seed, epoch, number of examples) alone, so a resumed run finds its place from three integers.

Examples that belong together (the two of a pair) are shuffled, sorted and cut as one, and stay neighbours in a micro-batch.

Rule: every example exactly once per epoch. Which examples share a window is decided by the shuffle alone; only inside a
window are they sorted by length, so that a micro-batch pads little and no step sees only short or only long
sequences. The micro-batches of a window then run in a seeded order. The last window may be short; its totals
(run/step/batches.py) are known before its first forward, and the losses are divided by them.

With packing a window's sequences are laid into rows instead, one after the other, as many as a row may hold; each row is a
micro-batch. Which sequences share a window, and so every step's loss, stays as it is.

An epoch's order takes 4 bytes an example, a micro-batch and a window (`Windows`); a window is made when it is asked for.

Not here: tensors. A micro-batch is lists of Python ints.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import overload

from lopt_edge.data.encode import Example
from lopt_edge.errors import InputError

IGNORED = -100  # the label that torch's cross-entropy leaves out
MOST_OPEN = 64  # rows that are looked at for room: a whole data set is packed in a time that grows with its length

Window = tuple[tuple[int, ...], ...]  # micro-batches of example indices


class Windows(Sequence[Window]):
    """The windows of an epoch; `first` is the one that changed places with the first."""

    def __init__(self, together: int) -> None:
        self._together, self.first = together, 0
        self._units, self._batch_ends, self._window_ends = array("I"), array("I"), array("I")

    def append(self, batches: Sequence[Sequence[int]]) -> None:
        """Add a window: the units of each of its micro-batches."""
        for batch in batches:
            self._units.extend(batch)
            self._batch_ends.append(len(self._units))
        self._window_ends.append(len(self._batch_ends))

    def __len__(self) -> int:
        return len(self._window_ends)

    @overload
    def __getitem__(self, index: int) -> Window: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Window, ...]: ...

    def __getitem__(self, index: int | slice) -> Window | tuple[Window, ...]:
        if isinstance(index, slice):
            return tuple(self[at] for at in range(*index.indices(len(self))))
        number = range(len(self))[index]
        number = {0: self.first, self.first: 0}.get(number, number)
        batches = range(self._window_ends[number - 1] if number else 0, self._window_ends[number])
        begins = (self._batch_ends[batch - 1] if batch else 0 for batch in batches)
        return tuple(
            members(self._units[begin : self._batch_ends[batch]], self._together)
            for begin, batch in zip(begins, batches, strict=True)
        )


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch of right-padded ids; `targets[b][t]` is the token after t where that is a target, else IGNORED.

    `packed`: one row, in which sequences of these lengths lie one after the other, without padding.
    """

    input_ids: list[list[int]]
    targets: list[list[int]]
    lengths: tuple[int, ...]
    packed: bool = False

    @property
    def n_supervised(self) -> int:
        """The number of targets."""
        return sum(target != IGNORED for row in self.targets for target in row)

    @property
    def n_tokens(self) -> int:
        """The number of real tokens, padding left out."""
        return sum(self.lengths)


def epoch_windows(
    lengths: Sequence[int], *, seed: int, epoch: int, batch_size: int, grad_accum: int, together: int = 1
) -> Windows:
    """The windows of one epoch, all of them in order. `together`: so many examples in a row belong together.

    In the first epoch the largest window comes first (it swaps places with the first one of the seeded order), so that what
    is too large for the memory shows in step 1. That is the order of the run; everything that counts steps uses it.
    """
    for name, value in (("batch-size", batch_size), ("grad-accum", grad_accum)):
        if value < 1:
            raise InputError(f"{value} is not a positive number", where=name, fix="use 1 or more")
    lengths = unit_lengths(lengths, together)
    rng = random.Random(f"order {seed} {epoch}")  # a string seed: the same on every platform and Python version
    indices = array("I", range(len(lengths)))
    rng.shuffle(indices)
    size = batch_size * grad_accum
    windows, most = Windows(together), (0, 0)
    for begin in range(0, len(indices), size):
        by_length = sorted(indices[begin : begin + size], key=lengths.__getitem__)
        batches = [tuple(by_length[at : at + batch_size]) for at in range(0, len(by_length), batch_size)]
        rng.shuffle(batches)
        if epoch == 0 and (rows := _most_rows(batches, lengths)) > most:
            windows.first, most = len(windows), rows
        windows.append(batches)
    return windows


def unit_lengths(lengths: Sequence[int], together: int) -> Sequence[int]:
    """The length of the longest example of each unit, of so many that belong together."""
    if together == 1:
        return lengths
    return array("I", (max(lengths[at : at + together]) for at in range(0, len(lengths), together)))


def members(units: Sequence[int], together: int) -> tuple[int, ...]:
    """The examples of these units, those of a unit side by side."""
    return tuple(unit * together + place for unit in units for place in range(together))


def split_window(window: Window, size: int) -> Window:
    """The same sequences in the same order, in micro-batches of at most `size`: equal up to rounding (design law 5)."""
    return tuple(batch[start : start + size] for batch in window for start in range(0, len(batch), size))


def packed_window(window: Window, lengths: Sequence[int], *, row_tokens: int, alone_from: int | None = None) -> Window:
    """The same sequences in rows of at most `row_tokens`, the fullest first: equal up to rounding (design law 5).

    The longest sequence goes first, each into the first row that has room for it. One of at least `alone_from` tokens has a
    row of its own.
    """
    rows, room = list[list[int]](), list[int]()
    for index in sorted((index for batch in window for index in batch), key=lambda index: (-lengths[index], index)):
        length = lengths[index]
        alone = alone_from is not None and length >= alone_from
        open_rows = () if alone else range(max(0, len(rows) - MOST_OPEN), len(rows))
        row = next((row for row in open_rows if room[row] >= length), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(0 if alone else row_tokens)
        rows[row].append(index)
        room[row] -= length
    return tuple(sorted(map(tuple, rows), key=lambda row: -sum(lengths[index] for index in row)))


def micro_batches_of(window: Window, n_sequences: int) -> int | None:
    """The number of micro-batches that hold the window's first sequences; None if the last of them is cut."""
    done = 0
    for number, batch in enumerate(window):
        if done >= n_sequences:
            return number if done == n_sequences else None
        done += len(batch)
    return len(window) if done == n_sequences else None


def _most_rows(window: Sequence[Sequence[int]], lengths: Sequence[int]) -> tuple[int, int]:
    """The tokens of a window's largest micro-batch, padding included, and of all of them: what its memory goes by."""
    rows = [len(batch) * max(lengths[i] for i in batch) for batch in window]
    return max(rows), sum(rows)


def collate(examples: Sequence[Example], pad_id: int, *, packed: bool = False) -> MicroBatch:
    """The examples as one micro-batch, padded on the right to its longest sequence; `packed`: in one row."""
    lengths = tuple(len(example) for example in examples)
    ids = [example.input_ids.tolist() for example in examples]
    targets = [_targets(example) for example in examples]
    if packed:
        return MicroBatch([list(chain(*ids))], [list(chain(*targets))], lengths, packed=True)
    longest = max(lengths)
    ids = [row + [pad_id] * (longest - len(row)) for row in ids]
    targets = [row + [IGNORED] * (longest - len(row)) for row in targets]
    return MicroBatch(ids, targets, lengths)


def _targets(example: Example) -> list[int]:
    nexts = zip(example.input_ids[1:], example.supervised[1:], strict=True)
    return [token if supervised else IGNORED for token, supervised in nexts] + [IGNORED]
