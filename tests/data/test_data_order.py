"""The order of an epoch, collation and window totals, as laws over arbitrary data."""

from __future__ import annotations

import random
from array import array
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lopt_edge.data import IGNORED, Example, collate, epoch_windows, micro_batches_of, split_window
from lopt_edge.errors import InputError

LENGTHS = st.lists(st.integers(2, 60), max_size=60)
SIZES = st.integers(1, 7)


@st.composite
def examples(draw):
    ids = draw(st.lists(st.integers(0, 2**31 - 1), min_size=2, max_size=12))
    mask = draw(st.lists(st.booleans(), min_size=len(ids) - 1, max_size=len(ids) - 1))
    return Example(array("i", ids), bytes([0, *mask]), "d:1")


@given(lengths=LENGTHS, seed=st.integers(0, 9), epoch=st.integers(0, 3), batch_size=SIZES, grad_accum=SIZES)
def test_windows(lengths, seed, epoch, batch_size, grad_accum):
    settings = {"seed": seed, "epoch": epoch, "batch_size": batch_size, "grad_accum": grad_accum}
    windows = epoch_windows(lengths, **settings)
    flat = [index for window in windows for batch in window for index in batch]
    assert sorted(flat) == list(range(len(lengths)))
    assert tuple(windows) == tuple(epoch_windows(lengths, **settings)) == windows[:]
    sizes = [sum(map(len, window)) for window in windows]
    # one window may be short: the last one, or the first if it was the largest and so changed places with it
    assert all(size == batch_size * grad_accum for size in sizes[1:-1])
    assert sum(size != batch_size * grad_accum for size in sizes) <= 1
    for window in windows:
        assert all(1 <= len(batch) <= batch_size for batch in window)
        assert len(window) == -(-sum(map(len, window)) // batch_size)
        # Batches do not overlap in length: none holds a sequence between two of another.
        spans = sorted((lengths[batch[0]], lengths[batch[-1]]) for batch in window)
        assert all(before[1] <= after[0] for before, after in pairwise(spans))


@given(lengths=LENGTHS, batch_size=SIZES)
def test_lengths_do_not_decide_which_examples_share_a_window(lengths, batch_size):
    settings = {"seed": 1, "epoch": 0, "batch_size": batch_size, "grad_accum": 3}
    members = [{i for batch in window for i in batch} for window in epoch_windows(lengths, **settings)]
    other = [{i for batch in window for i in batch} for window in epoch_windows([5] * len(lengths), **settings)]
    assert sorted(map(sorted, members)) == sorted(map(sorted, other))  # the largest window comes first


@given(lengths=LENGTHS.filter(bool), batch_size=SIZES, size=SIZES, data=st.data())
def test_a_window_in_smaller_micro_batches_and_a_place_in_it(lengths, batch_size, size, data):
    (window, *_) = epoch_windows(lengths, seed=2, epoch=1, batch_size=batch_size, grad_accum=3)
    split = split_window(window, size)
    assert [i for batch in split for i in batch] == [i for batch in window for i in batch]
    assert all(len(batch) <= size for batch in split) and (size < batch_size or split == window)
    number = data.draw(st.integers(0, len(split)))
    place = sum(map(len, split[:number]))
    assert micro_batches_of(split, place) == number
    boundaries = {sum(map(len, window[:at])) for at in range(len(window) + 1)}
    assert (micro_batches_of(window, place) is not None) == (place in boundaries)
    assert micro_batches_of(window, 10**6) is None


def test_seed_and_epoch_change_the_order_and_the_order_is_pinned():
    lengths = [5, 9, 2, 7, 3, 8, 4, 6]
    orders = [
        tuple(epoch_windows(lengths, seed=seed, epoch=epoch, batch_size=2, grad_accum=2))
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    assert len(set(orders)) == 4
    # A change here breaks the resumption of every run that exists.
    assert orders[0] == (((2, 6), (3, 1)), ((7, 5), (4, 0)))


def test_the_largest_window_of_the_run_comes_first_and_swaps_places():
    lengths = [random.Random(i).randint(2, 400) for i in range(60)]
    windows, later = (epoch_windows(lengths, seed=3, epoch=epoch, batch_size=2, grad_accum=3) for epoch in (0, 1))
    rows = [max(len(batch) * max(lengths[i] for i in batch) for batch in window) for window in windows]
    assert rows[0] == max(rows)
    assert any(max(lengths[i] for batch in window for i in batch) == max(lengths) for window in later[1:])
    assert sorted(i for window in windows for batch in window for i in batch) == list(range(60))


@pytest.mark.parametrize("sizes", [{"batch_size": 0, "grad_accum": 1}, {"batch_size": 1, "grad_accum": 0}])
def test_sizes_must_be_positive(sizes):
    with pytest.raises(InputError, match="not a positive number"):
        epoch_windows([3], seed=0, epoch=0, **sizes)


@given(batch=st.lists(examples(), min_size=1, max_size=5))
def test_collate(batch):
    out = collate(batch, pad_id=7)
    longest = max(map(len, batch))
    assert out.lengths == tuple(map(len, batch))
    for example, ids, targets in zip(batch, out.input_ids, out.targets, strict=True):
        assert len(ids) == len(targets) == longest
        assert ids[: len(example)] == example.input_ids.tolist()
        assert set(ids[len(example) :]) <= {7}
        for t in range(longest):
            is_target = t + 1 < len(example) and example.supervised[t + 1]
            assert targets[t] == (example.input_ids[t + 1] if is_target else IGNORED)
        assert all(type(value) is int for value in (*ids, *targets))
    assert out.n_tokens == sum(map(len, batch))
    assert out.n_supervised == sum(example.n_supervised for example in batch)
