"""Exponential moving averages of layers' adapters, for methods whose losses read out through later layers' copies (MLAAN).

    E <- a E + (1 - a) values,   after each step;   at first E = values

fp32, on the device, one flat block a layer, laid out as the optimizer's group of that layer. The rule: an average gets no
gradient, and a layer computes with it only inside `used`; outside of it the layer has the adapters that train. What is
written to an adapter folder is never an average; checkpoints contain them (training/checkpoint/snapshot.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lopt_edge.run.model.load import Model
from lopt_edge.run.model.lora import adapted, layer_parameters


class Averages:
    """The averages of the adapters of `layers`, which begin as the adapters are now."""

    def __init__(self, model: Model, layers: Iterable[int], *, momentum: float) -> None:
        self.model, self.momentum = model, momentum
        self.flat: dict[int, Tensor] = {}
        self._matrices: dict[int, list[nn.Parameter]] = {}
        for layer in layers:
            parameters = layer_parameters(model, layer)
            flat = self.flat[layer] = torch.cat([parameter.detach().reshape(-1) for parameter in parameters])
            pieces = torch.split(flat, [parameter.numel() for parameter in parameters])
            self._matrices[layer] = [
                nn.Parameter(piece.view(parameter.shape), requires_grad=False)
                for piece, parameter in zip(pieces, parameters, strict=True)
            ]

    def take(self, layer: int, values: Tensor) -> None:
        """Move a layer's average towards `values`, its adapters after the step (flat, fp32)."""
        self.flat[layer].mul_(self.momentum).add_(values.detach(), alpha=1 - self.momentum)

    @contextmanager
    def used(self, layer: int) -> Iterator[None]:
        """A context in which the layer computes with its average and without dropout.

        It must be open in the layer's backward too, which reads the adapters again.
        """
        modules = [module for _, module in adapted(self.model, layer)]
        trained = [(module.lora_a, module.lora_b) for module in modules]
        matrices, clock = iter(self._matrices[layer]), self.model.clock
        was_active, clock.active = clock.active, False
        try:
            for module in modules:
                module.lora_a, module.lora_b = next(matrices), next(matrices)
            yield
        finally:
            clock.active = was_active
            for module, (a, b) in zip(modules, trained, strict=True):
                module.lora_a, module.lora_b = a, b
