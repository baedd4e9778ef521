"""The op list: one optimizer step as a flat tuple of small frozen ops, with a text form, a parser and a hash.

A plan's text is its whole content: `parse_plan(plan.text()) == plan`. It opens with a header (method, kind of step, depth,
number of micro-batches, buffers for streamed layers, tokens of a loss' tile, pieces of an MLP, the segments, where each
unit's weights lie), then one op a line. A person can read it, a test can state it, a checkpoint can name its hash. Nothing
here decides (methods and passes do) or runs (run/step/executor.py does).

    EMBED mb=0
    FORWARD 3 mb=0 keep=input
    READ boundary 4 mb=0
    STEP layer 3
    STORE states layer 3 to=disk
    WAIT states layer 3

What each op does is a row of effects.py. `pass` tells the windows of a micro-batch apart (it is the segment whose loss is
taken), `adapters=ema` layers that run with averaged adapters: `FORWARD 7 mb=0 keep=input pass=1 adapters=ema`. Movements
between tiers begin with one op and end with the WAIT that names the same thing; between the two other ops run.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any, NamedTuple

from lopt_edge.plan.schedule.effects import ITEMS, Effect, Kind, effect_of
from lopt_edge.plan.schedule.knobs import MLP_PIECES, TOKEN_TILES
from lopt_edge.plan.schedule.segments import LOSSES, MOST_LAYERS, Segment, parse_runs, runs_text

MOST_IN_FLIGHT = 2  # boundaries that a process has sent and the next one has not taken


GroupName = tuple[str, int]  # (unit, target)


class Keep(StrEnum):
    """What a FORWARD leaves behind for its BACKWARD."""

    NONE = "none"
    INPUT = "input"
    GRAPH = "graph"
    PAGES = "pages"


class Op(NamedTuple):
    """One op of a plan. `target` is a layer, a segment (LOSS, and groups of unit `aux`) or -1 (EMBED).

    `unit` says what the target counts where that is not clear from the kind: `layer` or `aux`. `item` is what moves, where
    the kind leaves it open: `input`, `pages`, `states`, `gradients`, `boundary`, `teacher`, `held`. `tier` is where to.
    `micro_batch` is -1 for what belongs to the whole step. `pass_index` tells apart several runs of one layer in a step;
    `adapters` names the adapter set that the op computes with.
    """

    kind: Kind
    target: int = -1
    micro_batch: int = -1
    keep: Keep = Keep.NONE
    pass_index: int = 0
    adapters: str = "train"
    item: str = ""
    unit: str = ""
    tier: str = ""

    def text(self) -> str:
        """The op as a plan's text writes it."""
        words = [self.kind.value, *(word for word in (self.item, self.unit) if word)]
        words += [str(self.target)] if self.target >= 0 else []
        words += [f"mb={self.micro_batch}"] if self.micro_batch >= 0 else []
        words += [f"keep={self.keep.value}"] if self.kind is Kind.FORWARD else []
        words += [f"to={self.tier}"] if self.tier else []
        words += [f"pass={self.pass_index}"] if self.pass_index else []
        words += [f"adapters={self.adapters}"] if self.adapters != "train" else []
        return " ".join(words)

    @property
    def group(self) -> tuple[str, int]:
        """The parameter group of a STEP, LOAD or STORE."""
        return self.unit, self.target

    @property
    def effect(self) -> Effect:
        """The op's row of the table (effects.py)."""
        return effect_of(self.kind, self.item)


