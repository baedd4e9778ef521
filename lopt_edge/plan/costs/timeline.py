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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from lopt_edge.plan.costs.layer_bytes import GraphBytes
from lopt_edge.plan.costs.sizes import MOST_PAGES, MicroBatchSize, Sizes, on_disk
from lopt_edge.plan.schedule.effects import Effect, Kind, Thing
from lopt_edge.plan.schedule.ops import MOST_IN_FLIGHT, GroupName, Keep, Op, Plan

Key = tuple[str, int, int]  # (thing, micro-batch, layer or target)
_PRIORITY = ("saved inputs", "activations")  # a storage with several holders counts where the first of these says


class OpBytes(NamedTuple):
    """The bytes of one op: by category what is on the device when it begins, what it takes on top, the sum of all that, and
    the tiers below."""

    op: Op
    held: dict[str, int]
    within: int
    peak_bytes: int
    host_bytes: int
    disk_bytes: int


@dataclass(frozen=True)
class Timeline:
    """The bytes of one step, op by op: `rows` has one entry an op."""

    rows: tuple[OpBytes, ...]

    @cached_property
    def peak_row(self) -> OpBytes:
        """The row of the op at which the device's peak falls; of equal ones the first."""
        return max(self.rows, key=lambda row: row.peak_bytes)

    @property
    def peak_bytes(self) -> int:
        """The peak of the tensors on the device."""
        return self.peak_row.peak_bytes

    @property
    def host_bytes(self) -> int:
        """The most bytes on the host at an op."""
        return max(row.host_bytes for row in self.rows)

    @property
    def disk_bytes(self) -> int:
        """The most bytes on the disk at an op."""
        return max(row.disk_bytes for row in self.rows)


def timeline(plan: Plan, sizes: Sizes, batches: Sequence[MicroBatchSize], *, beside_bytes: int = 0) -> Timeline:
    """The bytes of one step, by a replay of its plan; `batches` has one entry a micro-batch. `beside_bytes` of activations
    live through all of it."""
    replay, rows = _Replay(plan, sizes, batches), []
    replay.live["activations"] += beside_bytes
    replay.total = sum(replay.live.values())
    for op in plan.ops:
        row = op.effect
        held, before, within = replay.held(), replay.total, replay.within(op, row)
        replay.run(op, row)
        within = max(within, replay.total + replay.within_end(op, row) - before)
        rows.append(OpBytes(op, held, within, before + within, replay.below["host"], replay.below["disk"]))
    return Timeline(tuple(rows))


@dataclass(eq=False)
class _Storage:
    """A storage whose bytes live while somebody holds them; `holders` name categories."""

    n_bytes: int
    holders: list[str] = field(default_factory=list)


