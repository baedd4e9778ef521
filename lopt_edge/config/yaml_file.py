"""Reads a run's YAML file into a flat mapping and the line of each key. A config may come from anybody.

Rules: at most `MAX_BYTES` (PyYAML reads some 100 kB a second, so this bounds the time), at most `MAX_DEPTH` levels, no
anchors and aliases (nine lines of them can stand for a billion values), no tag beyond plain YAML's, no number longer than
`MAX_NUMBER` characters (Python refuses to print one of 4,300 digits). The text is parsed once; the values are made from
the same nodes as the lines. Each fault is an InputError that names the file and, where there is one, the line.

Not here: which keys there are and what they may be (settings.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from lopt_edge.errors import InputError

MAX_BYTES = 64 * 1024
MAX_DEPTH = 64
MAX_NUMBER = 100
NUMBER_TAGS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class _Refused(Exception):
    """A thing that a YAML file must not hold, and the line where it does."""

    def __init__(self, what: str, line: int) -> None:
        super().__init__(what)
        self.line = line


class _Loader(yaml.SafeLoader):
    """A SafeLoader with the limits of this file."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise _Refused("anchors and aliases (&, *) are not taken", line)
        if self.depth >= MAX_DEPTH:
            raise _Refused(f"nested deeper than {MAX_DEPTH} levels", line)
        self.depth += 1
        try:
            node: yaml.Node | None = super().compose_node(parent, index)
        finally:
            self.depth -= 1
        if isinstance(node, yaml.ScalarNode) and node.tag in NUMBER_TAGS and len(node.value) > MAX_NUMBER:
            raise _Refused(f"a number of more than {MAX_NUMBER} characters", line)
        return node


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The values of a file by normalised key (hyphens are underscores), and the line of each key. Raises InputError(s)."""
    node, values = _parsed(_text(path), path)
    if values is None:
        return {}, {}
    if not isinstance(values, dict) or not isinstance(node, yaml.MappingNode):
        raise InputError("must hold 'key: value' lines", where=str(path))
    lines: dict[str, int] = {}
    for key, _ in node.value:
        name, line = _normal(key.value), key.start_mark.line + 1
        if name in lines:
            what = f"is given twice (first in line {lines[name]})"
            raise InputError(what, where=f"{path}:{line}: {name[:80]}", fix="keep one")
        lines[name] = line
    return {_normal(key): value for key, value in values.items()}, lines


def _text(path: Path) -> str:
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise InputError("is not a regular file", where=str(path))
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot be read ({reason})", where=str(path), fix="check the config's path") from None
    if len(raw) > MAX_BYTES:
        raise InputError(f"has more than {MAX_BYTES:,} bytes", where=str(path), fix="a config is some lines of settings")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise InputError("is not UTF-8 text", where=str(path)) from None


def _parsed(text: str, path: Path) -> tuple[yaml.Node | None, Any]:
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return node, None if node is None else loader.construct_document(node)
    except _Refused as error:
        what = f"is not valid YAML for a config: {error}"
        raise InputError(what, where=f"{path}:{error.line}", fix="write plain 'key: value' lines") from None
    except Exception as error:  # PyYAML raises errors of any kind for a tag that does not fit its value (!!int x)
        raise InputError(f"is not valid YAML: {' '.join(str(error).split())[:300]}", where=str(path)) from None


def _normal(key: Any) -> str:
    return str(key).replace("-", "_")
