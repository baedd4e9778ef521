"""LoRA adapters: made, found by name, read and written in peft's naming.

Parameters are fp32. A is (in, r), uniform in +-1/sqrt(in) (peft's kaiming-uniform with a = sqrt 5); B is (r, out), zero.
Initial values are a function of (seed, layer, module) and are drawn on the CPU, so that they do not depend on the device
or on which other layers train. peft stores both matrices transposed, under
`base_model.model.{decoder}.{layers}.{i}.{module}.lora_A.weight`; the transposition happens here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from lopt_edge.errors import InputError, NotFinite
from lopt_edge.plan.facts.layers import LinearFacts
from lopt_edge.run.model.adapter_config import ADAPTER_ADVICE, ADAPTER_NAME, AdapterConfig, lora_scale, read_adapter_config
from lopt_edge.run.model.load import Model
from quant.files import read_tensor, tensor_bytes
from quant.headers import FolderError, SafetensorsWriter, TensorEntry, read_header
from quant.linear import DropoutClock, PackedLinear


def adapted(model: Model, layer: int) -> Iterator[tuple[str, PackedLinear]]:
    """Yield the path inside the layer and the module of each linear layer of `layer` that carries an adapter."""
    for linear in model.facts.layer(layer).linears:
        module = model.layers[layer].get_submodule(linear.name)
        if isinstance(module, PackedLinear) and module.lora_a is not None:
            yield linear.name, module


def layer_parameters(model: Model, layer: int) -> list[nn.Parameter]:
    """The adapter matrices of a layer, A and B of each linear layer in the model's order."""
    pairs = ((module.lora_a, module.lora_b) for _, module in adapted(model, layer))
    return [matrix for pair in pairs for matrix in pair if matrix is not None]


def attach_adapters(
    model: Model,
    layers: Iterable[int],
    *,
    targets: tuple[str, ...],
    r: int,
    alpha: float,
    rslora: bool = False,
    dropout: float = 0.0,
    seed: int = 0,
) -> None:
    """Put fresh adapters of rank `r` on the linear layers of these layers whose short names are in `targets`.

    A is uniform, B zero, both fp32; the scale is `lora_scale`.
    """
    for layer in layers:
        for index, linear in enumerate(model.facts.layer(layer).linears):
            if linear.short_name not in targets:
                continue
            key = DropoutClock(seed=seed, step=-1).key(layer, index)  # no training step is -1
            bound = linear.in_features**-0.5
            a = torch.empty(linear.in_features, r).uniform_(-bound, bound, generator=torch.Generator().manual_seed(key))
            module = _linear(model, layer, linear.name)
            scale = lora_scale(alpha, r, rslora=rslora)
            _attach(module, a, torch.zeros(r, linear.out_features), scale=scale, device=model.device)
            module.dropout_rate = dropout


def _linear(model: Model, layer: int, name: str) -> PackedLinear:
    module = model.layers[layer].get_submodule(name)
    assert isinstance(module, PackedLinear)
    return module


def _attach(module: PackedLinear, a: Tensor, b: Tensor, *, scale: float, device: torch.device) -> None:
    module.attach(nn.Parameter(a.to(device)), nn.Parameter(b.to(device)), scale=scale)


def adapter_tensors(model: Model) -> dict[str, Tensor]:
    """All adapter matrices by peft's names and in peft's layout (transposed), fp32 on the CPU."""
    return {name: _in_peft_layout(matrix) for name, matrix in _matrices(model)}


def write_adapter(model: Model, path: Path) -> None:
    """Write `adapter_tensors` as a safetensors file, one matrix in memory at a time; it is synced, then renamed into place.

    Raises NotFinite, and leaves what was there, if a value is not finite; OSError where the file cannot be written.
    """
    layout = [(name, "F32", tuple(reversed(shape))) for name, shape in _shapes(model)]
    with SafetensorsWriter(path, layout) as writer:
        for name, matrix in _matrices(model):
            tensor = _in_peft_layout(matrix)
            if not torch.isfinite(tensor).all():
                raise NotFinite(f"the adapter holds values that are not finite ({name}); it was not saved", where=str(path))
            writer.write(name, tensor_bytes(tensor))


