"""Families: what a `model_type` means, one record each (family.py), found by lying in a file of this folder.

A file holds the families of one maker and declares `FAMILIES`, and `WRAPPERS` where it has multimodal models around them;
no list names the files. To add a family: its record here, a tiny model of it in tools/tiny_models.py, and the programs of
its layers (tools/trace_bytes.py). tests/plan/facts hold the record against transformers' own config and modules,
tests/laws/test_families.py the logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from lopt_edge.errors import InputError
from lopt_edge.plan.facts.families.family import Family, Wrapper


def _found(kind: str) -> Iterator[Any]:
    for file in iter_modules(__path__):
        yield from getattr(import_module(f"{__name__}.{file.name}"), kind, ())


PLAIN = "llama"  # the family that most others differ from, for whoever needs any
FAMILIES: Mapping[str, Family] = {one.name: one for one in sorted(_found("FAMILIES"), key=lambda one: one.name)}
WRAPPERS: Mapping[str, Wrapper] = {one.name: one for one in sorted(_found("WRAPPERS"), key=lambda one: one.name)}


def name_of(config: Any) -> Any:
    """The name of a config's family: of a parsed config.json, or of transformers' own; whatever stands there."""
    return config.get("model_type") if isinstance(config, dict) else getattr(config, "model_type", None)


def unsupported(name: object, why: str) -> str:
    """What is said of a family that is not supported, by its name and why."""
    return f"model_type {str(name)[:60]!r} is not supported{why}"


def family_of(model_type: object, *, where: str = "config.json") -> Family:
    """The family that a config names; `where` is the config's place in errors. Raises InputError for what is not here."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise InputError(
            f"model_type {str(model_type)[:60]!r} is not supported",
            where=where,
            fix=f"supported decoder-only families: {', '.join(FAMILIES)}; inside multimodal models: {', '.join(WRAPPERS)}",
        )
    return FAMILIES[model_type]
