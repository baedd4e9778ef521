"""`optimum-cli finetune lopt`: optimum finds the command, hands its words on, and ends with its exit code."""

from __future__ import annotations

from pathlib import Path

import pytest

INTEGRATION = Path(__file__).resolve().parents[2] / "tools" / "optimum-cli"


def test_words_and_exit_code_are_those_of_finetune(monkeypatch, capsys):
    pytest.importorskip("optimum.commands.optimum_cli")
    from optimum.commands.optimum_cli import main

    monkeypatch.syspath_prepend(str(INTEGRATION))
    monkeypatch.setattr("sys.argv", ["optimum-cli", "finetune", "lopt", "--model", "/nowhere", "--data", "x.jsonl"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2 and "output" in capsys.readouterr().err