def adapter_shapes(model: Model, layer: int) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """List (module, shape of A, shape of B) of each adapter of a layer that this process has."""
    found = ((name, module.lora_a, module.lora_b) for name, module in adapted(model, layer))
    return [(name, tuple(a.shape), tuple(b.shape)) for name, a, b in found if a is not None and b is not None]


def _shapes(model: Model) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name and shape of every adapter matrix, those of other processes among them."""
    for layer in range(model.facts.n_layers):
        far = None if layer in model.here else model.far
        for name, *shapes in adapter_shapes(model, layer) if far is None else far.shapes(layer):
            for letter, shape in zip("AB", shapes, strict=True):
                yield _peft_name(model, layer, name, letter), shape


def _peft_name(model: Model, layer: int, module: str, letter: str) -> str:
    """The name that peft gives a matrix: its path in transformers' class, which peft wraps twice."""
    layout = model.facts.layout
    return f"base_model.model.{layout.decoder}.{layout.stack}.{layer}.{module}.lora_{letter}.weight"


def _matrices(model: Model) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the matrix of every adapter, in the order of `_shapes`."""
    names = (name for name, _ in _shapes(model))
    for layer in range(model.facts.n_layers):
        far = None if layer in model.here else model.far
        for matrix in layer_parameters(model, layer) if far is None else far.matrices(layer):
            yield next(names), matrix


def _in_peft_layout(matrix: Tensor) -> Tensor:
    return matrix.detach().t().contiguous().cpu()


def check_adapter_folder(folder: Path) -> None:
    """Refuse a folder that is no readable LoRA adapter, without reading its tensors. Raises InputError."""
    read_adapter_config(folder)
    try:
        read_header(folder / ADAPTER_NAME)
    except FolderError as error:
        raise InputError(str(error), where=str(folder), fix=ADAPTER_ADVICE) from None


def load_adapters(model: Model, folder: Path) -> list[int]:
    """Attach the adapters of a LoRA folder; returns the layers that carry one. Raises InputError for a misfit.

    In a pipeline a process attaches the adapters of its own layers alone.
    """
    where, config = str(folder), read_adapter_config(folder)
    try:
        entries = read_header(folder / ADAPTER_NAME)
        layers = set()
        left = set(entries)
        for layer in range(model.facts.n_layers):
            for linear in model.facts.layer(layer).linears:
                names = [_peft_name(model, layer, linear.name, letter) for letter in "AB"]
                if not left >= set(names):
                    continue
                left -= set(names)
                rank = _fitting_rank(config, linear, layer, [entries[name] for name in names], where=where)
                layers.add(layer)
                if layer not in model.here:
                    continue
                a, b = (read_tensor(entries[name]).to(torch.float32).t().contiguous() for name in names)
                if not (a.isfinite().all() and b.isfinite().all()):
                    raise InputError(f"{names[0]} or its lora_B holds values that are not finite", where=where)
                _attach(_linear(model, layer, linear.name), a, b, scale=config.scale(rank), device=model.device)
    except FolderError as error:
        raise InputError(str(error), where=where, fix=ADAPTER_ADVICE) from None
    if left or not layers:
        detail = f"holds {sorted(left)[0][:80]!r}, which this model has no place for" if left else "holds no LoRA matrices"
        raise InputError(detail, where=where, fix="use an adapter that was trained on this model")
    return sorted(layers)


def _fitting_rank(config: AdapterConfig, linear: LinearFacts, layer: int, pair: list[TensorEntry], *, where: str) -> int:
    """The rank of a pair of stored matrices that fits the linear layer and the adapter's config. Raises InputError."""
    a, b = pair
    rank = a.shape[0] if a.shape else 0
    if not rank or (a.shape, b.shape) != ((rank, linear.in_features), (linear.out_features, rank)):
        raise InputError(f"{a.name} does not fit this model", where=where)
    if config.rank not in (None, rank):
        raise InputError(f"{a.name} has rank {rank}, adapter_config.json says r = {config.rank}", where=where)
    if not config.selects(layer, linear.name):
        raise InputError(
            f"adapter_config.json leaves out {a.name} (target_modules, exclude_modules or layers_to_transform)",
            where=where,
            fix="peft would not apply this matrix: make its config and its file agree",
        )
    return rank
