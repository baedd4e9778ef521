"""A message that cannot be printed ends no run, and no text of a foreign file is a command for the terminal.

The runs are real processes, since it is the process' own stdout and stderr that are lost.
"""

from __future__ import annotations

import io
import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.table import Table
from rich.text import Text

from lopt_edge.cli.terminal import SafeConsole
from lopt_edge.models.folder import find_model
from lopt_edge.models.four_bit import four_bit_folder
from lopt_edge.run.model.lora import ADAPTER_NAME
from lopt_edge.training.checkpoint.folder import CHECKPOINTS, latest
from tools.tiny_runs import log_of, make_config, make_model

pytestmark = pytest.mark.usefixtures("warm_children")

PROGRAM = "import sys; from lopt_edge.cli.main import main; sys.argv[0] = 'lopt-edge'; main()"
PLAN = ("plan", "--gpu", "list")  # printed as any plan is


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """With its 4-bit copy where `make_config` has it, so that no child makes it."""
    model = make_model(tmp_path_factory.mktemp("model") / "tiny")
    four_bit_folder(find_model(str(model)), cache_dir=str(model.parent / "cache"))
    return model


def settings(model: Path, root: Path, **changes: Any):
    config = make_config(model, root, **{"max_steps": 3, **changes})
    (root / "run.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)))
    return config


def command(*words: object) -> list[str]:
    return [sys.executable, "-c", PROGRAM, *map(str, words)]


def started(*words: object, **streams: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command(*words), env={**os.environ, "OMP_NUM_THREADS": "1"}, **streams)


def to_a_closed_pipe(*words: object, **streams: Any) -> int:
    """The exit code of a process whose reader goes away after a byte."""
    process = started(*words, stdout=subprocess.PIPE, **streams)
    assert process.stdout is not None
    process.stdout.read(1)
    process.stdout.close()
    return process.wait(300)


def to_a_full_disk(*words: object) -> int:
    with open("/dev/full", "wb") as full:
        return started(*words, stdout=full, stderr=full).wait(300)


def to_nothing(*words: object) -> int:
    return subprocess.run(
        ["bash", "-c", '"$@" >&- 2>&- <&-', "bash", *command(*words)], timeout=300, check=False
    ).returncode


@pytest.mark.parametrize(
    "run",
    [lambda *words: to_a_closed_pipe(*words, stderr=subprocess.STDOUT), to_a_full_disk, to_nothing],
    ids=["a pipe that is closed", "a full disk", "no streams at all"],
)
def test_a_run_ends_as_it_would(model, tmp_path, run):
    config = settings(model, tmp_path)
    assert run("finetune", tmp_path / "run.yaml") == 0
    output = Path(config.output)
    assert json.loads((output / "run.json").read_text())["totals"]["steps"] == 3
    assert (output / ADAPTER_NAME).stat().st_size > 10_000
    assert len(log_of(config)) == 3, "nothing that was printed went into a file of the run"


def test_a_terminal_that_goes_away_stops_the_run_at_a_checkpoint(model, tmp_path):
    config = settings(model, tmp_path, max_steps=100_000, n_rows=10)
    process, terminal = pty.fork()
    if not process:
        os.environ["OMP_NUM_THREADS"] = "1"
        os.execv(sys.executable, command("finetune", tmp_path / "run.yaml"))
    shown = b""
    while b"tok/s" not in shown:
        shown += os.read(terminal, 1000)
    os.close(terminal)  # the kernel sends SIGHUP, and every write fails from here on
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == 129
    found, faults = latest(Path(config.output) / CHECKPOINTS)
    assert found is not None and faults == [] and found.state["run"]["steps"] > 0


def test_a_printed_result_that_is_lost_is_an_error_but_for_a_reader_who_has_enough():
    with open("/dev/full", "wb") as full:
        process = started(*PLAN, stdout=full, stderr=subprocess.PIPE)
        _, told = process.communicate(timeout=300)
    assert process.returncode == 1
    assert b"stdout cannot be written (No space left on device): the result is lost" in told
    assert to_a_full_disk(*PLAN) == 1
    assert to_a_closed_pipe(*PLAN) == 0


def test_a_letter_that_the_encoding_lacks_is_shown_by_its_number(tmp_path):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}  # read when Python starts: a cold process
    done = subprocess.run(
        ["env", *command("finetune", tmp_path / "näme.yaml")],
        capture_output=True,
        env=environment,
        timeout=300,
        check=False,
    )
    assert done.returncode == 2 and b"n\\xe4me.yaml" in done.stderr and b"Traceback" not in done.stderr


# --- text of foreign files ----------------------------------------------------------------------------------------------

EVIL = "a\x1b]0;title\x07\x1b[2Jb\x9bc\u202ed\ne\tf"
SHOWN = r"\x1b[2Jb\x9bc\u202ed"


@pytest.mark.parametrize("form", ["text", "markup", "cell", "title", "object"])
def test_a_console_sends_no_control_character_of_a_text(form):
    file = io.StringIO()
    console = SafeConsole(file=file, force_terminal=True, color_system="truecolor", width=200, emoji=False)
    table = Table(title=EVIL if form == "title" else None)
    table.add_row(Text(EVIL, style="bold red"))
    what = {"text": EVIL, "markup": f"[red]x[/red]{EVIL}", "cell": table, "title": table, "object": {EVIL: 1}}[form]
    console.print(what)
    raw = file.getvalue()
    without_styles = "".join(piece.partition("m")[2] if at else piece for at, piece in enumerate(raw.split("\x1b[")))
    assert not any(code in without_styles for code in ("\x1b", "\x07", "\x9b", "\u202e")), repr(raw)
    assert form == "object" or (r"a\x1b]0;title" if form == "cell" else SHOWN) in without_styles  # a cell keeps its width
    assert form == "object" or "\x1b[" in raw or form == "text", "the console's own colours stay"


def test_a_stream_keeps_newlines_and_tabs(capsys):
    from lopt_edge.cli.terminal import stream

    stream(EVIL)
    assert capsys.readouterr().out == "a" + r"\x1b]0;title\x07" + SHOWN + "\ne\tf"


def test_names_in_a_models_folder_reach_the_terminal_as_text(model, tmp_path, command):
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["Llama\x1b[31mForCausalLM\x1b]0;x\x07"]
    (folder / "config.json").write_text(json.dumps(config))
    settings(folder, tmp_path)
    code, out, err = command("finetune", tmp_path / "run.yaml", "--dry-run")
    assert code == 0 and "\x1b" not in out + err and r"Llama\x1b[31m" in err
