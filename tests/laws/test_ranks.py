"""Data parallel's law: ranks that share a step have the gradients, losses and adapters of one process with the same window.

Bitwise where each rank has one micro-batch, since the ranks' gradients are added in the order in which one process adds its
micro-batches'. Where a rank has several (or a layer two windows), the sum is bracketed in another way: then the gradients
are bitwise those of the shares, each in a process of its own, added in the order of ranks, and within 1e-6 of their norm
those of one process. Here each rank is a thread with a model, a plan and a link of its own; whole runs are in
tests/training/test_ranks.py.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from lopt_edge.errors import NotFinite, PeerLost
from lopt_edge.models.folder import find_model
from lopt_edge.plan.costs.shape import LayerShape
from lopt_edge.plan.costs.sizes import Sizes
from lopt_edge.plan.costs.timeline import timeline
from lopt_edge.plan.schedule.ranks import Rank, shares
from lopt_edge.run import ranks as ranks_module
from lopt_edge.run.link import Link, host_store, join_store
from lopt_edge.run.ranks import Exchange
from lopt_edge.run.step.batches import window_totals
from lopt_edge.run.step.step_state import Share
from lopt_edge.run.watch.memory_report import MemoryMeter
from tests.fake_device.played_ranks import PlayedLink
from tests.fake_device.races import Races, Stream, Workers, install
from tests.laws.bench import make_bench, random_batch
from tests.plan.plans import make_knobs

CPU = torch.device("cpu")
LENGTHS = ((11, 7), (9, 9), (5, 12), (14,))
BATCHES = [random_batch(lengths, seed=seed) for seed, lengths in enumerate(LENGTHS)]
PAGED = {"weights": "disk", "saved_inputs": "disk", "states": "disk", "gradients": "disk"}
WAIT = timedelta(seconds=60)


def in_ranks(n: int, run: Callable[[Link], Any], *, timeout: timedelta = WAIT) -> list[Any]:
    """Each rank's result, or what it raised."""
    store, found = host_store(n, WAIT), [None] * n
    ranks = [Rank(rank) for rank in range(n)]

    def one(rank: int) -> None:
        try:
            meeting = store if rank == 0 else join_store(store.port, WAIT)
            found[rank] = run(Link(meeting, ranks, rank, timeout=timeout, whole=""))
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in found:
        if isinstance(error, Exception) and not isinstance(error, PeerLost):
            raise error
    return found


class RankBench:
    """What one rank has: its bench, its share of the batches, and the exchange."""

    def __init__(self, folder: Path, link: Link, batches: list[Any], delay: Callable[[], None], **options: Any) -> None:
        dealt = shares(batches, len(link.parts))
        self.own, first = list(dealt[link.rank]), sum(map(len, dealt[: link.rank]))
        self.share = Share(first, window_totals(batches))
        self.bench = make_bench(folder, n_micro_batches=len(self.own), ranks=len(link.parts), **options)
        self.executor = self.bench.executor
        self.executor.link, self.executor.peers.exchange = link, Exchange(link, CPU, delay=delay)

    def step(self, number: int, *, lr: float = 1e-2) -> Any:
        rates = dict.fromkeys(range(8), lr)
        return self.executor.run(self.bench.plan, self.own, step=number, learning_rates=rates, share=self.share)

    def values(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.bench.names().items()}


def gradients_of(folder: Path, batches: list[Any], share: Share, **options: Any) -> dict[str, torch.Tensor]:
    """The gradients of a share of a step, in one process."""
    bench = make_bench(folder, n_micro_batches=len(batches), **options)
    plan = replace(bench.plan, ops=tuple(op for op in bench.plan.ops if op.kind not in ("STEP", "AVERAGE")))
    bench.executor.run(plan, batches, step=1, learning_rates={}, share=share)
    return bench.take_gradients()


@pytest.fixture
def folder(four_bit) -> Path:
    return four_bit("llama", num_hidden_layers=4)


