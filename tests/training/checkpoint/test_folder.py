"""Checkpoint folders: whole or nothing, whatever fails while one is written; damaged ones are known for what they are."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lopt_edge.errors import InputError, RunError
from lopt_edge.training.checkpoint import folder as checkpoint
from lopt_edge.training.checkpoint.folder import (
    MANIFEST,
    STATE,
    clean,
    latest,
    name_of,
    new_checkpoint,
    prune,
    read,
    set_aside,
)


def write(root: Path, name: str, *, text: str = "x" * 5000) -> Path:
    with new_checkpoint(root, name) as folder:
        (folder / "tensors.bin").write_text(text)
        (folder / STATE).write_text(json.dumps({"name": name, "text": text[:10]}))
    return root / name


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "checkpoints"


def test_what_was_written_is_read_and_nothing_else_is_left(root):
    folder = write(root, name_of(7))
    assert read(folder).state["name"] == "step-000007"
    assert [path.name for path in root.iterdir()] == ["step-000007"]
    assert latest(root) == (read(folder), [])


def test_the_newest_is_found_by_steps_and_then_by_sequences(root):
    for step, sequences in ((9, 0), (10, 4), (10, 0), (10, 12), (2, 0)):
        write(root, name_of(step, sequences))
    found = []
    while (newest := latest(root)[0]) is not None:
        found.append(newest.folder.name)
        shutil.rmtree(newest.folder)
    assert found == ["step-000010+12", "step-000010+4", "step-000010", "step-000009", "step-000002"]


DAMAGES = {
    "cut": lambda folder: os.truncate(folder / "tensors.bin", 100),
    "a flipped bit": lambda folder: (folder / "tensors.bin").write_text("x" * 2500 + "y" + "x" * 2499),
    "a missing file": lambda folder: (folder / "tensors.bin").unlink(),
    "no manifest": lambda folder: (folder / MANIFEST).unlink(),
    "an empty manifest": lambda folder: (folder / MANIFEST).write_text(""),
    "another format": lambda folder: (folder / MANIFEST).write_text('{"format": 2, "files": {}}'),
    "a list": lambda folder: (folder / MANIFEST).write_text("[1]"),
    "numbers": lambda folder: (folder / MANIFEST).write_text('{"format": 1, "files": {"state.json": 3}}'),
    "no state": lambda folder: (folder / MANIFEST).write_text('{"format": 1, "files": {}}'),
    "a path that leaves the folder": lambda folder: (folder / MANIFEST).write_text(
        '{"format": 1, "files": {"../../secret": {"bytes": 1, "sha256": ""}}}'),
    "a link": lambda folder: ((folder / "tensors.bin").rename(folder.parent / "elsewhere"),
                              (folder / "tensors.bin").symlink_to(folder.parent / "elsewhere")),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_one_is_refused_with_its_reason_and_the_one_before_is_taken(root, damage):
    older, newer = write(root, name_of(1)), write(root, name_of(2))
    damage(newer)
    with pytest.raises(InputError, match="is no whole checkpoint"):
        read(newer)
    found, faults = latest(root)
    assert found is not None and found.folder == older
    assert len(faults) == 1 and str(newer) in faults[0]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("name", ["fsync", "rename"])
def test_a_fault_of_the_disk_at_any_moment_leaves_a_whole_checkpoint(root, monkeypatch, number, name):
    """The same name is written again, the worst case: at each call that fails, the old or the new one is there, whole."""
    real, calls = getattr(os, name), []
    failing = 0
    while True:
        shutil.rmtree(root, ignore_errors=True)
        write(root, name_of(5), text="old" * 1000)
        calls.clear()

        def faulty(*arguments, at=failing, **options):
            calls.append(arguments)
            if len(calls) == at + 1:
                raise OSError(number, os.strerror(number))
            return real(*arguments, **options)

        monkeypatch.setattr(checkpoint.os, name, faulty)
        try:
            write(root, name_of(5), text="new" * 1000)
            ended = True
        except RunError as error:
            ended = False
            assert os.strerror(number) in str(error) and "free space" in str(error) and str(root) in str(error)
        monkeypatch.setattr(checkpoint.os, name, real)
        clean(root)
        found, _ = latest(root)
        assert found is not None
        assert found.state["text"] == ("newnewnewn" if ended else found.state["text"])
        assert not [path for path in root.iterdir() if path.name.startswith(".")]
        if len(calls) <= failing:
            break
        failing += 1
    assert failing >= 2


def test_an_interruption_leaves_nothing_of_the_new_one(root):
    write(root, name_of(1))
    with pytest.raises(KeyboardInterrupt), new_checkpoint(root, name_of(2)) as folder:
        (folder / "half").write_text("h")
        raise KeyboardInterrupt
    assert [path.name for path in root.iterdir()] == ["step-000001"]


def test_a_half_written_one_of_a_killed_run_is_removed(root):
    write(root, name_of(1))
    left = root / ".writing-step-000002-123"
    left.mkdir()
    (left / "tensors.bin").write_text("half")
    shutil.copytree(root / "step-000001", root / "step-000001.old")
    clean(root)
    assert [path.name for path in root.iterdir()] == ["step-000001"]


def test_an_old_one_whose_successor_never_came_is_kept(root):
    write(root, name_of(3)).rename(root / "step-000003.old")
    clean(root)
    found, _ = latest(root)
    assert found is not None and found.folder.name == "step-000003.old"


@settings(max_examples=20, deadline=None)
@given(steps=st.lists(st.integers(0, 999999), min_size=1, max_size=6, unique=True), keep=st.integers(1, 4))
def test_the_newest_ones_are_kept(tmp_path_factory, steps, keep):
    root = tmp_path_factory.mktemp("prune") / "checkpoints"
    for step in steps:
        write(root, name_of(step), text="t")
    prune(root, keep=keep)
    assert sorted(path.name for path in root.iterdir()) == sorted(name_of(step) for step in sorted(steps)[-keep:])


def test_newer_ones_are_set_aside_not_lost(root):
    folders = [write(root, name_of(step)) for step in (1, 2, 3)]
    assert sorted(set_aside(root, beyond=folders[0])) == ["set-aside-step-000002", "set-aside-step-000003"]
    found, _ = latest(root)
    assert found is not None and found.folder == folders[0]
    assert read(root / "set-aside-step-000003").state["name"] == "step-000003"
    assert set_aside(root, beyond=root / "step-000099") == []
