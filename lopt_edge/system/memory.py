"""Host memory: what this process takes, how much is left and may be page-locked, and a wall that a run cannot grow through.

`available_bytes` is the smaller of what the system has (MemAvailable) and what the control groups around this process
leave (version 1 or 2; file pages that they can drop count as free). `pinned_limit_bytes` comes with its reason:
page-locked memory can neither be swapped nor reclaimed, so a run takes at most half of what is left, and under WSL about
1 GB, where the driver stops. RLIMIT_MEMLOCK is not asked: it binds mlock(), not the pages which the CUDA driver pins.

`cap_data_bytes` sets the soft RLIMIT_DATA. What Linux (4.7 and later) counts against it is VmData: private writable
mappings and the heap (brk), by the address space taken, touched or not. Seen here (Linux 6.18, glibc, torch 2.13):
- counted: malloc, numpy and torch CPU tensors; `calloc`ed memory before its first touch; each thread's stack, in full
  (8 MiB), when the thread starts; freed memory that glibc keeps (so it can be used again below the cap); private
  *writable* file maps, and so `safetensors.safe_open(..., "pt")`, which maps its whole file in that way
- not counted: the main thread's stack; read-only file maps, positioned reads and the page cache; shared memory and
  MAP_SHARED maps; address space reserved without write access
- an allocation beyond it fails with ENOMEM: MemoryError in Python and numpy, RuntimeError in torch, and a new thread may
  not start. Nothing is killed, and nothing that is already allocated changes. A child process inherits the number and
  counts its own bytes against it.
Not measured, for want of a GPU: by the same rule, memory that is page-locked by registering it with the driver counts as
the plain memory that it was, and what the driver maps as shared (device memory, cudaHostAlloc) does not.
So the cap bounds what can become resident apart from file pages; it is no meter of residency. Without /proc (macOS,
Windows) there is nothing to count with and no cap is set; a kernel that does not enforce the limit ignores it.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import psutil

from lopt_edge.errors import InputError

PROC, CONTROL_GROUPS = Path("/proc"), Path("/sys/fs/cgroup")
WSL_PINNED_BYTES = 10**9  # about where cudaHostAlloc fails under WSL


def available_bytes(*, proc: Path = PROC, control_groups: Path = CONTROL_GROUPS) -> int:
    """The bytes that this process may still take without swapping or being killed for them."""
    _, available = _system_memory(proc)
    group = cgroup_memory(membership=proc / "self/cgroup", root=control_groups)
    return available if group is None else min(available, group[1])


def ram_bytes() -> int:
    """The machine's memory, or this container's where it has less."""
    total, limit = machine_memory()[0], cgroup_memory()
    return total if limit is None else min(total, limit[0])


def granted_bytes(*, proc: Path = PROC, control_groups: Path = CONTROL_GROUPS) -> tuple[int, str]:
    """The most that this process may ever take, what it has included, and who says so.

    That is what the control groups around it leave beside their other processes; without one, all of the machine's memory
    (what others use of that may be swapped out, or end).
    """
    total, _ = _system_memory(proc)
    group = cgroup_memory(membership=proc / "self/cgroup", root=control_groups)
    left = None if group is None else min(group[0], group[1] + (_status_bytes("VmRSS", proc) or 0))
    if left is None or left >= total:
        return total, "the machine"
    return left, "the control group"


def pinned_limit_bytes(*, proc: Path = PROC, control_groups: Path = CONTROL_GROUPS) -> tuple[int, str]:
    """The page-locked host memory that the run may take, as (bytes, reason)."""
    half = available_bytes(proc=proc, control_groups=control_groups) // 2
    if is_wsl(proc=proc) and half > WSL_PINNED_BYTES:
        return WSL_PINNED_BYTES, "WSL lets a process pin about 1 GB of host memory"
    group = cgroup_memory(membership=proc / "self/cgroup", root=control_groups)
    if group is not None and group[0] < _system_memory(proc)[0]:
        return half, "half of what this container or control group leaves"
    return half, "half of the available memory"


class DataCap:
    """A cap on this process' private writable memory, from `cap_data_bytes`."""

    def __init__(self, proc: Path) -> None:
        self._proc, self._before = proc, resource.getrlimit(resource.RLIMIT_DATA)

    def renew(self, extra_bytes: int) -> None:
        """Count from what is taken now: pages given back inside the heap go on to count as taken."""
        taken = _status_bytes("VmData", self._proc)
        if taken is None:
            return
        soft, hard = self._before
        limits = (taken + max(0, extra_bytes), soft, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (min(n for n in limits if n != resource.RLIM_INFINITY), hard))

    def lift(self) -> None:
        """Take the cap away again."""
        resource.setrlimit(resource.RLIMIT_DATA, self._before)


