"""adapter_config.json: what peft's keys mean to us, and which are refused.

A key that is known changes the function as peft has it (`READ`), or not at all once the matrices are there (`HARMLESS`:
where it comes from, how it began, what only training uses). All else must be off: peft's default, or for a key that nobody
here knows a value that says nothing (null, false, empty). So an adapter of a kind that came after this file is refused by
the name of its key instead of being read as plain LoRA. A test goes through the fields of the installed peft.

Not here: the matrices (lora.py), and what we write (lopt_edge/adapters/save.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lopt_edge.errors import InputError
from quant.headers import FolderError, read_json
from quant.untrusted import check_folder, printable

ADAPTER_NAME = "adapter_model.safetensors"
REPLACED_NAME = "replaced_layers.json"

ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_ADVICE = "an adapter folder holds adapter_config.json and adapter_model.safetensors"
MAX_ALPHA = 1_000_000

READ = ("peft_type", "r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules", "layers_to_transform",
        "init_lora_weights", "base_model_name_or_path", "revision")  # fmt: skip
HARMLESS = ("auto_mapping", "peft_version", "task_type", "inference_mode", "lora_dropout", "layers_pattern",
            "megatron_core",
            "loftq_config", "eva_config", "corda_config", "lora_ga_config",  # how matrices began: `STARTS` has a say
            "qalora_group_size",  # only beside use_qalora
            "ensure_weight_tying")  # fmt: skip  # only beside modules_to_save and trainable_token_indices
DEFAULTS = {"bias": "none"}  # of keys that are off with another value than null, false or nothing
KINDS = {"use_dora": "DoRA", "alora_invocation_tokens": "aLoRA", "use_qalora": "QALoRA", "use_bdlora": "BD-LoRA",
         "velora_config": "VeLoRA", "monteclora_config": "MonteCLoRA", "kasa_config": "KaSA", "arrow_config": "Arrow",
         "layer_replication": "repeated layers", "modules_to_save": "whole modules",
         "trainable_token_indices": "token embeddings"}  # fmt: skip
STARTS = (True, False, "gaussian", "eva", "orthogonal")  # the others change the base weights too, or the layer


@dataclass(frozen=True)
class AdapterConfig:
    """The part of a LoRA adapter's config that decides what it computes; None where it says nothing."""

    alpha: float
    rslora: bool
    rank: int | None = None
    targets: str | tuple[str, ...] | None = None
    excluded: str | tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None
    base: str | None = None
    revision: str | None = None

    def scale(self, rank: int) -> float:
        """The factor of B A."""
        return lora_scale(self.alpha, rank, rslora=self.rslora)

    def selects(self, layer: int, module: str) -> bool:
        """Whether peft would put a matrix on this module of this layer. (A regular expression is not judged.)"""
        wanted = self.targets is None or isinstance(self.targets, str) or _among(module, self.targets)
        left_out = isinstance(self.excluded, tuple) and _among(module, self.excluded)
        return wanted and not left_out and (self.layers is None or layer in self.layers)


def lora_scale(alpha: float, rank: int, *, rslora: bool) -> float:
    """The factor of B A: alpha / r, and of a rank-stabilised adapter (arXiv 2312.03732) alpha / sqrt(r)."""
    return alpha / (rank**0.5 if rslora else rank)


def _among(module: str, names: Sequence[str]) -> bool:
    return any(f".{module}".endswith(f".{name}") for name in names)


def read_adapter_config(folder: Path) -> AdapterConfig:
    """The config of an adapter folder. Raises InputError for one that is not there, or not plain LoRA."""
    try:
        check_folder(folder)
        values = read_json(folder / ADAPTER_CONFIG_NAME)
    except FolderError as error:
        raise InputError(str(error), where=str(folder), fix=ADAPTER_ADVICE) from None
    return _checked(values, str(folder))


def _checked(values: object, where: str) -> AdapterConfig:
    if not isinstance(values, dict) or values.get("peft_type") != "LORA":
        raise InputError("is not a LoRA adapter (peft_type LORA)", where=where)
    alpha, rank, rslora = values.get("lora_alpha"), values.get("r"), values.get("use_rslora") or False
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        raise InputError("adapter_config.json lacks a number 'lora_alpha'", where=where)
    if not abs(alpha) < MAX_ALPHA:  # NaN and infinity as well, which JSON in Python may hold
        raise InputError(f"adapter_config.json: lora_alpha must be below {MAX_ALPHA:,}", where=where)
    if not isinstance(rslora, bool) or not (rank is None or type(rank) is int):
        raise InputError("adapter_config.json: r must be an integer, use_rslora true or false", where=where)
    if key := next((key for key in values if _changes_meaning(key, values[key])), None):
        kind = f" ({KINDS[key]})" if key in KINDS else ""
        raise InputError(
            f"adapter_config.json sets {printable(key[:80])!r}{kind}, which is not supported",
            where=where,
            fix="use a plain LoRA adapter; if this key changes nothing, take it out of adapter_config.json",
        )
    start = values.get("init_lora_weights", True)
    if start is not None and start not in STARTS:  # PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA
        what = f"adapter_config.json: init_lora_weights {str(start)[:40]!r} changes the base weights as well"
        raise InputError(f"{what}, which is not supported", where=where, fix="convert it to a plain LoRA adapter with peft")
    return AdapterConfig(
        alpha=alpha,
        rslora=rslora,
        rank=rank,
        targets=_names(values, "target_modules", where),
        excluded=_names(values, "exclude_modules", where),
        layers=_layers(values.get("layers_to_transform"), where),
        base=_text(values.get("base_model_name_or_path")),
        revision=_text(values.get("revision")),
    )


def _changes_meaning(key: str, value: Any) -> bool:
    return key not in READ and key not in HARMLESS and bool(value) and value != DEFAULTS.get(key)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _names(values: dict[str, Any], key: str, where: str) -> str | tuple[str, ...] | None:
    value = values.get(key)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return tuple(value)
    raise InputError(f"adapter_config.json: {key} must be a text or a list of texts", where=where)


def _layers(value: Any, where: str) -> tuple[int, ...] | None:
    found = [value] if type(value) is int else value
    if found is not None and not (isinstance(found, list) and all(type(layer) is int for layer in found)):
        raise InputError("adapter_config.json: layers_to_transform must be a number or a list of numbers", where=where)
    return tuple(found) if found else None  # peft: an empty list is all layers
