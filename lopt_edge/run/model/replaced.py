"""Replaced layers (method `repl`): their linear layers compute with a mixture of the neighbours' weights (quant/mixed.py).

`fit_layers` reads each layer's own weights once, one layer in a buffer at a time, finds the mixing coefficients of least
squares, and lets the weights go; `apply_replaced` does the same with coefficients that a run has learned. Norms and biases
of the layer stay as they are. The rule: after either, no byte of the layer's packed weights is kept or read again.

Coefficients are fp32 parameters, trained in the group of their layer, and lie beside the adapter in `replaced_layers.json`,
in an output folder and in each checkpoint (a number in JSON has all digits of an fp32 one):

    {"format": 1, "layers": {"3": {"self_attn.q_proj": [a, b], ...}}}
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lopt_edge.errors import InputError, NotFinite
from lopt_edge.plan.schedule.knobs import Knobs, placement_of
from lopt_edge.run.model.adapter_config import REPLACED_NAME
from lopt_edge.run.model.load import Model
from lopt_edge.run.model.lora import layer_parameters
from quant.headers import FolderError, read_json
from quant.linear import PackedLinear
from quant.mixed import Mixture, fit
from quant.untrusted import check_folder

FORMAT = 1
Coefficients = Mapping[int, Mapping[str, tuple[float, float]]]  # by layer and linear layer


def loading_placement(knobs: Knobs, replaced: tuple[int, ...]) -> tuple[tuple[str, str], ...]:
    """The (unit, place) pairs with which a model is loaded: weights of layers that will be replaced stay on disk."""
    names = {f"layer {layer}" for layer in replaced}
    return tuple((unit, "disk" if unit in names else place) for unit, place in placement_of(knobs))


def fit_layers(model: Model, layers: Iterable[int]) -> dict[int, dict[str, float]]:
    """Replace layers by least squares; returns, by layer and linear layer, the share |W - mixture| / |W| that is left."""
    coefficients: dict[int, dict[str, tuple[float, float]]] = {}
    left: dict[int, dict[str, float]] = {}
    for layer in _present(model, layers):
        coefficients[layer], left[layer] = {}, {}
        for linear in model.facts.layer(layer).linears:
            a, b, unexplained = fit(*(_linear(model, each, linear.name) for each in (layer, layer - 1, layer + 1)))
            coefficients[layer][linear.name], left[layer][linear.name] = (a, b), unexplained
        _linear(model, layer, model.facts.layer(layer).linears[0].name).buffer.flat.clear()  # it grew for three matrices
    replace_layers(model, coefficients)
    return left


def _present(model: Model, layers: Iterable[int]) -> Iterator[int]:
    return iter(layers) if model.weights is None else model.weights.stream(layers)


def replace_layers(model: Model, coefficients: Coefficients) -> None:
    """Let the weights of these layers go, and compute with mixtures of the neighbours' from now on."""
    for layer, by_linear in coefficients.items():
        for linear in model.facts.layer(layer).linears:
            module = _linear(model, layer, linear.name)
            mix = nn.Parameter(torch.tensor(by_linear[linear.name], dtype=torch.float32, device=model.device))
            before, after = (_linear(model, each, linear.name) for each in (layer - 1, layer + 1))
            module.weight, module.synthesis = None, Mixture(before, after, mix)
    if model.weights is not None:
        model.weights.forget(coefficients)


def _linear(model: Model, layer: int, name: str) -> PackedLinear:
    module = model.layers[layer].get_submodule(name)
    assert isinstance(module, PackedLinear)
    return module


def mixtures(model: Model, layer: int) -> Iterator[tuple[str, Mixture]]:
    """Yield the name and the mixture of each linear layer of `layer` that is one, in the model's order."""
    for linear in model.facts.layer(layer).linears if layer in model.here else ():
        found = _linear(model, layer, linear.name).synthesis
        if isinstance(found, Mixture):
            yield linear.name, found


def group_parameters(model: Model, layer: int) -> list[nn.Parameter]:
    """The parameters that train in a layer, in a fixed order: its adapter, then its mixing coefficients."""
    return [*layer_parameters(model, layer), *(mixture.mix for _, mixture in mixtures(model, layer))]


# files -----------------------------------------------------------------------------------------------------------------


def replaced_values(model: Model) -> dict[str, Any] | None:
    """The content of replaced_layers.json; None for a model without replaced layers.

    Raises NotFinite if a coefficient is not finite.
    """
    layers = {}
    for layer in range(model.facts.n_layers):
        if found := {name: mixture.mix.tolist() for name, mixture in mixtures(model, layer)}:
            layers[str(layer)] = found
    if not all(math.isfinite(value) for by_linear in layers.values() for pair in by_linear.values() for value in pair):
        raise NotFinite("mixing coefficients are not finite; they were not saved")
    return {"format": FORMAT, "layers": layers} if layers else None


def check_plain_adapter(folder: Path) -> None:
    """Refuse an adapter that belongs to a model with replaced layers. Raises InputError."""
    if (folder / REPLACED_NAME).exists():
        raise InputError(
            "its adapter belongs to a model with replaced layers (method repl)",
            where=str(folder),
            fix="make a model of it (lopt-edge export) and train that",
        )


def apply_replaced(model: Model, folder: Path) -> tuple[int, ...]:
    """Replace the layers that a folder's replaced_layers.json names; returns them (none without such a file).

    Raises InputError if the file is damaged or does not fit the model.
    """
    if not (folder / REPLACED_NAME).exists():
        return ()
    where = str(folder / REPLACED_NAME)
    try:
        check_folder(folder)
        found = _parsed(read_json(folder / REPLACED_NAME), model, where)
    except FolderError as error:
        raise InputError(str(error), where=where, fix="use the output folder of a finetune run") from None
    replace_layers(model, found)
    return tuple(found)


def _parsed(values: Any, model: Model, where: str) -> dict[int, dict[str, tuple[float, float]]]:
    last = model.facts.n_layers - 1

    def names(layer: int) -> list[str]:
        if not 0 <= layer <= last:
            raise ValueError("no such layer")
        return [linear.name for linear in model.facts.layer(layer).linears]

    try:
        if values["format"] != FORMAT:
            raise InputError(f"has format {str(values['format'])[:20]!r}, this program reads {FORMAT}", where=where)
        found = {
            int(layer): {name: _pair(by_linear[name]) for name in names(int(layer))}
            for layer, by_linear in values["layers"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        raise InputError("does not fit this model", where=where, fix="use the model that it was trained on") from None
    order = sorted(found)
    apart = all(right - left > 1 for left, right in pairwise(order))
    if not (order and apart and order[0] > 0 and order[-1] < last):
        raise InputError(
            f"names layers {order} of {last + 1}, which cannot be replaced",
            where=where,
            fix="use the model that it was trained on",
        )
    return {layer: found[layer] for layer in order}


def _pair(values: Any) -> tuple[float, float]:
    a, b = (float(value) for value in values)
    if not (math.isfinite(a) and math.isfinite(b)):
        raise ValueError("not finite")
    return a, b
