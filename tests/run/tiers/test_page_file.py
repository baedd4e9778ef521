"""The page folder refuses what would fail later; the page file gives back what was put in, or says why it cannot."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lopt_edge.errors import InputError, InputErrors, RunError
from lopt_edge.run.tiers.page_file import GRAIN, Extents, PageFile
from lopt_edge.run.tiers.page_folder import prepare_page_dir
from lopt_edge.system.file_systems import _file_system
from quant.locks import lock

needs_proc = pytest.mark.skipif(not Path("/proc/self/mounts").exists(), reason="needs Linux's /proc")


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A mount table that says that everything is a disk: /tmp is memory on some machines."""
    table = tmp_path / "mounts"
    table.write_text("/dev/x / ext4 rw 0 0\n")
    return table


@pytest.fixture
def page_file(tmp_path: Path):
    with PageFile(tmp_path, n_bytes=8 * GRAIN, name="test") as made:
        yield made


def noise(n_bytes: int, seed: int = 0) -> memoryview:
    return memoryview(bytearray(random.Random(seed).randbytes(n_bytes)))


def fail(code: int):
    def failing(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    return failing


# --- the folder -------------------------------------------------------------------------------------------------------


def test_folder_is_made(tmp_path, disk):
    made = prepare_page_dir(tmp_path / "a" / "b", need_bytes=GRAIN, disk_budget_bytes=GRAIN, mounts=disk)
    assert made.path == tmp_path / "a" / "b" and made.path.is_dir() and not list(made.path.iterdir())
    assert made.file_system == "ext4" and not made.is_memory and made.free_bytes >= GRAIN
    assert prepare_page_dir(made.path, need_bytes=0, disk_budget_bytes=None, mounts=disk).path == made.path


def test_file_in_its_place(tmp_path, disk):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match="is a file") as caught:
            prepare_page_dir(path, need_bytes=0, disk_budget_bytes=None, mounts=disk)
        assert str(tmp_path / "file") in str(caught.value)
    assert (tmp_path / "file").read_text() == "mine"


def test_folder_that_cannot_be_written(tmp_path, disk, monkeypatch):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    if os.geteuid() == 0:  # root may write anywhere
        monkeypatch.setattr("tempfile.TemporaryFile", lambda dir: fail(errno.EACCES)())
    with pytest.raises(InputError, match=r"cannot write in .*locked .Permission denied"):
        prepare_page_dir(folder, need_bytes=0, disk_budget_bytes=None, mounts=disk)


@needs_proc
def test_names_that_cannot_be(tmp_path, disk):
    for path in (Path("/proc/nowhere/pages"), tmp_path / "a\0b", tmp_path / ("n" * 300)):
        with pytest.raises(InputError, match="cannot write in"):
            prepare_page_dir(path, need_bytes=0, disk_budget_bytes=None, mounts=disk)


@pytest.mark.skipif(not Path("/dev/shm").is_dir() or sys.platform != "linux", reason="needs a tmpfs")
def test_memory_is_no_disk():
    folder = Path("/dev/shm") / f"lopt-edge-test-{os.getpid()}"
    with pytest.raises(InputError, match=r"lies in memory, not on a disk .file system tmpfs"):
        prepare_page_dir(folder / "pages", need_bytes=0, disk_budget_bytes=None)
    assert not folder.exists()


def test_too_little_space_and_budget_told_together(tmp_path, disk):
    with pytest.raises(InputErrors) as caught:
        prepare_page_dir(tmp_path / "new", need_bytes=1 << 60, disk_budget_bytes=1 << 30, mounts=disk)
    space, budget = caught.value.errors
    assert str(tmp_path / "new") in space.what and f"{1 << 60:,} bytes" in space.what and "free" in space.what
    assert budget.where == "disk_memory" and "1.0 GiB" in budget.what
    assert not (tmp_path / "new").exists()


def test_longest_and_latest_mount_wins(tmp_path):
    table = tmp_path / "mounts"
    table.write_text(
        "a / ext4 rw 0 0\nb /mnt tmpfs rw 0 0\nc /mnt/my\\040disk xfs rw 0 0\nd /mnt btrfs rw 0 0\n"
        "e /mnt/me ramfs rw 0 0\nbroken\n"
    )
    found = {
        path: _file_system(Path(path), table) for path in ("/home", "/mnt/x", "/mnt/my disk/x", "/mnt/me/x", "/mnt/men")
    }
    assert list(found.values()) == ["ext4", "btrfs", "xfs", "ramfs", "btrfs"], found
    assert _file_system(Path("/home"), tmp_path / "none") is None


