"""A model that another program quantised (GPTQ, AWQ, compressed-tensors, FP8), as a folder in blocks in the cache.

The rule: the matrices are what they were in the folder, code by code (quant/grouped), so an adapter learns against the very
weights that will run; the copy is made once, tensor by tensor, under a key of the config and of the files' sizes and times,
and whoever waits for it is told. Who only plans needs the headers alone, and writes nothing. The folder itself is never
changed, and is what the adapter's config names as its base.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lopt_edge.errors import InputError
from lopt_edge.models.gguf import facts_of_gguf
from lopt_edge.models.unlisted import read_facts
from lopt_edge.plan.facts.model import ModelFacts
from lopt_edge.system.cache import CACHE_VARIABLE, check_room, default_cache
from lopt_edge.units import format_bytes
from quant.folders import remove_stale
from quant.grouped.kinds import WORDS, planned_entries, unreadable
from quant.grouped.places import PLACES_NAME
from quant.headers import FolderError, TensorEntry, read_headers

VERSION = 1


def is_grouped(config: dict[str, Any]) -> bool:
    """Whether a config says that its folder is quantised in a form that is laid out in blocks."""
    found = config.get("quantization_config")
    return isinstance(found, dict) and found.get("quant_method") in WORDS


def check_readable(quantisation: Mapping[str, Any], *, where: str) -> None:
    """Refuse a quantization_config of which something cannot be read. Raises InputError."""
    if reason := unreadable(quantisation):
        fix = "use another quantised form of the model, or its full-precision one"
        raise InputError(f"{quantisation['quant_method']}: {reason}", where=where, fix=fix)


def entries_in_blocks(source: Path, config: dict[str, Any]) -> dict[str, TensorEntry]:
    """The tensors of the folder in blocks of a quantised one, as its headers tell, whether it is made or not.

    Raises InputError.
    """
    try:
        return planned(read_headers(source), config["quantization_config"], where=str(source / "config.json"))
    except FolderError as error:
        raise _broken(error) from None


def planned(entries: Mapping[str, TensorEntry], quantisation: Mapping[str, Any], *, where: str) -> dict[str, TensorEntry]:
    """The same of any headers, also of files that lie elsewhere. Raises InputError."""
    check_readable(quantisation, where=where)
    try:
        return planned_entries(entries, quantisation)
    except FolderError as error:
        raise _broken(error) from None


def facts_in_blocks(config: dict[str, Any], entries: dict[str, TensorEntry], *, where: str) -> ModelFacts:
    """The facts of a model with these tensors, as they are once they lie in blocks. Raises InputError."""
    facts = read_facts({**config, "quantization_config": None}, where=where)
    return facts_of_gguf(facts.of_checkpoint(entries), entries, where=where)


def folder_in_blocks(source: Path, config: dict[str, Any], *, say: Callable[[str], None]) -> Path:
    """The folder in blocks of a quantised one, made if it is not there, of which `say` hears. Raises InputError."""
    from quant.grouped.folder import lay_out_folder

    method = config["quantization_config"]["quant_method"]
    check_readable(config["quantization_config"], where=str(source / "config.json"))
    try:
        entries = read_headers(source)
        target = _place_of(source, config, entries)
        remove_stale(target)
        if (target / PLACES_NAME).exists():
            return target
        n_bytes, fix = sum(entry.n_bytes for entry in entries.values()), f"free space, or set {CACHE_VARIABLE}"
        check_room(target, n_bytes, what="the copy in blocks", where=str(target.parent), fix=fix)
        say(
            f"the {method} matrices of {source} are laid out in blocks in {target}, once: {format_bytes(n_bytes)} "
            f"(set {CACHE_VARIABLE} to have it elsewhere)"
        )
        lay_out_folder(source, target)
    except FolderError as error:
        raise _broken(error) from None
    except FileExistsError:
        return target  # another process made it meanwhile
    except OSError as error:
        what = f"the copy in blocks cannot be written: {error.strerror}"
        raise InputError(what, where=str(default_cache()), fix=f"free space there, or set {CACHE_VARIABLE}") from None
    return target


def _place_of(source: Path, config: dict[str, Any], entries: Mapping[str, TensorEntry]) -> Path:
    files = sorted({entry.path for entry in entries.values()})
    stamps = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    text = json.dumps([VERSION, str(source.resolve()), config, stamps])
    name = f"{source.resolve().name[:40]}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    return default_cache() / "blocks" / name


def _broken(error: FolderError) -> InputError:
    return InputError(str(error), where="model", fix="download the folder again, or use another form of it")
