"""Which model an adapter is put on: the one that its config names, or the one that was given.

The rule: a model that was given is taken, and if it is not the one that the adapter was trained on, that is said. How it
is known: run.json of the adapter's folder has the base's fingerprint; without one, the base itself tells if it is there.
A model of another shape is refused where the matrices are put on it (lopt_edge/run/model/lora.py).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

from lopt_edge.errors import InputError
from lopt_edge.models.folder import ModelFolder, find_model, model_fingerprint, names_a_gguf
from lopt_edge.run.model.adapter_config import AdapterConfig, read_adapter_config
from quant.headers import FolderError, read_json


class BaseOptions(TypedDict, total=False):
    """What every export is told of the adapter's base: `say` hears warnings."""

    model: str | None
    revision: str | None
    cache_dir: str | None
    say: Callable[[str], None]


RUN_NAME = "run.json"  # a finished run's facts, in its output folder


def base_of(
    adapter: str | Path | None, *, model: str | None, revision: str | None = None, say: Callable[[str], None]
) -> ModelFolder:
    """The model for an adapter folder: `model` if it is given, else what adapter_config.json names.

    `say` hears it if the given one is another model than the adapter's. Raises InputError if there is none.
    """
    if adapter is None:
        if model is None:
            raise InputError("is needed", where="model", fix="give --model, or an --adapter, whose config names its base")
        return find_model(model, revision=revision, say=say)
    folder = Path(adapter)
    if not folder.is_dir():
        raise InputError("no such adapter folder", where=str(adapter), fix="give the output folder of a finetune run")
    config = read_adapter_config(folder)
    if model is None:
        found = _named_base(config, revision, where=str(adapter), say=say)
    else:
        found = find_model(model, revision=revision, say=say)
    tell_if_another(found, folder, say)
    return found


def is_the_base(model: ModelFolder, adapter: Path) -> bool:
    """Whether a model is the one that the adapter was trained on, as far as anything tells (by its hash)."""
    return _is_base(model, read_adapter_config(adapter), adapter)


def tell_if_another(model: ModelFolder, adapter: Path, say: Callable[[str], None]) -> None:
    """Say so if a model is not the one that the adapter was trained on. Raises InputError for a folder without one."""
    config = read_adapter_config(adapter)
    if not _is_base(model, config, adapter):
        say(
            f"{model.name} is not the model that the adapter {adapter} was trained on ({config.base}): its weights or its "
            "config.json are others"
        )


def _named_base(config: AdapterConfig, revision: str | None, *, where: str, say: Callable[[str], None]) -> ModelFolder:
    fix = "give the base model with --model"
    if config.base is None:
        raise InputError("adapter_config.json names no base model", where=where, fix=fix)
    # of a GGUF file the adapter's own tokenizer is the one that it was trained with
    own = where if names_a_gguf(config.base) and (Path(where) / "tokenizer.json").is_file() else None
    try:
        return find_model(config.base, revision=revision or config.revision, tokenizer=own, say=say)
    except InputError as error:
        what = f"the base model that adapter_config.json names cannot be used ({error.what})"
        raise InputError(what, where=where, fix=f"{fix}, wherever it lies now") from None


def _is_base(found: ModelFolder, config: AdapterConfig, folder: Path) -> bool:
    """Whether a model is the adapter's own, as far as anything tells."""
    run = run_of(folder)
    if str(found.path) == run.get("quantised_folder"):
        return True
    wanted = run.get("model_fingerprint") or (found.name != config.base and _fingerprint_at(config.base)) or None
    return wanted is None or model_fingerprint(found) == wanted


def _fingerprint_at(base: str | None) -> str | None:
    """The fingerprint of the model in a local folder, if one is there."""
    try:
        return model_fingerprint(find_model(base)) if base and Path(base).is_dir() else None
    except (InputError, OSError):
        return None


def run_of(folder: Path) -> dict[str, Any]:
    """The facts of the run that made the adapter; nothing for an adapter from elsewhere, or a run that is not over."""
    if not (folder / RUN_NAME).is_file():
        return {}
    try:
        values = read_json(folder / RUN_NAME)
    except FolderError:
        return {}
    return values if isinstance(values, dict) else {}