def test_stale_page_files_go_and_nothing_else(tmp_path, disk):
    """Whose process lives is said by the lock, whatever the number in the name: in another container it may be ours."""
    stale = [f"lopt-pages-{pid}-{name}.bin" for pid in (7, os.getppid(), os.getpid()) for name in ("inputs", "a-b\n")]
    kept = ["lopt-pages-x-inputs.bin", f"lopt-pages-{10**30}-inputs.bin", "lopt-pages-7-inputs.txt",
            "my-lopt-pages-7-inputs.bin", "lopt-pages-7.bin", "adapter.bin"]  # fmt: skip
    for name in (*stale, *kept):
        (tmp_path / name).write_text("x")
    (tmp_path / "lopt-pages-7-folder.bin").mkdir()
    (tmp_path / "lopt-pages-7-link.bin").symlink_to(tmp_path / "adapter.bin")
    live = {f"lopt-pages-{os.getpid()}-live.bin", "lopt-pages-999999-live.bin"}
    held = [(tmp_path / name).open("wb") for name in live]
    assert all(lock(file.fileno()) for file in held)
    before = set(os.listdir(tmp_path))
    prepare_page_dir(tmp_path, need_bytes=0, disk_budget_bytes=None, mounts=disk)
    assert set(os.listdir(tmp_path)) == before - set(stale)
    for file in held:
        file.close()


def test_a_namesake_in_another_container_is_no_obstacle(tmp_path):
    (tmp_path / f"lopt-pages-{os.getpid()}-x.bin").touch()
    with PageFile(tmp_path, n_bytes=GRAIN, name="x") as page_file:
        assert page_file.path.name == f"lopt-pages-{os.getpid()}-1-x.bin"
    assert len(os.listdir(tmp_path)) == 1


# --- extents ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 9), st.integers(0, 99)), max_size=60), st.integers(0, 20))
def test_extents(steps, size):
    """Live extents never overlap, first-fit holds, free and taken cover the whole; all freed is one extent again."""
    extents, live, peak = Extents(), {}, 0
    if size:
        extents.grow(size)
    for frees, n, choice in steps:
        if frees and live:
            start = sorted(live)[choice % len(live)]
            del live[start]
            extents.free(start)
        else:
            gaps = [start for start, gap in extents.free_extents if gap >= n]
            start = extents.allocate(n)
            assert start == (gaps[0] if gaps else None)
            if start is None:
                extents.grow(n - extents.tail)
                start = extents.allocate(n)
                assert start is not None and start + n == extents.size
            live[start] = n
        cells = [cell for start, n in (*live.items(), *extents.free_extents) for cell in range(start, start + n)]
        assert sorted(cells) == list(range(extents.size))
        edges = [end for start, n in extents.free_extents for end in (start, start + n)]
        assert len(set(edges)) == len(edges)  # no two free neighbours
        assert extents.used == sum(live.values())
        peak = max(peak, extents.used)
    assert extents.peak == peak
    for start in live:
        extents.free(start)
    assert extents.free_extents == (((0, extents.size),) if extents.size else ())


def test_extents_refuse_what_is_not_theirs():
    extents = Extents()
    extents.grow(10)
    assert [extents.allocate(n) for n in (4, 4, 4)] == [0, 4, None]
    for start in (1, 8, 20, -1):
        with pytest.raises(ValueError, match="nothing is allocated"):
            extents.free(start)
    assert extents.holds(0, 4) and extents.holds(5, 3) and not extents.holds(3, 2) and not extents.holds(8, 1)
    assert not Extents().holds(0, 0)


# --- the file ---------------------------------------------------------------------------------------------------------


