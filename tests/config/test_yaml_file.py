"""The reader of a run's YAML file: limits, lines, and an InputError that names file and line."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from lopt_edge.config.yaml_file import MAX_BYTES, MAX_DEPTH, read_yaml
from lopt_edge.errors import InputError

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{here}: &{here} [{', '.join([f'*{before}'] * 9)}]\n" for before, here in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.yaml"


def test_values_and_lines(path):
    path.write_text("# a run\nmax-steps: 3\n\nlora_targets: [a, b]\n'lr': 2e-4\n")
    values, lines = read_yaml(path)
    assert values == {"max_steps": 3, "lora_targets": ["a", "b"], "lr": "2e-4"}
    assert lines == {"max_steps": 2, "lora_targets": 4, "lr": 5}
    path.write_text("# nothing\n")
    assert read_yaml(path) == ({}, {})


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        (LAUGHS, 1, "anchors and aliases"),
        ("a: 1\nb: &x 2\n", 2, "anchors and aliases"),
        ("a: 1\nb: *x\n", 2, "anchors and aliases"),
        ("a: 1\nb: " + "[" * (MAX_DEPTH + 1), 2, "deeper than 64 levels"),
        ("a:\n" + "".join(" " * n + "- \n" for n in range(70)), 65, "deeper than 64 levels"),
        ("a: 1\nseed: " + "9" * 5000, 2, "a number of more than 100 characters"),
        ("a: 1\nseed: 0x" + "f" * 5000, 2, "a number of more than 100 characters"),
        ("a: 1\n\na: 2", 3, "given twice"),
    ],
)
def test_what_is_refused_names_its_line(path, text, line, says):
    path.write_text(text)
    start = time.process_time()
    with pytest.raises(InputError, match=says) as caught:
        read_yaml(path)
    assert str(caught.value).startswith(f"{path}:{line}")
    assert time.process_time() - start < 2


LARGE = ["a: {" * 30_000, "[" * 60_000, "- " * 30_000, "? " * 30_000, "'" * 60_000, "!" * 60_000, "a: 1:1" + ":1" * 30_000,
         "<<: {<<: {a: 1}}\n" * 3000]  # fmt: skip


@pytest.mark.parametrize("text", LARGE)
def test_the_largest_files_end_soon(path, text):
    path.write_text(text[:MAX_BYTES])
    start = time.process_time()
    with pytest.raises(InputError, match=r"run\.yaml"):
        read_yaml(path)
    assert time.process_time() - start < 5


def test_a_large_file_and_a_fifo_are_not_read(path):
    path.write_text("a: 1\n" + "#" * MAX_BYTES)
    with pytest.raises(InputError, match="more than 65,536 bytes"):
        read_yaml(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(InputError, match="not a regular file"):
        read_yaml(path)
