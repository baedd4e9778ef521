"""Host memory: what the system and its control groups leave, how much may be pinned, and that the cap is a wall."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from lopt_edge.system import memory as host_memory
from lopt_edge.system.memory import available_bytes, cap_data_bytes, granted_bytes, pinned_limit_bytes

GIB = 1 << 30
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's accounting of private memory is Linux's")


@pytest.fixture
def machine(tmp_path: Path):
    """(available, cgroup files, its membership line, kernel) -> arguments of a made-up machine of 32 GiB."""

    def make(available: int = 20 * GIB, groups: dict[str, str] | None = None, member: str = "0::/", release: str = "6.1"):
        files = {
            "proc/meminfo": f"MemTotal: {32 << 20} kB\nMemFree: 1 kB\nMemAvailable: {available >> 10} kB\nOther: 0\n",
            "proc/self/cgroup": f"{member}\n",
            "proc/sys/kernel/osrelease": f"{release}\n",
            **{f"cgroup/{name}": text for name, text in (groups or {}).items()},
        }
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return {"proc": tmp_path / "proc", "control_groups": tmp_path / "cgroup"}

    return make


def group(folder: str, limit: object, used: int = 0, cached: int = 0) -> dict[str, str]:
    names = {"memory.max": limit, "memory.current": used, "memory.stat": f"anon 5\ninactive_file {cached}\nactive_file 9"}
    return {f"{folder}{name}": f"{value}\n" for name, value in names.items()}


def test_this_machine():
    memory = psutil.virtual_memory()
    assert 0 < available_bytes() <= memory.total
    limit, reason = pinned_limit_bytes()
    assert 0 < limit <= memory.total // 2 and reason


def test_no_limit(machine):
    for groups in ({}, group("a/b/", "max", used=GIB)):
        args = machine(groups=groups, member="0::/a/b")
        assert available_bytes(**args) == 20 * GIB
        assert pinned_limit_bytes(**args) == (10 * GIB, "half of the available memory")


def test_version_2_group_above_ours_binds(machine):
    groups = group("a/b/", 16 * GIB, used=GIB) | group("a/", 8 * GIB, used=7 * GIB, cached=3 * GIB)
    args = machine(groups=groups, member="0::/a/b")
    assert available_bytes(**args) == 4 * GIB
    limit, reason = pinned_limit_bytes(**args)
    assert limit == 2 * GIB and "container" in reason


def test_version_1_group_whose_path_the_container_hides(machine):
    groups = {
        "memory/memory.limit_in_bytes": str(4 * GIB),
        "memory/memory.usage_in_bytes": str(3 * GIB),
        "memory/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB}",
    }
    args = machine(groups=groups, member="3:cpu:/x\n2:memory:/docker/0123\n0::/")
    assert available_bytes(**args) == 2 * GIB


def test_version_1_without_a_limit_is_no_container(machine):
    groups = {
        "memory/memory.limit_in_bytes": "9223372036854771712",
        "memory/memory.usage_in_bytes": "5",
        "memory/memory.stat": "total_inactive_file 1",
    }
    assert pinned_limit_bytes(**machine(groups=groups, member="2:memory:/"))[1] == "half of the available memory"


def test_what_is_granted_is_what_the_tightest_group_leaves_beside_its_other_processes(machine):
    assert granted_bytes(**machine()) == (32 * GIB, "the machine")
    nested = group("a/b/", 16 * GIB, used=GIB) | group("a/", 8 * GIB, used=7 * GIB, cached=3 * GIB)
    args = machine(groups=nested, member="0::/a/b")
    assert granted_bytes(**args) == (4 * GIB, "the control group")
    (args["proc"] / "self/status").write_text(f"Name:\tx\nVmRSS:\t{GIB >> 10} kB\n")  # 1 GiB of what is used is ours
    assert granted_bytes(**args) == (5 * GIB, "the control group")
    version_1 = {
        "memory/docker/0/memory.limit_in_bytes": str(2 * GIB),
        "memory/docker/0/memory.usage_in_bytes": str(GIB),
        "memory/docker/0/memory.stat": "total_inactive_file 0",
    }
    assert granted_bytes(**machine(groups=version_1, member="2:memory:/docker/0")) == (2 * GIB, "the control group")
    assert granted_bytes(**machine(groups=group("", 64 * GIB))) == (32 * GIB, "the machine"), "a limit above the machine's"


def test_full_group_leaves_nothing(machine):
    args = machine(groups=group("", GIB, used=2 * GIB))
    assert available_bytes(**args) == 0
    assert pinned_limit_bytes(**args)[0] == 0


def test_wsl(machine):
    release = "5.15.153.1-microsoft-standard-WSL2"
    limit, reason = pinned_limit_bytes(**machine(release=release))
    assert limit == 10**9 and "WSL" in reason
    assert pinned_limit_bytes(**machine(available=GIB, release=release)) == (GIB // 2, "half of the available memory")


def test_no_proc(tmp_path):
    args = {"proc": tmp_path / "none", "control_groups": tmp_path}
    assert 0 < available_bytes(**args) <= psutil.virtual_memory().total
    assert pinned_limit_bytes(**args)[0] > 0
    cap_data_bytes(1, proc=tmp_path / "none").lift()  # no cap, and nothing to take away


@on_linux
def test_cap_is_a_wall_and_comes_down_again():
    """In a process of its own, since a cap could hit pytest. Both allocators that hold a run's bytes are asked."""
    code = """
import resource, threading, numpy, torch
from lopt_edge.system.memory import cap_data_bytes
MIB = 1 << 20
before = resource.getrlimit(resource.RLIMIT_DATA)
makers = {"python": lambda n: bytearray(n), "numpy": lambda n: numpy.empty(n, dtype=numpy.uint8),
          "torch": lambda n: torch.empty(n, dtype=torch.uint8)}
cap = cap_data_bytes(64 * MIB)
inner = cap_data_bytes(10**12)  # a looser cap does not loosen a tighter one
for name, make in makers.items():
    make(32 * MIB)
    try:
        make(256 * MIB)
        print(name, "went through")
    except (MemoryError, RuntimeError) as error:
        print(name, type(error).__name__)
inner.lift()
held = [bytearray(32 * MIB)]
try:
    held += [bytearray(MIB) for _ in range(64)]  # many small ones meet the same wall
    print("went through")
except MemoryError:
    print("stopped")
cap.lift()
print(before == resource.getrlimit(resource.RLIMIT_DATA), *(len(make(256 * MIB)) >> 20 for make in makers.values()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines == ["python MemoryError", "numpy MemoryError", lines[2], "stopped", "True 256 256 256"]
    assert lines[2] in ("torch RuntimeError", "torch MemoryError", "torch OutOfMemoryError")


@on_linux
def test_what_the_cap_counts(tmp_path):
    """The essay's list: thread stacks and untouched memory yes; read-only file maps and shared memory no."""
    (tmp_path / "file").write_bytes(b"x")
    code = f"""
import mmap, os, threading
from lopt_edge.system import memory as host_memory
file = os.open({str(tmp_path / "file")!r}, os.O_RDWR)
os.ftruncate(file, 1 << 26)
def taken(make):
    before = host_memory._status_bytes("VmData", host_memory.PROC)
    kept = make()
    return host_memory._status_bytes("VmData", host_memory.PROC) - before >> 20, kept
def thread():
    event = threading.Event()
    threading.Thread(target=event.wait, daemon=True).start()
    return event
threading.stack_size(1 << 26)
counted = [lambda: bytearray(1 << 26), thread, lambda: mmap.mmap(file, 1 << 26, flags=mmap.MAP_PRIVATE)]
free = [lambda: mmap.mmap(-1, 1 << 26), lambda: mmap.mmap(file, 1 << 26),
        lambda: mmap.mmap(file, 1 << 26, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)]
kept = [taken(make) for make in counted + free]
print(*(size for size, _ in kept))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sizes = [int(size) for size in done.stdout.split()]
    assert all(64 <= size <= 66 for size in sizes[:3]) and all(size <= 1 for size in sizes[3:]), sizes


def test_needs_no_torch():
    code = "import sys, lopt_edge.system.memory, lopt_edge.run.tiers.page_file; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_reads_real_status():
    assert host_memory._status_bytes("VmNothing", host_memory.PROC) is None


IN_A_ROOM_OF_ITS_OWN = ["unshare", "--map-root-user", "--mount"]
WITHOUT_PROC = """
mount -t tmpfs none /proc
exec "$@"
"""
ASK = "import sys; from lopt_edge.cli.main import main; sys.argv[0] = 'lopt-edge'; main()"


@on_linux
@pytest.mark.parametrize("words", [("plan", "--model", "llama-3.1-8b", "--device", "cpu"), ("doctor",)])
def test_without_proc_it_is_said(words):
    """A Linux on which /proc is not mounted (a chroot, an early container): nothing can be measured there."""
    can = subprocess.run([*IN_A_ROOM_OF_ITS_OWN, "mount", "-t", "tmpfs", "none", "/proc"], capture_output=True, check=False)
    if can.returncode:
        pytest.skip("this user may not unmount /proc for a process")
    command = [*IN_A_ROOM_OF_ITS_OWN, "bash", "-c", WITHOUT_PROC, "bash", sys.executable, "-c", ASK, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "/proc/meminfo: the machine's memory cannot be read" in done.stderr and "mount -t proc" in done.stderr
