"""A GGUF file that is written tensor by tensor, with the `gguf` package's writer, and appears under its name when whole.

The rule: one tensor is in memory at a time. Nothing half written stays: it is written beside, synced and renamed, and after
a fault nothing is left. Types: those for which the package has a quantiser; K types are llama_quantiser.py's.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lopt_edge.adapters.llama_quantiser import FTYPES, SHORT, check_quantiser
from lopt_edge.errors import InputError, RunError
from quant.gguf.types import TYPES

QUANTISERS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "BF16": 32}  # general.file_type
Info = tuple[str, tuple[int, ...], str]  # name, shape, type


def check_type(name: str) -> str:
    """The type by its name in any case. Raises InputError for one that cannot be written here, with the way to it."""
    kind = SHORT.get(name.upper(), name.upper())
    if kind in FTYPES:
        check_quantiser(kind)
    elif kind not in QUANTISERS:
        raise InputError(
            f"{name[:40]!r} is unknown", where="--type", fix=f"choose {', '.join((*QUANTISERS, *FTYPES)).lower()}"
        )
    return kind


def need_gguf() -> None:
    """Raise InputError where the `gguf` package is missing."""
    if find_spec("gguf") is None:
        raise InputError("needs the package gguf", where="export", fix="pip install 'lopt-edge[gguf]'")


def check_new(path: Path) -> None:
    """Raise InputError for a file that exists, or one in a folder that does not."""
    if path.exists():
        raise InputError("exists already", where=str(path), fix="choose a new file")
    if not path.parent.is_dir():
        raise InputError("its folder does not exist", where=str(path), fix="make the folder first")


class GgufWriter:
    """The tensors of a file, in the order in which they were declared."""

    def __init__(self, writer: Any, tensors: Sequence[Info]) -> None:
        self.writer, self.tensors, self.n_written = writer, tensors, 0

    def write(self, name: str, values: Tensor) -> None:
        """Write the next tensor, quantised to its declared type. Raises ValueError unless it is that one."""
        from gguf import GGMLQuantizationType, quantize

        expected, shape, kind = self.tensors[self.n_written]
        if (name, tuple(values.shape)) != (expected, shape):
            raise ValueError(f"{name} {tuple(values.shape)}, declared was {expected} {shape}")
        if kind in ("F32", "F16"):
            data = values.to(torch.float32 if kind == "F32" else torch.float16).numpy()
        else:
            data = quantize(values.float().numpy(), GGMLQuantizationType[kind])
        self.writer.write_tensor_data(data)
        self.n_written += 1


@contextmanager
def new_gguf(
    path: Path, name: str, metadata: Mapping[str, tuple[str, str | None, Any]], tensors: Sequence[Info]
) -> Iterator[GgufWriter]:
    """A file to write tensors into; on leaving it is whole and has its name. `name` is the architecture's.

    Raises RunError if it cannot be written.
    """
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter

    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    writer = GGUFWriter(partial, name)
    for key, (kind, sub, value) in metadata.items():
        if key != "general.architecture":
            writer.add_key_value(key, value, GGUFValueType[kind], sub_type=None if sub is None else GGUFValueType[sub])
    for tensor, shape, kind in tensors:
        n_bytes, raw = TYPES[kind].n_bytes(shape), GGMLQuantizationType[kind]
        if kind in ("F32", "F16"):
            writer.add_tensor_info(tensor, shape, np.dtype(np.float32 if kind == "F32" else np.float16), n_bytes)
        else:
            row_bytes = TYPES[kind].n_bytes(shape[-1:])  # of a packed tensor the writer wants the shape in bytes
            writer.add_tensor_info(tensor, (*shape[:-1], row_bytes), np.dtype(np.uint8), n_bytes, raw_dtype=raw)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        found = GgufWriter(writer, tensors)
        yield found
        if found.n_written != len(tensors):
            raise ValueError(f"{path}: {found.n_written} of {len(tensors)} tensors written")
        writer.flush()
        for file in writer.fout or ():
            os.fsync(file.fileno())
        writer.close()
        os.replace(partial, path)
    except OSError as error:
        raise RunError(f"cannot be written: {error.strerror}", where=str(path), fix="free space there") from None
    finally:
        for file in writer.fout or ():
            file.close()
        partial.unlink(missing_ok=True)


def in_pairs(values: Tensor, n_heads: int) -> Tensor:
    """The rows of a tensor in the order of a GGUF file: of each head 0, n/2, 1, n/2 + 1, ..."""
    if not n_heads:
        return values
    return values.view(n_heads, 2, -1, *values.shape[1:]).transpose(1, 2).reshape(values.shape)
