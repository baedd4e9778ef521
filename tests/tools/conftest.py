"""A tool in the tests' own process, which has imported torch already. Processes that a tool itself starts are real."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def run_tool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """(exit code, stdout, stderr) of `python tools/NAME.py WORDS`."""

    def call(name: str, *words: object) -> tuple[int, str, str]:
        with monkeypatch.context() as patch:
            patch.syspath_prepend(TOOLS)  # where a script finds its siblings
            patch.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
            code: str | int | None = 0
            try:
                importlib.import_module(name).main()
            except SystemExit as end:
                code = end.code
        out, err = capsys.readouterr()
        return (1, out, f"{err}{code}\n") if isinstance(code, str) else (code or 0, out, err)

    return call
