"""The 4-bit copy of a model: where it lies in the cache, when it is made, how many bytes it takes.

The rule: a copy is whole or not there; it is made tensor by tensor beside its final name, and its key holds what decides
its bytes. A model that is in 4 bits already is used as it lies.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from math import prod
from pathlib import Path

from lopt_edge.errors import InputError
from lopt_edge.models.folder import ModelFolder, check_weights, tensor_entries, told_untied
from lopt_edge.system.cache import check_room, default_cache
from quant.folders import remove_stale, wait_for
from quant.headers import FolderError, TensorEntry, read_json
from quant.sizes import DTYPE_BYTES

CACHE_VERSION = 1


def four_bit_folder(
    model: ModelFolder,
    *,
    cache_dir: str | None = None,
    on_tensor: Callable[[str], None] = lambda name: None,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[Path, bool]:
    """The folder with the model in 4 bits, and whether it was there already.

    A copy that is missing is made; `on_tensor` hears each tensor's name, `say` that another process makes it. Raises
    InputError.
    """
    check_weights(model, tensor_entries(model.path, model.facts))
    target = four_bit_path(model, cache_dir=cache_dir)
    if not model.facts.quantised:
        with suppress(OSError):
            wait_for(target, lambda: say(f"another process is making the 4-bit copy {target}: waiting for it"))
        remove_stale(target)
    if (target / "config.json").exists():
        return target, True
    _make_room(model, target)
    quantise_model(model, target, on_tensor=on_tensor)
    return target, False


def _make_room(model: ModelFolder, target: Path) -> None:
    """Refuse a disk that has no room for the copy. Raises InputError."""
    from quant.files import four_bit_layout

    stored = [(entry.name, entry.dtype, entry.shape) for entry in tensor_entries(model.path, model.facts).values()]
    need = sum(prod(shape) * DTYPE_BYTES[dtype] for _, dtype, shape in four_bit_layout(stored, model.facts.packs))
    fix = "free space, or choose another --cache-dir"
    check_room(target, need, what="the 4-bit copy", where=f"cache_dir {target.parent}", fix=fix)


def four_bit_path(model: ModelFolder, *, cache_dir: str | None = None) -> Path:
    """The folder where the model in 4 bits is, or will be: in the cache, or its own if that is in 4 bits already."""
    if model.facts.quantised:
        return model.path
    root = Path(cache_dir).expanduser() if cache_dir else default_cache()
    return root / f"{model.path.resolve().name[:40]}-{_cache_key(model.path, tensor_entries(model.path))}"


def folder_bytes(folder: Path) -> int:
    """The bytes that the files of a model folder take of the disk."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def quantise_model(
    model: ModelFolder, target: Path, *, dtype: str | None = None, on_tensor: Callable[[str], None] = lambda name: None
) -> None:
    """Write the 4-bit copy of a full-precision model to `target`; `dtype` is what it records (default: its own)."""
    import torch

    from quant.quantise import quantise_folder

    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    unpacked = model.facts.modules_beside(tensor_entries(model.path))
    recorded = names.get(dtype or model.facts.recorded_dtype, torch.bfloat16)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        quantise_folder(
            model.path,
            target,
            entries=tensor_entries(model.path, model.facts),
            should_pack=model.facts.packs,
            dtype=recorded,
            changes=told_untied(read_json(model.path / "config.json"), model.facts),
            unpacked=unpacked,
            on_tensor=on_tensor,
        )
    except FolderError as error:
        raise InputError(str(error), where="model") from None
    except OSError as error:
        if (target / "config.json").exists():
            return  # another process finished the same copy first
        raise InputError(
            f"cannot write the 4-bit copy: {error.strerror}",
            where=str(target),
            fix="check free space and permissions there, or choose another folder",
        ) from None


def _cache_key(folder: Path, entries: dict[str, TensorEntry]) -> str:
    files = sorted({entry.path for entry in entries.values()} | {folder / "config.json"})
    stamps = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    layout = sorted((entry.name, entry.dtype, entry.shape, entry.start) for entry in entries.values())
    config = (folder / "config.json").read_text(encoding="utf-8")
    text = json.dumps([CACHE_VERSION, str(folder.resolve()), config, stamps, layout])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