@dataclass(frozen=True)
class Plan:
    """The plan of one kind of optimizer step. `placement` gives each unit's weights a tier: resident, or streamed from a
    tier.

    `ring` is the number of buffers that streamed layers share, `tile` the tokens of which a loss is taken at a time, `mlp`
    the features and tokens of an MLP's pieces. `kind` names the kind of step where a run has several. `own`: the segments
    of this process of a pipeline, None where one process has them all. The layers before `closed` train no more in the run:
    their optimizer states are gone.
    """

    method: str
    n_layers: int
    n_micro_batches: int
    segments: tuple[Segment, ...]
    placement: tuple[tuple[str, str], ...]
    ops: tuple[Op, ...]
    ring: int = 0
    tile: int = TOKEN_TILES[0]
    kind: str = ""
    own: tuple[int, ...] | None = None
    closed: int = 0
    mlp: tuple[int, int] = MLP_PIECES

    def text(self) -> str:
        """The plan in words, a line for each op after the header: `parse_plan` reads it."""
        counts = f"layers={self.n_layers} micro_batches={self.n_micro_batches} ring={self.ring} tile={self.tile}"
        counts += "" if self.mlp == MLP_PIECES else f" mlp={self.mlp[0]}x{self.mlp[1]}"
        counts += "" if self.own is None else f" own={runs_text(self.own)}"
        counts += f" closed={self.closed}" if self.closed else ""
        kind = f" kind={self.kind}" if self.kind else ""
        head = [f"plan 4 method={self.method}{kind} {counts}", *(segment.text() for segment in self.segments)]
        head += [f"unit {unit} {place}" for unit, place in self.placement]
        return "\n".join([*head, *(op.text() for op in self.ops)]) + "\n"

    def hash(self) -> str:
        """The plan's name: the first 16 hex digits of the text's SHA-256."""
        return hashlib.sha256(self.text().encode()).hexdigest()[:16]

    def around(self, position: int, *, reach: int = 3) -> str:
        """The ops near one position, the op itself marked: what an error shows."""
        first, last = max(0, position - reach), min(len(self.ops), position + reach + 1)
        return "\n".join(f"{'>' if i == position else ' '} {i:5d}  {self.ops[i].text()}" for i in range(first, last))

    @property
    def has_early_steps(self) -> bool:
        """Whether some update comes before the last gradient."""
        kinds = [op.kind for op in self.ops if op.kind in (Kind.BACKWARD, Kind.STEP)]
        return Kind.STEP in kinds and Kind.BACKWARD in kinds[kinds.index(Kind.STEP) :]

    def segment_of(self, layer: int) -> Segment:
        """The segment that has this layer."""
        return self._segments_by_layer[layer]

    @cached_property
    def _segments_by_layer(self) -> dict[int, Segment]:
        """The segment of each layer: the first that has it."""
        return {layer: segment for segment in reversed(self.segments) for layer in range(segment.first, segment.last + 1)}

    def reads(self, layer: int) -> tuple[int, ...]:
        """The layers whose weights this one computes with."""
        return next((s.reads(layer) for s in self.segments if s.first <= layer <= s.last), (layer,))

    @cached_property
    def overlaps(self) -> bool:
        """Whether each loss has a pass of its own over each micro-batch: the window of its segment."""
        return any(segment.overlaps for segment in self.segments)

    def scope(self, op: Op) -> Segment:
        """The segment whose loss this op on a layer serves."""
        return self.segments[op.pass_index] if self.overlaps else self.segment_of(op.target)

    # what the rows of effects.py ask of an op (`Thing.when`)

    def is_last_run(self, op: Op) -> bool:
        """Whether nothing runs forward from the hidden states after this LOSS."""
        return self.overlaps or op.target == self.own_segments[-1].index

    def trains(self, op: Op) -> bool:
        """Whether an op adds to the gradients of a group: a BACKWARD with the adapters that train, a LOSS with a head."""
        if op.effect.trains == "aux":
            return self.segments[op.target].has_head
        return op.effect.trains == "layer" and op.adapters == "train"

    def group_of(self, op: Op) -> GroupName:
        """The parameter group whose gradients an op adds to, or that it updates or moves."""
        return (op.effect.trains, op.target) if op.effect.trains else op.group

    def keeps_input(self, op: Op) -> bool:
        """Whether a FORWARD leaves its input for the backward."""
        return op.keep is Keep.INPUT

    def keeps_graph(self, op: Op) -> bool:
        """Whether a FORWARD leaves its autograd graph."""
        return op.keep in (Keep.GRAPH, Keep.PAGES)

    def keeps_pages(self, op: Op) -> bool:
        """Whether a FORWARD leaves a graph whose tensors can move."""
        return op.keep is Keep.PAGES

    def holds_target(self, op: Op) -> bool:
        """Whether a FORWARD's input is kept for the local loss that reconstructs it, and nothing else keeps it."""
        segment = self.scope(op)
        return op.target == segment.first and segment.has_head and self.keeps_graph(op)

    def ends_gradient(self, op: Op) -> bool:
        """Whether the gradient of the hidden states goes no further than this BACKWARD."""
        return op.target == self.scope(op).reached[0]

    @cached_property
    def _last_pass(self) -> dict[int, int]:
        found: dict[int, int] = {}
        for op in self.ops:
            if op.kind is Kind.BACKWARD and op.adapters == "train":
                found[op.target] = max(op.pass_index, found.get(op.target, 0))
        return found

    def completes(self, op: Op) -> bool:
        """Whether a layer's gradients of the step are complete after this BACKWARD."""
        in_last = op.micro_batch == self.n_micro_batches - 1
        return in_last and op.adapters == "train" and op.pass_index == self._last_pass[op.target]

    @cached_property
    def averaged(self) -> tuple[int, ...]:
        """The layers that run with averaged adapters somewhere."""
        return tuple(sorted({layer for segment in self.segments for layer in segment.tail}))

    @cached_property
    def own_segments(self) -> tuple[Segment, ...]:
        """The segments whose ops are in this plan."""
        return self.segments if self.own is None else tuple(self.segments[index] for index in self.own)

    @cached_property
    def path(self) -> tuple[int, ...]:
        """The layers that run forward, in order."""
        return tuple(layer for segment in self.segments for layer in segment.layers)