class _Replay:
    """The state of a replay: what is alive, by ("hidden" | "input" | "grad" | "layer context" | "graph" | "pages" | ...,
    micro-batch, target)."""

    def __init__(self, plan: Plan, sizes: Sizes, batches: Sequence[MicroBatchSize]) -> None:
        self.plan, self.sizes, self.batches = plan, sizes, batches
        self.live = sizes.persistent(plan)  # bytes by category, now
        self.live["activations"] = sum(sizes.batch_bytes(batch) for batch in batches)
        self.total = 0  # of all categories, once the replay begins
        self.below: Counter[str] = Counter(sizes.persistent_below(plan.own_segments))
        self.held_by: dict[tuple[str, int, int], tuple[_Storage, str]] = {}
        self.at_wait: dict[tuple[str, str, int, int], tuple[str, ...]] = {}
        self.kept: dict[tuple[int, int], Keep] = {}
        self.graphs: dict[tuple[int, int, int], GraphBytes] = {}  # by (micro-batch, layer, pass)
        self.own_blocks = any(op.kind is Kind.STORE and op.item == "gradients" for op in plan.ops)
        self.tiers: dict[Key, tuple[str, int]] = {}  # thing -> (tier below, bytes there)
        batch_of = batches
        self.made: dict[str, Callable[[Op], int]] = {  # bytes of what an op makes anew, by what it takes
            "hidden": lambda op: sizes.hidden_bytes(batch_of[op.micro_batch]),
            "layer context": lambda op: sizes.layer_context_bytes(batch_of[op.micro_batch]),
            "graph": self._graph_bytes,
            "states": lambda op: sizes.states_bytes(op.group),
            "gradients": lambda op: sizes.group_bytes(op.group),
        }  # fmt: skip
        self.workspaces: dict[str, Callable[[Op], int]] = {  # by the name that a row gives
            "embed": lambda op: sizes.embed_within(batch_of[op.micro_batch]),
            "align": lambda op: sizes.align_within(batch_of[op.micro_batch]),
            "receive": lambda op: sizes.receive_within(batch_of[op.micro_batch]),
            "cache": lambda op: sizes.cache_within(batch_of[op.micro_batch], reads=False),
            "cache read": lambda op: sizes.cache_within(batch_of[op.micro_batch], reads=True),
            "loss": self.within_loss,
            "forward": self.within_forward,
            "backward": self.within_backward,
            "update": self.within_update,
        }

    # bookkeeping -----------------------------------------------------------------------------------------------------

    def held(self) -> dict[str, int]:
        if 0 in self.live.values():
            return {category: n_bytes for category, n_bytes in self.live.items() if n_bytes}
        return dict(self.live)

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
        holders, n_bytes = storage.holders, sign * storage.n_bytes
        if holders:
            category = holders[0]
            if len(holders) > 1:
                category = next((name for name in _PRIORITY if name in holders), category)
            self.live[category] = self.live.get(category, 0) + n_bytes
            self.total += n_bytes

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

    def within(self, op: Op, row: Effect) -> int:
        """The bytes that an op takes at its worst moment on top of what is alive when it begins."""
        return self.workspaces[row.workspace](op) if row.workspace else 0

    def within_loss(self, op: Op) -> int:
        segment, batch = self.plan.segments[op.target], self.batches[op.micro_batch]
        if segment.loss == "align":
            return self.sizes.align_within(batch)
        return self.sizes.loss_within(batch, task=segment.reads_out) + self.fresh_gradients(op)

    def within_forward(self, op: Op) -> int:
        if self.plan.keeps_graph(op):
            return self._graph(op).within
        return self.sizes.forward_within(self.batches[op.micro_batch], op.target, self.plan.scope(op))

    def within_backward(self, op: Op) -> int:
        kept, batch = self.kept[op.micro_batch, op.target], self.batches[op.micro_batch]
        fresh = self.fresh_gradients(op)
        return self.sizes.backward_within(batch, op.target, self.plan.scope(op), kept=kept, fresh=fresh)

    def within_update(self, op: Op) -> int:
        return self.sizes.step_within(op.group) + self._block_bytes(op.group)

    def within_end(self, op: Op, row: Effect) -> int:
        """What an op takes on top of what it leaves: the square of a group's complete gradients, for their norm."""
        uses = row.trains
        if uses == "layer" and self.plan.completes(op):
            return self.sizes.group_bytes(("layer", op.target))
        done = op.micro_batch == self.plan.n_micro_batches - 1
        return self.sizes.group_bytes(("aux", op.target)) if uses == "aux" and done and self.plan.trains(op) else 0

    def fresh_gradients(self, op: Op) -> int:
        """The bytes of a group's own block of gradients, where this op is the first that adds to it."""
        return self._block_bytes(self.plan.group_of(op)) if self.plan.trains(op) else 0

    def _block_bytes(self, group: GroupName) -> int:
        """The bytes of a group's own block of gradients: where gradients move each has one, made when its first gradient
        comes."""
        there = (f"gradients {group[0]}", -1, group[1]) in self.held_by
        return self.sizes.group_bytes(group) if self.own_blocks and not there else 0

    # what an op leaves -----------------------------------------------------------------------------------------------

    def run(self, op: Op, row: Effect) -> None:
        """Make, free and move what the op's row says."""
        if row.uses == "layer":
            self._note_kept(op)
        for thing in row.makes:
            if not thing.when or getattr(self.plan, thing.when)(op):
                self._make(thing, op)
        for thing in row.frees:
            if not thing.when or getattr(self.plan, thing.when)(op):
                for key in self._keys(thing, op):
                    self.drop(key)
                    if row.role == "compute":  # the thing itself is gone, not its copy here alone
                        self.forget_below(key)
        if row.role == "down":
            self._begin_down(op)
        elif row.role == "wait":
            for name in self.at_wait.pop((op.item, op.unit, op.micro_batch, op.target), ()):
                self.drop((name, op.micro_batch, op.target))

    def _note_kept(self, op: Op) -> None:
        if op.keep is not Keep.NONE:
            self.kept[op.micro_batch, op.target] = op.keep
        elif op.effect.trains:
            self.kept.pop((op.micro_batch, op.target))

    def _keys(self, thing: Thing, op: Op) -> list[Key]:
        """The keys of a thing as this op names it; of boundaries in flight the one that it sends, or all of them."""
        if thing.per == "layer":
            return [(thing.name, op.micro_batch, op.target)]
        if thing.per == "group":
            unit, target = self.plan.group_of(op)
            return [(f"{thing.name} {unit}", -1, target)]
        if thing.per == "boundary":  # it is held until the next but one goes (run/link.py)
            places = range(MOST_IN_FLIGHT) if op.micro_batch < 0 else (op.micro_batch % MOST_IN_FLIGHT,)
            return [(thing.name, place, -1) for place in places]
        return [(thing.name, -1, -1)]

    def _make(self, thing: Thing, op: Op) -> None:
        (key,) = self._keys(thing, op)
        if thing.name == "gradients" and op.effect.role == "compute":
            if self.own_blocks and key not in self.held_by:  # else they lie in the group's steady bytes
                self.hold(key, self.sizes.group_bytes(self.plan.group_of(op)), "gradients")
        elif thing.name == "graph input" and not self._graph(op).holds_input:
            return
        elif thing.shares:
            self.hold(key, self.storage((thing.shares, -1, -1)), thing.counts_as)
        elif thing.takes:
            self.hold(key, self.made[thing.takes](op), thing.counts_as)

    def _graph(self, op: Op) -> GraphBytes:
        key = (op.micro_batch, op.target, op.pass_index)
        if key not in self.graphs:
            self.graphs[key] = self.sizes.graph(self.batches[op.micro_batch], op.target, self.plan.scope(op))
        return self.graphs[key]

    def _graph_bytes(self, op: Op) -> int:
        """The bytes that a FORWARD's graph keeps beside its input; what comes back from below is all of it."""
        return self._page_bytes(op) if op.effect.role == "up" else self._graph(op).rest

    def _page_bytes(self, op: Op) -> int:
        graph = self._graph(op)
        return graph.rest + (self.sizes.hidden_bytes(self.batches[op.micro_batch]) if graph.holds_input else 0)

    def _begin_down(self, op: Op) -> None:
        """Begin a movement down: the copy below appears at once, the one on the device goes at the WAIT."""
        row = op.effect
        item, place = (op.item, -1) if row.moves == "group" else (row.moves, op.micro_batch)
        key = (f"{item} {op.unit}" if row.moves == "group" else item, place, op.target)
        if row.moves == "input":
            self.send_down(key, op.tier, self.storage(key).n_bytes)
        elif row.moves == "pages":
            self.send_down(key, op.tier, self._page_bytes(op), MOST_PAGES)
        elif item == "gradients":  # states are below at rest, and counted there
            self.send_down(key, op.tier, self.sizes.group_bytes(op.group))
        names = tuple(f"{name} {op.unit}" if row.moves == "group" else name for name in row.until_wait)
        self.at_wait[item, op.unit, place, op.target] = names
