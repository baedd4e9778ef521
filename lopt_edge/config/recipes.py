"""The recipes that come with the package: whole settings files for usual jobs, each with what it is for in its first line.

The rule: each is an ordinary settings file that a test plans and dry-runs; a copy of it is a user's own. They lie in
lopt_edge/recipes, so an installed package has them.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from lopt_edge.errors import InputError, RunError

FOLDER = Path(__file__).parents[1] / "recipes"


@dataclass(frozen=True)
class Recipe:
    """A recipe: its name, what it is for, its text."""

    name: str
    what: str
    text: str


def recipes() -> list[Recipe]:
    """All recipes by name."""
    found = []
    for path in sorted(FOLDER.glob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        found.append(Recipe(path.stem, text.splitlines()[0].removeprefix("# ").removesuffix("."), text))
    return found


def copy_recipe(name: str, target: Path | None) -> Path:
    """Write a recipe beside the user (`NAME.yaml`, or `target`); returns where. Raises InputError, RunError."""
    known = {recipe.name: recipe for recipe in recipes()}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=2)
        fix = f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(known)}"
        raise InputError("no such recipe", where=name, fix=fix)
    path = Path(f"{name}.yaml") if target is None else target
    write_new(path, known[name].text)
    return path


def write_new(path: Path, text: str) -> None:
    """Write a settings file that is not there yet. Raises InputError where it is, RunError where it cannot be written."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise InputError("exists already", where=str(path), fix="name another file") from None
    except OSError as error:
        raise RunError(f"cannot be written: {error.strerror}", where=str(path)) from None
