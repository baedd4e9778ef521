"""The validator: what every plan must obey, whoever wrote it. Numbered as in the design; the code cites the numbers.

 (1) a unit computes only while all that it reads is resident: declared so, or fetched and waited for; streamed layers never
     take more buffers than the plan's ring
 (2) BACKWARD i needs layer i's saved input or kept graph, on the device
 (3) inside a segment, backwards run in reverse order, without a gap
 (4) LOSS s precedes every backward of s
 (5) nothing of a later segment needs a graph of an earlier one
 (6) what was fetched is evicted, what was saved is consumed, what was begun is waited for
 (7) each parameter group has exactly one STEP, after its last backward and after every gradient that its clip needs, with
     its gradients and optimizer states on the device
 (8) layers of a tail, and no others, compute with averaged adapters; each average is taken once, after every STEP
 (9) a process of a pipeline (`own` segments) has the ops of its own segments only; micro-batches come and go in order, each
     by RECV before its first layer (the first process: EMBED) and by SEND after its last one's FORWARD, before that
     segment's LOSS (the last process: none); one AGREE after all gradients, before any STEP
 (10) where ranks share a step, each group that gets gradients has one REDUCE after the last of them, and its end (WAIT
     reduced) before the one AGREE; its gradients are not touched in between

It replays the list with small states instead of tensors; it knows no bytes. Movements are in `validate_moves.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from lopt_edge.plan.schedule.build import groups_of
from lopt_edge.plan.schedule.effects import EFFECTS, Kind
from lopt_edge.plan.schedule.ops import Keep, Op, Plan
from lopt_edge.plan.schedule.segments import Segment
from lopt_edge.plan.schedule.validate_moves import Moves


class PlanError(ValueError):
    """A plan that breaks a rule; the text shows the rule's number and the ops around the fault."""


@dataclass
class _Replay:
    plan: Plan
    clip_scope: str
    moves: Moves
    saved: dict[tuple[int, int], Keep] = field(default_factory=dict)  # (micro-batch, layer) -> what was kept
    entered: dict[tuple[int, int], int] = field(default_factory=dict)  # (micro-batch, pass) -> position in the path, next
    teacher: bool = False  # its features are there for the micro-batch under way
    backward_from: dict[tuple[int, int], int] = field(default_factory=dict)  # (micro-batch, segment) -> next layer
    stepped: set[tuple[str, int]] = field(default_factory=set)
    held: tuple[int, int] | None = None  # (micro-batch, layer): the hidden states that the next pass enters with
    averaged: set[int] = field(default_factory=set)
    n_received: int = 0
    n_sent: int = 0
    agreed: bool = False

    def path(self, pass_index: int) -> tuple[int, ...]:
        """The layers that run forward in a pass over a micro-batch."""
        return self.plan.segments[pass_index].window if self.plan.overlaps else self.plan.path

    def is_finished(self, pass_index: int, position: int) -> bool:
        """Whether a pass may end there."""
        path, own = self.path(pass_index), self.plan.own_segments
        if self.plan.overlaps:
            return position == len(path)
        ending = {s.last for s in own if s.trains} | ({own[-1].last} if self.plan.own is not None else set())
        return position > 0 and path[position - 1] in ending

    def next_layer(self, op: Op) -> int | None:
        """The layer that runs next in this op's micro-batch and pass."""
        if (position := self.entered.get((op.micro_batch, op.pass_index))) is None:
            return None
        path = self.path(op.pass_index)
        return path[position] if position < len(path) else None


