"""Where a model's files are: a local folder or a hub id, its facts, and its 4-bit copy in the cache.

Rules: nothing is ever executed from a model folder (no remote code, no pickle: only JSON, safetensors and tokenizer files
are fetched or read); a folder that is already in bitsandbytes' 4-bit form is used as it is; any other is quantised once,
tensor by tensor, into the cache, under a key made of its config and its tensors' layout, sizes and file times. The copy
appears under its final name only when complete.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

from lopt_edge.errors import InputError
from lopt_edge.plan.budget import format_bytes
from lopt_edge.plan.facts import ModelFacts, facts_from_config, packs
from quant.folders import remove_stale
from quant.headers import FolderError, TensorEntry, read_headers, read_json
from quant.sizes import DTYPE_BYTES
from quant.untrusted import check_folder

HUB_PATTERNS = ["model*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*",
                "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.jinja"]  # fmt: skip
CACHE_VERSION = 1


@dataclass(frozen=True)
class ModelFolder:
    """A model on this machine: its folder, what it is called, its facts, and (for a hub id) the commit."""

    path: Path
    name: str
    facts: ModelFacts
    commit: str | None = None


def default_cache() -> Path:
    return Path.home() / ".cache" / "lopt-edge"


def find_model(name: str, *, revision: str | None = None) -> ModelFolder:
    """The folder and facts of a local folder or a hub id. Raises InputError for what is missing or unsupported."""
    path, commit = Path(name).expanduser(), None
    try:
        is_folder, is_file = path.is_dir(), path.exists()
    except OSError as error:
        raise InputError(f"{name[:80]!r} cannot be a path ({error.strerror})", where="model") from None
    if not is_folder:
        if is_file or name.startswith((".", "/", "~")) or name.count("/") != 1:
            raise InputError(f"no model folder at {name!r}", where="model", fix="give a folder or a hub id (org/name)")
        path, commit = _download(name, revision)
    try:
        check_folder(path)
        config = read_json(path / "config.json")
    except FolderError as error:
        raise InputError(str(error), where="model", fix="a model folder holds config.json and safetensors") from None
    facts = facts_from_config(config, where=str(path / "config.json"))
    return ModelFolder(path, name if commit else str(path.resolve()), facts, commit)


def _download(name: str, revision: str | None) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        path = Path(snapshot_download(name, revision=revision, allow_patterns=HUB_PATTERNS))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise _not_from_hub(name, error) from None
    return path, path.name  # a snapshot's folder is named by its commit


def tensor_entries(folder: Path) -> dict[str, TensorEntry]:
    """The tensors of a model folder. Raises InputError for missing weights or a truncated shard."""
    try:
        return read_headers(folder)
    except FolderError as error:
        raise InputError(str(error), where="model", fix="download or copy the model folder again") from None


def vocabulary_itemsize(folder: Path) -> int:
    """Bytes of a stored number of the token embedding and the lm_head. Raises InputError as `tensor_entries` does."""
    entry = tensor_entries(folder).get("model.embed_tokens.weight")
    if entry is None:
        raise InputError("model.embed_tokens.weight is missing", where=str(folder), fix="download or copy the folder again")
    return DTYPE_BYTES[entry.dtype]


def hub_facts(name: str, *, revision: str | None = None) -> tuple[ModelFacts, int]:
    """Facts and `vocabulary_itemsize` of a hub id, by its config.json and the headers of its weights alone.

    Both are of one commit, also when the branch moves between the two requests.
    """
    from huggingface_hub import get_safetensors_metadata, hf_hub_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        NotASafetensorsRepoError,
        SafetensorsParsingError,
    )

    try:
        config_path = Path(hf_hub_download(name, "config.json", revision=revision))
        config, commit = read_json(config_path), config_path.parent.name  # .../snapshots/<commit>/config.json
        headers = get_safetensors_metadata(name, revision=commit).files_metadata.values()
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, NotASafetensorsRepoError, SafetensorsParsingError,
            FolderError, OSError) as error:  # fmt: skip
        raise _not_from_hub(name, error) from None
    facts = facts_from_config(config, where=f"{name} config.json")
    found = [
        header.tensors["model.embed_tokens.weight"] for header in headers if "model.embed_tokens.weight" in header.tensors
    ]
    itemsize = DTYPE_BYTES.get(found[0].dtype) if found else 2
    if itemsize is None:
        raise InputError(f"the token embedding has dtype {str(found[0].dtype)[:20]!r}", where=name,
                         fix="use the bfloat16, float16 or float32 form of the model")  # fmt: skip
    return facts, itemsize


def _not_from_hub(name: str, error: Exception) -> InputError:
    reason = " ".join(str(error).split())[:300]
    return InputError(
        f"{name!r} is no local folder, and the hub did not give it: {reason}",
        where="model",
        fix="check the name, the revision, your access rights and the network; or give a local folder",
    )


def four_bit_folder(
    model: ModelFolder, *, cache_dir: str | None = None, on_tensor: Callable[[str], None] = lambda name: None
) -> tuple[Path, bool]:
    """The folder with the model in 4 bits, and whether it was there already."""
    check_weights(model, tensor_entries(model.path))
    target = four_bit_path(model, cache_dir=cache_dir)
    if (target / "config.json").exists():
        return target, True
    _make_room(model, target)
    quantise_model(model, target, on_tensor=on_tensor)
    return target, False


def _make_room(model: ModelFolder, target: Path) -> None:
    """Remove what killed runs left of this copy, and refuse a disk that has no room for it. Raises InputError."""
    from quant.files import four_bit_layout

    remove_stale(target)
    stored = [(entry.name, entry.dtype, entry.shape) for entry in tensor_entries(model.path).values()]
    need = sum(prod(shape) * DTYPE_BYTES[dtype] for _, dtype, shape in four_bit_layout(stored, packs))
    existing = next(path for path in target.absolute().parents if path.is_dir())
    free = shutil.disk_usage(existing).free
    if free < need:
        raise InputError(f"the 4-bit copy needs {format_bytes(need)}, {format_bytes(free)} are free there",
                         where=f"cache_dir {target.parent}", fix="free space, or choose another --cache-dir")  # fmt: skip


def four_bit_path(model: ModelFolder, *, cache_dir: str | None = None) -> Path:
    """Where the model in 4 bits is, or will be: a folder in the cache, or the model's own if that is in 4 bits already."""
    if model.facts.quantised:
        return model.path
    root = Path(cache_dir).expanduser() if cache_dir else default_cache()
    return root / f"{model.path.resolve().name[:40]}-{_cache_key(model.path, tensor_entries(model.path))}"


