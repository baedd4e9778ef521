"""The validator: what every plan must obey, whoever wrote it. Numbered as in the design; the code cites the numbers.

 (1) a unit computes only while all that it reads is resident (a placement is declared for every unit that an op reads)
 (2) BACKWARD i needs layer i's saved input or kept graph
 (3) inside a segment, backwards run in reverse order, without a gap
 (4) LOSS s precedes every backward of s
 (5) nothing of a later segment needs a graph of an earlier one
 (6) what was saved is consumed
 (7) each segment that trains has exactly one STEP, after its last backward and after every gradient that its clip needs

It replays the list with sets instead of tensors; it knows no bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lopt_edge.plan.ops import Keep, Kind, Op, Plan


class PlanError(ValueError):
    """A plan that breaks a rule; the text shows the rule's number and the ops around the fault."""


@dataclass
class _Replay:
    plan: Plan
    clip_scope: str
    saved: dict[tuple[int, int], Keep] = field(default_factory=dict)  # (micro-batch, layer) -> what was kept
    expected: dict[int, int] = field(default_factory=dict)  # micro-batch -> layer that runs forward next
    backward_from: dict[tuple[int, int], int] = field(default_factory=dict)  # (micro-batch, segment) -> next layer
    stepped: set[int] = field(default_factory=set)


def validate(plan: Plan, *, clip_scope: str = "segment") -> Plan:
    """Return the plan, or raise PlanError."""
    replay = _Replay(plan, clip_scope)
    units = {unit for unit, _ in plan.placement}
    checks = {
        Kind.EMBED: _embed, Kind.FORWARD: _forward, Kind.LOSS: _loss, Kind.BACKWARD: _backward, Kind.STEP: _step,
    }  # fmt: skip
    _check_cover(plan)
    for position, op in enumerate(plan.ops):
        problem = _unplaced(plan, units, op) or checks[op.kind](replay, op)
        if problem:
            raise PlanError(f"rule {problem}\n{plan.around(position)}")
    if replay.saved:
        (micro_batch, layer), _ = next(iter(replay.saved.items()))
        raise PlanError(f"rule (6): what layer {layer} saved in micro-batch {micro_batch} is never consumed")
    missing = [s.index for s in plan.segments if s.loss != "none" and s.index not in replay.stepped]
    if missing:
        raise PlanError(f"rule (7): segment {missing[0]} has no STEP")
    return plan


def _check_cover(plan: Plan) -> None:
    layers = [layer for segment in plan.segments for layer in segment.layers]
    if layers != list(range(plan.n_layers)) or [s.index for s in plan.segments] != list(range(len(plan.segments))):
        raise PlanError("the segments do not cover the layers once, in order")


def _unplaced(plan: Plan, units: set[str], op: Op) -> str:
    if op.kind is Kind.STEP:
        return ""
    task = op.kind is Kind.LOSS and op.target < len(plan.segments) and plan.segments[op.target].loss == "task"
    unit = {Kind.EMBED: "embed", Kind.LOSS: "head" if task else ""}.get(op.kind, f"layer {op.target}")
    return "" if not unit or unit in units else f"(1): unit {unit!r} is read but has no placement"


def _embed(replay: _Replay, op: Op) -> str:
    if not 0 <= op.micro_batch < replay.plan.n_micro_batches:
        return f"(2): there is no micro-batch {op.micro_batch}"
    if op.micro_batch in replay.expected:
        return "(2): this micro-batch was already embedded"
    replay.expected[op.micro_batch] = 0
    return ""


def _forward(replay: _Replay, op: Op) -> str:
    if replay.expected.get(op.micro_batch) != op.target:
        return f"(2): layer {op.target} runs out of order"
    segment = next(s for s in replay.plan.segments if op.target in s.layers)
    if op.target == segment.first and any(micro_batch == op.micro_batch for micro_batch, _ in replay.saved):
        return "(5): the segment before still holds what it saved"
    replay.expected[op.micro_batch] = op.target + 1
    if op.keep is not Keep.NONE:
        replay.saved[op.micro_batch, op.target] = op.keep
    return ""


def _loss(replay: _Replay, op: Op) -> str:
    if not 0 <= op.target < len(replay.plan.segments):
        return f"(4): there is no segment {op.target}"
    segment = replay.plan.segments[op.target]
    if segment.loss == "none":
        return f"(4): segment {op.target} has no loss"
    if (op.micro_batch, op.target) in replay.backward_from:
        return f"(4): the loss of segment {op.target} was already taken"
    if replay.expected.get(op.micro_batch) != segment.last + 1:
        return f"(4): the loss of segment {op.target} comes before its forward ended"
    replay.backward_from[op.micro_batch, op.target] = segment.last
    return ""


def _backward(replay: _Replay, op: Op) -> str:
    segment = next((s for s in replay.plan.segments if op.target in s.layers), None)
    if segment is None:
        return f"(2): there is no layer {op.target}"
    following = replay.backward_from.get((op.micro_batch, segment.index))
    if following is None:
        return f"(4): no LOSS {segment.index} came before"
    if following != op.target:
        return f"(3): layer {following} is next in the backward of segment {segment.index}"
    if replay.saved.pop((op.micro_batch, op.target), None) is None:
        return f"(2): layer {op.target} kept neither its input nor its graph"
    if segment.index in replay.stepped:
        return f"(7): segment {segment.index} was already updated"
    replay.backward_from[op.micro_batch, segment.index] = op.target - 1
    return ""


def _step(replay: _Replay, op: Op) -> str:
    segments = {s.index: s for s in replay.plan.segments if s.loss != "none"}
    if op.target not in segments or op.target in replay.stepped:
        return f"(7): segment {op.target} does not train, or was already updated"
    needed = segments if replay.clip_scope == "global" else {op.target: segments[op.target]}
    for index, segment in needed.items():
        ended = all(
            replay.backward_from.get((micro_batch, index)) == segment.first - 1
            for micro_batch in range(replay.plan.n_micro_batches)
        )
        if not ended:
            return f"(7): the gradients of segment {index} are not complete"
    replay.stepped.add(op.target)
    return ""
