"""A disk that forgets: what a run does to its files is recorded, and disks after a power cut are made of it. Not a test.

The recorder looks at a folder before and after each call of Python that syncs, renames, links, makes or removes something
below it, and takes what changed between two looks for writes, by whichever library. So the order of all things is known,
and of each what the run was promised: the bytes of a file are durable as they were at its last fsync, the names of a
folder as they were at the folder's last fsync. Nothing else is (POSIX promises no more; a file's own fsync does not keep
its name, a rename does not keep its order to another one).

An image is the disk at one moment of that order: what is durable, and of the rest any part. A name that was not synced is
there or not, a rename is whole; bytes that were not synced are the new ones, the old ones, nothing, zeros, or half.

What it does not do: see the moments between two looks (nothing is promised there either), or blocks of a device.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

CALLS = ("replace", "rename", "unlink", "remove", "mkdir", "rmdir", "link", "symlink", "truncate", "ftruncate")
Names = dict[str, int]  # of a folder: name to inode
FOLDER = None  # in the place of a file's bytes


@dataclass
class Disk:
    """The disk at one moment: what is there now, and what of it is durable."""

    names: dict[int, Names]  # by folder
    content: dict[int, bytes | None]
    durable_names: dict[int, Names]
    durable_content: dict[int, bytes]
    pending: dict[int, tuple[tuple[tuple[str, int | None], ...], ...]]  # by folder: changes since its last sync, in order


@dataclass
class CrashDisk:
    """The recorder. `moments` has the disk after each change."""

    root: Path
    moments: list[Disk] = field(default_factory=list)
    held: dict[int, int] = field(default_factory=dict)  # descriptors, so that no inode's number is used again

    @contextmanager
    def recording(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """A context in which the folder is watched; what is there at its beginning is durable."""
        names, content = self._look()
        self.moments = [Disk(names, content, names, {key: raw for key, raw in content.items() if raw is not None}, {})]
        with monkeypatch.context() as patch:
            for call in CALLS:
                patch.setattr(os, call, self._watched(getattr(os, call)))
            patch.setattr(os, "fsync", self._synced(os.fsync))
            try:
                yield
                self._note()
            finally:
                for descriptor in self.held.values():
                    os.close(descriptor)

    def _watched(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self._note()
            try:
                return real(*arguments, **options)
            finally:
                self._note(whole=True)

        return call

    def _synced(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(descriptor: int) -> None:
            self._note()
            real(descriptor)
            inode, now = os.fstat(descriptor).st_ino, self.moments[-1]
            if inode in now.names:
                pending = {key: changes for key, changes in now.pending.items() if key != inode}
                kept = {**now.durable_names, inode: now.names[inode]}
                self.moments.append(Disk(now.names, now.content, kept, now.durable_content, pending))
            elif (raw := now.content.get(inode)) is not None:
                durable = {**now.durable_content, inode: raw}
                self.moments.append(Disk(now.names, now.content, now.durable_names, durable, now.pending))

        return call

    def _look(self) -> tuple[dict[int, Names], dict[int, bytes | None]]:
        names: dict[int, Names] = {}
        content: dict[int, bytes | None] = {}
        for place, folders, files in os.walk(self.root):
            own = names.setdefault(os.stat(place).st_ino, {})
            for name in (*folders, *files):
                descriptor = os.open(os.path.join(place, name), os.O_RDONLY)
                inode = own[name] = os.fstat(descriptor).st_ino
                content[inode] = FOLDER if name in folders else _bytes_of(descriptor)
                if inode in self.held:
                    os.close(descriptor)
                else:
                    self.held[inode] = descriptor
        return names, content

    def _note(self, *, whole: bool = False) -> None:
        """Look, and add a moment if something changed. `whole`: names that changed in a folder did so by one call."""
        names, content = self._look()
        before = self.moments[-1]
        if names == before.names and content == before.content:
            return
        pending = dict(before.pending)
        for folder, own in names.items():
            was = before.names.get(folder, {})
            changed = tuple((name, own.get(name)) for name in sorted({*own, *was}) if own.get(name) != was.get(name))
            changes = (changed,) if whole else tuple((change,) for change in changed)
            if changed:
                pending[folder] = pending.get(folder, ()) + changes
        kept = {folder: before.durable_names.get(folder, {}) for folder in names} | before.durable_names
        self.moments.append(Disk(names, {**before.content, **content}, kept, before.durable_content, pending))

    # images --------------------------------------------------------------------------------------------------------

    def images(self, *, at: int, seeds: Iterator[int] | range) -> Iterator[dict[str, bytes | None]]:
        """Disks after a power cut at one moment: path to bytes (None: a folder). All forgotten, nothing forgotten, names
        kept and bytes forgotten, the reverse, then by chance."""
        for names, content in (("none", "old"), ("all", "new"), ("all", "empty"), ("none", "new"), ("all", "old")):
            yield self._image(self.moments[at], lambda _, names=names: names, lambda _, content=content: content)
        for seed in seeds:
            rng = random.Random(f"{at} {seed}")
            yield self._image(
                self.moments[at],
                lambda _, rng=rng: rng.choice(("none", "all", "some", "some")),
                lambda _, rng=rng: rng.choice(("new", "old", "empty", "zeros", "half")),
                rng,
            )

    def _image(
        self,
        disk: Disk,
        which: Callable[[int], str],
        how: Callable[[int], str],
        rng: random.Random | None = None,
    ) -> dict[str, bytes | None]:
        found: dict[str, bytes | None] = {}

        def walk(folder: int, place: str) -> None:
            names, choice = dict(disk.durable_names.get(folder, {})), which(folder)
            for change in disk.pending.get(folder, ()):
                if choice == "all" or (choice == "some" and rng is not None and rng.random() < 0.5):
                    for name, inode in change:
                        names.pop(name, None)
                        if inode is not None:
                            names[name] = inode
            for name, inode in sorted(names.items()):
                path = f"{place}{name}"
                new = disk.content[inode]
                if new is FOLDER:
                    found[path] = FOLDER
                    walk(inode, f"{path}/")
                else:
                    found[path] = _after(new, disk.durable_content.get(inode), how(inode))

        walk(os.stat(self.root).st_ino, "")
        return found


def _after(new: bytes, durable: bytes | None, how: str) -> bytes:
    """What a file holds after the cut, whose bytes were `new` and are durable as `durable`."""
    if durable is not None and (new == durable or how == "old"):
        return durable
    kept = durable or b""
    start = len(kept) if new.startswith(kept) else 0  # a log that grew loses no synced line
    tail = new[start:]
    forms = {"new": tail, "old": b"", "empty": b"", "zeros": bytes(len(tail)), "half": tail[: len(tail) // 2]}
    return (kept if start else b"") + forms[how]


def _bytes_of(descriptor: int) -> bytes:
    raw, at = b"", 0
    while part := os.pread(descriptor, 1 << 20, at):
        raw, at = raw + part, at + len(part)
    return raw


def name_of_image(image: dict[str, bytes | None]) -> str:
    """A name that equal images share."""
    digest = hashlib.sha256()
    for path, raw in sorted(image.items()):
        digest.update(f"{path} {-1 if raw is None else len(raw)}\n".encode() + (raw or b""))
    return digest.hexdigest()[:16]


def lay_out_image(image: dict[str, bytes | None], folder: Path) -> None:
    """Write an image into a new folder."""
    folder.mkdir()
    for path, raw in sorted(image.items()):
        if raw is None:
            (folder / path).mkdir(parents=True, exist_ok=True)
        else:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(raw)
