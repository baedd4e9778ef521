"""A 4-bit model folder from a full-precision one, tensor by tensor.

The rule: memory has one full-precision tensor plus its packed result (the usual stack needs 10.3 GiB for a 3B model); the
new folder appears under its name only when complete. Which tensors to pack is the caller's choice.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from quant.files import four_bit_layout, four_bit_tensors, quantization_config, read_tensor
from quant.folders import new_folder
from quant.headers import TensorEntry, read_headers, read_json
from quant.shards import write_sharded
from quant.small_files import copy_small_files


def quantise_folder(
    source: Path,
    target: Path,
    *,
    should_pack: Callable[[str], bool],
    dtype: torch.dtype,
    entries: Mapping[str, TensorEntry] | None = None,
    changes: Mapping[str, Any] | None = None,
    unpacked: Sequence[str] = (),
    on_tensor: Callable[[str], None] = lambda name: None,
) -> None:
    """Write `source` in 4-bit form to the new folder `target`, with `changes` of its config.

    `entries` are its tensors, where they are to be written otherwise than its files spell them.
    `dtype` is recorded as the compute dtype and in each quantisation state, `unpacked` as modules that stay as they are.
    Raises FolderError for a broken source.
    """
    ordered = sorted((entries or read_headers(source)).values(), key=lambda entry: (entry.path.name, entry.start))
    config = read_json(source / "config.json")
    with new_folder(target) as partial:
        layout = four_bit_layout([(entry.name, entry.dtype, entry.shape) for entry in ordered], should_pack)
        stream = ((entry.name, read_tensor(entry)) for entry in ordered)
        write_sharded(partial, layout, four_bit_tensors(stream, should_pack, dtype=dtype), on_tensor=on_tensor)
        dtype_name = str(dtype).removeprefix("torch.")
        config.pop("torch_dtype", None)
        found = quantization_config(dtype_name, unpacked=unpacked)
        config |= {**(changes or {}), "dtype": dtype_name, "quantization_config": found}
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        copy_small_files(source, partial)
