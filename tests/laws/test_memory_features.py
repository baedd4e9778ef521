"""Design law 3: every memory knob, alone and in random combination, gives the losses, gradients and updates of the run that
holds everything on the device, bitwise; also while every copy, read and write is delayed at random.

Some knobs change bits: `adamw8bit`, which is compared with itself, `token_tile` and the pieces of an MLP, whose bounds are
held here.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lopt_edge.plan.schedule.knobs import TOKEN_TILES, Knobs
from tests.laws.bench import Bench, make_bench, random_batch

BATCHES = [random_batch((9, 6), seed=1), random_batch((12,), seed=2)]
N_LAYERS = 4
RATES = {0: 1e-2, 1: 2e-2, 2: 3e-2, 3: 1e-2}


def two_steps(bench: Bench, n_micro_batches: int) -> tuple[list[object], dict[str, torch.Tensor]]:
    """Losses and norms of two steps, and all trained values after them."""
    results = [
        bench.executor.run(bench.plan, BATCHES[:n_micro_batches], step=step, learning_rates=RATES) for step in (1, 2)
    ]
    values = {name: parameter.detach().clone() for name, parameter in bench.names().items()}
    bench.executor.mover.close()
    return results, values


def assert_same(ours: tuple, theirs: tuple) -> None:
    assert ours[0] == theirs[0]
    for name, value in theirs[1].items():
        assert torch.equal(ours[1][name], value), name


def all_on_device(**changes: object) -> Knobs:
    return Knobs(("resident",) * N_LAYERS, ("recompute",) * N_LAYERS, **changes)


SINGLE = {
    "weights from disk": {"weights": ("disk",) * N_LAYERS},
    "weights from disk, no prefetch": {"weights": ("disk",) * N_LAYERS, "prefetch": 0},
    "weights from disk, far prefetch": {"weights": ("disk",) * N_LAYERS, "prefetch": 3},
    "some weights from disk": {"weights": ("resident", "disk", "resident", "disk")},
    "graphs kept": {"activations": ("keep",) * N_LAYERS},
    "graphs paged": {"activations": ("page",) * N_LAYERS},
    "saved inputs on disk": {"saved_inputs": "disk"},
    "states on disk": {"states": "disk"},
    "gradients on disk": {"gradients": "disk"},
}


@pytest.fixture(scope="module")
def plain_steps(four_bit) -> Callable[..., tuple]:
    """Two steps without any knob, made once for each shape."""
    return cache(lambda **shape: two_steps(make_bench(four_bit(), **shape), 2))


@pytest.mark.parametrize("name", list(SINGLE))
@pytest.mark.parametrize(("method", "num_segments"), [("e2e", 1), ("lopt", 2), ("lopt", 4)])
def test_each_knob_alone(four_bit, plain_steps, tmp_path, name, method, num_segments):
    shape = {"method": method, "num_segments": num_segments, "n_micro_batches": 2}
    plain = plain_steps(**shape)
    knobs = Knobs(**{"weights": ("resident",) * N_LAYERS, "activations": ("recompute",) * N_LAYERS, **SINGLE[name]})
    assert_same(two_steps(make_bench(four_bit(), **shape, knobs=knobs, page_dir=tmp_path), 2), plain)


@pytest.mark.parametrize("name", ["gradients on disk", "graphs paged", "saved inputs on disk"])
def test_gradients_themselves(four_bit, tmp_path, name):
    shape = {"method": "lopt", "num_segments": 2, "n_micro_batches": 2}
    knobs = Knobs(**{"weights": ("disk",) * N_LAYERS, "activations": ("recompute",) * N_LAYERS, **SINGLE[name]})
    plain = make_bench(four_bit(), **shape).gradients(BATCHES)
    paged = make_bench(four_bit(), **shape, knobs=knobs, page_dir=tmp_path).gradients(BATCHES)
    for key, value in plain.items():
        assert torch.equal(paged[key], value), key


@pytest.mark.parametrize("apply", ["segment", "layer"])
def test_early_updates(four_bit, apply):
    """No op after a group's last backward reads its values, so updating it at once changes nothing."""
    shape = {"num_segments": 2, "clip": 0.0 if apply == "layer" else 1.0}
    plain = two_steps(make_bench(four_bit(), **shape), 1)
    assert_same(two_steps(make_bench(four_bit(), **shape, knobs=all_on_device(apply=apply)), 1), plain)


def test_eight_bit_states_are_the_same_wherever_they_lie(four_bit, tmp_path):
    plain = two_steps(make_bench(four_bit(), knobs=all_on_device(optimizer="adamw8bit")), 1)
    knobs = all_on_device(optimizer="adamw8bit", states="disk")
    assert_same(two_steps(make_bench(four_bit(), knobs=knobs, page_dir=tmp_path), 1), plain)


LONG = {"hidden_size": 128, "intermediate_size": 128, "vocab_size": 320, "max_position_embeddings": 1024}


