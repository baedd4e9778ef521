"""A part of a document that a tool writes: it stands between two marks, and whoever edits the rest leaves it alone.

    <!-- begin: written by tools/NAME.py -->
    <!-- end: written by tools/NAME.py -->

`run` is the whole command line of such a tool: without a flag it writes the block into the document, `--print` prints it,
`--check` exits with 1 where the document shows another one, so that a test can hold it. Only the standard library is used.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def with_block(text: str, block: str, *, tool: str) -> str:
    """The document's text with this block between the tool's marks. Raises SystemExit where they are not there."""
    first, last = (f"<!-- {word}: written by tools/{tool}.py -->" for word in ("begin", "end"))
    before, found, rest = text.partition(first)
    _, closed, after = rest.partition(last)
    if not found or not closed:
        raise SystemExit(f"the document lacks the marks of its block: {first} ... {last}")
    return f"{before}{first}\n{block.strip()}\n{last}{after}"


def run(make: Callable[[], str], document: Path, *, tool: str, description: str | None) -> None:
    """The command line of a tool that writes one block of one document."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    wanted = parser.add_mutually_exclusive_group()
    wanted.add_argument("--print", action="store_true", dest="only_print", help="print the block, write nothing")
    wanted.add_argument("--check", action="store_true", help="exit with 1 if the document shows another block")
    options = parser.parse_args()
    block = make()
    if options.only_print:
        print(block.strip())
        return
    text = document.read_text(encoding="utf-8")
    written = with_block(text, block, tool=tool)
    if not options.check:
        document.write_text(written, encoding="utf-8")
    elif written != text:
        raise SystemExit(f"{document.relative_to(ROOT)} is out of date; run python tools/{tool}.py")
