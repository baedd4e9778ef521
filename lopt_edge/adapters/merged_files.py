"""What lies beside the weights of a merged model: config, tokenizer, template, where generation stops, the licence.

The rules: the tokenizer's files are the base's own (lopt_edge/models/tokenizer_files.py), with the template that the
adapter was trained with; generation stops at the tokens that were trained as ends, and where the base knew to stop. No code
is copied, nor named by the config.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lopt_edge.adapters.base import run_of
from lopt_edge.data import load_template
from lopt_edge.errors import InputError
from lopt_edge.models.folder import ModelFolder, told_untied
from lopt_edge.models.tokenizer import load_tokenizer
from lopt_edge.models.tokenizer_files import template_in, write_tokenizer_files
from quant.headers import FolderError, read_json
from quant.small_files import GENERATION_NAME, LICENCE_NAMES, copy_small_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lopt_edge.data import ChatTemplate

END_KEY = "end_token_ids"  # in run.json


def write_beside(
    target: Path, source: ModelFolder, adapter: Path, tokenizer: PreTrainedTokenizerBase, changes: Mapping[str, Any]
) -> None:
    """Write all files of a merged model but its weights; `tokenizer` is the base's, `changes` are of its config.

    Raises InputError, RunError, FolderError, OSError.
    """
    _write_config(source, target, changes)
    copy_small_files(source.path, target, names=LICENCE_NAMES)
    write_tokenizer_files(target, base=source.path, tokenizer=tokenizer, template=template_in(adapter), has_config=True)
    ends = _trained_ends(adapter, target)
    base = _generation_config(source.path)
    base["eos_token_id"] = list(dict.fromkeys((*ends, *_ids(base.get("eos_token_id")))))
    (target / GENERATION_NAME).write_text(json.dumps(base, indent=2) + "\n", encoding="utf-8")


def end_token_ids(template: ChatTemplate | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens after which a reply is over, as it was trained: the template's own, and eos."""
    if template is not None:
        return list(template.stop_ids(tokenizer))
    return _ids(tokenizer.eos_token_id)


def _write_config(source: ModelFolder, target: Path, changes: Mapping[str, Any]) -> None:
    config = read_json(source.path / "config.json")
    for key in ("quantization_config", "torch_dtype", "auto_map"):  # no code is copied that auto_map could name
        config.pop(key, None)
    config |= told_untied(config, source.facts)
    for inner in (part for part in config.values() if isinstance(part, dict)):  # of a multimodal model
        for key in ("torch_dtype", "dtype"):
            inner.pop(key, None)
    (target / "config.json").write_text(json.dumps({**config, **changes}, indent=2) + "\n", encoding="utf-8")


def _trained_ends(adapter: Path, merged: Path) -> list[int]:
    """The ends that the run trained, by its own word; for an adapter from elsewhere those of its template."""
    if found := _ids(run_of(adapter).get(END_KEY)):
        return found
    tokenizer = load_tokenizer(merged, say=lambda text: None)
    try:
        return end_token_ids(load_template(tokenizer)[0], tokenizer)
    except InputError:  # no template that can be read, and no eos
        return _ids(tokenizer.eos_token_id)


def _generation_config(base: Path) -> dict[str, Any]:
    """The base's generation settings; where it has none, what transformers takes from its config."""
    try:
        if (base / GENERATION_NAME).exists():
            values = read_json(base / GENERATION_NAME)
            return values if isinstance(values, dict) else {}
    except FolderError as error:
        raise InputError(str(error), where="model") from None
    config = read_json(base / "config.json")
    return {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(key) is not None}


def _ids(value: Any) -> list[int]:
    values: Iterable[Any] = value if isinstance(value, list) else [value]
    return [number for number in values if type(number) is int and number >= 0]
