"""The study's committed data and configs: whole, disjoint, small; and its tool writes the same bytes twice."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lopt_edge.config.load import load_config
from lopt_edge.config.rules import no_effect_warnings

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "examples" / "study"
TASKS, SPLITS = ("broad", "narrow"), ("train", "valid", "test")


def rows(task: str, split: str, folder: Path = STUDY) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / f"{task}-{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def sentences(task: str, split: str) -> set[str]:
    return {text.strip() for row in rows(task, split) for text in row.values()}


def check_disjoint(task: str, folder: Path) -> None:
    prompts = [row["prompt"] for split in SPLITS for row in rows(task, split, folder)]
    assert len(prompts) == len(set(prompts))


@pytest.mark.parametrize("task", TASKS)
def test_rows_are_prompts_with_completions_and_no_prompt_stands_twice(task):
    for split in SPLITS:
        found = rows(task, split)
        assert len(found) >= (400 if split == "train" else 100)
        assert all(set(row) == {"prompt", "completion"} and row["prompt"] and row["completion"].strip() for row in found)
    check_disjoint(task, STUDY)


def test_no_sentence_of_the_broad_task_is_in_two_splits():
    train, valid, test = (sentences("broad", split) for split in SPLITS)
    assert not train & valid and not train & test and not valid & test


def test_the_narrow_answer_follows_from_the_line_and_no_line_is_in_the_retention_text():
    retention = (STUDY / "retention.txt").read_text(encoding="utf-8")
    for split in SPLITS:
        for row in rows("narrow", split):
            line = row["prompt"].removesuffix("\n#")
            names = re.findall(r"(?:^|, )(\w+)", line[line.index("(") + 1 :])
            answer = row["completion"].strip().split(", ")
            assert answer == [name for name in names if name in answer] and set(names) - set(answer) <= {"self", "cls"}
            if split != "train":
                assert f"{line}\n" not in retention


def test_the_folder_is_small_enough_to_be_committed():
    assert sum(path.stat().st_size for path in STUDY.iterdir()) < 600_000


@pytest.mark.parametrize("task", TASKS)
def test_the_config_is_valid_and_its_files_exist(task, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config(STUDY / f"{task}.yaml")
    assert (config.method, config.seed, config.output) == ("e2e", 0, f"outputs/study-{task}")
    assert no_effect_warnings(config) == []
    assert Path(config.model).is_dir()
    assert all(Path(str(path)).is_file() for path in (config.data, config.eval_data, config.retention_data))
    assert config.max_steps is not None and config.max_steps * config.batch_size >= 0.9 * len(rows(task, "train"))


@pytest.mark.parametrize("runs", [(("1", 0), ("2", 0)), pytest.param((("1", 0), ("1", 7)), marks=pytest.mark.long)])
def test_the_tool_writes_the_same_bytes_twice_and_other_ones_with_another_seed(tmp_path, runs):
    pytest.importorskip("pydoc_data.topics", reason="this Python came without its reference manual")
    written = []
    for hash_seed, seed in runs:
        folder = tmp_path / str(len(written))
        command = [
            sys.executable,
            str(ROOT / "tools" / "make_study_data.py"),
            "--output",
            str(folder),
            "--seed",
            str(seed),
        ]
        command += ["--train-rows", "60", "--heldout-rows", "20"]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONHASHSEED": hash_seed})
        assert done.returncode == 0, done.stderr
        written.append({path.name: path.read_bytes() for path in folder.iterdir()})
        for task in TASKS:
            check_disjoint(task, folder)
            assert len(rows(task, "train", folder)) == 60
    assert len(written[0]) == 7 and (written[0] == written[1]) == (runs[0][1] == runs[1][1])


def test_the_methods_page_has_the_study_s_tables():
    done = subprocess.run(
        [sys.executable, "tools/study.py", "--tables"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    for table in done.stdout.strip().split("\n\n"):
        assert table in page
