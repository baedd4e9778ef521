"""The op list: one optimizer step as a flat tuple of small frozen ops, with a text form, a parser and a hash.

A plan's text is its whole content: `parse_plan(plan.text()) == plan`. It opens with a header (method, depth, number of
micro-batches, the segments, where each unit's weights lie), then one op a line. A person can read it, a test can state
it, a checkpoint can name its hash. Nothing here decides (methods do, in `methods.py`) or runs (run/executor.py does).

    EMBED mb=0                  hidden states from token ids
    FORWARD 3 mb=0 keep=input   run layer 3; keep nothing | its input | its autograd graph
    LOSS 0 mb=0                 the loss of segment 0: its gradient with respect to the segment's output
    BACKWARD 3 mb=0             gradient through layer 3 (from its graph, or recomputed from its saved input)
    STEP 0                      clip and update the parameters of segment 0
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from lopt_edge.plan.segments import Segment


class Kind(StrEnum):
    EMBED = "EMBED"
    FORWARD = "FORWARD"
    LOSS = "LOSS"
    BACKWARD = "BACKWARD"
    STEP = "STEP"


class Keep(StrEnum):
    """What a FORWARD leaves behind for its BACKWARD."""

    NONE = "none"
    INPUT = "input"
    GRAPH = "graph"


@dataclass(frozen=True, slots=True)
class Op:
    """One step of the plan. `target` is a layer (FORWARD, BACKWARD), a segment (LOSS, STEP) or -1 (EMBED).

    `micro_batch` is -1 for STEP. `pass_index` tells apart several runs of one layer in a step; `adapters` names the
    adapter set that the op computes with.
    """

    kind: Kind
    target: int = -1
    micro_batch: int = -1
    keep: Keep = Keep.NONE
    pass_index: int = 0
    adapters: str = "train"

    def text(self) -> str:
        words = [self.kind.value]
        words += [str(self.target)] if self.target >= 0 else []
        words += [f"mb={self.micro_batch}"] if self.micro_batch >= 0 else []
        words += [f"keep={self.keep.value}"] if self.kind is Kind.FORWARD else []
        words += [f"pass={self.pass_index}"] if self.pass_index else []
        words += [f"adapters={self.adapters}"] if self.adapters != "train" else []
        return " ".join(words)


@dataclass(frozen=True)
class Plan:
    """One kind of optimizer step. `placement` gives each unit's weights a tier: resident, or streamed from a tier."""

    method: str
    n_layers: int
    n_micro_batches: int
    segments: tuple[Segment, ...]
    placement: tuple[tuple[str, str], ...]
    ops: tuple[Op, ...]

    def text(self) -> str:
        head = [f"plan 1 method={self.method} layers={self.n_layers} micro_batches={self.n_micro_batches}"]
        head += [f"segment {s.index} layers={s.first}-{s.last} loss={s.loss}" for s in self.segments]
        head += [f"unit {unit} {place}" for unit, place in self.placement]
        return "\n".join([*head, *(op.text() for op in self.ops)]) + "\n"

    def hash(self) -> str:
        """The first 16 hex digits of the text's SHA-256."""
        return hashlib.sha256(self.text().encode()).hexdigest()[:16]

    def around(self, position: int, *, reach: int = 3) -> str:
        """The ops near one position, the op itself marked: what an error shows."""
        first, last = max(0, position - reach), min(len(self.ops), position + reach + 1)
        return "\n".join(f"{'>' if i == position else ' '} {i:5d}  {self.ops[i].text()}" for i in range(first, last))


class PlanTextError(ValueError):
    """A plan text that does not parse; names the line."""


_HEAD = re.compile(r"plan 1 method=([\w-]+) layers=(\d{1,6}) micro_batches=(\d{1,6})")
_SEGMENT = re.compile(r"segment (\d{1,6}) layers=(\d{1,6})-(\d{1,6}) loss=(task|reconstruct|none)")
_UNIT = re.compile(r"unit ([\w. -]+?) ([\w-]+)")
_OP = re.compile(
    r"(EMBED|FORWARD|LOSS|BACKWARD|STEP)(?: (\d{1,6}))?(?: mb=(\d{1,6}))?(?: keep=(none|input|graph))?"
    r"(?: pass=(\d{1,3}))?(?: adapters=(\w+))?"
)


def parse_plan(text: str) -> Plan:
    """The plan that `Plan.text` wrote. Raises PlanTextError with the line number for anything else."""
    lines = text.splitlines()
    head = _HEAD.fullmatch(lines[0]) if lines else None
    if head is None:
        raise PlanTextError("line 1: not a plan of version 1")
    segments: list[Segment] = []
    placement: list[tuple[str, str]] = []
    ops: list[Op] = []
    for number, line in enumerate(lines[1:], start=2):
        if match := _SEGMENT.fullmatch(line):
            loss: Any = match[4]
            segments.append(Segment(int(match[1]), int(match[2]), int(match[3]), loss))
        elif match := _UNIT.fullmatch(line):
            placement.append((match[1], match[2]))
        elif match := _OP.fullmatch(line):
            ops.append(_parsed_op(match))
        else:
            raise PlanTextError(f"line {number}: not an op: {line[:80]!r}")
    return Plan(head[1], int(head[2]), int(head[3]), tuple(segments), tuple(placement), tuple(ops))


def _parsed_op(match: re.Match[str]) -> Op:
    return Op(
        kind=Kind(match[1]),
        target=int(match[2]) if match[2] else -1,
        micro_batch=int(match[3]) if match[3] else -1,
        keep=Keep(match[4]) if match[4] else Keep.NONE,
        pass_index=int(match[5]) if match[5] else 0,
        adapters=match[6] or "train",
    )
