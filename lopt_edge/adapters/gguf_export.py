"""An adapter on its way to llama.cpp: merged into a GGUF model, or as a GGUF adapter for the file that it was trained on.

Merged: W + scale (A B)^T in fp32, then the chosen type, tensor by tensor; norms and biases stay in fp32. Tables of the
vocabulary get 8 bits where the chosen type has fewer (llama.cpp, too, keeps them wider), rows that are not whole blocks
half precision. As an adapter: A and B in fp32, B's rows in the order of the file's q and k. llama.cpp computes alpha /
rank times B A x, so alpha is what makes that our scale. The rule: an adapter whose base is known to be another model is
refused, not written.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor

from lopt_edge.adapters.base import BaseOptions, base_of, is_the_base
from lopt_edge.adapters.gguf_file import FILE_TYPES, Info, check_new, check_type, in_pairs, need_gguf, new_gguf
from lopt_edge.adapters.llama_quantiser import FTYPES, quantised
from lopt_edge.adapters.merge import merged_tensors, tensor_shapes
from lopt_edge.errors import InputError
from lopt_edge.models.folder import ModelFolder
from lopt_edge.models.four_bit import four_bit_folder
from lopt_edge.models.gguf_written import Target, table_of, target_of
from lopt_edge.models.tokenizer import load_tokenizer
from lopt_edge.models.tokenizer_files import template_in
from lopt_edge.plan.facts.gguf_architectures import FREQUENCIES
from lopt_edge.run.model.load import Model, load_model
from lopt_edge.run.model.lora import adapted, load_adapters
from lopt_edge.run.model.replaced import apply_replaced
from quant.gguf.types import TYPES

TEMPLATE_KEY = "tokenizer.chat_template"


@dataclass(frozen=True)
class Written:
    """A file that was written, and what is in it in a few words."""

    path: Path
    n_bytes: int
    what: str


@dataclass(frozen=True)
class _Tuned:
    """An adapter on its base, both loaded, and how the base is written."""

    source: ModelFolder
    weights: Path  # the folder that merging reads
    model: Model
    target: Target


def export_gguf(adapter: str | Path, file: str | Path, *, kind: str = "f16", **base: Unpack[BaseOptions]) -> Written:
    """Merge an adapter into one GGUF file (new) whose matrices are of `kind`. Raises InputError, RunError."""
    need_gguf()
    adapter, path, kind = Path(adapter), Path(file), check_type(kind)
    check_new(path)
    if kind in FTYPES:
        quantised(path, kind, lambda wide: export_gguf(adapter, wide, kind="f16", **base))
        return Written(path, path.stat().st_size, f"the merged model in {kind}")
    tuned = _load(adapter, whole=True, **base)
    layout, target = tuned.source.facts.layout, tuned.target
    shapes = tensor_shapes(tuned.model, tuned.weights)
    table = table_of(tuned.source)
    infos: list[Info] = [(FREQUENCIES, (len(table),), "F32")] if table else []
    infos += [(target.tensor(name, layout), shape, _kind_of(name, shape, kind, tuned)) for name, shape in shapes.items()]
    metadata = {**target.metadata, "general.file_type": ("UINT32", None, FILE_TYPES[kind])}
    metadata["general.quantization_version"] = ("UINT32", None, 2)
    if (template := template_in(adapter)) is not None:  # the one that was trained with
        metadata[TEMPLATE_KEY] = ("STRING", None, template)
    with new_gguf(path, target.name, metadata, infos) as writer:
        if table:
            writer.write(FREQUENCIES, torch.tensor(table))
        for name, tensor in merged_tensors(tuned.model, tuned.weights):
            values = in_pairs(tensor.float(), target.heads(name)) + target.offset(name)
            writer.write(target.tensor(name, layout), values)
            del tensor, values
    return Written(path, path.stat().st_size, f"the merged model in {kind}")


def export_gguf_adapter(adapter: str | Path, file: str | Path, **base: Unpack[BaseOptions]) -> Written:
    """Write an adapter in llama.cpp's form, as one GGUF file (new). Raises InputError, RunError."""
    need_gguf()
    adapter, path = Path(adapter), Path(file)
    check_new(path)
    tuned = _load(adapter, whole=False, **base)
    pairs = list(_adapter_tensors(tuned))
    if not pairs:
        raise InputError("has no matrices", where=str(adapter), fix="give the output folder of a finetune run")
    alpha = pairs[0][3]
    metadata: dict[str, tuple[str, str | None, Any]] = {
        "general.type": ("STRING", None, "adapter"),
        "general.name": ("STRING", None, adapter.resolve().name),
        "adapter.type": ("STRING", None, "lora"),
        "adapter.lora.alpha": ("FLOAT32", None, alpha),
    }
    infos: list[Info] = []
    for name, a, b, _ in pairs:
        infos += [(f"{name}.lora_a", tuple(a.shape), "F32"), (f"{name}.lora_b", tuple(b.shape), "F32")]
    with new_gguf(path, tuned.target.name, metadata, infos) as writer:
        for name, a, b, own in pairs:
            writer.write(f"{name}.lora_a", a)
            writer.write(f"{name}.lora_b", b if own == alpha else b * (own / alpha))
    return Written(path, path.stat().st_size, f"an adapter for {tuned.source.name}")


def _load(adapter: Path, *, whole: bool, **base: Unpack[BaseOptions]) -> _Tuned:
    say = base.get("say", warnings.warn)
    source = base_of(adapter, model=base.get("model"), revision=base.get("revision"), say=say)
    if not is_the_base(source, adapter):
        fix = "give the model that it was trained on with --model"
        raise InputError(f"was trained on another model than {source.name}", where=str(adapter), fix=fix)
    if source.facts.forms is None:
        load_tokenizer(source.path, say=say)  # a broken one is a sentence here
    target = target_of(source, whole=whole)
    folder, _ = four_bit_folder(source, cache_dir=base.get("cache_dir"))
    tuned = load_model(folder, source.facts, device=torch.device("cpu"), dtype=torch.float32)
    apply_replaced(tuned, adapter)
    load_adapters(tuned, adapter)
    return _Tuned(source, folder if source.facts.quantised else source.path, tuned, target)


def _kind_of(name: str, shape: tuple[int, ...], kind: str, tuned: _Tuned) -> str:
    """The type of one tensor where the file's is `kind`."""
    layout = tuned.source.facts.layout
    if len(shape) == 1:
        return "F32"
    if not name.startswith(layout.layers) and kind.startswith(("Q4", "Q5")):
        kind = "Q8_0"
    return "F16" if shape[-1] % TYPES[kind].block_elements else kind


def _adapter_tensors(tuned: _Tuned) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """Yield the file's name of each adapted matrix, A (r, in), B (out, r) in the order of the file, and alpha."""
    layout = tuned.source.facts.layout
    for layer in tuned.model.here:
        for path, module in adapted(tuned.model, layer):
            if module.synthesis is not None:
                what = "its layers were replaced (method repl), which no adapter file can say"
                raise InputError(what, where="export", fix="export --gguf writes the merged model")
            assert module.lora_a is not None and module.lora_b is not None
            name = f"{layout.layer(layer)}{path}.weight"
            a, b = module.lora_a.detach().t().contiguous(), module.lora_b.detach().t().contiguous()
            alpha = module.scale * a.shape[0]
            yield tuned.target.tensor(name, layout), a, in_pairs(b, tuned.target.heads(name)), alpha