def test_no_name_is_left_and_space_is_reserved(tmp_path):
    with PageFile(tmp_path, n_bytes=10 * GRAIN + 1, name="inputs") as page_file:
        assert page_file.path.name == f"lopt-pages-{os.getpid()}-inputs.bin"
        assert os.listdir(tmp_path) == []
        status = os.fstat(page_file.fileno())
        assert status.st_size == page_file.size_bytes == 11 * GRAIN and status.st_mode & 0o777 == 0o600
        if hasattr(os, "posix_fallocate"):
            assert status.st_blocks * 512 >= 11 * GRAIN
        PageFile(tmp_path, n_bytes=0, name="inputs").close()  # the name is free again


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3 * GRAIN), st.booleans()), max_size=20))
def test_round_trips(tmp_path_factory, steps):
    with PageFile(tmp_path_factory.getbasetemp(), n_bytes=2 * GRAIN, name=f"{threading.get_ident()}") as page_file:
        live: list[tuple[int, memoryview]] = []
        for seed, (n_bytes, frees) in enumerate(steps):
            if frees and live:
                page_file.free(live.pop(seed % len(live))[0])
            data, offset = noise(n_bytes, seed), page_file.allocate(n_bytes)
            assert offset % GRAIN == 0
            page_file.write(offset, data)
            live.append((offset, data))
        for offset, data in live:
            out = memoryview(bytearray(len(data)))
            page_file.read(offset, out)
            assert out == data
        assert page_file.used_bytes == sum(-(-len(data) // GRAIN) * GRAIN for _, data in live)
        assert page_file.used_bytes <= page_file.peak_bytes <= page_file.size_bytes
        for offset, _ in live:
            page_file.free(offset)
        assert page_file.used_bytes == 0


def test_parts_of_an_allocation_and_other_formats(page_file):
    offset = page_file.allocate(3 * GRAIN)
    numbers = noise(2 * GRAIN).cast("f", (2, GRAIN // 4))
    page_file.write(offset + GRAIN, numbers)
    out = memoryview(bytearray(GRAIN)).cast("d")
    page_file.read(offset + 2 * GRAIN, out)
    assert out.cast("B") == numbers.cast("B")[GRAIN:]
    page_file.write(offset, memoryview(b""))
    page_file.read(offset, memoryview(bytearray()))


def test_partial_transfers_go_on(page_file, monkeypatch):
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:1000], offset))
    monkeypatch.setattr(os, "preadv", lambda fd, outs, offset: preadv(fd, [outs[0][:777]], offset))
    data, out = noise(2 * GRAIN), memoryview(bytearray(2 * GRAIN))
    offset = page_file.allocate(2 * GRAIN)
    page_file.write(offset, data)
    page_file.read(offset, out)
    assert out == data


def test_transfer_outside_an_allocation_is_a_defect(page_file):
    first, second = page_file.allocate(GRAIN), page_file.allocate(GRAIN)
    page_file.free(second)
    for offset, n_bytes in ((first, GRAIN + 1), (second, 1), (-GRAIN, 1), (100 * GRAIN, 1)):
        with pytest.raises(ValueError, match="outside what is allocated"):
            page_file.write(offset, noise(n_bytes))
        with pytest.raises(ValueError, match="outside what is allocated"):
            page_file.read(offset, noise(n_bytes))
    for n_bytes in (0, -1):
        with pytest.raises(ValueError, match="cannot allocate"):
            page_file.allocate(n_bytes)
    with pytest.raises(ValueError, match="nothing is allocated"):
        page_file.free(second)


def test_grows_to_its_limit(tmp_path):
    with PageFile(tmp_path, n_bytes=GRAIN, name="small", max_bytes=4 * GRAIN) as page_file:
        first = page_file.allocate(GRAIN)
        second = page_file.allocate(3 * GRAIN)
        assert os.fstat(page_file.fileno()).st_size == page_file.size_bytes == 4 * GRAIN
        with pytest.raises(RunError, match=r"20,480 bytes.* 16,384 bytes.* are allowed") as caught:
            page_file.allocate(1)
        assert str(page_file.path) in str(caught.value)
        page_file.free(second)
        assert page_file.allocate(2 * GRAIN) == second and first == 0
        assert page_file.peak_bytes == 4 * GRAIN
    with pytest.raises(RunError, match="are allowed"):
        PageFile(tmp_path, n_bytes=5 * GRAIN, name="big", max_bytes=4 * GRAIN)
    assert os.listdir(tmp_path) == []


def test_grows_by_what_is_missing(page_file):
    assert page_file.allocate(6 * GRAIN) == 0
    assert page_file.allocate(4 * GRAIN) == 6 * GRAIN  # two grains were free at the end
    assert page_file.size_bytes == 10 * GRAIN


def test_truncated_file(page_file):
    offset = page_file.allocate(4 * GRAIN)
    page_file.write(offset, noise(4 * GRAIN))
    os.ftruncate(page_file.fileno(), page_file.size_bytes - GRAIN)
    for transfer in (page_file.read, page_file.write):  # also where the range itself is still there: the file is broken
        with pytest.raises(RunError, match="page file was truncated: 4,096 bytes are missing") as caught:
            transfer(offset, memoryview(bytearray(GRAIN)))
        assert str(page_file.path) in str(caught.value)


def test_closed_file(tmp_path):
    page_file = PageFile(tmp_path, n_bytes=GRAIN, name="closed")
    offset, fd = page_file.allocate(GRAIN), page_file.fileno()
    page_file.close()
    page_file.close()
    with pytest.raises(OSError):
        os.fstat(fd)
    for use in (
        lambda: page_file.allocate(1),
        lambda: page_file.write(offset, noise(1)),
        lambda: page_file.read(offset, noise(1)),
    ):
        with pytest.raises(RunError, match="is closed"):
            use()
    page_file.free(offset)  # what outlives the file may still give back
    assert page_file.peak_bytes == GRAIN


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="no posix_fallocate here")
def test_full_disk_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", fail(errno.ENOSPC))
    with pytest.raises(RunError, match=r"cannot reserve space, 1 MiB .1,048,576 bytes.: No space left") as caught:
        PageFile(tmp_path, n_bytes=1 << 20, name="full")
    assert str(tmp_path) in str(caught.value) and "free some space" in str(caught.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="no posix_fallocate here")
