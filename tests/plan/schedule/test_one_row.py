"""An op is one row: the table is whole, and an op that is put into it is planned, checked, timed, counted and run.

The toy op lives in a copy of the package, as its kind, its row, its writer and its runner; `finetune` is run there.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import lopt_edge
from lopt_edge.plan.schedule.effects import COMPUTE, EFFECTS, ITEMS, Kind, effect_of
from lopt_edge.plan.schedule.ops import Plan
from lopt_edge.plan.schedule.validate import _RULES
from tools.tiny_runs import make_config, make_model

pytestmark = pytest.mark.usefixtures("warm_children")

PACKAGE = Path(lopt_edge.__file__).parent
ROW = """    (Kind.TOY, ""): Effect(
        "compute", "a copy of the hidden states", makes=(Thing("toy"),), rule="next layer", seconds="align"),
"""
RUNNER = """    def _toy(self, state, op):
        state.toy_BTD = state.hidden_BTD.clone()

"""
WRITER = """    if kind.reads is None:
        yield Op(Kind.TOY, 0, micro_batch)
"""
TOY = {  # file -> what is put in, before what
    "plan/schedule/effects.py": (
        ('    TOY = "TOY"\n', '    STORE = "STORE"\n'),
        (ROW, '    (Kind.FETCH, ""): Effect('),
    ),
    "plan/schedule/build.py": ((WRITER, "    if kind.teacher:\n"),),
    "run/step/executor.py": (
        ("            Kind.TOY: self._toy,\n", "            Kind.HOLD:"),
        (RUNNER, "    def _hold(self"),
    ),
}


def copied(folder: Path) -> Path:
    """A copy of the package with the toy op."""
    for package in (PACKAGE, PACKAGE.parent / "quant"):
        shutil.copytree(package, folder / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    for name, additions in TOY.items():
        path = folder / "lopt_edge" / name
        text = path.read_text()
        for what, where in additions:
            assert text.count(where) == 1, (name, where)
            text = text.replace(where, what + where)
        path.write_text(text)
    return folder


def test_a_toy_op_is_planned_checked_timed_counted_and_run(tmp_path: Path) -> None:
    copy, model = copied(tmp_path / "copy"), make_model(tmp_path / "tiny")
    config = make_config(model, tmp_path, method="e2e", max_steps=3, batch_size=2, grad_accum=1)
    report = tmp_path / "report"
    file = tmp_path / "toy.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)))
    code = "from lopt_edge.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "finetune", str(file), "--memory-report", str(report)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"},
        cwd=copy,
    )
    assert done.returncode == 0, done.stderr
    run = json.loads((Path(config.output) / "run.json").read_text())
    assert "\nEMBED mb=0\nTOY 0 mb=0\nFORWARD 0" in run["plan"]["text"]
    rows = json.loads(report.with_suffix(".json").read_text())["ops"]
    place = next(i for i, row in enumerate(rows) if row["op"].startswith("TOY"))
    toy, following = rows[place], rows[place + 1]
    held = [sum(row["predicted"]["held"].values()) for row in (toy, following)]
    measured = [sum(row["measured"]["held"].values()) for row in (toy, following)]
    assert held[1] - held[0] == measured[1] - measured[0] > 0, "the copy is counted as it is"


def test_every_kind_has_a_row_whose_names_exist() -> None:
    assert {kind for kind, _ in EFFECTS} == {*Kind} and {item for _, item in EFFECTS} <= {"", *ITEMS}
    assert {row.rule for row in EFFECTS.values() if row.role in ("compute", "beside")} <= {"", *_RULES}
    assert all(row.rule == "" for row in EFFECTS.values() if row.role in ("up", "down", "wait", "evict"))
    conditions = {thing.when for row in EFFECTS.values() for thing in (*row.makes, *row.frees)} - {""}
    assert all(callable(getattr(Plan, name)) for name in conditions)
    assert {row.moves for row in EFFECTS.values() if row.role in ("up", "down")} == {"weights", "input", "pages", "group"}
    assert Kind.AVERAGE not in COMPUTE and effect_of(Kind.READ, "nothing").role == "compute"
    assert all(row.says for row in EFFECTS.values())
