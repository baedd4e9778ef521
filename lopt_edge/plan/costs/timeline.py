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

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

from lopt_edge.plan.costs.key_bytes import key_gradient_bytes, keys_bytes
from lopt_edge.plan.costs.layer_bytes import GraphBytes
from lopt_edge.plan.costs.sizes import MOST_PAGES, MicroBatchSize, Sizes, on_disk
from lopt_edge.plan.schedule.effects import Effect, Kind, Thing
from lopt_edge.plan.schedule.ops import MOST_IN_FLIGHT, GroupName, Keep, Op, Plan

Key = tuple[str, int, int]  # (thing, micro-batch, layer or target)
_PRIORITY = ("saved inputs", "activations")  # a storage with several holders counts where the first of these says


@dataclass(frozen=True)
class OpBytes:
    """The bytes of one op: by category what is on the device when it begins, what it takes on top, and the tiers below."""

    op: Op
    held: dict[str, int]
    within: int
    host_bytes: int
    disk_bytes: int

    @property
    def peak_bytes(self) -> int:
        """The most bytes on the device while the op runs."""
        return sum(self.held.values()) + self.within


@dataclass(frozen=True)
class Timeline:
    """The bytes of one step, op by op: `rows` has one entry an op.

    The search makes hundreds and asks for peaks alone, so rows with their categories are made when somebody wants them:
    the replay keeps two numbers an op (`loads`: what lives when it begins, and what it takes on top), and the peak's row.
    """

    loads: tuple[tuple[int, int], ...]
    peak_bytes: int  # of the tensors on the device
    peak_op: Op  # where it falls; of equal ones the first
    host_bytes: int  # the most at an op
    disk_bytes: int
    again: Callable[[], Iterator[OpBytes]] = field(repr=False, compare=False)

    @cached_property
    def rows(self) -> tuple[OpBytes, ...]:
        """The bytes of each op, by category: the same replay once more."""
        return tuple(self.again())

    @cached_property
    def peak_row(self) -> OpBytes:
        """The row of the op at which the device's peak falls."""
        return next(row for row in self.again() if row.peak_bytes == self.peak_bytes)

    def most_bytes(self, within_share: float) -> int:
        """The peak of the tensors, each op's with a share of what it takes on top."""
        return max(held + within + round(within_share * within) for held, within in self.loads)

    @property
    def most_within(self) -> int:
        """The most that an op takes on top of what lives when it begins."""
        return max(within for _, within in self.loads)


def timeline(plan: Plan, sizes: Sizes, batches: Sequence[MicroBatchSize], *, beside_bytes: int = 0) -> Timeline:
    """The bytes of one step, by a replay of its plan; `batches` has one entry a micro-batch. `beside_bytes` of activations
    live through all of it."""
    replay = _Replay(plan, sizes, batches, beside_bytes)
    loads, most, peak_op, host, disk = [], -1, plan.ops[0], 0, 0
    for op in plan.ops:
        before, within = replay.run_whole(op)
        loads.append((before, within))
        if before + within > most:
            most, peak_op = before + within, op
        host, disk = max(host, replay.below["host"]), max(disk, replay.below["disk"])
    return Timeline(tuple(loads), most, peak_op, host, disk, partial(_rows, plan, sizes, batches, beside_bytes))


def _rows(plan: Plan, sizes: Sizes, batches: Sequence[MicroBatchSize], beside_bytes: int) -> Iterator[OpBytes]:
    """The rows of a timeline."""
    replay = _Replay(plan, sizes, batches, beside_bytes)
    for op in plan.ops:
        held = replay.held()
        _, within = replay.run_whole(op)
        yield OpBytes(op, held, within, replay.below["host"], replay.below["disk"])


@dataclass(eq=False, slots=True)
class _Storage:
    """A storage whose bytes live while somebody holds them."""

    n_bytes: int
    n_holders: int = 0


