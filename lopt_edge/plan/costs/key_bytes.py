"""The bytes of keys and values that later layers attend to, and of their gradients (run/step/key_sharing.py). No torch."""

from __future__ import annotations

from lopt_edge.plan.costs.sizes import MicroBatchSize, Sizes
from lopt_edge.plan.facts.layers import KEPT
from lopt_edge.plan.schedule.segments import Segment


def keys_bytes(sizes: Sizes, batch: MicroBatchSize, layer: int) -> int:
    """The bytes of the keys and values of a layer, where later layers attend to them; else 0."""
    one = sizes.shape.facts.layer(layer)
    return 2 * batch.n_rows * one.n_kv_heads * one.head_dim * sizes.shape.itemsize * (one.keys == KEPT)


def all_keys_bytes(sizes: Sizes, batch: MicroBatchSize) -> int:
    """The bytes of all of them, which live as long as the micro-batch."""
    return sum(keys_bytes(sizes, batch, layer) for layer in range(sizes.shape.facts.n_layers))


def key_gradient_bytes(sizes: Sizes, batch: MicroBatchSize, layer: int, segment: Segment) -> int:
    """The bytes of the gradients that a layer's backward gives to another's keys and values; 0 if none."""
    source = sizes.shape.facts.source_of.get(layer)
    return keys_bytes(sizes, batch, source) if source is not None and source in segment.reached else 0