class PlanTextError(ValueError):
    """A plan text that does not parse; the message names the line."""


_LAYERS = r"\d{1,6}(?:-\d{1,6})?(?:,\d{1,6}(?:-\d{1,6})?){0,5000}"
_HEAD = re.compile(
    r"plan 4 method=([\w-]+)(?: kind=([\w-]+))? layers=(\d{1,6}) micro_batches=(\d{1,6}) ring=(\d{1,6}) tile=(\d{1,6})"
    rf"(?: mlp=(\d{{1,6}})x(\d{{1,6}}))?(?: own=({_LAYERS}))?(?: closed=(\d{{1,6}}))?"
)
_SEGMENT = re.compile(
    rf"segment (\d{{1,6}}) layers=(\d{{1,6}})-(\d{{1,6}}) loss=({'|'.join(LOSSES)})"
    rf"(?: through=({_LAYERS}))?(?: absent=({_LAYERS}))?(?: replaced=({_LAYERS}))?"
    rf"(?: reach=(\d{{1,6}}))?(?: tail=({_LAYERS}))?"
)
_UNIT = re.compile(r"unit ([\w. -]+?) ([\w-]+)")
_OP = re.compile(
    rf"({'|'.join(kind.value for kind in Kind)})"
    rf"(?: ({'|'.join(ITEMS)}))?"
    r"(?: (layer|aux))?(?: (\d{1,6}))?(?: mb=(\d{1,6}))?"
    r"(?: keep=(none|input|graph|pages))?(?: to=(device|host|disk))?(?: pass=(\d{1,3}))?(?: adapters=(\w+))?"
)


def parse_plan(text: str) -> Plan:
    """The plan that `Plan.text` wrote. Raises PlanTextError with the line number for anything else."""
    lines = text.splitlines()
    head = _HEAD.fullmatch(lines[0]) if lines else None
    if head is None:
        raise PlanTextError("line 1: not a plan of version 4")
    segments: list[Segment] = []
    placement: list[tuple[str, str]] = []
    ops: list[Op] = []
    for number, line in enumerate(lines[1:], start=2):
        if match := _SEGMENT.fullmatch(line):
            segments.append(_parsed_segment(match, number))
        elif match := _UNIT.fullmatch(line):
            placement.append((match[1], match[2]))
        elif (match := _OP.fullmatch(line)) and (match[1] == "FORWARD") == bool(match[6]):
            ops.append(_parsed_op(match))
        else:
            raise PlanTextError(f"line {number}: not an op: {line[:80]!r}")
    n_layers, n_micro_batches, ring, tile = (int(number) for number in head.groups()[2:6])
    if n_layers > MOST_LAYERS:
        raise PlanTextError(f"line 1: more than {MOST_LAYERS:,} layers")
    own, closed = _parsed_own(head[9], len(segments)), int(head[10] or 0)
    mlp = (int(head[7]), int(head[8])) if head[7] else MLP_PIECES
    return Plan(
        head[1], n_layers, n_micro_batches, tuple(segments), tuple(placement), tuple(ops), ring, tile, head[2] or "", own,
        closed, mlp,
    )  # fmt: skip


def _parsed_own(text: str | None, n_segments: int) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        own = parse_runs(text)
    except ValueError as error:
        raise PlanTextError(f"line 1: {error}") from None
    if not own or max(own) >= n_segments:
        raise PlanTextError(f"line 1: own={text[:40]} names other segments than the plan has")
    return own


def _parsed_segment(match: re.Match[str], number: int) -> Segment:
    loss: Any = match[4]
    try:
        through, absent, replaced, tail = (parse_runs(match[place] or "") for place in (5, 6, 7, 9))
    except ValueError as error:
        raise PlanTextError(f"line {number}: {error}") from None
    reach = int(match[8]) if match[8] else None
    return Segment(int(match[1]), int(match[2]), int(match[3]), loss, through, absent, replaced, reach, tail)


def _parsed_op(match: re.Match[str]) -> Op:
    return Op(
        kind=Kind(match[1]),
        item=match[2] or "",
        unit=match[3] or "",
        target=int(match[4]) if match[4] else -1,
        micro_batch=int(match[5]) if match[5] else -1,
        keep=Keep(match[6]) if match[6] else Keep.NONE,
        tier=match[7] or "",
        pass_index=int(match[8]) if match[8] else 0,
        adapters=match[9] or "train",
    )
