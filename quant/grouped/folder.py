"""A folder in another program's quantised form, written anew: matrices in `blocks.bin`, where they lie in `blocks.json`.

What is not quantised (norms, embeddings, biases, modules that were left out) goes into model.safetensors as it is. The
rule: one matrix is in memory at a time; the folder appears when it is whole; its config has no quantization_config any
more, since no other program reads blocks. places.py reads it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

from torch import Tensor

from quant.files import read_tensor, tensor_bytes
from quant.folders import new_folder
from quant.gguf.types import ALIGNMENT
from quant.grouped import awq, compressed, fp8, gptq
from quant.grouped.kinds import WORDS, matrices_in, plain_in
from quant.grouped.places import BLOCKS_NAME, PLACES_NAME
from quant.headers import read_headers, read_json
from quant.shards import write_sharded
from quant.small_files import copy_small_files

FORMATS: Mapping[str, ModuleType] = {"gptq": gptq, "awq": awq, "compressed-tensors": compressed, "fp8": fp8}
assert FORMATS.keys() == WORDS.keys()


def lay_out_folder(source: Path, target: Path, *, on_tensor: Callable[[str], None] = lambda name: None) -> None:
    """Write `source` in blocks to the new folder `target`. Raises FolderError for a broken source, OSError."""
    config = read_json(source / "config.json")
    quantisation = config.pop("quantization_config")
    form = FORMATS[quantisation["quant_method"]]
    entries = read_headers(source)
    plain, suffix = plain_in(entries, quantisation["quant_method"]), WORDS[quantisation["quant_method"]].suffix
    with new_folder(target) as partial:
        places: dict[str, dict[str, Any]] = {}
        with (partial / BLOCKS_NAME).open("wb") as file:
            for matrix in matrices_in(entries, quantisation["quant_method"]):

                def part(word: str, matrix: str = matrix) -> Tensor | None:
                    entry = entries.get(f"{matrix}.{word}")
                    return None if entry is None else read_tensor(entry)

                where = str(entries[f"{matrix}.{suffix}"].path)
                grouped = form.read(part, quantisation, where=f"{where}: {matrix}")
                kind, blocks = grouped.laid_out(f"{where}: {matrix}")
                shape = [*grouped.codes_OI.shape]
                place = {"type": kind.name, "shape": shape, "start": _append(file, blocks)}
                if grouped.place_I is not None:
                    place["order"] = _append(file, grouped.place_I)
                places[f"{matrix}.weight"] = place
                on_tensor(f"{matrix}.weight")
        layout = [(name, entries[name].dtype, entries[name].shape) for name in plain]
        write_sharded(partial, layout, ((name, read_tensor(entries[name])) for name in plain), on_tensor=on_tensor)
        (partial / PLACES_NAME).write_text(json.dumps(places), encoding="utf-8")
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        copy_small_files(source, partial)


def _append(file: BinaryIO, tensor: Tensor) -> int:
    """Write a tensor's bytes at the next multiple of ALIGNMENT, which is returned."""
    file.write(b"\0" * (-file.tell() % ALIGNMENT))
    start = file.tell()
    file.write(tensor_bytes(tensor))
    return start