def cap_data_bytes(extra_bytes: int, *, proc: Path = PROC) -> DataCap:
    """Let this process' private writable memory grow by `extra_bytes` at most.

    A cap that is already tighter stays. Where the system counts no such memory, nothing happens.
    """
    cap = DataCap(proc)
    cap.renew(extra_bytes)
    return cap


def _system_memory(proc: Path) -> tuple[int, int]:
    """The (total, available) bytes of the whole machine."""
    try:
        fields = {line.partition(":")[0]: line.split()[1] for line in (proc / "meminfo").read_text().splitlines()}
        return int(fields["MemTotal"]) * 1024, int(fields["MemAvailable"]) * 1024
    except (OSError, KeyError, IndexError, ValueError):  # no Linux, or an unusual /proc
        return machine_memory()


def machine_memory() -> tuple[int, int]:
    """The (total, available) bytes of the whole machine, as the system tells any program.

    Raises InputError on a Linux whose /proc is not mounted: nothing could be measured there, and no budget held.
    """
    try:
        memory = psutil.virtual_memory()
    except OSError as error:
        raise InputError(
            f"the machine's memory cannot be read ({error.strerror})",
            where=str(error.filename or PROC),
            fix="mount it: mount -t proc proc /proc",
        ) from None
    return memory.total, memory.available


def is_wsl(*, proc: Path = PROC) -> bool:
    """Whether this is Linux inside Windows, where a driver of Windows' drives the GPU."""
    try:
        return "microsoft" in (proc / "sys/kernel/osrelease").read_text().lower()
    except OSError:
        return False


def _status_bytes(field: str, proc: Path = PROC) -> int | None:
    """The bytes of one field of /proc/self/status, None where there is none."""
    try:
        lines = (proc / "self/status").read_text().splitlines()
    except OSError:
        return None
    sizes = [line.split() for line in lines if line.startswith(f"{field}:")]
    return int(sizes[0][1]) * 1024 if sizes else None


def cgroup_memory(*, membership: Path = PROC / "self/cgroup", root: Path = CONTROL_GROUPS) -> tuple[int, int] | None:
    """The (limit, free) bytes of the tightest memory limit of this process' control groups (version 1 or 2), or None."""
    try:
        lines = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:
        return None  # no Linux
    found = []
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if controllers == "":
            top, names = root, ("memory.max", "memory.current", "inactive_file ")
        elif "memory" in controllers.split(","):
            top, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file ")
        else:
            continue
        group = top / path.lstrip("/")
        while group != top.parent:  # a container may show its own group as the top: missing levels are passed over
            found += _group_memory(group, *names)
            group = group.parent
    return (min(limit for limit, _ in found), min(free for _, free in found)) if found else None


def _group_memory(group: Path, limit_name: str, usage_name: str, cached_key: str) -> list[tuple[int, int]]:
    """The (limit, free) bytes of one control group; file pages that it can drop count as free."""
    try:
        limit = int((group / limit_name).read_text())  # version 2 says "max" for none
        usage = int((group / usage_name).read_text())
        stat = (group / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):
        return []
    cached = sum(int(line.removeprefix(cached_key)) for line in stat if line.startswith(cached_key))
    return [(limit, max(0, limit - max(0, usage - cached)))]


def peak_rss_bytes() -> int:
    """The largest resident set this process ever had."""
    if (peak := _status_bytes("VmHWM")) is not None:
        return peak
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes() -> int:
    """The resident set now (where that is unknown, the largest one so far)."""
    try:
        with (PROC / "self/statm").open("rb") as file:  # a tenth of the time of the status file
            return int(file.read().split()[1]) * resource.getpagesize()
    except (OSError, IndexError, ValueError):
        return peak_rss_bytes()