@pytest.mark.parametrize(("method", "n", "dropout"), [("e2e", 4, 0.3), ("lopt", 2, 0.0)])
def test_with_a_micro_batch_each_all_bits_are_those_of_one_process(folder, method, n, dropout):
    """Gradients as the updates see them, two steps of values, and the losses; dropout's masks are those of the window."""
    options = {"method": method, "num_segments": 2, "dropout": dropout, "clip_scope": "global"}
    whole = make_bench(folder, n_micro_batches=n, **options)
    rates = dict.fromkeys(range(8), 1e-2)
    results = [whole.executor.run(whole.plan, BATCHES[:n], step=step, learning_rates=rates) for step in (1, 2)]
    wanted = {name: p.detach().clone() for name, p in whole.names().items()}

    def run(link: Link) -> Any:
        rank = RankBench(folder, link, BATCHES[:n], lambda: time.sleep(0.002 * link.rank), **options)
        return [rank.step(1), rank.step(2)], rank.values()

    found = in_ranks(n, run)
    for _, values in found:
        for name, value in wanted.items():
            assert torch.equal(values[name], value), name
    for one, other in zip(found[0][0], results, strict=True):
        assert (one.grad_norm, one.totals) == (other.grad_norm, other.totals)
        assert (one.loss, *one.local_loss) == pytest.approx((other.loss, *other.local_loss), rel=1e-12)


@pytest.mark.parametrize(("method", "changes"), [("mlaan", {}), ("lopt", PAGED)], ids=["mlaan", "lopt, paged"])
def test_with_several_each_they_are_the_shares_added_in_the_order_of_ranks(folder, tmp_path, method, changes):
    """Four micro-batches for three ranks: two, one and one. And one batch for three: two ranks give zeros."""
    knobs = make_knobs(4, **changes)
    options = {"method": method, "num_segments": 4}
    for n_batches in (4, 1):
        batches = BATCHES[:n_batches]
        share = Share(0, window_totals(batches))
        at_once = gradients_of(folder, batches, share, **options)
        parts = [gradients_of(folder, list(one), share, **options) for one in shares(batches, 3) if one]
        wanted = {name: sum((part[name] for part in parts[1:]), start=parts[0][name]) for name in at_once}

        def run(link: Link, batches: list[Any] = batches) -> Any:
            rank = RankBench(folder, link, batches, lambda: None, page_dir=tmp_path, knobs=knobs, **options)
            left_out = ("STEP", "AVERAGE")
            ops = tuple(op for op in rank.bench.plan.ops if op.kind not in left_out and op.item != "states")
            rank.executor.run(replace(rank.bench.plan, ops=ops), rank.own, step=1, learning_rates={}, share=rank.share)
            return rank.bench.take_gradients()

        for gradients in in_ranks(3, run):
            for name, gradient in wanted.items():
                assert torch.equal(gradients[name], gradient), name
                assert (gradient - at_once[name]).norm() <= 1e-6 * at_once[name].norm()


def test_a_bad_number_in_one_rank_updates_nothing_anywhere(folder):
    def run(link: Link) -> Any:
        rank = RankBench(folder, link, BATCHES, lambda: None, method="lopt", num_segments=2)
        before, weight = rank.values(), rank.bench.heads[0].down.weight.data
        kept = weight.clone()
        if link.rank == 1:
            weight.fill_(float("nan"))
        with pytest.raises(NotFinite) as caught:
            rank.step(1)
        weight.copy_(kept)
        same = all(torch.equal(before[name], value) for name, value in rank.values().items())
        rank.step(2)
        return str(caught.value), same

    for text, same in in_ranks(2, run):
        assert "rank 1" in text and same