@pytest.mark.parametrize(("method", "num_segments", "n_micro_batches"), [("e2e", 1, 1), ("lopt", 2, 2), ("frozen", 2, 1)])
def test_tiles_of_the_losses_agree_within_a_hundred_thousandth(four_bit, method, num_segments, n_micro_batches):
    """256, 512 and 1024 tokens at a time in fp32; every gradient compared by its norm. Measured: 5e-7 at most."""
    batches = [random_batch((900, 333), seed=5), random_batch((700,), seed=6)][:n_micro_batches]
    shape = {"method": method, "num_segments": num_segments, "n_micro_batches": n_micro_batches}
    plain = make_bench(four_bit(**LONG), **shape).gradients(batches)
    for tile in TOKEN_TILES[1:]:
        bench = make_bench(four_bit(**LONG), **shape, knobs=all_on_device(token_tile=tile))
        assert bench.plan.tile == tile
        for name, value in bench.gradients(batches).items():
            assert (value - plain[name]).norm() <= 1e-5 * plain[name].norm(), (name, tile)


def test_pieces_of_the_mlp_agree_within_a_hundred_thousandth(four_bit):
    """Blocks of 64 features and tiles of 16 tokens against one of all 192 features, in fp32. Measured: 4e-7 at most."""
    batches, shape = [random_batch((90, 33), seed=5)], {"hidden_size": 128, "intermediate_size": 192}
    plain = make_bench(four_bit(**shape), knobs=all_on_device(mlp_block=192)).gradients(batches)
    cut = make_bench(four_bit(**shape), knobs=all_on_device(mlp_block=64, mlp_tile=16))
    assert cut.plan.mlp == (64, 16)
    found = cut.gradients(batches)
    assert any(not torch.equal(found[name], value) for name, value in plain.items())
    for name, value in plain.items():
        assert (found[name] - value).norm() <= 1e-5 * value.norm(), name


@pytest.mark.parametrize("lengths", [(256,), (120, 136), (10,)])
def test_a_smaller_tile_that_holds_all_tokens_changes_no_bit(four_bit, lengths):
    """The local loss is over all real tokens, the task's over the supervised ones."""
    batch = random_batch(lengths, seed=5)
    shape = {"method": "lopt", "num_segments": 2}
    plain = make_bench(four_bit(**LONG), **shape).gradients([batch])
    small = make_bench(four_bit(**LONG), **shape, knobs=all_on_device(token_tile=256)).gradients([batch])
    assert all(torch.equal(small[name], value) for name, value in plain.items())


def delays(seed: int, *, longest: float) -> object:
    """Sleeps of random length in every stage of every movement."""
    source, lock = random.Random(seed), threading.Lock()

    def pause(name: str) -> None:
        with lock:
            seconds = source.random() ** 4 * longest
        time.sleep(seconds)

    return pause


TIERS = st.sampled_from(["device", "disk"])
KNOBS = st.builds(
    Knobs,
    weights=st.tuples(*[st.sampled_from(["resident", "disk"])] * N_LAYERS),
    activations=st.tuples(*[st.sampled_from(["keep", "recompute", "page"])] * N_LAYERS),
    saved_inputs=TIERS,
    states=TIERS,
    gradients=TIERS,
    apply=st.sampled_from(["step", "segment"]),
    prefetch=st.integers(0, 3),
)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    knobs=KNOBS,
    shape=st.sampled_from([("e2e", 1), ("lopt", 2), ("lopt", 4), ("frozen", 2)]),
    n_micro_batches=st.sampled_from([1, 2]),
    dropout=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 99),
)
def test_any_combination_under_random_delays(four_bit, tmp_path, knobs, shape, n_micro_batches, dropout, seed):
    """A buffer that is overwritten too early, or read before it is filled, would show here."""
    arguments = {"method": shape[0], "num_segments": shape[1], "n_micro_batches": n_micro_batches, "dropout": dropout}
    key = (*shape, n_micro_batches, dropout)
    if key not in PLAIN:
        PLAIN[key] = two_steps(make_bench(four_bit(), **arguments), n_micro_batches)
    pause = delays(seed, longest=0.01)
    bench = make_bench(four_bit(), **arguments, knobs=knobs, page_dir=tmp_path, delay=pause)
    assert_same(two_steps(bench, n_micro_batches), PLAIN[key])


PLAIN: dict[tuple, tuple] = {}


@pytest.mark.parametrize("stage", ["fetch", "write", "read"])
def test_one_long_delay_in_each_direction(four_bit, tmp_path, stage):
    everything = Knobs(
        ("disk",) * N_LAYERS,
        ("recompute", "page", "recompute", "recompute"),
        saved_inputs="disk",
        states="disk",
        gradients="disk",
        prefetch=2,
    )
    plain = two_steps(make_bench(four_bit(), method="e2e", n_micro_batches=2), 2)

    def pause(name: str) -> None:
        time.sleep(0.05 if name == stage else 0.0)

    bench = make_bench(four_bit(), method="e2e", n_micro_batches=2, knobs=everything, page_dir=tmp_path, delay=pause)
    assert_same(two_steps(bench, 2), plain)


def test_evaluation_and_its_loss_do_not_depend_on_where_weights_lie(four_bit):
    plain = make_bench(four_bit()).evaluate(BATCHES)
    assert make_bench(four_bit(), knobs=Knobs(("disk",) * N_LAYERS, ("recompute",) * N_LAYERS)).evaluate(BATCHES) == plain
