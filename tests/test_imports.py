"""The rooms in their order: a folder imports from folders below it only, no file stands in a circle, no file is loose.

An import under TYPE_CHECKING or inside a function is an import. `quant` is a leaf: it imports nothing of lopt_edge.
"""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import lopt_edge

PACKAGE = Path(lopt_edge.__file__).parent
ROOMS = (  # the highest first
    "cli", "comparison",
    "training", "training/session", "training/ranks", "training/pipeline", "training/prepare", "training/checkpoint",
    "doctor", "planning", "adapters", "tracing",
    "run/watch", "run/step", "run/model", "run/kernels", "run/tiers", "run", "run/devices",
    "config", "models",
    "plan/search", "plan/costs", "plan/methods", "plan/schedule", "plan/facts", "plan/facts/families",
    "objectives", "data", "pictures", "system", "units", "errors", "quant",
)  # fmt: skip
LOOSE = {"__init__.py", "errors.py", "units.py", "py.typed"}
FILES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for package in (PACKAGE, PACKAGE.parent / "quant")
    for path in package.rglob("*.py")
}


def imported(path: Path) -> Iterator[str]:
    """The modules of this project that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in FILES else node.module for name in names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        yield from (name for name in names if name in FILES)


def room(module: str) -> str:
    """The folder of a module, or its own name where it lies in `lopt_edge/` itself."""
    path = FILES[module]
    if module.split(".")[0] == "quant":  # a leaf, with the folders in it
        return "quant"
    folder = path.parent.relative_to(PACKAGE).as_posix()
    return path.stem if folder == "." else folder


def test_imports_only_fall() -> None:
    level = {name: place for place, name in enumerate(ROOMS)}
    for module, path in FILES.items():
        if module == "lopt_edge":  # its names resolve on first use
            continue
        for other in imported(path):
            upwards = level[room(other)] < level[room(module)]
            assert not upwards, f"{module} imports {other}, which lies higher ({room(module)} -> {room(other)})"


def test_no_file_stands_in_a_circle() -> None:
    graph = {module: {*imported(path)} - {module} for module, path in FILES.items() if module != "lopt_edge"}
    assert len([*TopologicalSorter(graph).static_order()]) >= len(graph)  # raises CycleError


def test_no_file_is_loose() -> None:
    assert {path.name for path in PACKAGE.iterdir() if path.is_file()} == LOOSE
    assert {room(module) for module in FILES if module != "lopt_edge"} - {"plan"} <= {*ROOMS}


def test_the_planner_knows_neither_torch_nor_the_settings() -> None:
    for path in (PACKAGE / "plan").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.split(".")[0] not in ("torch", "transformers", "bitsandbytes", "peft"), f"{path}: {name}"
                assert not name.startswith("lopt_edge.config"), f"{path}: {name}"


def test_the_type_checker_follows_every_module_that_is_imported() -> None:
    """The types of what it skips, to be quick, would be Any. Of several patterns that fit the longest counts, as there."""
    settings = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]["overrides"]
    actions = {pattern: entry["follow_imports"] for entry in settings for pattern in entry["module"]}
    assert {"skip", "silent"} == {*actions.values()}
    for path in FILES.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                fitting = [each for each in actions if f"{name}.".startswith(f"{each.removesuffix('.*')}.")
                           and (name == each or each.endswith(".*"))]  # fmt: skip
                assert not fitting or actions[max(fitting, key=len)] != "skip", f"{path}: {name}"
