"""A model that is a GGUF file (or its shards), as a model folder: small files in the cache, the weights where they are.

Everything of ours takes a folder with a config.json. For a GGUF file that folder is made from its metadata, in the cache:
config.json (gguf_architectures.py), a pointer to the file, and, once they are asked for, the tokenizer's files
(gguf_tokenizer.py). The rules: the weights are never copied or changed; the pointer names the file's size and the hash of
its header, so a folder never speaks for another file than the one it was made from; whoever moves the file gets a new one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from lopt_edge.errors import InputError
from lopt_edge.plan.facts.forms import Forms
from lopt_edge.plan.facts.gguf_architectures import config_of, entries_of
from lopt_edge.plan.facts.model import ModelFacts
from lopt_edge.system.cache import CACHE_VARIABLE, default_cache
from lopt_edge.system.files import write_json
from quant.gguf.header import GgufHeader, is_gguf, read_gguf_header
from quant.gguf.types import ORDER_SUFFIX
from quant.headers import FolderError, TensorEntry, read_json
from quant.small_files import TEMPLATE_NAMES, TOKENIZER_NAMES, copy_small_files
from quant.untrusted import check_folder

POINTER_NAME = "gguf.json"
VERSION = 1


def looks_like_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file by its suffix or its first bytes."""
    return path.suffix == ".gguf" or (path.is_file() and is_gguf(path))


def folder_of_gguf(path: Path, *, tokenizer: Path | None = None) -> Path:
    """The model folder of a GGUF file, made if it is not there; `tokenizer` is a folder whose tokenizer is taken.

    Raises InputError.
    """
    path = path.resolve()
    try:
        header = _header(path)
    except FolderError as error:
        raise InputError(
            str(error), where="model", fix="download the file again, or use another form of the model"
        ) from None
    pointer = {
        "version": VERSION,
        "files": [str(one) for one in header.paths],
        "bytes": [one.stat().st_size for one in header.paths],
        "header_sha256": _digest(header),
    }
    config = config_of(header)
    entries_of(header)  # a tensor without a name is refused here, before anything is written
    text = json.dumps([pointer, config, _digests(tokenizer)])
    folder = default_cache() / "gguf" / f"{path.stem[:40]}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    if not (folder / POINTER_NAME).exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "config.json", config)
            if tokenizer is not None:
                copy_small_files(tokenizer, folder, names=(*TOKENIZER_NAMES, *TEMPLATE_NAMES))
            write_json(folder / POINTER_NAME, pointer)  # last: a folder with a pointer is whole
        except OSError as error:
            raise InputError(
                f"cannot be written: {error.strerror}", where=str(folder), fix=f"set {CACHE_VARIABLE}"
            ) from None
    return folder


def gguf_in(folder: Path) -> GgufHeader | None:
    """The header of the GGUF file that a folder stands for; None for any other folder. Raises InputError.

    A file that has changed since is refused.
    """
    place = folder / POINTER_NAME
    if not place.exists():
        return None
    try:
        pointer: Any = read_json(place)
        header = _header(Path(pointer["files"][0]))
        same = pointer["header_sha256"] == _digest(header) and pointer["files"] == [str(one) for one in header.paths]
    except (KeyError, IndexError, TypeError):
        raise InputError("is no pointer of ours to a GGUF file", where=str(place), fix="remove this folder") from None
    except FolderError as error:
        raise InputError(str(error), where="model", fix="put the GGUF file back, or name it where it is now") from None
    if not same:
        fix = "name the GGUF file itself as --model"
        raise InputError(f"{pointer['files'][0]} is not the file that this folder was made from", where=str(place), fix=fix)
    return header


def gguf_entries(folder: Path) -> dict[str, TensorEntry] | None:
    """The tensors of the GGUF file that a folder stands for, by transformers' names; None for any other folder.

    Raises InputError.
    """
    header = gguf_in(folder)
    return None if header is None else entries_of(header)


def facts_of_gguf(facts: ModelFacts, entries: dict[str, TensorEntry], *, where: str) -> ModelFacts:
    """The facts with the types in which the matrices are stored. Raises InputError for a matrix that is missing."""
    layout = facts.layout

    def kind(name: str) -> str:
        if name not in entries:
            raise InputError(f"{name} is missing", where=where, fix="download the file again")
        return entries[name].dtype

    layers = tuple(
        tuple(kind(f"{layout.layer(layer)}{linear.name}.weight") for linear in facts.layer(layer).linears)
        for layer in range(facts.n_layers)
    )
    around = (kind(layout.embedding), kind(layout.head(tied=facts.tied)))
    if any(one.endswith(ORDER_SUFFIX) for one in around):
        what = "its lm_head is quantised in act-order (desc_act), which is read inside the layers alone"
        raise InputError(what, where=where, fix="use a build that leaves lm_head as it is")
    experts = tuple(_of_experts(facts, layer, kind, where=where) for layer in range(facts.n_layers))
    forms = Forms(layers, *around, experts if any(experts) else ())
    return replace(facts, quantised=True, forms=forms)


def _of_experts(facts: ModelFacts, layer: int, kind: Callable[[str], str], *, where: str) -> tuple[str, ...]:
    """The types of an expert's matrices in a layer. Raises InputError where not all experts have the same."""
    experts, prefix = facts.layer(layer).experts, facts.layout.layer(layer)
    if experts is None:
        return ()
    found = [kind(f"{prefix}{name}.weight") for name, _ in experts.matrices()]
    first = tuple(found[: len(experts.stored)])
    if found != [*first] * experts.count:
        what = f"the experts of layer {layer} are stored in several forms ({', '.join(sorted({*found}))})"
        raise InputError(what, where=where, fix="use a folder whose experts are all in one form")
    return first


def _digests(tokenizer: Path | None) -> dict[str, str]:
    """The hashes of a folder's tokenizer files. Raises InputError for a folder without a tokenizer."""
    if tokenizer is None:
        return {}
    try:
        check_folder(tokenizer)
        found = [name for name in (*TOKENIZER_NAMES, *TEMPLATE_NAMES) if (tokenizer / name).is_file()]
        if not {"tokenizer.json", "tokenizer.model"} & {*found}:
            raise FolderError(f"{tokenizer}: has neither tokenizer.json nor tokenizer.model")
        return {name: hashlib.sha256((tokenizer / name).read_bytes()).hexdigest() for name in found}
    except FolderError as error:
        raise InputError(str(error), where="tokenizer", fix="name a folder with the model's tokenizer files") from None


def _header(path: Path) -> GgufHeader:
    found = path.stat() if path.exists() else None
    return _cached(path, (found.st_size, found.st_mtime_ns)) if found else read_gguf_header(path)


@lru_cache(maxsize=4)
def _cached(path: Path, stamp: tuple[int, int]) -> GgufHeader:
    del stamp  # a changed file is read again
    return read_gguf_header(path)


def _digest(header: GgufHeader) -> str:
    with header.paths[0].open("rb") as file:
        return hashlib.sha256(file.read(header.header_bytes)).hexdigest()
