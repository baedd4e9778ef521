"""Layers that attend to an earlier layer's keys and values: what of them a layer's graph reads, keeps and gives back.

A layer whose keys are read later puts them into the context when it runs forward, without their graph. A later layer's
graph begins at them as it begins at its input: their gradient is caught there, waits in the step's state, where those of
several layers add up (the last layer's first, as autograd would), and is fed into the graph of the layer that made them. So
still no graph is longer than one layer.

The rule: a gradient of keys goes back only inside the segment of a loss. Where the layer that made them lies before the
segment, they cross its boundary as the hidden states do, detached (design.md). A layer run again for its graph makes keys
of the same values, which nobody else sees.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from lopt_edge.plan.facts.layers import KEPT, SHARED
from lopt_edge.plan.schedule.effects import Kind
from lopt_edge.plan.schedule.ops import Op
from lopt_edge.run.model.context import KeysValues, LayerContext
from lopt_edge.run.model.load import Model
from lopt_edge.run.step.step_state import StepState
from lopt_edge.run.tiers.graphs import LayerGraph


class _Made(dict[str, KeysValues]):
    """The keys and values that a layer makes in its graph, which does not own them: the context does."""

    def __init__(self, graph: LayerGraph) -> None:
        super().__init__()
        self.graph = graph

    def __setitem__(self, layer_type: str, made: KeysValues) -> None:
        super().__setitem__(layer_type, made)
        self.graph.disown(made)


def run_in_graph(
    model: Model,
    state: StepState,
    op: Op,
    graph: LayerGraph,
    run: Callable[[LayerContext], Tensor],
    context: LayerContext,
) -> Tensor:
    """A layer's output at the end of its graph, with the keys and values that it reads or makes in their places."""
    facts, kind = model.facts, model.facts.layer_types[op.target]
    role, gives_back = facts.layer(op.target).keys, facts.gives_back(op.target, state.plan.scope(op).reached)
    if role == SHARED and gives_back:
        context = replace(context, keys={kind: graph.tap_keys(context.keys[kind])})
    if role != KEPT:
        return graph.end(run(context))
    own: Any = _Made(graph)
    output = graph.end(run(replace(context, keys=own)), own[kind] if gives_back else ())
    if op.kind is Kind.FORWARD:
        key, value = own[kind]
        context.keys[kind] = key.detach(), value.detach()
    return output


def take_gradients(model: Model, state: StepState, op: Op, graph: LayerGraph) -> None:
    """Add what a layer's backward caught of another layer's keys and values to what waits for that layer."""
    if (found := graph.take_key_gradients()) is None:
        return
    place = op.micro_batch, model.facts.source_of[op.target]
    waiting = state.key_gradients.get(place)
    if waiting is None:
        key, value = found
        state.key_gradients[place] = key.data, value.data  # no views of a base, so that autograd may add into them
        return
    for total, one in zip(waiting, found, strict=True):
        total.add_(one)
