"""A method is one file: what the records say is whole, and a file put into the folder is a method that trains.

The toy method lives in a copy of the package, in one new file, and is run through the command line in a process of its own.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml

import lopt_edge
from lopt_edge.config.settings import Config, field_names
from lopt_edge.plan.methods import METHODS, option_classes, owners_of
from lopt_edge.plan.methods.method import Options
from tools.tiny_runs import make_config, make_model, metrics_of

pytestmark = pytest.mark.usefixtures("warm_children")

PACKAGE = Path(lopt_edge.__file__).parent
TOY = '''"""Toy: the first `--toy-layers` layers rest, and the others learn the task on every other step only."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from lopt_edge.plan.methods import method
from lopt_edge.plan.methods.course import Course, Phase
from lopt_edge.plan.methods.method import Method, Problem, RunSettings
from lopt_edge.plan.schedule.build import StepKind
from lopt_edge.plan.schedule.segments import Segment


class Options(method.Options):
    """How deep it rests."""

    toy_layers: int = Field(1, ge=1, description="toy: layers that rest")


def course(options: Options, n_layers: int) -> Course:
    split, last = options.toy_layers, n_layers - 1
    upper = StepKind("upper", (Segment(0, 0, split - 1, "rest"), Segment(1, split, last, "task")))
    whole = StepKind("whole", (Segment(0, 0, last, "task"),))
    return Course("toy", (whole, upper), (Phase(1.0, ("whole", "upper")),))


def problems(options: Options, run: RunSettings) -> Iterator[Problem]:
    if run.keep_best:
        yield Problem("keep_best", "toy has no best", "leave it out")


METHODS = (Method("toy", Options, course, problems),)
'''


@pytest.fixture
def with_toy(tmp_path: Path) -> Path:
    """A copy of the package with one file more."""
    shutil.copytree(PACKAGE, tmp_path / "copy" / "lopt_edge", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(PACKAGE.parent / "quant", tmp_path / "copy" / "quant", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "copy" / "lopt_edge" / "plan" / "methods" / "toy.py").write_text(TOY)
    return tmp_path / "copy"


def run(copy: Path, *words: str) -> subprocess.CompletedProcess[str]:
    code = "from lopt_edge.cli.main import main; main()"
    environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, env=environment, cwd=copy)


def test_a_toy_method_in_one_file_trains_and_is_refused_like_the_others(with_toy: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "tiny")
    config = make_config(model, tmp_path, method="e2e", max_steps=4, batch_size=1, grad_accum=2)
    settings = {**config.model_dump(mode="json", exclude_unset=True), "method": "toy", "toy_layers": 2}
    file = tmp_path / "toy.yaml"
    file.write_text(yaml.safe_dump(settings))
    done = run(with_toy, "finetune", str(file))
    assert done.returncode == 0, done.stderr
    steps, _ = metrics_of(config)
    assert [len(line["grad_norm"]) for line in steps] == [1, 2, 1, 2], "the two kinds of step in turn"
    assert [line["grad_norm"][0] > 0 for line in steps] == [True, False, True, False]
    again = tmp_path / "again"
    wrong = run(with_toy, "finetune", str(file), "--output", str(again), "--keep-best", "--train-layers", "2")
    told = " ".join(wrong.stderr.split())
    assert wrong.returncode == 2 and "toy has no best" in told and "belongs to method top-layers" in told, told
    assert "--toy-layers" in run(with_toy, "finetune", "--help").stdout


def test_no_other_file_compares_a_methods_name() -> None:
    names = "|".join(map(re.escape, METHODS))
    compared = re.compile(rf"""method\w*\)?\s*(==|!=|in|not in)\s*[(\[{{]?\s*["']({names})["']""")
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name != "methods":
            found = compared.search(path.read_text())
            assert found is None, f"{path}: {found and found[0]}"


def test_every_option_has_one_home() -> None:
    own = Counter(name for one in option_classes() for name in one.__annotations__ if name not in Options.model_fields)
    assert not [name for name, n_homes in own.items() if n_homes > 1], "two methods' options share a name"
    assert {*own} <= {*Config.model_fields} and sorted(field_names()) == sorted(Config.model_fields)
    for name in own:
        assert owners_of(name), f"{name} belongs to no method"
    assert owners_of("lr") == ()
