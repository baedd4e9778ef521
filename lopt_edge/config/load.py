"""A Config from a YAML file and flags: every mistake found in one pass, each with its place.

The rule: flags win over the file, all mistakes are collected and shown together, and each names its line in the file or
its flag; an unknown key is answered with the nearest known one. What the settings are is settings.py's, what
contradicts what is rules.py's.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from lopt_edge.config.aliases import ADVICE, ALIASES
from lopt_edge.config.rules import PATHS, method_errors
from lopt_edge.config.settings import Config
from lopt_edge.config.yaml_file import read_yaml
from lopt_edge.errors import InputError, InputErrors, raise_collected
from lopt_edge.plan.methods import owners_of


def file_errors(named: Mapping[str, str | None]) -> list[InputError]:
    """The errors of files that settings name and that are not there, or are folders."""
    found = {name: Path(value) for name, value in named.items() if value is not None}
    return [
        InputError("is a folder" if path.exists() else "no such file", where=f"{name} {path}", fix="check the path")
        for name, path in found.items()
        if not path.exists() or path.is_dir()
    ]


def load_config(
    path: str | Path | None = None, overrides: Mapping[str, Any] | None = None, *, placeholder: str | None = None
) -> Config:
    """A Config from a YAML file and overrides. Raises InputError(s) that name every mistake.

    `placeholder` stands for needed settings that were not given, for a config that is only printed.
    """
    values, lines, errors = ({}, {}, []) if path is None else _in_our_words(path, *read_yaml(Path(path)))
    flags = {key: value for key, value in (overrides or {}).items() if value is not None}
    errors += [_unknown_key(key, _place(key, path, lines)) for key in values if key not in Config.model_fields]
    errors += [_unknown_key(key, f"--{key.replace('_', '-')}") for key in flags if key not in Config.model_fields]
    known = {key: value for key, value in {**values, **flags}.items() if key in Config.model_fields}
    if placeholder is not None:
        needed = [name for name, field in Config.model_fields.items() if field.is_required()]
        known = {**dict.fromkeys(needed, placeholder), **known}

    def where(key: str) -> str:
        return f"--{key.replace('_', '-')}" if key in flags or key not in values else _place(key, path, lines)

    try:
        config = Config(**known)
    except ValidationError as error:
        faults = {str(fault["loc"][0]): dict(fault) for fault in error.errors()}
        errors += [_as_input_error(fault, where(key)) for key, fault in faults.items()]
        config = _healed(known, faults)
    for found in method_errors(config):
        errors.append(InputError(found.what, where=where(found.setting), fix=found.fix))
    raise_collected(errors)
    return config


def _in_our_words(
    path: str | Path, values: dict[str, Any], lines: dict[str, int]
) -> tuple[dict[str, Any], dict[str, int], list[InputError]]:
    """A file's values and lines with other tools' keys read as ours (aliases.py); errors for two keys of one setting."""
    errors = []
    for alias in [key for key in values if key in ALIASES]:
        ours = ALIASES[alias]
        if ours in values:
            where = _place(alias, path, lines)
            errors.append(InputError(f"means the same as {ours} in line {lines[ours]}", where=where, fix="keep one"))
            del values[alias]
        else:
            values[ours], lines[ours] = values.pop(alias), lines[alias]
    return values, lines, errors


def _healed(known: Mapping[str, Any], faults: Mapping[str, Any]) -> Config:
    """The settings without those that are wrong, so that the others can be looked at too."""
    needed = [name for name, field in Config.model_fields.items() if field.is_required()]
    sound = {key: value for key, value in known.items() if key not in faults}
    if "method" in faults:  # nothing can be said of its options
        sound = {key: value for key, value in sound.items() if not owners_of(key)}
    return Config(**{**dict.fromkeys(needed, "(needed)"), **sound})


@contextmanager
def placed(path: str | Path | None, flags: Mapping[str, Any]) -> Iterator[None]:
    """A context in which an error about a setting that only the model or the data show gets the setting's place in the
    file, or its flag."""
    try:
        yield
    except InputErrors as errors:
        raise InputErrors([_placed(error, path, flags) for error in errors.errors]) from None
    except InputError as error:
        raise _placed(error, path, flags) from None


def _placed(error: InputError, path: str | Path | None, flags: Mapping[str, Any]) -> InputError:
    key = error.where.replace(":", " ").split(" ")[0]
    if key not in Config.model_fields:
        return error
    lines = {} if path is None else _in_our_words(path, *read_yaml(Path(path)))[1]
    if flags.get(key) is not None:
        place = f"--{key.replace('_', '-')}"
    elif key in lines:
        place = _place(key, path, lines)
    else:
        return error
    return type(error)(error.what, where=place + error.where[len(key) :], fix=error.fix)


def _place(key: str, path: str | Path | None, lines: dict[str, int]) -> str:
    return f"{path}:{lines[key]}: {key}" if key in lines else f"{path}: {key}"


def _unknown_key(key: str, where: str) -> InputError:
    if key in ADVICE:
        return InputError("is another tool's setting", where=where, fix=ADVICE[key])
    near = [ALIASES.get(name, name) for name in difflib.get_close_matches(key, [*Config.model_fields, *ALIASES], n=1)]
    return InputError("unknown setting", where=where, fix=f"did you mean {near[0]!r}?" if near else "see --help")


def _as_input_error(fault: dict[str, Any], where: str) -> InputError:
    message = str(fault["msg"]).removeprefix("Value error, ").replace("Input should be", "must be")
    if fault["type"] == "missing":
        return InputError("is needed", where=where, fix=Config.model_fields[str(fault["loc"][0])].description or "")
    return InputError(f"{message} (got {str(fault['input'])[:60]!r})", where=where)


DATA = ("data", "eval_data", "retention_data")  # files, folders, hub data sets
KEPT_AS_GIVEN = ("output", "resume", "memory_report")  # of the paths


def with_absolute_paths(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with every path that is there made absolute; a boundary cache may be still to come."""
    found = dict(values)
    for name in (name for name in PATHS if name not in KEPT_AS_GIVEN):
        value = found.get(name)
        if name in DATA and isinstance(value, str) and not Path(value).expanduser().exists():
            from lopt_edge.data.sources import absolute  # not above: most files are one path, and data loads templates

            found[name] = absolute(value)
        elif isinstance(value, str) and ((path := Path(value).expanduser()).exists() or name == "boundary_cache"):
            found[name] = str(path.resolve())
    return found


def settings_text(config: Config) -> str:
    """The settings as given, for `lopt-edge resume`: local paths made absolute."""
    given = config.model_dump(mode="json", exclude_unset=True)
    given = with_absolute_paths(given)
    for name in ("resume", "overwrite"):  # of the command that was given, not of the run
        given.pop(name, None)
    return yaml.safe_dump(given, sort_keys=False, allow_unicode=True)