def validate(plan: Plan, *, clip_scope: str = "segment") -> Plan:
    """Return the plan, or raise PlanError. `clip_scope`: global | segment | none, what a clip norm covers."""
    replay = _Replay(plan, clip_scope, Moves(plan))
    _check_cover(plan)
    for position, op in enumerate(plan.ops):
        problem = replay.moves.problem_before(op)
        if not problem and op.effect.role in ("compute", "beside", "exchange"):
            problem = _check(replay, op) or replay.moves.note_compute(op)
        if problem:
            raise PlanError(f"rule {problem}\n{plan.around(position)}")
    if replay.saved:
        (micro_batch, layer), _ = next(iter(replay.saved.items()))
        raise PlanError(f"rule (6): what layer {layer} saved in micro-batch {micro_batch} is never consumed")
    if any(layer < plan.closed for segment in plan.segments for layer in (*segment.trained, *segment.through)):
        raise PlanError(f"rule (7): a layer before {plan.closed} trains, and those are closed")
    missing = [group for s in plan.own_segments for group in groups_of(s) if group not in replay.stepped]
    if missing:
        raise PlanError(f"rule (7): group {missing[0][0]} {missing[0][1]} has no STEP")
    if replay.held is not None:
        raise PlanError(f"rule (6): the hidden states held before layer {replay.held[1]} are never read")
    if replay.averaged != set(plan.averaged):
        raise PlanError("rule (8): an average of a tail's layer is never taken")
    if plan.own is not None and not (replay.agreed and replay.n_sent == _n_to_send(plan)):
        raise PlanError("rule (9): a micro-batch is never sent, or the processes never agree")
    if left := replay.moves.left():
        raise PlanError(f"rule (6): {left}")
    return plan


def _check(replay: _Replay, op: Op) -> str:
    """The check that the op's row names; an item that the op's kind does not know has no row."""
    if (op.kind, op.item) not in EFFECTS:
        return f"(2): {op.text()} belongs to no micro-batch under way"
    return _RULES[op.effect.rule](replay, op) if op.effect.rule else ""


def _check_cover(plan: Plan) -> None:
    firsts, lasts = [s.first for s in plan.segments], [s.last for s in plan.segments]
    whole = [*firsts, plan.n_layers] == [0, *(last + 1 for last in lasts)] and firsts == sorted(set(firsts))
    if not whole or [s.index for s in plan.segments] != list(range(len(plan.segments))):
        raise PlanError("the segments do not cover the layers once, in order")
    own = plan.own
    if own is not None and (not own or own != tuple(range(own[0], own[-1] + 1)) or own[-1] >= len(plan.segments)):
        raise PlanError("rule (9): the segments of a process do not follow each other")
    for segment in plan.segments:
        named = [*segment.through, *segment.absent]
        if len(set(named)) < len(named) or not all(segment.first <= layer <= segment.last for layer in named):
            raise PlanError(f"segment {segment.index} names layers twice, or others than its own")
        if not {segment.first, segment.last}.isdisjoint(segment.absent):
            raise PlanError(f"segment {segment.index} leaves out its first or its last layer")
        known = set(range(plan.n_layers)) - {layer for s in plan.segments for layer in (*s.absent, *s.replaced)}
        for layer in segment.replaced:
            if not segment.first <= layer <= segment.last or not known >= set(segment.reads(layer)):
                raise PlanError(f"segment {segment.index} replaces layer {layer}, which has no two neighbours with weights")
        if segment.trains and not segment.trained:
            raise PlanError(f"segment {segment.index} has a loss and no layer that trains")
        _check_window(plan, segment)


def _check_window(plan: Plan, segment: Segment) -> None:
    before = plan.segments[segment.index - 1] if segment.index else None
    if segment.reach is not None and (before is None or segment.reach != before.first or not before.trains):
        raise PlanError(f"segment {segment.index} must reach back to the first layer of a training segment before it")
    tail = segment.tail
    if tail and not (segment.last < tail[0] and tail[-1] < plan.n_layers and list(tail) == sorted(set(tail))):
        raise PlanError(f"the tail of segment {segment.index} must be of later layers, in order")
    following = plan.segments[segment.index + 1] if segment.index + 1 < len(plan.segments) else None
    if segment.loss == "following" and (following is None or following.reach is None or not following.has_loss):
        raise PlanError(f"no loss reaches segment {segment.index}")
    if plan.overlaps and (segment.through or segment.absent or not segment.trains):
        raise PlanError(f"segment {segment.index} leaves layers out, beside segments that overlap")


