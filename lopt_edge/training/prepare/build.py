"""An executor from a loaded model and a run's decisions: adapters, aux heads, optimizer.

The rule: one builder for a whole run and for each process of a pipeline, which builds its own layers and segments only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch

from lopt_edge.adapters.save import AdapterShape
from lopt_edge.config.settings import Config
from lopt_edge.errors import InputError
from lopt_edge.models.folder import ModelFolder
from lopt_edge.objectives import objective_of
from lopt_edge.plan.methods.course import Course
from lopt_edge.plan.schedule.processes import Part
from lopt_edge.run.model.adapter_config import lora_scale, read_adapter_config
from lopt_edge.run.model.averages import Averages
from lopt_edge.run.model.load import Model
from lopt_edge.run.model.lora import attach_adapters, load_adapters
from lopt_edge.run.model.replaced import group_parameters
from lopt_edge.run.step.executor import Executor
from lopt_edge.run.step.losses import ReconstructHead
from lopt_edge.run.step.optim import SegmentOptimizer
from quant.linear import DropoutClock, PackedLinear


class ExecutorInputs(Protocol):
    """The facts that an executor is made from: a run's `Inputs`, or a worker's `Task` (training/pipeline/worker.py)."""

    @property
    def config(self) -> Config: ...
    @property
    def source(self) -> ModelFolder: ...
    @property
    def course(self) -> Course: ...
    @property
    def targets(self) -> tuple[str, ...]: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def part(self) -> Part | None: ...


def build_executor(inputs: ExecutorInputs, model: Model, *, adapter: str | None = None) -> tuple[Executor, AdapterShape]:
    """The executor of a loaded model, and the shape of its adapter.

    Every training layer gets an adapter, those of the folder `adapter` among them; aux heads and optimizer are made. In a
    pipeline these are of this process' layers and segments. Raises InputError for an adapter of another shape.
    """
    config, facts = inputs.config, inputs.source.facts
    model.clock.seed = config.seed  # of the dropout masks
    trained = inputs.course.adapted
    carried: list[int] = []
    rslora = _rslora(config, adapter)
    if adapter is not None:
        carried = load_adapters(model, Path(adapter))
        setting = "init_adapter" if adapter == config.init_adapter else "adapter"
        here = [layer for layer in carried if layer in model.here]
        _check_same_shape(inputs, model, here, rslora=rslora, where=f"{setting} {adapter}")
    fresh = [layer for layer in trained if layer not in carried and layer in model.here]
    own = [group for group in inputs.course.groups if inputs.part is None or inputs.part.owns(group)]
    attach_adapters(
        model,
        fresh,
        targets=inputs.targets,
        r=config.lora_r,
        alpha=config.lora_alpha,
        rslora=rslora,
        dropout=config.lora_dropout,
        seed=config.seed,
    )
    heads = {
        index: ReconstructHead(facts.hidden_size, seed=DropoutClock(config.seed, step=-2).key(index, 0)).to(inputs.device)
        for unit, index in own
        if unit == "aux"
    }
    parameters = {
        (unit, target): group_parameters(model, target) if unit == "layer" else list(heads[target].parameters())
        for unit, target in own
    }
    optimizer = SegmentOptimizer(
        parameters,
        mover=model.mover,
        weight_decay=config.weight_decay,
        clip=config.clip,
        clip_scope=config.clip_scope,
        optimizer=config.optimizer,
    )
    averages = (
        Averages(model, inputs.course.averaged, momentum=inputs.course.ema_momentum) if inputs.course.averaged else None
    )
    executor = Executor(
        model,
        heads=heads,
        optimizer=optimizer,
        local_weight=config.local_weight,
        averages=averages,
        cascade_weight=inputs.course.cascade_weight,
        objective=objective_of(config),
    )
    layers = tuple(sorted({*trained, *carried}))
    shape = AdapterShape(
        config.lora_r,
        config.lora_alpha,
        config.lora_dropout,
        inputs.targets,
        layers,
        facts.n_layers,
        inputs.source.name,
        inputs.source.commit,
        rslora,
        facts.outside,
    )
    return executor, shape


def _rslora(config: Config, adapter: str | None) -> bool:
    """Whether the branch is scaled by alpha / sqrt(r): as the settings say, or as an adapter that goes on has it."""
    if adapter is None:
        return config.lora_rslora
    carried = read_adapter_config(Path(adapter)).rslora
    if config.lora_rslora and not carried:
        fix = "leave lora_rslora out, or begin with a fresh adapter"
        raise InputError("the adapter that goes on is scaled by alpha / r", where="lora_rslora", fix=fix)
    return carried


def _check_same_shape(inputs: ExecutorInputs, model: Model, layers: list[int], *, rslora: bool, where: str) -> None:
    """Refuse an adapter of another shape than the settings': one adapter_config.json describes both."""
    config = inputs.config
    shape = config.lora_r, lora_scale(config.lora_alpha, config.lora_r, rslora=rslora)
    for layer in layers:
        for linear in inputs.source.facts.layer(layer).linears:
            module = model.layers[layer].get_submodule(linear.name)
            assert isinstance(module, PackedLinear)
            wanted = linear.short_name in inputs.targets
            rank = None if module.lora_a is None else module.lora_a.shape[1]
            found = rank is not None
            if wanted != found or (found and (rank, module.scale) != shape):
                raise InputError(
                    "its rank, alpha or target modules differ from lora_r, lora_alpha, lora_targets",
                    where=where,
                    fix="set these three to the values of its adapter_config.json",
                )
            if found:
                module.dropout_rate = config.lora_dropout
