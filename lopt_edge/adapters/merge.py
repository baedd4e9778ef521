"""Export: the adapter merged into a plain transformers folder, tensor by tensor, shard by shard.

Merged weight = W + scale (A B)^T in fp32, rounded once to bfloat16 (or kept: `dtype`). In a layer that the run replaced
(method repl) W = a W1 + b W2 of the layers beside it. W is either the original full-precision weight
(`onto="original"`) or the dequantised 4-bit one (`onto="dequantized"`: what the adapter was trained on). Either rounds, so
the function changes; how far is measured and returned (divergence.py), and written beside the weights. The rule: beside the
packed model and its adapter, memory holds one full matrix (two in a replaced layer, all experts' where a checkpoint stacks
them) while writing, and one full layer (of a model written in NF4: that model) while measuring. The folder appears under
its name only when complete and read by transformers, where memory suffices for that.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from lopt_edge.adapters.base import base_of
from lopt_edge.adapters.divergence import LARGE_KL, Divergence, measure
from lopt_edge.adapters.merged_files import write_beside
from lopt_edge.adapters.packed_forms import check_form, check_packable, config_of_form, packed
from lopt_edge.adapters.probe import probe_of
from lopt_edge.errors import InputError, RunError
from lopt_edge.models.expert_tensors import as_published
from lopt_edge.models.folder import tensor_entries
from lopt_edge.models.four_bit import four_bit_folder
from lopt_edge.models.tokenizer import load_tokenizer
from lopt_edge.run.model.load import Model, load_model
from lopt_edge.run.model.lora import load_adapters
from lopt_edge.run.model.replaced import apply_replaced
from lopt_edge.system.files import write_json
from quant.files import NamedTensor, is_packed, packed_on_disk, read_packed
from quant.folders import new_folder
from quant.gguf.weight import read_gguf
from quant.headers import FolderError, TensorEntry
from quant.linear import PackedLinear
from quant.mixed import Mixture
from quant.mxfp4.stacks import is_mxfp4
from quant.mxfp4.weight import read_mxfp4
from quant.nf4 import unpack_into
from quant.shards import write_sharded
from quant.sizes import DTYPE_BYTES

EXPORT_NAME = "export.json"  # in the merged folder: what it was made from, and how far it is from that
DTYPES = {"bfloat16": "BF16", "float32": "F32"}  # of the merged weights, with their names in files


@dataclass(frozen=True)
class Merged:
    """The folder written, and how far its logits are from those of the adapter on the 4-bit base."""

    folder: Path
    onto: str
    dtype: str
    n_bytes: int
    divergence: Divergence
    form: str | None = None  # in which matrices are packed

    @property
    def advice(self) -> str:
        """What makes the difference smaller; nothing where it is small."""
        if self.divergence.mean_kl <= LARGE_KL:
            return ""
        if self.form is not None:
            return "packing the merged weights anew rounds them; without --form, or as base and adapter, they are not"
        if self.onto == "original":
            return "--onto dequantized merges onto the 4-bit weights that the adapter was trained on"
        return "--dtype float32 keeps what bfloat16 rounds away" if self.dtype == "bfloat16" else ""


def export(
    adapter: str | Path,
    *,
    merged: str | Path,
    onto: str = "original",
    dtype: str = "bfloat16",
    form: str | None = None,
    model: str | None = None,
    revision: str | None = None,
    cache_dir: str | None = None,
    say: Callable[[str], None] = warnings.warn,
) -> Merged:
    """Merge the adapter of a finetune output folder into a model folder `merged` (new).

    `form="nf4"` packs the layers' matrices, and `dtype` is that of the rest. `model` is the base, where it is not what the
    adapter's config names; `say` hears what is odd about it. Raises InputError for a folder that is no adapter, an unknown
    `onto`, `dtype` or `form`, or a target that exists.
    """
    adapter, target = Path(adapter), Path(merged)
    if dtype not in DTYPES:
        raise InputError(f"{dtype!r} is unknown", where="dtype", fix=f"choose {' or '.join(DTYPES)}")
    if onto not in ("original", "dequantized"):
        raise InputError(f"{onto!r} is unknown", where="onto", fix="choose original or dequantized")
    check_form(form)
    if target.exists():
        raise InputError("exists already", where=str(target), fix="choose a new folder for --merged")
    source = base_of(adapter, model=model, revision=revision, say=say)
    check_packable(source, form)
    if onto == "original" and source.facts.quantised and source.facts.forms is None:  # a GGUF file is its own original
        raise InputError("the base model is there in 4 bits only", where="onto", fix="use --onto dequantized")
    tokenizer = load_tokenizer(source.path, say=say)
    folder, _ = four_bit_folder(source, cache_dir=cache_dir)
    tuned = load_model(folder, source.facts, device=torch.device("cpu"), dtype=torch.float32)
    apply_replaced(tuned, adapter)
    load_adapters(tuned, adapter)
    try:
        with new_folder(target) as partial:
            base = source.path if onto == "original" else folder
            n_bytes = _write_weights(tuned, base, partial, dtype=dtype, form=form)
            config = config_of_form(form, source.facts, list(tensor_shapes(tuned, base)), dtype=dtype)
            write_beside(partial, source, adapter, tokenizer, {"dtype": dtype, **config})
            probe = probe_of(adapter, load_tokenizer(partial, say=lambda text: None))  # with the template that was used
            divergence = measure(tuned, partial, probe, needs=_needs(n_bytes, dtype=dtype, form=form))
            made = {"adapter": str(adapter), "base": source.name, "onto": onto, "dtype": dtype, "form": form}
            made |= asdict(divergence)
            write_json(partial / EXPORT_NAME, made)
    except FolderError as error:
        raise InputError(str(error), where="model") from None
    except OSError as error:
        raise RunError(f"cannot be written: {error.strerror}", where=str(target), fix="free space there") from None
    return Merged(target, onto, dtype, n_bytes, divergence, form)


def _write_weights(model: Model, base: Path, target: Path, *, dtype: str, form: str | None) -> int:
    """All shards and their index; returns the bytes of the tensors."""
    layout = [(name, DTYPES[dtype], shape) for name, shape in tensor_shapes(model, base).items()]
    tensors: Iterable[NamedTensor] = (
        (name, tensor.to(getattr(torch, dtype))) for name, tensor in merged_tensors(model, base)
    )
    if form is not None:
        layout, tensors = packed(layout, tensors, model.facts, dtype=dtype)
    return write_sharded(target, layout, tensors)


def _needs(n_bytes: int, *, dtype: str, form: str | None) -> dict[str, int]:
    """The bytes of the weights in each dtype in which transformers may read the folder."""
    n_parameters = n_bytes // DTYPE_BYTES[DTYPES[dtype]]
    return {dtype: n_bytes} if form is not None else {"float32": 4 * n_parameters, "bfloat16": 2 * n_parameters}


def tensor_shapes(model: Model, base: Path) -> dict[str, tuple[int, ...]]:
    """The tensors of the merged model by name, in the order of `merged_tensors`. Raises InputError."""
    entries = _entries(base, model)
    shapes = {name: [_full_shape(part, entries, model) for part in parts] for name, parts in _parts(entries, model).items()}
    return {name: found[0] if len(found) == 1 else _stacked(found, model) for name, found in shapes.items()}


def merged_tensors(model: Model, base: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the merged model, one in memory at a time; `base` is the weights' folder. Raises InputError."""
    entries, shapes = _entries(base, model), tensor_shapes(model, base)
    for name, parts in _parts(entries, model).items():
        if len(parts) == 1:
            yield from _merged_tensors([*parts], entries, model)
        else:
            yield name, _stack(parts, entries, model, shapes[name])