def _enter(replay: _Replay, op: Op) -> str:
    """Check where a micro-batch begins: at the embeddings, or at a boundary that is read or received."""
    if problem := _enters_here(replay, op):
        return problem
    if not 0 <= op.micro_batch < replay.plan.n_micro_batches:
        return f"(2): there is no micro-batch {op.micro_batch}"
    if replay.plan.overlaps and (op.pass_index >= len(replay.plan.segments) or not replay.path(op.pass_index)):
        return f"(4): pass {op.pass_index} has no loss"
    key, path = (op.micro_batch, op.pass_index), replay.path(op.pass_index)
    if key in replay.entered:
        return "(2): this micro-batch was already embedded"
    if replay.saved or not all(replay.is_finished(each, position) for (_, each), position in replay.entered.items()):
        return "(5): the micro-batch before is not finished"
    first = 0 if op.kind is Kind.EMBED else op.target
    if first not in path or (replay.plan.overlaps and first != path[0]):
        return f"(2): layer {first} is not in the path"
    replay.entered[key], replay.teacher = path.index(first), False
    return ""


def _enters_here(replay: _Replay, op: Op) -> str:
    """Whether this process begins a micro-batch in this way."""
    own = replay.plan.own
    if (op.kind is Kind.RECV) != (own is not None and own[0] > 0):
        return f"(9): a micro-batch does not come by {op.kind.value} here"
    if own is None:
        return ""
    if op.kind is Kind.RECV and op.target != replay.plan.own_segments[0].first:
        return f"(9): layer {op.target} is not the first one of this process"
    if op.micro_batch != replay.n_received or op.pass_index:
        return f"(9): micro-batch {replay.n_received} is the next one"
    replay.n_received += 1
    return ""


def _n_to_send(plan: Plan) -> int:
    return plan.n_micro_batches if plan.own_segments[-1] is not plan.segments[-1] else 0


def _send(replay: _Replay, op: Op) -> str:
    plan, last = replay.plan, replay.plan.own_segments[-1]
    if plan.own is None or not _n_to_send(plan) or op.target != last.last + 1:
        return "(9): nothing is sent from here"
    if op.micro_batch != replay.n_sent or replay.next_layer(op) != op.target:
        return f"(9): micro-batch {replay.n_sent} is the next one to be sent, after layer {last.last}"
    replay.n_sent += 1
    return ""


def _agree(replay: _Replay, op: Op) -> str:
    plan = replay.plan
    if (plan.own is None and plan.ranks == 1) or replay.agreed:
        return "(9): the processes agree once, in a pipeline or among ranks"
    if plan.ranks > 1:
        missing = [group for s in plan.segments for group in groups_of(s) if not replay.moves.is_reduced(group)]
        replay.agreed = True
        return f"(10): the gradients of {missing[0][0]} {missing[0][1]} are not summed over the ranks" if missing else ""
    for segment in plan.own_segments:
        for micro_batch in range(plan.n_micro_batches if segment.trains else 0):
            if replay.backward_from.get((micro_batch, segment.index), segment.first) >= segment.first:
                return f"(9): the gradients of segment {segment.index} are not complete"
    replay.agreed = True
    return ""


def _reduce(replay: _Replay, op: Op) -> str:
    plan = replay.plan
    with_gradients = {group: s for s in plan.segments for group in groups_of(s)}
    if plan.ranks == 1 or replay.agreed or op.group not in with_gradients:
        return f"(10): no rank has gradients of {op.unit} {op.target} to be summed here"
    for s in plan.segments:
        is_layer = op.unit == "layer"
        concerned = s.has_loss and (op.target in s.reached if is_layer else s.index == op.target)
        for micro_batch in range(plan.n_micro_batches if concerned else 0):
            progress = replay.backward_from.get((micro_batch, s.index))
            if progress is None or (is_layer and progress >= op.target):
                return f"(10): the gradients of {op.unit} {op.target} are not complete"
    return ""


