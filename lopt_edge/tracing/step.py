"""One traced step: the real executor runs layers with stand-ins over a plan whose segments are variants.

A variant says which linear layers have LoRA, and which one saves its input, so one step holds all that programs are made
from. The optimizer is left out: nothing is updated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lopt_edge.plan.facts.layers import KEPT, SHARED
from lopt_edge.plan.schedule.effects import Kind
from lopt_edge.plan.schedule.ops import Op, Plan
from lopt_edge.plan.schedule.segments import Segment
from lopt_edge.run.model.load import Model
from lopt_edge.run.step.batches import Batch
from lopt_edge.run.step.executor import Executor
from lopt_edge.run.step.losses import ReconstructHead
from lopt_edge.run.step.step_state import present
from lopt_edge.run.tiers.moves import Mover
from lopt_edge.tracing.log import Event, EventLog


@dataclass(frozen=True)
class Variant:
    """A segment of `n_layers` layers in which `trains` have LoRA parameters and `holds` save their input."""

    n_layers: int
    trains: frozenset[str]
    holds: frozenset[str]


class NoOptimizer:
    """The part of SegmentOptimizer that a step without updates asks for."""

    def __init__(self) -> None:
        self.mover = Mover(torch.device("cpu"))
        self.norms: dict[Any, Any] = {}

    def begin_step(self, **_: Any) -> None: ...

    def accept_gradients(self, name: Any, **_: Any) -> None: ...

    def complete_gradients(self, name: Any) -> None: ...

    def drop_gradients(self) -> None: ...

    def roll_back(self) -> bool:
        return True


@dataclass
class Trace:
    """A trace of what happened in each op of one step, by the op's text; `given` are numbers of tensors that an op begins
    with."""

    spans: dict[str, list[Event]] = field(default_factory=dict)
    given: dict[str, dict[int, str]] = field(default_factory=dict)
    result: dict[str, int] = field(default_factory=dict)
    shared: dict[str, tuple[int, int]] = field(default_factory=dict)  # keys and values that an op leaves to others


def make_segments(n_layers: list[int]) -> tuple[Segment, ...]:
    """The segments of the step: the last but one has a local loss, all others the task loss."""
    starts = [sum(n_layers[:i]) for i in range(len(n_layers))]
    return tuple(
        Segment(i, start, start + n - 1, "reconstruct" if i == len(n_layers) - 2 else "task")
        for i, (start, n) in enumerate(zip(starts, n_layers, strict=True))
    )


def zero_keys(model: Model, sizes: Mapping[str, int]) -> Tensor:
    """Keys or values of all tokens, laid out as attention lays them out, and no view: autograd adds into such a one."""
    s, t, k, e = (sizes[letter] for letter in "stke")
    return torch.empty_strided((s, k, t, e), (t * k * e, e, k * e, 1), dtype=model.dtype).zero_()


def observed(model: Model, plan: Plan, sizes: Mapping[str, int], log: EventLog) -> Trace:
    """The trace of a step of a model with stand-ins; `sizes` are by letter: sequences, tokens, hidden, rows with a loss."""
    rows, n = sizes["s"] * sizes["t"], sizes["n"]
    own = torch.zeros(sizes["s"], sizes["t"], model.facts.n_layers, sizes["w"], dtype=model.dtype)
    keys, values = (zero_keys(model, sizes) for _ in range(2))
    role = model.facts.kinds[0].keys
    ids_BT, targets_N = torch.zeros(sizes["s"], sizes["t"], dtype=torch.int64), torch.zeros(n, dtype=torch.int64)
    batch = Batch(ids_BT, torch.arange(n), targets_N, torch.arange(n), rows)
    head = ReconstructHead(sizes["d"], seed=0)
    for parameter in head.parameters():
        parameter.grad = torch.zeros_like(parameter)
    heads = {s.index: head for s in plan.segments if s.loss == "reconstruct"}
    optimizer: Any = NoOptimizer()
    executor, trace = Executor(model, heads=heads, optimizer=optimizer, local_weight=1.0), Trace()
    start = 0

    def observe(op: Op, after: bool) -> None:
        nonlocal start
        state, text = present(executor.state), op.text()
        if after and op.kind is Kind.EMBED and model.facts.own_inputs is not None:
            context = present(state.layer_context)
            context.own_inputs_BTLP = own
            if role == SHARED:
                context.keys.update(dict.fromkeys(model.facts.attention_types, (keys, values)))
        if not after and op.kind is Kind.BACKWARD and role == KEPT:
            present(state.layer_context).keys.clear()
            if model.facts.gives_back(op.target, ()):
                state.key_gradients[0, op.target] = zero_keys(model, sizes), zero_keys(model, sizes)
        if not after:
            saved = state.inputs.get((0, op.target)) if op.kind is Kind.BACKWARD else None
            given: dict[str, Tensor | None] = {
                "input": state.hidden_BTD if op.kind is Kind.FORWARD else None if saved is None else saved.tensor,
                "grad": state.grad_BTD,
            }
            if op.kind is Kind.BACKWARD and (0, op.target) in state.key_gradients:
                given |= dict(zip(("keys", "values"), state.key_gradients[0, op.target], strict=True))
            trace.given[text] = {log.number(tensor): name for name, tensor in given.items() if tensor is not None}
            start = len(log.events)
            return
        trace.spans[text] = log.events[start:]
        if op.kind is Kind.FORWARD and role == KEPT:
            found = present(state.layer_context).keys[model.facts.layer_types[op.target]]
            trace.shared[text] = log.number(found[0]), log.number(found[1])
        if op.kind is Kind.BACKWARD:
            state.key_gradients.clear()
        made = state.grad_BTD if op.kind in (Kind.LOSS, Kind.BACKWARD) else state.hidden_BTD
        trace.result[text] = -1 if made is None else log.number(made)

    vocabulary: Any = model.embedding  # a stand-in
    beside = [] if model.body is None else [*model.body.decoder.parameters(), *model.body.decoder.buffers()]
    constants = [
        batch.ids_BT, batch.supervised_N, batch.targets_N, present(batch.real_N), vocabulary.chunk,
        *model.norm.parameters(), *beside,
    ]  # fmt: skip
    with log, executor.observed(observe):
        numbers = [tensor for layer in model.layers for tensor in (*layer.buffers(), *layer.parameters())]
        log.watch(
            [*constants, own, keys, values, *numbers, *head.parameters(), *(present(p.grad) for p in head.parameters())]
        )
        executor.run(plan, [batch], step=1, learning_rates={})
    return trace
