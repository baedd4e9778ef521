"""Where a model's files are: a local folder or a hub id, its facts, and its 4-bit copy in the cache.

Rules: nothing is ever executed from a model folder (no remote code, no pickle: only JSON, safetensors and tokenizer files
are fetched or read); a folder that is already in bitsandbytes' 4-bit form is used as it is; any other is quantised once,
tensor by tensor, into the cache, under a key made of its config and its tensors' layout, sizes and file times. The copy
appears under its final name only when complete. What transformers reads of a folder is what counts: a head of its own in a
checkpoint whose config ties it to the embedding is the head (transformers 5 ties only what is equal or missing).
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lopt_edge.errors import InputError
from lopt_edge.models.blocks import entries_in_blocks, facts_in_blocks, folder_in_blocks, is_grouped
from lopt_edge.models.expert_tensors import by_expert
from lopt_edge.models.gguf import facts_of_gguf, folder_of_gguf, gguf_entries, looks_like_gguf
from lopt_edge.models.hub import _download, download_gguf, names_gguf
from lopt_edge.models.unlisted import read_facts
from lopt_edge.plan.facts.model import ModelFacts
from quant.grouped.places import PLACES_NAME, block_entries
from quant.headers import FolderError, TensorEntry, read_headers
from quant.sizes import DTYPE_BYTES
from quant.untrusted import check_folder, read_config


@dataclass(frozen=True)
class ModelFolder:
    """A model on this machine: its folder, what it is called, its facts, and (for a hub id) the commit.

    A GGUF file is called by its path; its folder is in the cache (gguf.py).
    """

    path: Path
    name: str
    facts: ModelFacts
    commit: str | None = None


def find_model(
    name: str,
    *,
    revision: str | None = None,
    tokenizer: str | None = None,
    lay_out: bool = True,
    say: Callable[[str], None] = warnings.warn,
) -> ModelFolder:
    """The folder and facts of a local folder, a GGUF file or a hub id; `org/name:FILE.gguf` is a GGUF file of a hub id.

    `tokenizer` is a folder with the tokenizer of a GGUF file. A folder that another program quantised is laid out in blocks
    once, of which `say` hears; without `lay_out` it stays where it is, and its weights are not to be read.

    Raises InputError for what is missing or unsupported.
    """
    path, commit = Path(name).expanduser(), None
    try:
        is_folder, is_file = path.is_dir(), path.exists()
    except OSError as error:
        raise InputError(f"{name[:80]!r} cannot be a path ({error.strerror})", where="model") from None
    if is_file and not is_folder and looks_like_gguf(path):
        return _of_gguf(path, str(path.resolve()), None, tokenizer)
    if not is_file and names_gguf(name):
        path, commit = download_gguf(name, revision)
        return _of_gguf(path, name, commit, tokenizer)
    if tokenizer is not None:
        what = "is for a GGUF file; this model has its tokenizer in its folder"
        raise InputError(what, where="tokenizer", fix="leave it out, or put those files into a copy of the folder")
    if not is_folder:
        if is_file or name.startswith((".", "/", "~")) or name.count("/") != 1:
            raise InputError(
                f"no model folder at {name!r}", where="model", fix="give a folder, a GGUF file or a hub id (org/name)"
            )
        path, commit = _download(name, revision)
    try:
        check_folder(path)
        config = read_config(path / "config.json")
    except FolderError as error:
        raise InputError(str(error), where="model", fix="a model folder holds config.json and safetensors") from None
    where, given = str(path / "config.json"), path
    if is_grouped(config):
        read_facts({**config, "quantization_config": None}, where=where)  # refused before it is written
        if not lay_out:
            facts = facts_in_blocks(config, entries_in_blocks(path, config), where=where)
            return ModelFolder(path, name if commit else str(given.resolve()), facts, commit)
        path = folder_in_blocks(path, config, say=say)
        config = read_config(path / "config.json")
    facts = _of_its_weights(read_facts(config, where=where), path)
    if named := config.get("transformers_weights"):  # where transformers would read the weights
        what = f"transformers_weights ({str(named)[:80]!r}) is not supported"
        raise InputError(what, where=where, fix="name the weights' file model.safetensors, and drop the key")
    return ModelFolder(path, name if commit else str(given.resolve()), facts, commit)


def names_a_gguf(name: str) -> bool:
    """Whether a model's name is that of a GGUF file, here or on the hub."""
    return names_gguf(name) or looks_like_gguf(Path(name).expanduser())


def _of_gguf(path: Path, name: str, commit: str | None, tokenizer: str | None) -> ModelFolder:
    folder = folder_of_gguf(path, tokenizer=None if tokenizer is None else Path(tokenizer).expanduser())
    facts = _of_its_weights(read_facts(read_config(folder / "config.json"), where=str(path)), folder)
    return ModelFolder(folder, name, facts, commit)