def _take_held(replay: _Replay, op: Op) -> str:
    if replay.held != (op.micro_batch, op.target):
        return f"(2): nothing was held before layer {op.target}"
    replay.held = None
    return _enter(replay, op)


def _teacher(replay: _Replay, op: Op) -> str:
    if (op.micro_batch, op.pass_index) not in replay.entered:
        return f"(2): {op.text()} belongs to no micro-batch under way"
    replay.teacher = True
    return ""


def _next_layer(replay: _Replay, op: Op) -> str:
    return "" if replay.next_layer(op) == op.target else f"(2): layer {op.target} is not the next one"


def _align(replay: _Replay, op: Op) -> str:
    """Check an ALIGN: it comes right after the layer's forward, and its gradient must find a backward of that layer."""
    position = replay.entered.get((op.micro_batch, op.pass_index), 0)
    if not replay.teacher or replay.plan.path[:position][-1:] != (op.target,):
        return f"(2): {op.text()} needs a teacher's features and layer {op.target}'s output"
    if (op.micro_batch, op.target) not in replay.saved:
        return f"(2): layer {op.target} keeps nothing for a backward"
    replay.teacher = False  # its features go with this op
    return ""


def _hold(replay: _Replay, op: Op) -> str:
    if replay.held is not None:
        return f"(6): hidden states are held already, before layer {replay.held[1]}"
    if replay.next_layer(op) != op.target:
        return f"(2): layer {op.target} is not the next one"
    replay.held = op.micro_batch, op.target
    return ""


def _average(replay: _Replay, op: Op) -> str:
    if op.target not in replay.plan.averaged or op.target in replay.averaged:
        return f"(8): layer {op.target} has no average, or it was already taken"
    if any(group not in replay.stepped for s in replay.plan.segments for group in groups_of(s)):
        return "(8): not every group was updated before"
    replay.averaged.add(op.target)
    return ""


def _wrong_adapters(plan: Plan, op: Op) -> str:
    averaged = plan.overlaps and op.target in plan.scope(op).tail
    return f"(8): layer {op.target} computes with other adapters" if (op.adapters == "ema") != averaged else ""


def _forward(replay: _Replay, op: Op) -> str:
    if replay.next_layer(op) != op.target:
        return f"(2): layer {op.target} runs out of order"
    if wrong := _wrong_adapters(replay.plan, op):
        return wrong
    if replay.plan.segment_of(op.target) not in replay.plan.own_segments:
        return f"(9): layer {op.target} lies in another process"
    segment = replay.plan.scope(op)
    if op.target == segment.begin and any(micro_batch == op.micro_batch for micro_batch, _ in replay.saved):
        return "(5): the segment before still holds what it saved"
    replay.entered[op.micro_batch, op.pass_index] += 1
    if op.keep is not Keep.NONE:
        replay.saved[op.micro_batch, op.target] = op.keep
    return ""


