"""The recorder of crash_disk.py sees what a power cut can take: a wrong order of writes must show in its images."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.training.crash_disk import CrashDisk


def last_images(root: Path, act: Callable[[], object]) -> list[dict[str, bytes | None]]:
    disk = CrashDisk(root)
    with pytest.MonkeyPatch.context() as patch, disk.recording(patch):
        act()
    return list(disk.images(at=len(disk.moments) - 1, seeds=range(20)))


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def test_a_name_without_its_bytes_and_bytes_without_their_name(tmp_path):
    def act() -> None:
        (tmp_path / "a").write_bytes(b"1234")
        os.rename(tmp_path / "a", tmp_path / "b")

    found = [image.get("b", image.get("a")) for image in last_images(tmp_path, act)]
    assert {None, b"", b"1234", b"12", bytes(4)} <= set(found)


@pytest.mark.parametrize(("file", "folder", "may_be_lost"), [(1, 1, False), (1, 0, True), (0, 1, True)])
def test_only_what_is_synced_in_both_is_kept(tmp_path, file, folder, may_be_lost):
    def act() -> None:
        (tmp_path / "a").write_bytes(b"1234")
        if file:
            sync(tmp_path / "a")
        if folder:
            sync(tmp_path)

    assert any(image.get("a") != b"1234" for image in last_images(tmp_path, act)) == may_be_lost


def test_a_rename_over_a_file_is_the_old_or_the_new_one(tmp_path):
    (tmp_path / "a").write_bytes(b"old")

    def act() -> None:
        (tmp_path / "a.partial").write_bytes(b"new")
        sync(tmp_path / "a.partial")
        os.replace(tmp_path / "a.partial", tmp_path / "a")

    assert {image["a"] for image in last_images(tmp_path, act)} == {b"old", b"new"}


def test_a_log_loses_no_synced_line(tmp_path):
    (tmp_path / "log").write_bytes(b"first\n")

    def act() -> None:
        with (tmp_path / "log").open("ab") as log:
            log.write(b"second\n")

    found = {image["log"] for image in last_images(tmp_path, act)}
    assert all(raw.startswith(b"first\n") for raw in found) and b"first\nsec" in found


def test_a_removal_that_was_not_synced_may_not_have_been(tmp_path):
    (tmp_path / "a").write_bytes(b"x")
    assert {image.get("a") for image in last_images(tmp_path, lambda: os.unlink(tmp_path / "a"))} == {None, b"x"}
