"""A model that another program quantised (GPTQ, AWQ, compressed-tensors, FP8), as a folder in blocks in the cache.

The rule: the matrices are what they were in the folder, code by code (quant/grouped), so an adapter learns against the very
weights that will run; the copy is made once, tensor by tensor, before anything is planned, under a key of the config and of
the files' sizes and times. The folder itself is never changed, and is what the adapter's config names as its base.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from lopt_edge.errors import InputError
from lopt_edge.models.cache import CACHE_VARIABLE, check_room, default_cache
from quant.folders import remove_stale
from quant.grouped.places import METHODS, PLACES_NAME
from quant.headers import FolderError, read_headers

VERSION = 1


def is_grouped(config: dict[str, Any]) -> bool:
    """Whether a config says that its folder is quantised in a form that is laid out in blocks."""
    found = config.get("quantization_config")
    return isinstance(found, dict) and found.get("quant_method") in METHODS


def folder_in_blocks(source: Path, config: dict[str, Any]) -> Path:
    """The folder in blocks of a quantised one, made if it is not there. Raises InputError."""
    from quant.grouped.folder import lay_out_folder, unreadable

    method = config["quantization_config"]["quant_method"]
    if reason := unreadable(config["quantization_config"]):
        fix = "use another quantised form of the model, or its full-precision one"
        raise InputError(f"{method}: {reason}", where=str(source / "config.json"), fix=fix)
    try:
        entries = read_headers(source)
        files = sorted({entry.path for entry in entries.values()})
        stamps = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        text = json.dumps([VERSION, str(source.resolve()), config, stamps])
        name = f"{source.resolve().name[:40]}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        target = default_cache() / "blocks" / name
        remove_stale(target)
        if (target / PLACES_NAME).exists():
            return target
        n_bytes, fix = sum(entry.n_bytes for entry in entries.values()), f"free space, or set {CACHE_VARIABLE}"
        check_room(target, n_bytes, what="the copy in blocks", where=str(target.parent), fix=fix)
        lay_out_folder(source, target)
    except FolderError as error:
        raise InputError(str(error), where="model", fix="download the folder again, or use another form of it") from None
    except FileExistsError:
        return target  # another process made it meanwhile
    except OSError as error:
        what = f"the copy in blocks cannot be written: {error.strerror}"
        raise InputError(what, where=str(default_cache()), fix=f"free space there, or set {CACHE_VARIABLE}") from None
    return target
