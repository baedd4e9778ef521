"""The timeline: bytes per tier and category around every op of a plan, and the peak with its op.

It replays the plan with sizes instead of tensors, storage by storage, as the executor makes, shares and frees them.
`held` is what lives when an op begins, by category; `within` what the op takes on top of that at its worst moment; their
sum is the op's peak. On the CPU the tracked bytes of a run equal it (design law 6; tests/laws/test_timeline.py says how
closely). Categories: weights, adapters, optimizer, gradients, aux heads, saved inputs, activations, head, workspace; the
library's own memory is added by whoever knows it.

What is steady is assumed: moments of the optimizer exist (from the second step on), buffers have grown to their size. No
seconds here, no choice, no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from lopt_edge.plan.ops import Keep, Kind, Op, Plan
from lopt_edge.plan.sizes import MicroBatchSize, Sizes

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

    @property
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


def timeline(plan: Plan, sizes: Sizes, batches: Sequence[MicroBatchSize]) -> Timeline:
    """Replay one step; `batches` has one entry a micro-batch."""
    replay, rows = _Replay(plan, sizes, batches), []
    for op in plan.ops:
        held, within = replay.held(), replay.within(op)
        replay.run(op)
        rows.append(OpBytes(op, held, within, replay.below["host"], replay.below["disk"]))
    return Timeline(tuple(rows))


@dataclass(eq=False)
class _Storage:
    """Bytes that live while somebody holds them; `holders` name categories."""

    n_bytes: int
    holders: Counter[str] = field(default_factory=Counter)


class _Replay:
    """What is alive. Keys: ("hidden" | "input" | "grad" | "frame" | "graph" | "pages" | ..., micro-batch, target)."""

    def __init__(self, plan: Plan, sizes: Sizes, batches: Sequence[MicroBatchSize]) -> None:
        self.plan, self.sizes, self.batches = plan, sizes, batches
        self.steady = Counter(sizes.persistent(plan))
        self.below: Counter[str] = Counter(sizes.persistent_below(plan))
        self.alive: list[_Storage] = []
        self.held_by: dict[tuple[str, int, int], tuple[_Storage, str]] = {}
        self.at_wait: dict[tuple[str, str, int, int], tuple[str, ...]] = {}
        self.steady["activations"] += sum(sizes.batch_bytes(batch) for batch in batches)
        self.kept: dict[tuple[int, int], Keep] = {}
        moving = any(op.kind is Kind.STORE and op.item == "gradients" for op in plan.ops)
        self.stores = {op.group for op in plan.ops if op.kind is Kind.STEP} if moving else set()
        self.tiers: dict[tuple[str, int, int], tuple[str, int]] = {}  # thing -> (tier below, bytes there)

    # bookkeeping -----------------------------------------------------------------------------------------------------

    def held(self) -> dict[str, int]:
        found = Counter(self.steady)
        for storage in self.alive:
            category = next((name for name in _PRIORITY if storage.holders[name]), None)
            found[category or next(iter(+storage.holders))] += storage.n_bytes
        return dict(found)

    def hold(self, key: tuple[str, int, int], storage: _Storage | int, category: str) -> None:
        self.drop(key)
        if isinstance(storage, int):
            storage = _Storage(storage)
        if not any(storage is other for other in self.alive):
            self.alive.append(storage)
        storage.holders[category] += 1
        self.held_by[key] = (storage, category)

    def drop(self, key: tuple[str, int, int]) -> None:
        found = self.held_by.pop(key, None)
        if found is None:
            return
        storage, category = found
        storage.holders[category] -= 1
        if not +storage.holders:
            self.alive = [other for other in self.alive if other is not storage]

    def storage(self, key: tuple[str, int, int]) -> _Storage:
        return self.held_by[key][0]

    def send_down(self, key: tuple[str, int, int], tier: str, n_bytes: int) -> None:
        if key not in self.tiers:
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
            return sizes.step_within(op.group)
        if op.micro_batch < 0:
            return 0
        batch = self.batches[op.micro_batch]
        if op.kind is Kind.EMBED:
            return sizes.embed_within(batch)
        if op.kind is Kind.FORWARD:
            return sizes.within("graph" if op.keep in (Keep.GRAPH, Keep.PAGES) else "forward", batch)
        if op.kind is Kind.LOSS:
            task = self.plan.segments[op.target].loss == "task"
            return sizes.loss_within(batch, task=task) + (0 if task else self.fresh_gradients(("aux", op.target)))
        if op.kind is Kind.BACKWARD:
            first = op.target == self.plan.segment_of(op.target).first
            recompute = self.kept[op.micro_batch, op.target] is Keep.INPUT
            name = ("backward_first" if first else "backward") if recompute else "backward_graph"
            return self.fresh_gradients(("layer", op.target)) + sizes.within(name, batch)
        return 0

    def fresh_gradients(self, group: tuple[str, int]) -> int:
        """A group whose gradients move has a block of its own, made when its first gradient comes."""
        there = (f"gradients {group[0]}", -1, group[1]) in self.held_by
        return self.sizes.group_bytes(group) if group in self.stores and not there else 0

    # what an op leaves -----------------------------------------------------------------------------------------------

    def run(self, op: Op) -> None:
        getattr(self, f"_{op.kind.value.lower()}")(op)

    def _embed(self, op: Op) -> None:
        batch = self.batches[op.micro_batch]
        self.hold(("hidden", -1, -1), self.sizes.hidden_bytes(batch), "activations")
        self.hold(("frame", -1, -1), self.sizes.frame_bytes(batch), "activations")

    def _forward(self, op: Op) -> None:
        segment, batch = self.plan.segment_of(op.target), self.batches[op.micro_batch]
        entering = self.storage(("hidden", -1, -1))
        if op.target == segment.first and segment.loss == "reconstruct" and op.keep is not Keep.INPUT:
            self.hold(("target", -1, -1), entering, "saved inputs")
        if op.keep is not Keep.NONE:
            self.kept[op.micro_batch, op.target] = op.keep
        if op.keep is Keep.INPUT:
            self.hold(("input", op.micro_batch, op.target), entering, "saved inputs")
        if op.keep in (Keep.GRAPH, Keep.PAGES):
            rest, holds_input = self.sizes.graph(batch)
            self.hold(("graph", op.micro_batch, op.target), rest, "activations")
            if holds_input:
                self.hold(("graph input", op.micro_batch, op.target), entering, "activations")
        self.hold(("hidden", -1, -1), self.sizes.hidden_bytes(batch), "activations")

    def _loss(self, op: Op) -> None:
        self.hold(("grad", -1, -1), self.sizes.hidden_bytes(self.batches[op.micro_batch]), "activations")
        self.drop(("target", -1, -1))
        if op.target == len(self.plan.segments) - 1:
            self.drop(("hidden", -1, -1))
        if self.plan.segments[op.target].loss == "reconstruct":
            self.take_gradients(("aux", op.target))

    def _backward(self, op: Op) -> None:
        self.kept.pop((op.micro_batch, op.target))
        for name in ("input", "graph", "graph input"):
            self.drop((name, op.micro_batch, op.target))
        for name in ("input", "pages"):
            self.forget_below((name, op.micro_batch, op.target))
        if op.target == self.plan.segment_of(op.target).first:
            self.drop(("grad", -1, -1))
        self.take_gradients(("layer", op.target))

    def take_gradients(self, group: tuple[str, int]) -> None:
        key = (f"gradients {group[0]}", -1, group[1])
        if group in self.stores and key not in self.held_by:
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
        rest, holds_input = self.sizes.graph(self.batches[op.micro_batch])
        return rest + (self.sizes.hidden_bytes(self.batches[op.micro_batch]) if holds_input else 0)

    def _page_out(self, op: Op) -> None:
        self.send_down(("pages", op.micro_batch, op.target), op.tier, self._page_bytes(op))
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
