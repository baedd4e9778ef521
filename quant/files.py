"""Tensors of model folders on disk: read in full precision or in 4 bits, and the 4-bit form that is written.

The on-disk form is the one that bitsandbytes and transformers read: beside `N.weight` (uint8, (n / 2, 1)) stand
`N.weight.absmax`, `.quant_map`, `.nested_absmax`, `.nested_quant_map` and `.quant_state.bitsandbytes__nf4` (a JSON text
as bytes). So `AutoModelForCausalLM.from_pretrained` loads our folders, and we load published ones without requantising.

Rules: a tensor is packed while no other one is in memory; what is not packed is passed on as it is; reads are positioned
reads into fresh memory, never a memory map, so that no file page stays in the resident set. Which tensors to pack is the
caller's choice; whole folders are written by `quantise.py`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from quant.headers import Beside, FolderError, TensorEntry
from quant.nf4 import PackedWeight, pack
from quant.sizes import packed_sizes
from quant.untrusted import parse_json

TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
WORD = 4  # bytes
STATE_SUFFIX = ".quant_state.bitsandbytes__"
MAX_STATE_BYTES = 4096  # of the JSON text of one quantisation state
NamedTensor = tuple[str, Tensor]
Layout = list[tuple[str, str, tuple[int, ...]]]


def read_bytes(entry: TensorEntry, out: memoryview, *, start: int = 0) -> None:
    """Fill `out` with the tensor's bytes from byte `start` on, by positioned reads. Raises FolderError.

    Rows that lie pair by pair, or in two places, are put in order on the way; such a tensor is read whole.
    """
    try:
        if entry.beside is not None:
            return _read_in_turn(entry, entry.beside, out)
        with entry.path.open("rb", buffering=0) as file:
            if entry.rotary_heads:
                return _read_pairs(file.fileno(), entry, out)
            position, done = entry.start + start, 0
            while done < len(out):
                n_read = os.preadv(file.fileno(), [out[done:]], position + done)
                if n_read == 0:
                    raise FolderError(f"{entry.path}: ends inside tensor {entry.name!r} (truncated while reading?)")
                done += n_read
    except OSError as error:
        raise FolderError(f"{entry.path}: cannot read tensor {entry.name!r} ({error.strerror})") from None


def _read_in_turn(entry: TensorEntry, beside: Beside, out: memoryview) -> None:
    """Read a tensor whose units come in turn from two places: each place from its beginning, unit by unit to its place."""
    assert len(out) == entry.n_bytes
    size, most = beside.unit_bytes, os.sysconf("SC_IOV_MAX")
    for half, (path, start) in enumerate(((entry.path, entry.start), (beside.path, beside.start))):
        with path.open("rb", buffering=0) as file:
            if size == WORD:  # single numbers
                words = bytearray(entry.n_bytes // 2)
                if os.preadv(file.fileno(), [words], start) != len(words):
                    raise FolderError(f"{path}: ends inside tensor {entry.name!r} (truncated while reading?)")
                out.cast("I")[half::2] = memoryview(words).cast("I")
                continue
            units = [out[place : place + size] for place in range(half * size, len(out), 2 * size)]
            for first in range(0, len(units), most):
                some = units[first : first + most]
                if os.preadv(file.fileno(), some, start + first * size) != len(some) * size:
                    raise FolderError(f"{path}: ends inside tensor {entry.name!r} (truncated while reading?)")


def _read_pairs(descriptor: int, entry: TensorEntry, out: memoryview) -> None:
    """Read a tensor whose heads' rows are stored as 0, n/2, 1, n/2 + 1, ...: one call a head, each row to its place."""
    assert len(out) == entry.n_bytes
    n_rows = entry.shape[0] // entry.rotary_heads
    row_bytes = entry.n_bytes // entry.shape[0]
    most = os.sysconf("SC_IOV_MAX")
    for head in range(entry.rotary_heads):
        first = head * n_rows
        rows = [first + pair + half * (n_rows // 2) for pair in range(n_rows // 2) for half in range(2)]
        for start in range(0, n_rows, most):
            some = [out[row * row_bytes : (row + 1) * row_bytes] for row in rows[start : start + most]]
            position = entry.start + (first + start) * row_bytes
            if os.preadv(descriptor, some, position) != len(some) * row_bytes:
                raise FolderError(f"{entry.path}: ends inside tensor {entry.name!r} (truncated while reading?)")


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor as writable bytes; nothing is copied."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def read_tensor(entry: TensorEntry) -> Tensor:
    """One tensor in fresh CPU memory, in its stored dtype and its shape. Raises FolderError."""
    if entry.transposed:
        return read_tensor(replace(entry, shape=entry.shape[::-1], transposed=False)).t().contiguous()
    if entry.dtype not in TORCH_DTYPES:
        raise FolderError(f"{entry.path}: tensor {entry.name!r} has dtype {entry.dtype}, which is not supported")
    out = torch.empty(entry.shape, dtype=TORCH_DTYPES[entry.dtype])
    if out.numel():
        read_bytes(entry, tensor_bytes(out))
    return out.sub_(entry.offset) if entry.offset else out


def is_packed(entries: dict[str, TensorEntry], name: str) -> bool:
    """Whether the matrix `name` (ends in .weight) is stored in 4 bits."""
    return f"{name}.absmax" in entries


@dataclass(frozen=True)
class PackedLayout:
    """A packed matrix on disk: the places of its parts ("" the codes, ".absmax", ...), and what its state records."""

    parts: Mapping[str, TensorEntry]
    shape: tuple[int, int]
    dtype: torch.dtype
    block_elements: int
    nested_block_elements: int
    quant_type: str
    offset: float | None
    moved: tuple[str, ...] = ("", ".absmax", ".nested_absmax")

    def shared(self, device: torch.device, known: dict[object, Tensor]) -> dict[str, Tensor]:
        """The small parts that stay on the device; code maps, the same for all matrices, are shared."""
        found = {}
        for part in (".quant_map", ".nested_quant_map"):
            if part in self.parts:
                tensor = read_tensor(self.parts[part]).view(-1)
                found[part] = known.setdefault(bytes(tensor.numpy()), tensor.to(device))
        if self.offset is not None:
            found[".offset"] = torch.tensor(self.offset, dtype=torch.float32, device=device)
        return found

    def assemble(self, tensors: Mapping[str, Tensor]) -> PackedWeight:
        """The matrix from its parts as flat tensors of one device, by the names of `parts`, and ".offset" (a scalar).

        Moved parts may come as bytes.
        """
        tensors = {part: self._in_its_dtype(part, tensor) for part, tensor in tensors.items()}
        return PackedWeight(
            codes=tensors[""],
            absmax=tensors[".absmax"],
            code_map=tensors[".quant_map"],
            shape=self.shape,
            dtype=self.dtype,
            nested_absmax=tensors.get(".nested_absmax"),
            nested_map=tensors.get(".nested_quant_map"),
            offset=tensors.get(".offset"),
            block_elements=self.block_elements,
            nested_block_elements=self.nested_block_elements,
            quant_type=self.quant_type,
        )

    def _in_its_dtype(self, part: str, tensor: Tensor) -> Tensor:
        dtype = TORCH_DTYPES[self.parts[part].dtype] if part in self.parts else tensor.dtype
        return tensor if tensor.dtype == dtype else tensor.view(dtype)


def packed_on_disk(entries: Mapping[str, TensorEntry], name: str) -> PackedLayout:
    """The layout of a packed matrix of a bitsandbytes folder, every size checked against the recorded shape.

    Raises FolderError for a state that is missing or malformed, and for a size that does not fit.
    """
    kinds = [kind for kind in ("nf4", "fp4") if f"{name}{STATE_SUFFIX}{kind}" in entries]
    if not kinds:
        raise FolderError(f"{entries[name].path}: {name!r} has no bitsandbytes 4-bit quantisation state")
    where = f"{entries[name].path}: quantisation state of {name!r}"
    nested = f"{name}.nested_absmax" in entries
    state = _read_state(entries[f"{name}{STATE_SUFFIX}{kinds[0]}"], where, quant_type=kinds[0], nested=nested)
    shape = (state["shape"][0], state["shape"][1])
    n_blocks = -(-prod(shape) // state["blocksize"])
    sizes = {"": ("U8", packed_sizes(shape).codes_bytes), ".quant_map": ("F32", 16)}
    sizes[".absmax"] = ("U8" if nested else "F32", n_blocks)
    if nested:
        sizes[".nested_absmax"] = ("F32", -(-n_blocks // state.get("nested_blocksize", 256)))
        sizes[".nested_quant_map"] = ("F32", 256)
    parts = {}
    for part, (dtype, n_elements) in sizes.items():  # bitsandbytes' kernels read raw memory: nothing may be too short
        entry = entries.get(name + part)
        if entry is None or (entry.dtype, prod(entry.shape)) != (dtype, n_elements):
            found = "missing" if entry is None else f"{entry.dtype} {list(entry.shape)}, not {n_elements} x {dtype}"
            raise FolderError(f"{where}: {part[1:] or 'the packed tensor'} is {found}")
        parts[part] = entry
    return PackedLayout(
        parts=parts,
        shape=shape,
        dtype=getattr(torch, state["dtype"]),
        block_elements=state["blocksize"],
        nested_block_elements=state.get("nested_blocksize", 256),
        quant_type=state["quant_type"],
        offset=state["nested_offset"] if nested else None,
    )


def read_packed(entries: Mapping[str, TensorEntry], name: str) -> PackedWeight:
    """One packed matrix from a bitsandbytes folder, in fresh CPU memory. Raises FolderError."""
    layout = packed_on_disk(entries, name)
    tensors = {part: read_tensor(entry).view(-1) for part, entry in layout.parts.items()}
    if layout.offset is not None:
        tensors[".offset"] = torch.tensor(layout.offset, dtype=torch.float32)
    return layout.assemble(tensors)


def _read_state(entry: TensorEntry, where: str, *, quant_type: str, nested: bool) -> dict[str, Any]:
    if entry.n_bytes > MAX_STATE_BYTES:
        raise FolderError(f"{where}: {entry.n_bytes} bytes is too long")
    if entry.dtype != "U8" or len(entry.shape) != 1:  # else bytes(tolist()) of one integer would allocate that many
        raise FolderError(f"{where}: is {entry.dtype} {list(entry.shape)}, not a row of bytes")
    try:
        state = parse_json(bytes(read_tensor(entry).tolist()).decode("utf-8"))
        shape, blocks = state["shape"], (state["blocksize"], state.get("nested_blocksize", 256))
        sound = (
            len(shape) == 2
            and all(type(side) is int and 0 < side < 2**31 for side in shape)
            and all(type(n_elements) is int and n_elements in BLOCK_SIZES for n_elements in blocks)
            and state["dtype"] in ("float32", "bfloat16", "float16")
            and state["quant_type"] == quant_type
            and (not nested or (type(state["nested_offset"]) is float and abs(state["nested_offset"]) < 1e30))
        )
    except (ValueError, KeyError, TypeError):
        sound = False
    if not sound:
        raise FolderError(f"{where}: malformed")
    return dict(state)


def packed_layout(name: str, shape: tuple[int, int]) -> Layout:
    """The names, dtypes and shapes of the tensors that a packed matrix becomes on disk, in writing order."""
    sizes = packed_sizes(shape)
    return [
        (name, "U8", (sizes.codes_bytes, 1)),
        (f"{name}.absmax", "U8", (sizes.absmax_bytes,)),
        (f"{name}.quant_map", "F32", (16,)),
        (f"{name}.nested_absmax", "F32", (sizes.nested_absmax_bytes // 4,)),
        (f"{name}.nested_quant_map", "F32", (256,)),
        (f"{name}{STATE_SUFFIX}nf4", "U8", (STATE_BYTES,)),
    ]


STATE_BYTES = 256  # the JSON state is padded with blanks to this, so that the layout is known before quantising


def packed_tensors(name: str, weight: PackedWeight) -> Iterator[NamedTensor]:
    """Yield the tensors of `packed_layout`, from a packed matrix. Raises ValueError if it is not double-quantised."""
    if weight.nested_absmax is None or weight.nested_map is None or weight.offset is None:
        raise ValueError("only double-quantised matrices are written")
    state = {
        "quant_type": weight.quant_type,
        "blocksize": weight.block_elements,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
        "nested_blocksize": weight.nested_block_elements,
        "nested_dtype": "float32",
        "nested_offset": weight.offset.item(),
    }
    text = json.dumps(state).encode().ljust(STATE_BYTES)
    yield name, weight.codes.view(-1, 1)
    yield f"{name}.absmax", weight.absmax
    yield f"{name}.quant_map", weight.code_map
    yield f"{name}.nested_absmax", weight.nested_absmax
    yield f"{name}.nested_quant_map", weight.nested_map
    yield f"{name}{STATE_SUFFIX}nf4", torch.tensor(list(text), dtype=torch.uint8)


def quantization_config(compute_dtype: str, *, unpacked: Sequence[str] = ()) -> dict[str, Any]:
    """The `quantization_config` entry of config.json for our folders; every default that misleads is written out.

    `unpacked` names modules beside the decoder layers that transformers would pack.
    """
    return ({"llm_int8_skip_modules": [*unpacked]} if unpacked else {}) | {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": compute_dtype,
        "bnb_4bit_quant_storage": "uint8",
    }


def four_bit_layout(layout: Layout, should_pack: Callable[[str], bool]) -> Layout:
    """The layout of a folder after packing the chosen matrices."""
    full: Layout = []
    for name, dtype_name, shape in layout:
        full += packed_layout(name, (shape[0], shape[1])) if should_pack(name) else [(name, dtype_name, shape)]
    return full


def four_bit_tensors(
    tensors: Iterable[NamedTensor], should_pack: Callable[[str], bool], *, dtype: torch.dtype
) -> Iterator[NamedTensor]:
    """Yield the tensors of `four_bit_layout` from full-precision ones, packed one by one; `dtype` is what is recorded."""
    for name, tensor in tensors:
        if should_pack(name):
            packed = pack(tensor, dtype=dtype)
            del tensor  # or it would live on while the next one is read
            yield from packed_tensors(name, packed)
        else:
            yield name, tensor
            del tensor
