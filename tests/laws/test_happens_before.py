"""Movements between tiers have no race on a GPU's streams (tests/fake_device/races.py), whatever the plan.

Falling loss proves nothing: a buffer that is overwritten too early still trains. The real movement code runs plans with all
tiers, workers eager and lazy; no two accesses of which one writes may be unordered, and nothing may be freed in use. That
the rig sees such faults is proved by making them: each mutation leaves one mark or one wait out, and must be caught. (The
marks of the arena's blocks are tests/run/tiers/test_pinned.py's matter: in so small a model no block is cut out of what a
copy still reads.)

A few random plans by default, 200 more with `-m long`.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lopt_edge.plan.schedule.knobs import Knobs
from lopt_edge.run.tiers import moves, weights
from lopt_edge.run.tiers.moves import Mover
from lopt_edge.run.tiers.staging import Stage
from lopt_edge.run.tiers.weights import Weights
from tests.fake_device.races import Event, Races, install
from tests.laws.bench import make_bench, random_batch

N_LAYERS = 3
RATES = dict.fromkeys(range(9), 1e-3)
TIERS = ("device", "host", "disk")


@pytest.fixture
def model(four_bit: Callable[..., Path]) -> Path:
    return four_bit(num_hidden_layers=N_LAYERS)


def all_on(place: str, **changes: Any) -> Knobs:
    below = {"saved_inputs": place, "pages": place, "states": place, "gradients": place}
    return Knobs((place,) * N_LAYERS, ("page", "recompute", "page"), head="resident", **below, **changes)


PLANS = {
    "host": all_on("host"),
    "disk": all_on("disk"),
    "weights on the host": Knobs(("host",) * N_LAYERS, ("recompute",) * N_LAYERS, head="resident"),
}


def random_knobs(pick: random.Random) -> Knobs:
    def some(*choices: str) -> tuple[str, ...]:
        return tuple(pick.choice(choices) for _ in range(N_LAYERS))

    return Knobs(
        some("resident", "host", "disk"),
        some("keep", "recompute", "page"),
        saved_inputs=pick.choice(TIERS),
        pages=pick.choice(TIERS[1:]),
        states=pick.choice(TIERS),
        gradients=pick.choice(TIERS),
        apply=pick.choice(["step", "segment", "layer"]),
        prefetch=pick.choice([0, 1, 2]),
        head="resident",
    )


def races_of(
    folder: Path, page_dir: Path, knobs: Knobs, *, lazy: bool, patch: pytest.MonkeyPatch, mutation: str = "", seed: int = 0
) -> Counter[str]:
    """The races of two steps of a run, of what it keeps between them, and of its end."""
    races, method = Races(lazy=lazy, seed=seed), ("lopt", 2) if seed % 2 else ("e2e", 1)
    n_micro_batches = 1 if knobs.apply == "layer" or (mutation and mutation != ROOMS) else 2
    with patch.context() as context:
        install(context, races)
        if mutation:
            MUTATIONS[mutation](context)
        bench = make_bench(
            folder,
            method=method[0],
            num_segments=method[1],
            knobs=knobs,
            page_dir=page_dir,
            n_micro_batches=n_micro_batches,
            clip=0.0 if knobs.apply == "layer" else 1.0,
        )
        batches = [random_batch(lengths, seed=1) for lengths in ((9, 6), (12,))[:n_micro_batches]]
        embedding = bench.model.embedding
        bench.executor.optimizer.meanwhile = [lambda: embedding.read_ahead(batches[0].ids_BT.reshape(-1))]
        with races:
            for step in (1, 2):
                bench.executor.run(bench.plan, batches, step=step, learning_rates=RATES)
            bench.executor.release()
            bench.executor.mover.close()
    return races.found


@pytest.mark.parametrize(("plan", "lazy"), [("host", False), ("disk", False), ("disk", True)])
def test_no_race_where_all_is_below(model, tmp_path, monkeypatch, plan, lazy):
    assert not races_of(model, tmp_path, PLANS[plan], lazy=lazy, patch=monkeypatch)


def check(numbers: range, model: Path, tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    for number in numbers:
        knobs = random_knobs(random.Random(number))
        found = races_of(model, tmp_path, knobs, lazy=number % 4 < 2, patch=patch, seed=number)
        assert not found, (number, knobs, found)


def test_random_plans_have_no_race(model, tmp_path, monkeypatch):
    check(range(2), model, tmp_path, monkeypatch)


@pytest.mark.long
def test_two_hundred_random_plans_have_no_race(model, tmp_path, monkeypatch):
    check(range(2, 202), model, tmp_path, monkeypatch)


# faults, made on purpose, in steps of one micro-batch (but for that of the rooms, which the next one takes again) ---------


def let_go_early(patch: pytest.MonkeyPatch) -> None:
    down = Mover.down

    def call(self: Mover, offloaded: Any, tier: str) -> None:
        down(self, offloaded, tier)
        offloaded.tensor = None

    patch.setattr(Mover, "down", call)


def hand_out_early(patch: pytest.MonkeyPatch) -> None:
    up = Mover.up

    def call(self: Mover, offloaded: Any) -> None:
        up(self, offloaded)
        pending, offloaded.pending = offloaded.pending, None
        if offloaded.host is None:
            offloaded.pending = pending
        else:
            patch_free(self, pending)

    def patch_free(mover: Mover, pending: Callable[[], None]) -> None:
        hold, mover.before_compute = mover.before_compute, lambda event: None  # type: ignore[method-assign]
        pending()
        mover.before_compute = hold  # type: ignore[method-assign]

    patch.setattr(Mover, "up", call)


def give_staging_early(patch: pytest.MonkeyPatch) -> None:
    """A staging block goes back before its copy has ended: nobody waits for events."""
    patch.setattr(Event, "synchronize", lambda self: None)


def no_wait_for_jobs(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(moves, "result_of", lambda job: None)


def no_wait_for_fetches(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(weights, "result_of", lambda job: None)


def fetch_without_mark(patch: pytest.MonkeyPatch) -> None:
    copy = Weights._copy
    patch.setattr(Weights, "_copy", lambda self, buffer, source, mark: copy(self, buffer, source, None))


def one_way_without_mark(way: str) -> Callable[[pytest.MonkeyPatch], None]:
    """Copies of one direction begin at once: the stream that both shared once would have kept them in order."""

    def change(patch: pytest.MonkeyPatch) -> None:
        on_side = Mover.on_side
        patch.setattr(
            Mover,
            "on_side",
            lambda self, stream, mark: on_side(self, stream, None if stream is getattr(self, f"going_{way}") else mark),
        )

    return change


def one_way_without_hold(way: str) -> Callable[[pytest.MonkeyPatch], None]:
    """The computing stream waits for copies of one direction only."""

    def change(patch: pytest.MonkeyPatch) -> None:
        copy = getattr(Mover, f"copy_{way}")

        def call(self: Mover, *given: Any, **named: Any) -> Any:
            return Event(copy(self, *given, **named).races, {})

        patch.setattr(Mover, f"copy_{way}", call)

    return change


def weights_without_hold(patch: pytest.MonkeyPatch) -> None:
    wait = Weights.wait

    def call(self: Weights, layer: int) -> None:
        buffer, job, _ = self._taken[layer]
        self._taken[layer] = (buffer, job, None)
        wait(self, layer)

    patch.setattr(Weights, "wait", call)


def copies_without_mark(patch: pytest.MonkeyPatch) -> None:
    on_side = Mover.on_side
    patch.setattr(Mover, "on_side", lambda self, stream, mark: on_side(self, stream, None))


def copy_on_no_stream(patch: pytest.MonkeyPatch) -> None:
    """An event is put before the copy that it is to follow."""
    copy = Mover._copy

    def call(self: Mover, stream: Any, *given: Any) -> Any:
        event = stream.record_event()
        copy(self, stream, *given)
        return event

    patch.setattr(Mover, "_copy", call)


def rooms_without_mark(patch: pytest.MonkeyPatch) -> None:
    """What the host sends up is written over while it is still read."""
    patch.setattr(Stage, "send", lambda self, room, *, out=None, send=Stage.send: send(_unmarked(self), room, out=out))


def _unmarked(stage: Stage) -> Stage:
    return Stage(stage.device, stage.pinned, lambda: None)


ROOMS = "rooms go back without a mark"
MUTATIONS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "the computing stream never waits": lambda patch: patch.setattr(Mover, "before_compute", lambda self, event: None),
    "copies never wait": lambda patch: patch.setattr(Mover, "after_compute", lambda self: None),
    "copies ignore their marks": copies_without_mark,
    "copies up begin at once": one_way_without_mark("up"),
    "copies down begin at once": one_way_without_mark("down"),
    "nothing waits for copies up": one_way_without_hold("up"),
    "nothing waits for copies down": one_way_without_hold("down"),
    "an event comes before its copy": copy_on_no_stream,
    "a tensor is let go before its copy": let_go_early,
    "a tensor is handed out before its copy": hand_out_early,
    "events are not waited for": give_staging_early,
    "jobs are not waited for": no_wait_for_jobs,
    "fetches are not waited for": no_wait_for_fetches,
    "a fetch ignores who computes": fetch_without_mark,
    ROOMS: rooms_without_mark,
    "weights are bound before they are there": weights_without_hold,
}


SEEN_IN = {  # a plan, and whether workers are lazy; others hide the fault behind an order that they keep anyway
    "the computing stream never waits": ("host", False),
    "copies never wait": ("host", False),
    "copies ignore their marks": ("host", False),
    "copies up begin at once": ("host", False),
    "copies down begin at once": ("host", False),
    "nothing waits for copies up": ("host", False),
    "nothing waits for copies down": ("host", False),
    "an event comes before its copy": ("host", False),
    "a tensor is let go before its copy": ("host", False),
    "a tensor is handed out before its copy": ("host", False),
    "events are not waited for": ("disk", False),
    "jobs are not waited for": ("disk", False),
    "fetches are not waited for": ("disk", False),
    "a fetch ignores who computes": ("weights on the host", False),
    ROOMS: ("weights on the host", False),
    "weights are bound before they are there": ("weights on the host", False),
}


@pytest.mark.parametrize("mutation", list(MUTATIONS))
def test_each_fault_is_caught(model, tmp_path, monkeypatch, mutation):
    plan, lazy = SEEN_IN[mutation]
    assert races_of(model, tmp_path, PLANS[plan], lazy=lazy, patch=monkeypatch, mutation=mutation)
