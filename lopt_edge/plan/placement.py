"""Where each unit's weights lie during a step: `resident` on the device, or read from a tier when they are needed.

One rule so far: decoder layers are resident; the token embedding's rows are read from the model's file for each batch; the
lm_head is resident on a GPU and read in chunks from the file on a CPU, where it would be the largest tensor in memory.
The plan's header carries the answer, and run/load.py follows it.
"""

from __future__ import annotations

from lopt_edge.plan.facts import ModelFacts


def weight_placement(facts: ModelFacts, device_type: str) -> tuple[tuple[str, str], ...]:
    """(unit, place) for every unit of the model, on a device of type "cpu" or "cuda"."""
    layers = tuple((f"layer {i}", "resident") for i in range(facts.n_layers))
    return (("embed", "disk"), *layers, ("head", "disk" if device_type == "cpu" else "resident"))
