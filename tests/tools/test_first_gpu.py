"""tools/first_gpu.py: parts run one after the other, whatever becomes of one; what each needs and is left out for."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from tools.first_gpu import LEFT_OUT, ROOT, TIMED_OUT, Part, parts, run_parts


def say(text: str, code: int = 0) -> tuple[str, ...]:
    return (sys.executable, "-c", f"print({text!r}); raise SystemExit({code})")


def test_it_goes_on_after_a_fault(tmp_path, capsys):
    found = [
        Part("proofs", say('{"sound": true}'), 1.0, needs_card=False),
        Part("fails", say("a kernel is missing", 3), 1.0),
        Part("hangs", (sys.executable, "-c", "import time; print('here', flush=True); time.sleep(60)"), 0.05),
        Part("absent", (str(tmp_path / "no such program"),), 1.0),
        Part("works", say("all well"), 1.0),
    ]
    rows = run_parts(found, tmp_path, seconds=40, has_card=True)
    assert [(row.part, row.exit_code) for row in rows] == [
        ("proofs", 0), ("fails", 3), ("hangs", TIMED_OUT), ("absent", 127), ("works", 0),
    ]  # fmt: skip
    assert (rows[1].last_line, rows[2].last_line, rows[4].last_line) == ("a kernel is missing", "here", "all well")
    assert (tmp_path / "proofs.json").read_text() == '{"sound": true}\n'
    with (tmp_path / "steps.csv").open(newline="") as file:
        assert [row["part"] for row in csv.DictReader(file)] == [part.name for part in found]
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_without_a_card_or_time_parts_are_left_out_and_said_so(tmp_path, capsys):
    rows = run_parts([Part("tests", say("never"), 1.0)], tmp_path, seconds=40, has_card=False)
    assert (rows[0].exit_code, rows[0].last_line) == (LEFT_OUT, "left out: torch sees no CUDA device")
    rows = run_parts([Part("works", say("never"), 1.0, needs_card=False)], tmp_path, seconds=0, has_card=False)
    assert (rows[0].exit_code, rows[0].last_line) == (LEFT_OUT, "left out: no time")


def test_what_it_starts_exists(tmp_path):
    for part in parts(tmp_path):
        for word in part.command[1:]:
            assert not word.startswith(str(ROOT)) or Path(word).exists(), word
    assert parts(tmp_path)[0].command[3:] == ("doctor", "--prove", "--json")
