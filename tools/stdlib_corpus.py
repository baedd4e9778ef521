"""The example's text: the running Python's own standard library, read the same way each time.

The example model, its fine-tuning rows and its retention text all come from here, because every machine that can run
the project already has this text: nothing is downloaded, nobody's data is asked for.

The rule it keeps: whole files are either `train` or `heldout`, by a hash of their name. So what is written from
held-out files (evaluation rows, retention text) is text that the pretraining never saw, not even through a neighbouring
function. The order is the sorted order of names; one Python version gives one corpus.

What it does not do: it tokenizes nothing and writes no file. Tests, tables and generated modules are left out, since
they teach a small model lists of numbers instead of English. Text is Python's own, under the PSF licence.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import re
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SKIPPED_FOLDERS = {
    "site-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "encodings",  # tables of code points
    "pydoc_data",  # one string of 700 KB
    "turtledemo",
    "__pycache__",
    "__phello__",
}
SKIPPED_PREFIXES = ("_sysconfigdata", "config-")  # say how this machine's Python was built
HELDOUT_ONE_IN = 10  # files


@dataclass(frozen=True)
class SourceFile:
    module: str  # "json.decoder"
    text: str
    heldout: bool


@dataclass(frozen=True)
class DocEntry:
    """A documented function, method or class."""

    signature: str  # "textwrap.TextWrapper.wrap(self, text)"
    docstring: str  # dedented, whole

    @property
    def paragraph(self) -> str:
        """The first paragraph on one line."""
        return " ".join(self.docstring.split("\n\n", 1)[0].split())

    @property
    def sentence(self) -> str:
        """The first sentence of the first paragraph; the paragraph where no sentence ends."""
        return re.split(r"(?<=[a-z0-9)'\"`][.!?]) (?=[A-Z`'\"(])", self.paragraph, maxsplit=1)[0]


def read_files() -> list[SourceFile]:
    """The usable source files of the standard library, by name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.intersection(relative.parts) or relative.parts[0].startswith(SKIPPED_PREFIXES):
            continue
        with tokenize.open(path) as source:
            text = source.read().strip() + "\n"
        if len(text) > 200:  # characters; below it stands only an import
            files.append(SourceFile(_module_name(relative), text, _is_heldout(relative.as_posix())))
    return files


def _module_name(relative: Path) -> str:
    parts = relative.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def _is_heldout(name: str) -> bool:
    return hashlib.sha256(name.encode()).digest()[0] * HELDOUT_ONE_IN < 256


def doc_entries(file: SourceFile) -> Iterator[DocEntry]:
    """The file's documented definitions in source order; private names are included, they are documented too."""
    yield from _entries_below(ast.parse(file.text), file.module)


def _entries_below(node: ast.AST, prefix: str) -> Iterator[DocEntry]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If | ast.Try):  # definitions that depend on the platform
            yield from _entries_below(child, prefix)
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        name = f"{prefix}.{child.name}"
        docstring = ast.get_docstring(child)
        if docstring and docstring.strip():
            yield DocEntry(_signature(child, name), inspect.cleandoc(docstring))
        if isinstance(child, ast.ClassDef):
            yield from _entries_below(child, name)


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, name: str) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {name}({bases})" if bases else f"class {name}"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    word = "async " if isinstance(node, ast.AsyncFunctionDef) else ""
    return f"{word}{name}({ast.unparse(node.args)}){returns}"


def reference_page(file: SourceFile) -> str:
    """The file's docstrings as one page of plain text, or "" where it has none: English with little code between."""
    module_docstring = ast.get_docstring(ast.parse(file.text))
    parts = [f"{file.module}\n"]
    if module_docstring:
        parts.append(inspect.cleandoc(module_docstring) + "\n")
    for entry in doc_entries(file):
        body = "\n".join(f"    {line}".rstrip() for line in entry.docstring.splitlines())
        parts.append(f"{entry.signature}\n{body}\n")
    return "\n".join(parts) if len(parts) > 1 else ""