def test_full_disk_while_growing_leaves_the_rest_usable(page_file, monkeypatch):
    offset, data = page_file.allocate(8 * GRAIN), noise(8 * GRAIN)
    page_file.write(offset, data)

    def partly(fd: int, start: int, n_bytes: int) -> None:
        os.ftruncate(fd, start + n_bytes // 2)  # a reservation may fail half-way, and keep what it has
        fail(errno.ENOSPC)()

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", partly)
        with pytest.raises(RunError, match="No space left"):
            page_file.allocate(1)
        assert os.fstat(page_file.fileno()).st_size == 8 * GRAIN
    out = memoryview(bytearray(len(data)))
    page_file.read(offset, out)
    assert out == data and page_file.size_bytes == 8 * GRAIN
    assert page_file.allocate(1) == 8 * GRAIN


@pytest.mark.parametrize(
    ("code", "advice"), [(errno.ENOSPC, "free some space"), (errno.EIO, "dmesg"), (errno.EPERM, "another")]
)
def test_faults_of_the_disk(page_file, monkeypatch, code, advice):
    offset = page_file.allocate(GRAIN)
    monkeypatch.setattr(os, "pwrite", fail(code))
    monkeypatch.setattr(os, "preadv", fail(code))
    for use, what in ((page_file.write, "cannot write"), (page_file.read, "cannot read")):
        with pytest.raises(RunError, match=what) as caught:
            use(offset, noise(GRAIN))
        for part in (advice, "4,096 bytes", os.strerror(code), str(page_file.path)):
            assert part in str(caught.value)


def test_folder_that_vanished(tmp_path):
    with pytest.raises(RunError, match="cannot be made"):
        PageFile(tmp_path / "none", n_bytes=GRAIN, name="x")


def test_threads(page_file):
    """Four threads page in and out at once; each finds its own bytes."""
    wrong: list[object] = []

    def work(seed: int) -> None:
        try:
            for turn in range(40):
                data = noise(1 + (seed * 37 + turn * 911) % (3 * GRAIN), seed * 1000 + turn)
                offset, out = page_file.allocate(len(data)), memoryview(bytearray(len(data)))
                page_file.write(offset, data)
                page_file.read(offset, out)
                if out != data:
                    wrong.append((seed, turn))
                page_file.free(offset)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and page_file.used_bytes == 0
    assert page_file.peak_bytes <= page_file.size_bytes <= 16 * GRAIN


def test_close_waits_for_a_transfer(page_file, monkeypatch):
    """A descriptor that is closed under a write may by then be another file's."""
    offset, inside, go_on = page_file.allocate(GRAIN), threading.Event(), threading.Event()
    pwrite = os.pwrite

    def slow(*args: object) -> int:
        inside.set()
        assert go_on.wait(10)
        return pwrite(*args)

    monkeypatch.setattr(os, "pwrite", slow)
    writer = threading.Thread(target=page_file.write, args=(offset, noise(GRAIN)))
    closer = threading.Thread(target=page_file.close)
    writer.start()
    assert inside.wait(10)
    closer.start()
    closer.join(0.1)
    assert closer.is_alive() and os.fstat(page_file.fileno())
    go_on.set()
    writer.join(10)
    closer.join(10)
    assert not writer.is_alive() and not closer.is_alive()


def test_nothing_is_left_after_a_kill(tmp_path):
    code = (
        "import os, signal\nfrom pathlib import Path\nfrom lopt_edge.run.tiers.page_file import PageFile\n"
        f"page_file = PageFile(Path({str(tmp_path)!r}), n_bytes=1 << 20, name='x')\n"
        "page_file.write(page_file.allocate(100), memoryview(b'x' * 100))\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert os.listdir(tmp_path) == []