def _entries(base: Path, model: Model) -> dict[str, TensorEntry]:
    """The tensors of the weights' folder; of one in blocks, whose stacks have no numbers, each matrix by itself."""
    return tensor_entries(base, model.facts if model.facts.forms is not None else None)


def _stack(parts: tuple[str, ...], entries: dict[str, TensorEntry], model: Model, shape: tuple[int, ...]) -> Tensor:
    """The stack of all experts' matrices, filled one by one."""
    found = torch.empty(0)
    for number, part in enumerate(parts):
        matrix = _read(part, entries)
        matrix = matrix.t() if _is_transposed(model) else matrix
        if number == 0:
            found = matrix.new_empty(len(parts), *matrix.shape)
        found[number].copy_(matrix)
    return found.view(shape)


def _is_transposed(model: Model) -> bool:
    return model.facts.family.experts is not None and model.facts.family.experts.transposed


def _parts(entries: dict[str, TensorEntry], model: Model) -> dict[str, tuple[str, ...]]:
    """The tensors of the merged model, as its maker spells them, and which of the base's are in each."""
    return as_published((name for name in sorted(entries) if not _is_quantisation_part(name, entries)), model.facts)


def _stacked(shapes: list[tuple[int, ...]], model: Model) -> tuple[int, ...]:
    """The shape of the stack of all experts whose matrices have these shapes, expert by expert."""
    count = next(kind.experts.count for kind in model.facts.kinds if kind.experts is not None)
    n_rows, n_columns = sum(rows for rows, *_ in shapes) // count, shapes[0][1]
    return (count, n_columns, n_rows) if _is_transposed(model) else (count, n_rows, n_columns)