def _loss(replay: _Replay, op: Op) -> str:
    if not 0 <= op.target < len(replay.plan.segments):
        return f"(4): there is no segment {op.target}"
    segment = replay.plan.segments[op.target]
    if segment not in replay.plan.own_segments:
        return f"(9): segment {op.target} lies in another process"
    sends = bool(_n_to_send(replay.plan)) and segment is replay.plan.own_segments[-1]
    if sends and replay.n_sent <= op.micro_batch:
        return f"(9): the output of segment {op.target} is not sent before its loss"
    if not segment.has_loss or (replay.plan.overlaps and op.pass_index != op.target):
        return f"(4): segment {op.target} has no loss here"
    if (op.micro_batch, op.target) in replay.backward_from:
        return f"(4): the loss of segment {op.target} was already taken"
    position = replay.entered.get((op.micro_batch, op.pass_index), 0)
    at_end = segment.tail[-1] if segment.tail else segment.last
    if replay.path(op.pass_index)[:position][-1:] != (at_end,):
        return f"(4): the loss of segment {op.target} comes before its forward ended"
    kept_input = replay.saved.get((op.micro_batch, segment.first)) is Keep.INPUT
    here = replay.moves.is_here("input", op.micro_batch, segment.first)
    if segment.loss == "reconstruct" and kept_input and not here:
        return f"(2): the input of segment {op.target}, which its loss reconstructs, is not on the device"
    if segment.loss == "align" and not replay.teacher:
        return f"(2): the loss of segment {op.target} needs a teacher's features"
    replay.backward_from[op.micro_batch, op.target] = segment.turned[-1]
    return ""


def _backward(replay: _Replay, op: Op) -> str:
    segment = next((s for s in replay.plan.segments if op.target in s.layers), None)
    if segment is None or (replay.plan.overlaps and op.pass_index >= len(replay.plan.segments)):
        return f"(2): there is no layer {op.target}"
    segment = replay.plan.scope(op)
    if wrong := _wrong_adapters(replay.plan, op):
        return wrong
    following = replay.backward_from.get((op.micro_batch, segment.index))
    if following is None:
        return f"(4): no LOSS {segment.index} came before"
    if following != op.target:
        return f"(3): layer {following} is next in the backward of segment {segment.index}"
    if replay.saved.pop((op.micro_batch, op.target), None) is None:
        return f"(2): layer {op.target} kept neither its input nor its graph"
    if ("layer", op.target) in replay.stepped:
        return f"(7): layer {op.target} was already updated"
    below = segment.turned[: segment.turned.index(op.target)]
    replay.backward_from[op.micro_batch, segment.index] = below[-1] if below else segment.begin - 1
    return ""


def _step(replay: _Replay, op: Op) -> str:
    if (replay.plan.own is not None or replay.plan.ranks > 1) and not replay.agreed:
        return "(9): the processes have not agreed"
    segments = {group: s for s in replay.plan.own_segments for group in groups_of(s)}
    resting = op.unit == "layer" and any(op.target in s.through for s in replay.plan.segments)
    if (op.group not in segments and not resting) or op.group in replay.stepped:
        return f"(7): {op.unit} {op.target} does not train, or was already updated"
    if resting:  # without a gradient
        replay.stepped.add(op.group)
        return ""
    own = segments[op.group]
    every = [s for s in replay.plan.segments if s.has_loss]
    whose = [s for s in every if s.index == own.index or not set(s.reached).isdisjoint(own.trained)]
    last_needed = {"none": op.target if op.unit == "layer" else own.last + 1, "segment": own.first}
    for segment in every if replay.clip_scope == "global" else whose:
        down_to = last_needed.get(replay.clip_scope, segment.begin)
        for micro_batch in range(replay.plan.n_micro_batches):
            progress = replay.backward_from.get((micro_batch, segment.index))
            aux_ready = op.unit == "aux" and replay.clip_scope == "none" and progress is not None
            if not aux_ready and (progress is None or progress >= max(down_to, segment.begin)):
                return f"(7): the gradients of segment {segment.index} are not complete"
    replay.stepped.add(op.group)
    return ""


_RULES: dict[str, Callable[[_Replay, Op], str]] = {
    "enter": _enter, "forward": _forward, "loss": _loss, "backward": _backward, "step": _step, "take held": _take_held,
    "teacher": _teacher, "next layer": _next_layer, "align": _align, "hold": _hold, "average": _average, "send": _send,
    "agree": _agree, "reduce": _reduce,
}  # fmt: skip