class _Replay:
    """The state of a replay: what is alive, by ("hidden" | "input" | "grad" | "layer context" | "graph" | "pages" | ...,
    micro-batch, target)."""

    def __init__(self, plan: Plan, sizes: Sizes, batches: Sequence[MicroBatchSize], beside_bytes: int) -> None:
        sizes = sizes.closing(plan.closed, evaluates=sizes.evaluates)
        self.plan, self.sizes, self.batches = plan, sizes, batches
        self.steady = sizes.persistent(plan)  # bytes by category that live through the step
        self.steady["activations"] = beside_bytes + sum(sizes.batch_bytes(batch) for batch in batches)
        self.total = sum(self.steady.values())  # of all that lives now
        self.below: Counter[str] = Counter(sizes.persistent_below(plan.own_segments))
        self.held_by: dict[tuple[str, int, int], tuple[_Storage, str]] = {}
        self.at_wait: dict[tuple[str, str, int, int], tuple[str, ...]] = {}
        self.kept: dict[tuple[int, int], Keep] = {}
        self.own_blocks = any(op.kind is Kind.STORE and op.item == "gradients" for op in plan.ops)
        self.tiers: dict[Key, tuple[str, int]] = {}  # thing -> (tier below, bytes there)
        batch_of = batches
        self.made: dict[str, Callable[[Op], int]] = {  # bytes of what an op makes anew, by what it takes
            "hidden": lambda op: sizes.hidden_bytes(batch_of[op.micro_batch]),
            "layer context": lambda op: sizes.layer_context_bytes(batch_of[op.micro_batch]),
            "graph": self._graph_bytes,
            "keys": lambda op: keys_bytes(sizes, batch_of[op.micro_batch], op.target),
            "key gradients": lambda op: key_gradient_bytes(sizes, batch_of[op.micro_batch], op.target, plan.scope(op)),
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
        """The bytes that live now, by category."""
        found, holders = Counter(self.steady), defaultdict[_Storage, list[str]](list)
        for storage, category in self.held_by.values():
            holders[storage].append(category)
        for storage, categories in holders.items():
            found[next((name for name in _PRIORITY if name in categories), categories[0])] += storage.n_bytes
        return {category: n_bytes for category, n_bytes in found.items() if n_bytes}

    def hold(self, key: tuple[str, int, int], storage: _Storage | int, category: str) -> None:
        self.drop(key)
        if isinstance(storage, int):
            storage = _Storage(storage)
        if not storage.n_holders:
            self.total += storage.n_bytes
        storage.n_holders += 1
        self.held_by[key] = (storage, category)

    def drop(self, key: tuple[str, int, int]) -> None:
        if (found := self.held_by.pop(key, None)) is not None:
            storage = found[0]
            storage.n_holders -= 1
            if not storage.n_holders:
                self.total -= storage.n_bytes

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

    def run_whole(self, op: Op) -> tuple[int, int]:
        """Run an op; returns the bytes that live when it begins, and the most that it takes on top of them."""
        row = op.effect
        before = self.total
        within = self.workspaces[row.workspace](op) if row.workspace else 0
        self.run(op, row)
        at_end = self.total - before + (self.within_end(op, row) if row.trains else 0)
        return before, at_end if at_end > within else within

    # what an op takes ------------------------------------------------------------------------------------------------

    def within_loss(self, op: Op) -> int:
        segment, batch = self.plan.segments[op.target], self.batches[op.micro_batch]
        if segment.loss == "align":
            return self.sizes.align_within(batch)
        return self.sizes.loss_within(batch, task=segment.reads_out) + self.fresh_gradients(op)

    def within_forward(self, op: Op) -> int:
        segment, batch = self.plan.scope(op), self.batches[op.micro_batch]
        if self.plan.keeps_graph(op):
            return self.sizes.graph(batch, op.target, segment).within
        return self.sizes.forward_within(batch, op.target, segment)

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
            self._begin_down(op, row)
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
        if thing.per == "step":
            return [(thing.name, -1, -1)]
        if thing.per == "source":
            return [(thing.name, op.micro_batch, self.sizes.shape.facts.source_of.get(op.target, op.target))]
        if thing.per == "layers":
            return [key for key in self.held_by if key[0] == thing.name]
        if thing.per == "group":
            unit, target = self.plan.group_of(op)
            return [(f"{thing.name} {unit}", -1, target)]
        # a boundary is held until the next but one goes (run/link.py)
        places = range(MOST_IN_FLIGHT) if op.micro_batch < 0 else (op.micro_batch % MOST_IN_FLIGHT,)
        return [(thing.name, place, -1) for place in places]

    def _make(self, thing: Thing, op: Op) -> None:
        (key,) = self._keys(thing, op)
        if thing.name == "gradients" and op.effect.role == "compute":
            if self.own_blocks and key not in self.held_by:  # else they lie in the group's steady bytes
                self.hold(key, self.sizes.group_bytes(self.plan.group_of(op)), "gradients")
        elif thing.name == "graph input" and not self._graph(op).holds_input:
            return
        elif thing.shares:
            self.hold(key, self.storage((thing.shares, -1, -1)), thing.counts_as)
        elif thing.takes and (n_bytes := self.made[thing.takes](op)):
            self.hold(key, n_bytes, thing.counts_as)

    def _graph(self, op: Op) -> GraphBytes:
        return self.sizes.graph(self.batches[op.micro_batch], op.target, self.plan.scope(op))

    def _graph_bytes(self, op: Op) -> int:
        """The bytes that a FORWARD's graph keeps beside its input; what comes back from below is all of it."""
        return self._page_bytes(op) if op.effect.role == "up" else self._graph(op).rest

    def _page_bytes(self, op: Op) -> int:
        graph = self._graph(op)
        return graph.rest + (self.sizes.hidden_bytes(self.batches[op.micro_batch]) if graph.holds_input else 0)

    def _begin_down(self, op: Op, row: Effect) -> None:
        """Begin a movement down: the copy below appears at once, the one on the device goes at the WAIT."""
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