def _of_its_weights(facts: ModelFacts, folder: Path) -> ModelFacts:
    """The facts, with what the weights' names decide. What cannot be read of them is reported where it is needed."""
    if (entries := gguf_entries(folder)) is not None:
        return facts_of_gguf(facts, entries, where=str(folder))
    if facts.forms is not None or (folder / PLACES_NAME).exists():
        entries = tensor_entries(folder, facts)
        return facts_of_gguf(facts.of_checkpoint(entries), entries, where=str(folder))
    if not facts.tied and not facts.wrapper:
        return facts
    try:
        return facts.of_checkpoint(read_headers(folder))
    except FolderError:
        return facts


def told_untied(config: dict[str, Any], facts: ModelFacts) -> dict[str, Any]:
    """What a config that we write says, so that every reader takes the head in the file (transformers 4.57 would not)."""
    return {"tie_word_embeddings": False} if config.get("tie_word_embeddings", True) and not facts.tied else {}


def tensor_entries(folder: Path, facts: ModelFacts | None = None) -> dict[str, TensorEntry]:
    """The tensors of a model folder, as they are spelled; with its facts each matrix of an expert has an entry.

    Raises InputError for missing weights or a truncated shard.
    """
    if (entries := gguf_entries(folder)) is not None:
        return entries
    try:
        entries = block_entries(folder) or read_headers(folder)
        return entries if facts is None else by_expert(entries, facts)
    except FolderError as error:
        raise InputError(str(error), where="model", fix="download or copy the model folder again") from None


def vocabulary_itemsize(source: ModelFolder) -> int:
    """Bytes of a stored number of the head (if tied, the token embedding). Raises InputError as `tensor_entries` does."""
    if source.facts.forms is not None:
        return 4  # asked for by nobody: the facts say how many bytes a row has
    name = source.facts.layout.head(tied=source.facts.tied)
    entry = tensor_entries(source.path).get(name)
    if entry is None:
        raise InputError(f"{name} is missing", where=str(source.path), fix="download or copy the folder again")
    return DTYPE_BYTES[entry.dtype]


def check_weights(model: ModelFolder, entries: dict[str, TensorEntry]) -> None:
    """Refuse weights that are not all there in the shapes which the config promises, before anything is allocated.

    Raises InputError.
    """
    facts, layout = model.facts, model.facts.layout
    expected: dict[str, tuple[int, ...]] = {layout.embedding: (facts.vocab_size, facts.hidden_size)}
    expected |= {} if facts.tied else {layout.lm_head: (facts.vocab_size, facts.hidden_size)}
    for layer in range(facts.n_layers):
        for linear in facts.layer(layer).linears:
            name = f"{layout.layer(layer)}{linear.name}.weight"
            if not facts.quantised or f"{name}.absmax" not in entries:
                expected[name] = (linear.out_features, linear.in_features)
            elif name not in entries:
                expected[name] = ()
        expected |= _expert_shapes(facts, layer, entries)
    for name, shape in expected.items():
        entry = entries.get(name)
        if entry is None or entry.shape != shape:
            found = "is missing" if entry is None else f"has shape {entry.shape}, config.json says {shape}"
            raise InputError(f"{name} {found}", where=str(model.path), fix="weights and config.json do not belong together")
        if entry.dtype not in ("F32", "BF16", "F16") and facts.forms is None:
            raise InputError(
                f"{name} has dtype {entry.dtype}, which is not supported",
                where=str(entry.path),
                fix="use the bfloat16, float16 or float32 form of the model",
            )


def _expert_shapes(facts: ModelFacts, layer: int, entries: dict[str, TensorEntry]) -> dict[str, tuple[int, ...]]:
    """The shapes of a layer's experts by name, of those that are not in 4 bits (whose states say more than a shape)."""
    experts, prefix = facts.layer(layer).experts, facts.layout.layer(layer)
    names = ((f"{prefix}{name}.weight", shape) for name, shape in (experts.matrices() if experts else ()))
    return {name: shape for name, shape in names if f"{name}.absmax" not in entries or name not in entries}


HEAD_BYTES = 4096  # of each tensor, in the model's fingerprint


def model_fingerprint(source: ModelFolder) -> str:
    """The SHA-256 of config.json, the tensors' names, dtypes and shapes, and the first bytes of each.

    It is the same wherever the folder lies.
    """
    digest = hashlib.sha256((source.path / "config.json").read_bytes())
    for entry in sorted(tensor_entries(source.path).values(), key=lambda entry: entry.name):
        digest.update(f"\n{entry.name} {entry.dtype} {entry.shape}\n".encode())
        with entry.path.open("rb") as file:
            file.seek(entry.start)
            digest.update(file.read(min(HEAD_BYTES, entry.n_bytes)))
    return digest.hexdigest()
