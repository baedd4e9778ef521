"""What pydantic finds wrong with settings, as errors that a user reads: what, where, what to do.

The rule: a setting's mistake is told in the same words whether it stood in a file, a flag or a call from Python; an unknown
name is answered with what it may have meant.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from lopt_edge.config.aliases import ADVICE, ALIASES
from lopt_edge.errors import InputError, InputErrors


class SettingsError(InputErrors):
    """The errors of settings that were given in Python; `faults` are pydantic's, by setting."""

    def __init__(self, faults: Mapping[str, dict[str, Any]], fields: Mapping[str, Any]) -> None:
        self.faults = faults
        super().__init__(errors_of(faults, fields, where=lambda key: key))


def faults_of(error: ValidationError) -> dict[str, dict[str, Any]]:
    """The first fault of each setting."""
    found: dict[str, dict[str, Any]] = {}
    for fault in error.errors():
        found.setdefault(str(fault["loc"][0]) if fault["loc"] else "", dict(fault))
    return found


def errors_of(
    faults: Mapping[str, dict[str, Any]], fields: Mapping[str, Any], where: Callable[[str], str]
) -> list[InputError]:
    """An error for each fault, at the place that `where` gives."""
    return [_error(key, fault, fields, where(key)) for key, fault in faults.items()]


def unknown(key: str, fields: Sequence[str] | Mapping[str, Any], where: str) -> InputError:
    """The error for a name that is no setting."""
    if key in ADVICE:
        return InputError("is another tool's setting", where=where, fix=ADVICE[key])
    near = [ALIASES.get(name, name) for name in difflib.get_close_matches(key, [*fields, *ALIASES], n=1)]
    return InputError("unknown setting", where=where, fix=f"did you mean {near[0]!r}?" if near else "see --help")


def _error(key: str, fault: dict[str, Any], fields: Mapping[str, Any], where: str) -> InputError:
    message = str(fault["msg"]).removeprefix("Value error, ").replace("Input should be", "must be")
    if fault["type"] == "extra_forbidden":
        return unknown(key, fields, where)
    if fault["type"] == "missing":
        return InputError("is needed", where=where, fix=fields[key].description or "")
    return InputError(f"{message} (got {str(fault['input'])[:60]!r})", where=where)
