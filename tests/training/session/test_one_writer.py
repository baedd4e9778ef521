"""A session has no god: what is loaded is frozen, and one file writes the run's state."""

from __future__ import annotations

import ast
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest

import lopt_edge
from lopt_edge.training.checkpoint.run_state import RunState
from lopt_edge.training.session.loaded import Loaded, RunContext

PACKAGE = Path(lopt_edge.__file__).parent
STATES = {"state", "run_state"}  # what a RunState is called


def written(path: Path) -> set[str]:
    """The fields of a RunState that a file assigns or changes in place."""
    names, found = {each.name for each in fields(RunState)}, set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and node.attr in names:
            owner = node.value
            if (isinstance(owner, ast.Name) and owner.id in STATES) or (
                isinstance(owner, ast.Attribute) and owner.attr in STATES
            ):
                found.add(node.attr)
    return found


def test_one_file_writes_the_state() -> None:
    writers = {str(path.relative_to(PACKAGE)) for path in (PACKAGE / "training").rglob("*.py") if written(path)}
    assert writers == {"training/session/session.py"}


def test_what_is_loaded_is_frozen() -> None:
    for record in (Loaded, RunContext):
        empty = object.__new__(record)
        with pytest.raises(FrozenInstanceError):
            empty.inputs = None  # type: ignore[misc]