def test_a_silent_rank_is_a_fault_and_no_hang(folder):
    def run(link: Link) -> Any:
        rank = RankBench(folder, link, BATCHES[:2], lambda: None, method="e2e")
        if link.rank:
            time.sleep(2.5)
            return None
        before = rank.values()
        try:
            rank.step(1)
        except PeerLost as error:
            same = all(torch.equal(before[name], value) for name, value in rank.values().items())
            return str(error), error.values_intact, same

    link_timeout = timedelta(seconds=1)
    text, intact, same = in_ranks(2, run, timeout=link_timeout)[0]
    assert "the other processes said nothing" in text and intact and same


@pytest.mark.parametrize(("ranks", "changes"), [(2, {"activations": "keep"}), (3, PAGED)], ids=["kept", "paged"])
def test_predicted_bytes_of_a_rank_are_the_tracked_ones(folder, tmp_path, ranks, changes):
    """As tests/laws/test_timeline.py has it for one process: the sums' buffers are planned."""
    facts, knobs = find_model(str(folder)).facts, make_knobs(4, **changes)
    batches = [random_batch((90, 60), seed=1), random_batch((100, 80), seed=2), random_batch((70, 50), seed=3)]

    def run(link: Link) -> Any:
        rank = RankBench(folder, link, batches, lambda: None, method="lopt", num_segments=2, knobs=knobs, page_dir=tmp_path)
        meter = MemoryMeter(rank.executor)
        for step in (1, 2):
            with meter.watching(rank.own) if step == 2 and not link.rank else nullcontext():
                rank.step(step)
        return meter.rows, rank.bench.plan, rank.own

    rows, plan, own = in_ranks(ranks, run)[0]
    sizes = Sizes(LayerShape(facts, 4, 4, facts.linear_names), knobs, vocabulary_itemsize=4)
    predicted = timeline(plan, sizes, [replace(batch.size, n_real=batch.n_tokens) for batch in own])
    assert any(row.op.kind == "REDUCE" for row in predicted.rows)
    for measured, row in zip(rows, predicted.rows, strict=True):
        off = sum(row.held.values()) - sum(measured.held.values())
        assert 0 <= off <= 64, (measured.text, off)
        too_much = row.peak_bytes - measured.peak_bytes
        assert too_much >= -64, (measured.text, too_much)
        assert row.op.effect.enters or too_much <= 0.02 * measured.peak_bytes + 64, (measured.text, too_much)


# on a card in name -----------------------------------------------------------------------------------------------------


def races_of(folder: Path, patch: pytest.MonkeyPatch, *, lazy: bool, fault: str = "") -> Counter[str]:
    """The races of two steps whose gradients are summed on a side stream (tests/fake_device/races.py)."""
    races = Races(lazy=lazy)
    with patch.context() as context:
        install(context, races)
        context.setattr(ranks_module, "ThreadPoolExecutor", lambda *_, **__: Workers(races))
        if fault == "no mark":
            context.setattr(Stream, "mark_compute", lambda self: None)
        if fault == "no wait":
            context.setattr(PlayedLink, "wait_for", lambda self, job: None)
        bench = make_bench(folder, method="lopt", num_segments=2, ranks=2)
        link: Any = PlayedLink()
        bench.executor.link, bench.executor.peers.exchange = link, Exchange(link, CPU)
        with races:
            for step in (1, 2):
                bench.executor.run(bench.plan, BATCHES[:1], step=step, learning_rates=dict.fromkeys(range(8), 1e-3))
            bench.executor.release()
            bench.executor.mover.close()
    return races.found


@pytest.mark.parametrize("lazy", [False, True])
def test_sums_have_no_race_on_a_cards_streams(folder, monkeypatch, lazy):
    assert not races_of(folder, monkeypatch, lazy=lazy)


@pytest.mark.parametrize("fault", ["no mark", "no wait"])
def test_a_sum_that_begins_early_or_is_not_waited_for_is_caught(folder, monkeypatch, fault):
    assert races_of(folder, monkeypatch, lazy=False, fault=fault)
