"""For trace_bytes.py: layers that keep their keys and values for later ones, or attend to those of an earlier one.

In a traced model all layers are of one kind, so what the others would give is made up: keys and values that layers read,
and the gradients that come to those that made some (trace_step.py gives them when an op begins).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from lopt_edge.plan.facts.layers import KEPT
from lopt_edge.plan.facts.model import ModelFacts

if TYPE_CHECKING:
    from trace_step import Case


def share_keys(case: Case, facts: ModelFacts, layers: list[nn.Module]) -> ModelFacts:
    """Let all layers keep their keys for others, or attend to others' keys; returns the facts of such a model."""
    kept, (kind,) = case.keys == KEPT, facts.kinds
    for layer in layers:
        attention: Any = layer.self_attn
        attention.is_kv_shared_layer, attention.store_full_length_kv = not kept, kept
        if not kept:
            del attention.k_proj, attention.v_proj, attention.k_norm, attention.v_norm
    linears = tuple(one for one in kind.linears if kept or one.short_name not in ("k_proj", "v_proj"))
    # The observer gives keys to those that read them, and gradients to those that keep them.
    sources = tuple((layer, -1) for layer in (range(-2, -1) if kept else range(len(layers))))
    facts = replace(facts, kinds=(replace(kind, linears=linears, keys=case.keys),), key_sources=sources)
    return _GivingBack(**vars(facts)) if case.gives_back else facts


class _GivingBack(ModelFacts):
    """The facts of a model in which gradients of keys flow in every layer's backward."""

    def gives_back(self, layer: int, reached: object) -> bool:
        return True