def folder_bytes(folder: Path) -> int:
    """What the files of a model folder take of the disk."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def quantise_model(
    model: ModelFolder, target: Path, *, dtype: str | None = None, on_tensor: Callable[[str], None] = lambda name: None
) -> None:
    """Write the 4-bit copy of a full-precision model to `target`; `dtype` is what it records (default: its own)."""
    import torch

    from quant.quantise import quantise_folder

    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    recorded = names.get(dtype or model.facts.recorded_dtype, torch.bfloat16)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        quantise_folder(model.path, target, should_pack=packs, dtype=recorded, on_tensor=on_tensor)
    except FolderError as error:
        raise InputError(str(error), where="model") from None
    except OSError as error:
        if (target / "config.json").exists():
            return  # another process finished the same copy first
        raise InputError(f"cannot write the 4-bit copy: {error.strerror}", where=str(target),
                         fix="check free space and permissions there, or choose another folder") from None  # fmt: skip


def check_weights(model: ModelFolder, entries: dict[str, TensorEntry]) -> None:
    """Each matrix that the config promises is there in the promised shape, before anything is allocated."""
    facts = model.facts
    expected = {"model.embed_tokens.weight": (facts.vocab_size, facts.hidden_size)}
    expected |= {} if facts.tied else {"lm_head.weight": (facts.vocab_size, facts.hidden_size)}
    for layer in range(facts.n_layers):
        for linear in facts.linears:
            name = f"model.layers.{layer}.{linear.name}.weight"
            if not facts.quantised or f"{name}.absmax" not in entries:
                expected[name] = (linear.out_features, linear.in_features)
            elif name not in entries:
                expected[name] = ()
    for name, shape in expected.items():
        entry = entries.get(name)
        if entry is None or entry.shape != shape:
            found = "is missing" if entry is None else f"has shape {entry.shape}, config.json says {shape}"
            raise InputError(f"{name} {found}", where=str(model.path), fix="weights and config.json do not belong together")
        if entry.dtype not in ("F32", "BF16", "F16"):
            raise InputError(f"{name} has dtype {entry.dtype}, which is not supported", where=str(entry.path),
                             fix="use the bfloat16, float16 or float32 form of the model")  # fmt: skip


def _cache_key(folder: Path, entries: dict[str, TensorEntry]) -> str:
    files = sorted({entry.path for entry in entries.values()} | {folder / "config.json"})
    stamps = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    layout = sorted((entry.name, entry.dtype, entry.shape, entry.start) for entry in entries.values())
    config = (folder / "config.json").read_text(encoding="utf-8")
    text = json.dumps([CACHE_VERSION, str(folder.resolve()), config, stamps, layout])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