def _is_quantisation_part(name: str, entries: dict[str, TensorEntry]) -> bool:
    weight, mark, _ = name.partition(".weight.")
    return bool(mark) and f"{weight}.weight" in entries


def _module_of(name: str, model: Model) -> PackedLinear | None:
    """The packed linear layer whose weight this tensor is."""
    layers = model.facts.layout.layers
    if not model.facts.packs(name):
        return None
    layer, path = name.removeprefix(layers).removesuffix(".weight").split(".", 1)
    if int(layer) >= len(model.layers) or path not in {linear.name for linear in model.facts.layer(int(layer)).linears}:
        return None  # an expert's matrix, which has no adapter
    module = model.layers[int(layer)].get_submodule(path)
    return module if isinstance(module, PackedLinear) else None


def _full_shape(name: str, entries: dict[str, TensorEntry], model: Model) -> tuple[int, ...]:
    module = _module_of(name, model)
    if module is None and is_packed(entries, name):
        return packed_on_disk(entries, name).shape
    return (module.out_features, module.in_features) if module else entries[name].shape


def _merged_tensors(names: list[str], entries: dict[str, TensorEntry], model: Model) -> Iterator[tuple[str, Tensor]]:
    for name in names:
        module = _module_of(name, model)
        if module is not None and isinstance(module.synthesis, Mixture):
            tensor = _synthesised(name, entries, module.synthesis)
        else:
            tensor = _read(name, entries)
        if module is not None and module.lora_a is not None and module.lora_b is not None:
            tensor = tensor.float()
            tensor += (module.lora_a.detach() @ module.lora_b.detach()).t() * module.scale
        yield name, tensor


def _read(name: str, entries: dict[str, TensorEntry]) -> Tensor:
    """A stored tensor as it is, or in fp32 out of 4 bits or GGUF blocks; in bfloat16 out of MXFP4."""
    if is_mxfp4(entries, name):
        return read_mxfp4(entries, name)
    if not is_packed(entries, name):
        return read_gguf(entries, name)
    weight = read_packed(entries, name)
    return unpack_into(weight, torch.empty(weight.shape))


def _synthesised(name: str, entries: dict[str, TensorEntry], mixture: Mixture) -> Tensor:
    """The weight of a replaced layer, fp32, from those of the layers beside it."""
    head, layer, rest = re.split(r"(?<=\.layers\.)(\d+)", name, maxsplit=1)
    before, after = (_read(f"{head}{int(layer) + step}{rest}", entries).float() for step in (-1, 1))
    a, b = mixture.mix.tolist()
    return before.mul(a).add_(after, alpha=b)
