"""Draws the rooms of the package and what they import, as the Mermaid picture of docs/architecture.md.

    python tools/draw_architecture.py            write the picture into docs/architecture.md
    python tools/draw_architecture.py --print    print it, write nothing
    python tools/draw_architecture.py --check    exit with 1 if the document shows another one

A room is a folder with Python files; a file directly in lopt_edge/ is a room of its own, and so is quant/. An import
counts wherever it stands: in a function, or under TYPE_CHECKING. The lazily resolved names of lopt_edge/__init__.py count,
too. The picture leaves out an arrow that follows from others (transitive reduction), so it shows what lies directly on
what; the counts under it are of all arrows. A level is the longest way down to a room that imports nothing.

The rule: arrows fall. A circle between rooms has no lowest one, so its rooms share a level, are joined by thick arrows, and
are named under the picture. Only the standard library is used, and nothing is imported to be looked at.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.document_block import ROOT, run

PACKAGES = ("lopt_edge", "quant")

Graph = Mapping[str, frozenset[str]]


def source_files(root: Path) -> dict[str, Path]:
    """The modules by their dotted names; a package goes by the name of its folder."""
    found = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def room_of(module: str, files: Mapping[str, Path]) -> str:
    """The folder of a module, seen from lopt_edge/; the module itself where it lies directly there."""
    parts = module.split(".")
    folder = parts if files[module].name == "__init__.py" else parts[:-1]
    if parts[0] != "lopt_edge":
        return parts[0]
    return "/".join(folder[1:]) or (parts[1] if len(parts) > 1 else "public names")


def imports_of(module: str, files: Mapping[str, Path]) -> Iterator[str]:
    """The modules that one imports, among those that were given."""
    package = module if files[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(files[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name for alias in node.names for name in [alias.name] if name in files)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                name = f"{base}.{alias.name}"
                if name in files or base in files:
                    yield name if name in files else base


def room_graph(root: Path = ROOT) -> Graph:
    """The rooms that each room imports. A folder that holds no more than an empty `__init__.py` is no room."""
    files = source_files(root)
    found: dict[str, set[str]] = {}
    for module, path in files.items():
        room = room_of(module, files)
        below = {room_of(name, files) for name in imports_of(module, files)} - {room}
        if below or path.name != "__init__.py":
            found.setdefault(room, set()).update(below)
    return {room: frozenset(below & found.keys()) for room, below in found.items()}


def reachable(graph: Graph, room: str) -> frozenset[str]:
    """The rooms that one can come to by imports; itself only where it lies on a circle."""
    seen: set[str] = set()
    open_rooms = list(graph[room])
    while open_rooms:
        if (one := open_rooms.pop()) not in seen:
            seen.add(one)
            open_rooms += graph[one]
    return frozenset(seen)


def circles(graph: Graph) -> list[tuple[str, ...]]:
    """The sets of rooms that reach each other."""
    reach = {room: reachable(graph, room) for room in graph}
    found = {tuple(sorted(other for other in reach[room] if room in reach[other])) for room in graph if room in reach[room]}
    return sorted(found)


def levels(graph: Graph) -> dict[str, int]:
    """The level of each room: 0 imports nothing, every other one lies above all that it imports; a circle has one level."""
    together = {room: frozenset(circle) for circle in circles(graph) for room in circle}
    found: dict[str, int] = {}

    def level(room: str) -> int:
        if room not in found:
            circle = together.get(room, frozenset({room}))
            below = {other for one in circle for other in graph[one]} - circle
            found.update(dict.fromkeys(circle, 1 + max((level(other) for other in below), default=-1)))
        return found[room]

    return {room: level(room) for room in graph}


def reduced(graph: Graph) -> list[tuple[str, str]]:
    """The arrows without those that follow from others. Arrows inside a circle all stay."""
    reach = {room: reachable(graph, room) for room in graph}
    together = {room: frozenset(circle) for circle in circles(graph) for room in circle}
    kept = []
    for room in sorted(graph):
        own = together.get(room, frozenset({room}))
        below = {other for one in own for other in graph[one]} - own
        for other in sorted(graph[room]):
            its = together.get(other, frozenset({other}))
            if other in own or not any(other in reach[one] for one in below - its):
                kept.append((room, other))
    return kept


def picture(graph: Graph) -> str:
    """The block of docs/architecture.md: the Mermaid flowchart and what it leaves out, in numbers."""
    height, found = levels(graph), circles(graph)
    rooms = sorted(graph, key=lambda room: (-height[room], room))
    names = {room: room.replace("/", "_").replace(" ", "_") for room in rooms}
    circular = {(a, b) for circle in found for a in circle for b in circle}
    drawn = sorted(reduced(graph), key=lambda arrow: (-height[arrow[0]], arrow))  # top down, as Mermaid lays them out
    lines = ["```mermaid", "flowchart TD", *(f'    {names[room]}["{room}"]' for room in rooms)]
    lines += [f"    {names[a]} {'==>' if (a, b) in circular else '-->'} {names[b]}" for a, b in drawn]
    n_arrows = sum(len(below) for below in graph.values())
    counts = f"{len(graph)} rooms on {max(height.values()) + 1} levels, {n_arrows} arrows, of which {len(drawn)} are drawn"
    lines += ["```", "", f"{counts}; circles: {'; '.join(' <-> '.join(circle) for circle in found) or 'none'}."]
    lines += ["", "| level | rooms |", "|---:|---|"]
    for level in range(max(height.values()), -1, -1):
        lines.append(f"| {level} | {', '.join(f'`{room}`' for room in rooms if height[room] == level)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run(lambda: picture(room_graph()), ROOT / "docs" / "architecture.md", tool="draw_architecture", description=__doc__)
