"""The timeline: bytes per tier and category around every op of a plan, and the peak with its op.

It replays the plan with sizes instead of tensors, storage by storage, as the executor makes, shares and frees them.
`held` is what lives when an op begins, by category; `within` what the op takes on top of that at its worst moment; their
sum is the op's peak. On the CPU the tracked bytes of a run equal it (design law 6; tests/laws/test_timeline.py says how
closely). Averaged adapters count as adapters. Categories: weights, adapters, optimizer, gradients, aux heads, saved inputs,
activations, head, workspace; the library's own memory is added by whoever knows it.

What is steady is assumed: moments of the optimizer exist (from the second step on), buffers have grown to their size. No
seconds here, no choice, no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from lopt_edge.plan.costs.sizes import MOST_PAGES, MicroBatchSize, Sizes, on_disk
from lopt_edge.plan.schedule.ops import MOST_IN_FLIGHT, Keep, Kind, Op, Plan

_PRIORITY = ("saved inputs", "activations")  # a storage with several holders counts where the first of these says


@dataclass(frozen=True)
class OpBytes:
    """One op: bytes held on the device at its beginning by category, what it takes on top, and the tiers below."""

    op: Op
    held: dict[str, int]
    within: int
    host_bytes: int
    disk_bytes: int

    @property
    def peak_bytes(self) -> int:
        return sum(self.held.values()) + self.within


@dataclass(frozen=True)
class Timeline:
    """`rows` has one entry an op."""

    rows: tuple[OpBytes, ...]

    @cached_property
    def peak_row(self) -> OpBytes:
        return max(self.rows, key=lambda row: row.peak_bytes)

    @property
    def peak_bytes(self) -> int:
        return self.peak_row.peak_bytes

    @property
    def host_bytes(self) -> int:
        return max(row.host_bytes for row in self.rows)

    @property
    def disk_bytes(self) -> int:
        return max(row.disk_bytes for row in self.rows)


def timeline(plan: Plan, sizes: Sizes, batches: Sequence[MicroBatchSize], *, beside_bytes: int = 0) -> Timeline:
    """Replay one step; `batches` has one entry a micro-batch. `beside_bytes` of activations live through all of it."""
    replay, rows = _Replay(plan, sizes, batches), []
    replay.live["activations"] += beside_bytes
    replay.total = sum(replay.live.values())
    for op in plan.ops:
        held, before, within = replay.held(), replay.total, replay.within(op)
        replay.run(op)
        within = max(within, replay.total + replay.within_end(op) - before)
        rows.append(OpBytes(op, held, within, replay.below["host"], replay.below["disk"]))
    return Timeline(tuple(rows))


@dataclass(eq=False)
class _Storage:
    """Bytes that live while somebody holds them; `holders` name categories."""

    n_bytes: int
    holders: list[str] = field(default_factory=list)


class _Replay:
    """What is alive. Keys: ("hidden" | "input" | "grad" | "frame" | "graph" | "pages" | ..., micro-batch, target)."""

    def __init__(self, plan: Plan, sizes: Sizes, batches: Sequence[MicroBatchSize]) -> None:
        self.plan, self.sizes, self.batches = plan, sizes, batches
        self.live = sizes.persistent(plan)  # bytes by category, now
        self.live["activations"] = sum(sizes.batch_bytes(batch) for batch in batches)
        self.total = 0  # of all categories, once the replay begins
        self.below: Counter[str] = Counter(sizes.persistent_below(plan.own_segments))
        self.held_by: dict[tuple[str, int, int], tuple[_Storage, str]] = {}
        self.at_wait: dict[tuple[str, str, int, int], tuple[str, ...]] = {}
        self.kept: dict[tuple[int, int], Keep] = {}
        self.own_blocks = any(op.kind is Kind.STORE and op.item == "gradients" for op in plan.ops)
        self.tiers: dict[tuple[str, int, int], tuple[str, int]] = {}  # thing -> (tier below, bytes there)

    # bookkeeping -----------------------------------------------------------------------------------------------------

    def held(self) -> dict[str, int]:
        return {category: n_bytes for category, n_bytes in self.live.items() if n_bytes}

    def hold(self, key: tuple[str, int, int], storage: _Storage | int, category: str) -> None:
        self.drop(key)
        if isinstance(storage, int):
            storage = _Storage(storage)
        self._count(storage, -1)
        storage.holders.append(category)
        self._count(storage, 1)
        self.held_by[key] = (storage, category)

    def drop(self, key: tuple[str, int, int]) -> None:
        found = self.held_by.pop(key, None)
        if found is None:
            return
        storage, category = found
        self._count(storage, -1)
        storage.holders.remove(category)
        self._count(storage, 1)

    def _count(self, storage: _Storage, sign: int) -> None:
        if storage.holders:
            category = next((name for name in _PRIORITY if name in storage.holders), storage.holders[0])
            self.live[category] = self.live.get(category, 0) + sign * storage.n_bytes
            self.total += sign * storage.n_bytes

    def storage(self, key: tuple[str, int, int]) -> _Storage:
        return self.held_by[key][0]

    def send_down(self, key: tuple[str, int, int], tier: str, n_bytes: int, n_pieces: int = 1) -> None:
        if key not in self.tiers:
            n_bytes = on_disk(n_bytes, n_pieces) if tier == "disk" else n_bytes
            self.tiers[key] = (tier, n_bytes)
            self.below[tier] += n_bytes

    def forget_below(self, key: tuple[str, int, int]) -> None:
        if key in self.tiers:
            tier, n_bytes = self.tiers.pop(key)
            self.below[tier] -= n_bytes

    # what an op takes ------------------------------------------------------------------------------------------------

    def within(self, op: Op) -> int:
        sizes = self.sizes
        if op.kind is Kind.STEP:
            return sizes.step_within(op.group) + self.fresh_gradients(op.group)
        if op.micro_batch < 0:
            return 0
        batch = self.batches[op.micro_batch]
        if op.kind is Kind.EMBED:
            return sizes.embed_within(batch)
        if op.kind is Kind.ALIGN:
            return sizes.align_within(batch)
        if op.kind is Kind.HOLD or op.item == "held":
            return 0
        if op.kind in (Kind.READ, Kind.WRITE):
            return sizes.cache_within(batch, reads=op.kind is Kind.READ and op.item == "boundary")
        if op.kind is Kind.RECV:
            return sizes.receive_within(batch)
        if op.kind is Kind.LOSS:
            segment = self.plan.segments[op.target]
            fresh = self.fresh_gradients(("aux", op.target)) if segment.has_head else 0
            if segment.loss == "align":
                return sizes.align_within(batch)
            return sizes.loss_within(batch, task=segment.reads_out) + fresh
        if op.kind not in (Kind.FORWARD, Kind.BACKWARD):
            return 0
        segment = self.plan.scope(op)
        if op.kind is Kind.BACKWARD:
            kept = self.kept[op.micro_batch, op.target]
            fresh = self.fresh_gradients(("layer", op.target)) if op.adapters == "train" else 0
            return sizes.backward_within(batch, op.target, segment, kept=kept, fresh=fresh)
        if op.keep in (Keep.GRAPH, Keep.PAGES):
            return sizes.graph(batch, op.target, segment).within
        return sizes.forward_within(batch, op.target, segment)

    def within_end(self, op: Op) -> int:
        """What an op takes on top of what it leaves: the square of a group's complete gradients, for their norm."""
        if op.kind is Kind.BACKWARD and self.plan.completes(op):
            return self.sizes.group_bytes(("layer", op.target))
        done = op.micro_batch == self.plan.n_micro_batches - 1
        if done and op.kind is Kind.LOSS and self.plan.segments[op.target].has_head:
            return self.sizes.group_bytes(("aux", op.target))
        return 0

    def fresh_gradients(self, group: tuple[str, int]) -> int:
        """Where gradients move each group has a block of its own, made when its first gradient comes."""
        there = (f"gradients {group[0]}", -1, group[1]) in self.held_by
        return self.sizes.group_bytes(group) if self.own_blocks and not there else 0

    # what an op leaves -----------------------------------------------------------------------------------------------

    def run(self, op: Op) -> None:
        getattr(self, f"_{op.kind.value.lower()}")(op)

    def _embed(self, op: Op) -> None:
        batch = self.batches[op.micro_batch]
        self.hold(("hidden", -1, -1), self.sizes.hidden_bytes(batch), "activations")
        self.hold(("frame", -1, -1), self.sizes.frame_bytes(batch), "activations")

    def _read(self, op: Op) -> None:
        batch = self.batches[op.micro_batch]
        if op.item == "held":
            self.hold(("hidden", -1, -1), self.storage(("held", -1, -1)), "activations")
            self.drop(("held", -1, -1))
        elif op.item == "teacher":
            self.hold(("teacher", -1, -1), self.sizes.hidden_bytes(batch), "activations")
        else:
            self._embed(op)

    def _recv(self, op: Op) -> None:
        self._embed(op)

    def _send(self, op: Op) -> None:
        """It is held until the next but one goes (run/link.py)."""
        self.hold(("sent", op.micro_batch % MOST_IN_FLIGHT, -1), self.storage(("hidden", -1, -1)), "activations")

    def _agree(self, op: Op) -> None:
        for place in range(MOST_IN_FLIGHT):
            self.drop(("sent", place, -1))

    def _write(self, op: Op) -> None:
        """The hidden states go on as the cache holds them: new ones."""
        self.hold(("hidden", -1, -1), self.sizes.hidden_bytes(self.batches[op.micro_batch]), "activations")

    def _align(self, op: Op) -> None:
        n_bytes = self.sizes.hidden_bytes(self.batches[op.micro_batch])
        self.hold(("aligned", op.micro_batch, op.target), n_bytes, "activations")
        self.drop(("teacher", -1, -1))

    def _hold(self, op: Op) -> None:
        self.hold(("held", -1, -1), self.storage(("hidden", -1, -1)), "activations")

    def _average(self, op: Op) -> None:
        """In place."""

    def _forward(self, op: Op) -> None:
        segment, batch = self.plan.scope(op), self.batches[op.micro_batch]
        entering = self.storage(("hidden", -1, -1))
        if op.target == segment.first and segment.has_head and op.keep in (Keep.GRAPH, Keep.PAGES):
            self.hold(("target", -1, -1), entering, "saved inputs")
        if op.keep is not Keep.NONE:
            self.kept[op.micro_batch, op.target] = op.keep
        if op.keep is Keep.INPUT:
            self.hold(("input", op.micro_batch, op.target), entering, "saved inputs")
        if op.keep in (Keep.GRAPH, Keep.PAGES):
            graph = self.sizes.graph(batch, op.target, segment)
            self.hold(("graph", op.micro_batch, op.target), graph.rest, "activations")
            if graph.holds_input:
                self.hold(("graph input", op.micro_batch, op.target), entering, "activations")
        self.hold(("hidden", -1, -1), self.sizes.hidden_bytes(batch), "activations")

    def _loss(self, op: Op) -> None:
        self.hold(("grad", -1, -1), self.sizes.hidden_bytes(self.batches[op.micro_batch]), "activations")
        self.drop(("target", -1, -1))
        if self.plan.is_last_run(op):
            self.drop(("hidden", -1, -1))
            self.drop(("teacher", -1, -1))
        if self.plan.segments[op.target].has_head:
            self.take_gradients(("aux", op.target))

    def _backward(self, op: Op) -> None:
        self.kept.pop((op.micro_batch, op.target))
        for name in ("input", "graph", "graph input", "aligned"):
            self.drop((name, op.micro_batch, op.target))
        for name in ("input", "pages"):
            self.forget_below((name, op.micro_batch, op.target))
        if op.target == self.plan.scope(op).reached[0]:
            self.drop(("grad", -1, -1))
        if op.adapters == "train":
            self.take_gradients(("layer", op.target))

    def take_gradients(self, group: tuple[str, int]) -> None:
        key = (f"gradients {group[0]}", -1, group[1])
        if self.own_blocks and key not in self.held_by:
            self.hold(key, self.sizes.group_bytes(group), "gradients")

    def _step(self, op: Op) -> None:
        key = (f"gradients {op.unit}", -1, op.target)
        self.drop(key)
        self.forget_below(key)

    # movements -------------------------------------------------------------------------------------------------------

    def _fetch(self, op: Op) -> None:
        """The ring's buffers are counted as steady."""

    def _spill(self, op: Op) -> None:
        key = ("input", op.micro_batch, op.target)
        self.send_down(key, op.tier, self.storage(key).n_bytes)
        self.at_wait["input", "", op.micro_batch, op.target] = ("input",)

    def _restore(self, op: Op) -> None:
        n_bytes = self.sizes.hidden_bytes(self.batches[op.micro_batch])
        self.hold(("input", op.micro_batch, op.target), n_bytes, "saved inputs")

    def _evict(self, op: Op) -> None:
        if op.item == "input":
            self.drop(("input", op.micro_batch, op.target))

    def _page_bytes(self, op: Op) -> int:
        batch = self.batches[op.micro_batch]
        graph = self.sizes.graph(batch, op.target, self.plan.scope(op))
        return graph.rest + (self.sizes.hidden_bytes(batch) if graph.holds_input else 0)

    def _page_out(self, op: Op) -> None:
        self.send_down(("pages", op.micro_batch, op.target), op.tier, self._page_bytes(op), MOST_PAGES)
        self.at_wait["pages", "", op.micro_batch, op.target] = ("graph", "graph input")

    def _page_in(self, op: Op) -> None:
        self.hold(("graph", op.micro_batch, op.target), self._page_bytes(op), "activations")

    def _store(self, op: Op) -> None:
        name = f"{op.item} {op.unit}"
        if op.item == "gradients":
            self.send_down((name, -1, op.target), op.tier, self.sizes.group_bytes(op.group))
        self.at_wait[op.item, op.unit, -1, op.target] = (name,)

    def _load(self, op: Op) -> None:
        n_bytes = self.sizes.states_bytes(op.group) if op.item == "states" else self.sizes.group_bytes(op.group)
        category = "optimizer" if op.item == "states" else "gradients"
        self.hold((f"{op.item} {op.unit}", -1, op.target), n_bytes, category)

    def _wait(self, op: Op) -> None:
        for name in self.at_wait.pop((op.item, op.unit, op.micro_batch, op.target), ()):
            self.drop((name, op.micro_batch, op.target))
