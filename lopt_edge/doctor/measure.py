"""Measures this machine's rates for the planner: products, unpacking, attention, copies, the disk.

`measure_profile` takes about `seconds` in all, imports included, each rate its share of what is left: one call to warm up,
then batches of calls, each batch at least a few milliseconds long, and the median of the batches. The rule: it measures
what a run does, with the shapes, kernels and threads of a run (our own unpacking, torch's attention, plain positioned
writes), not what the hardware could do. A rate whose share is too short (products in a dtype that the CPU emulates) gets
four calls all the same, and overdraws.

The disk: one unnamed file, written in pieces with fdatasync after each, read back after the kernel was asked to forget it
(posix_fadvise; where there is none, macOS, reading is served from memory and the profile says so). What it does not see:
the disk's own cache. The memory that libraries or a CUDA context take is read off a fresh process, where there is time for
one. On a busy machine everything comes out slower than it is: the profile then says so too.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

from lopt_edge.doctor.check_machine import cpu_device
from lopt_edge.errors import InputError
from lopt_edge.plan.facts.device_kinds import DEVICE_TYPES, in_words, kind_of
from lopt_edge.plan.facts.profile import DISK_READ, DISK_WRITE, DeviceProfile
from lopt_edge.system.cache import default_cache

if TYPE_CHECKING:
    import torch

MIB = 1 << 20
HEADS, HEAD_DIM = 16, 64  # of attention
UNPACK_WIDTH = 2048
COPY_BYTES = 128 * MIB  # beyond the last cache of common CPUs
DISK_BYTES, DISK_PIECE = 256 * 10**6, 16 * 10**6
TINY_TOKENS, TINY_WIDTH, N_LINEARS, RANK = 8, 64, 7, 8  # a layer that is all overhead
LEAST_BATCH = 5e-3  # seconds: calls are timed in batches of this length, beyond the clock's and the launches' noise
LEAST_BATCHES, MOST_BATCHES = 3, 200
CHILD_SECONDS = 10.0  # a fresh process is asked only if at least this much was allowed; it takes some 5 s
# Shares of the seconds, in the order of measuring; products are split over dtypes and shapes, the disk over both ways.
SHARES = {"products": 0.3, "attention": 0.12, "unpack": 0.1, "memory": 0.08, "copies": 0.1, "overhead": 0.05, "disk": 0.25}
BUSY_SHARE = 0.75  # of the cores: other work beyond that is reported
_LIBRARIES = (
    "import lopt_edge.training.run, transformers.models.llama.modeling_llama\n"
    "from lopt_edge.system.allocator import release_free_memory\n"
    "from lopt_edge.system.memory import resident_bytes\n"
    "release_free_memory()\n"
    "print(resident_bytes())\n"
)
_CONTEXT = (
    "import sys, torch\n"
    "from lopt_edge.run.device import device_of\n"
    "a = torch.ones(256, 256, device=sys.argv[1])\n"
    "(a @ a).sum().item()\n"
    "own = device_of(a.device)\n"
    "print(own.free_bytes() + own.taken_bytes())\n"
)


def measure_profile(device: torch.device | str, *, seconds: float = 20, page_dir: Path | None = None) -> DeviceProfile:
    """The rates of `device`, named as torch does, and of the disk under `page_dir` (default: the cache folder)."""
    allowed, busy = _clock(seconds), _busy()
    import torch

    from lopt_edge.run.device import choose_dtype, device_of
    from quant.nf4 import import_packing

    import_packing()  # none of the unpacking's time
    device = torch.device(device)
    if device.type not in DEVICE_TYPES:
        raise InputError(f"{device.type!r} cannot be measured", where="device", fix=f"choose {in_words(*DEVICE_TYPES)}")
    kind, own = kind_of(device.type), device_of(device)
    fixed_bytes = _fixed_bytes(device) if seconds >= CHILD_SECONDS else None
    chosen = str(choose_dtype("auto", device)[0]).removeprefix("torch.")
    with torch.inference_mode():
        products = _products(device, allowed("products"))
        attention = _attention(device, allowed("attention"))
        unpack = _unpack_rate(device, chosen, allowed("unpack"))
        memory = _memory_bandwidth(device, allowed("memory"))
        copies = _copies(device, allowed("copies")) if kind.host_is_below else (memory / 2,) * 4
        overhead = _overhead(device, chosen, allowed("overhead"))
    disk_read, disk_write, note = _disk(page_dir or default_cache(), allowed("disk"), fraction=min(1.0, seconds / 20))
    return DeviceProfile(
        name=own.name(),
        device_type=device.type,
        memory_bytes=own.total_bytes(),
        matmul_flops=products,
        unpack_rate=unpack,
        memory_bandwidth=memory,
        copy_up_pinned=copies[0],
        copy_down_pinned=copies[1],
        copy_up_pageable=copies[2],
        copy_down_pageable=copies[3],
        disk_read=disk_read,
        disk_write=disk_write,
        op_overhead_seconds=overhead,
        attention_flops=attention.get(chosen, min(attention.values())),
        context_bytes=0 if kind.counts_process else fixed_bytes or kind.context_bytes,
        library_bytes=fixed_bytes or kind.library_bytes if kind.counts_process else 0,
        measured=date.today(),
        source=f"measured on this machine, {torch.get_num_threads()} threads, torch {torch.__version__}{busy}{note}",
        attention_by_dtype=attention,
    )


# --- timing -----------------------------------------------------------------------------------------------------------


def _clock(seconds: float) -> Callable[[str], float]:
    """A clock that, asked in the order of SHARES, gives the seconds of a rate: its share of what is left now."""
    end = time.monotonic() + 0.9 * seconds  # setting up and warming up take the rest

    def allowed(name: str) -> float:
        names = list(SHARES)
        to_come = sum(SHARES[later] for later in names[names.index(name) :])
        return max(0.0, end - time.monotonic()) * SHARES[name] / to_come

    return allowed


def _busy() -> str:
    """A sentence for the profile if other programs use the cores; else an empty one."""
    cores = cpu_device().cores or 1
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return f"; the machine was busy (load {load:.1f} on {cores} cores)" if load > BUSY_SHARE * cores else ""


def _seconds_per_call(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """The median of batches of calls, for about `seconds` in all."""
    from lopt_edge.run.device import device_of

    own = device_of(device)

    def batch(n_calls: int) -> float:
        start = time.perf_counter()
        for _ in range(n_calls):
            call()
        own.synchronize()
        return time.perf_counter() - start

    batch(1)  # warm-up: kernels are chosen, pages are touched
    deadline = time.perf_counter() + seconds
    first = batch(1)
    n_calls = max(1, round(LEAST_BATCH / max(first, 1e-7)))
    found = [first] if n_calls == 1 else []
    while len(found) < LEAST_BATCHES or (len(found) < MOST_BATCHES and time.perf_counter() < deadline):
        found.append(batch(n_calls) / n_calls)
    return sorted(found)[len(found) // 2]


# --- arithmetic -------------------------------------------------------------------------------------------------------


def _products(device: torch.device, seconds: float) -> dict[str, float]:
    """Operations per second of x W^T by dtype, over the shapes."""
    import torch

    kind, found = kind_of(device.type), {}
    each = seconds / len(kind.measured_products) / len(kind.measured_dtypes)
    for name in kind.measured_dtypes:
        dtype, total, operations = getattr(torch, name), 0.0, 0
        for rows, width_in, width_out in kind.measured_products:
            x = torch.randn(width_in, device=device).to(dtype).repeat(rows, 1)  # one row's randomness will do
            weight = torch.randn(width_in, device=device).to(dtype).repeat(width_out, 1)
            y = torch.empty(rows, width_out, device=device, dtype=dtype)
            total += _seconds_per_call(lambda x=x, w=weight, y=y: torch.mm(x, w.t(), out=y), device, each)  # type: ignore[misc]  # no types of defaults
            operations += 2 * rows * width_in * width_out
        found[name] = operations / total
    return found


def _attention(device: torch.device, seconds: float) -> dict[str, float]:
    """Operations per second of causal attention, half of the square counted, by dtype."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    kind, found = kind_of(device.type), {}
    n_tokens, names = kind.measured_tokens, kind.measured_dtypes
    for name in names:
        shape = (1, HEADS, n_tokens, HEAD_DIM)
        q, k, v = (torch.randn(shape, device=device).to(getattr(torch, name)) for _ in range(3))
        each = seconds / len(names)
        call = lambda q=q, k=k, v=v: scaled_dot_product_attention(q, k, v, is_causal=True)  # noqa: E731
        found[name] = 2 * n_tokens**2 * HEADS * HEAD_DIM / _seconds_per_call(call, device, each)
    return found


def _unpack_rate(device: torch.device, dtype_name: str, seconds: float) -> float:
    """Elements of a packed weight per second, unpacked to the compute dtype."""
    import torch

    from quant.nf4 import pack, unpack_into

    weight = pack(torch.randn(UNPACK_WIDTH, UNPACK_WIDTH, device=device))
    out = torch.empty(UNPACK_WIDTH, UNPACK_WIDTH, device=device, dtype=getattr(torch, dtype_name))
    return out.numel() / _seconds_per_call(lambda: unpack_into(weight, out), device, seconds)


def _overhead(device: torch.device, dtype_name: str, seconds: float) -> float:
    """Seconds of a layer so small that nothing but starting its operations counts: its linears with adapters, attention."""
    import torch
    from torch import nn
    from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

    from quant.linear import PackedLinear, UnpackBuffer
    from quant.nf4 import pack

    dtype, buffer, linears = getattr(torch, dtype_name), UnpackBuffer(), []
    for _ in range(N_LINEARS):
        linear = PackedLinear(TINY_WIDTH, TINY_WIDTH, buffer=buffer)
        linear.weight = pack(torch.randn(TINY_WIDTH, TINY_WIDTH, device=device))
        a, b = (torch.zeros(shape, device=device) for shape in ((TINY_WIDTH, RANK), (RANK, TINY_WIDTH)))
        linear.attach(nn.Parameter(a), nn.Parameter(b), scale=1.0)
        linears.append(linear)
    x = torch.randn(1, TINY_TOKENS, TINY_WIDTH, device=device).to(dtype)

    def layer() -> torch.Tensor:
        normed = rms_norm(x, (TINY_WIDTH,))
        q, k, v = (linear(normed) for linear in linears[:3])
        y = x + linears[3](scaled_dot_product_attention(q, k, v, is_causal=True))
        normed = rms_norm(y, (TINY_WIDTH,))
        z: torch.Tensor = y + linears[6](silu(linears[4](normed)) * linears[5](normed))
        return z

    return _seconds_per_call(layer, device, seconds)


# --- memory -----------------------------------------------------------------------------------------------------------


def _memory_bandwidth(device: torch.device, seconds: float) -> float:
    """Bytes per second of a copy on the device, what is read and what is written."""
    import torch

    source = torch.ones(COPY_BYTES, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / _seconds_per_call(lambda: target.copy_(source), device, seconds)


def _copies(device: torch.device, seconds: float) -> tuple[float, float, float, float]:
    """Bytes per second: up and down from pinned memory, up and down from pageable memory."""
    import torch

    there, found = torch.empty(COPY_BYTES, device=device, dtype=torch.uint8), []
    for pinned in (True, False):
        here = torch.zeros(COPY_BYTES, dtype=torch.uint8)
        if pinned:
            with suppress(RuntimeError):  # where pinning is refused (WSL, containers) a run copies from pageable memory too
                here = here.pin_memory()
        for target, source in ((there, here), (here, there)):
            call = lambda t=target, s=source: t.copy_(s, non_blocking=True)  # noqa: E731
            found.append(COPY_BYTES / _seconds_per_call(call, device, seconds / 4))
    up, down, up_pageable, down_pageable = found
    return up, down, up_pageable, down_pageable


def _fixed_bytes(device: torch.device) -> int | None:
    """What a fresh process takes before any tensor: on the CPU its resident set, on a GPU its context. None: unknown."""
    from lopt_edge.run.device import device_of

    own = device_of(device)
    free = 0 if own.kind.counts_process else own.free_bytes()
    code = _LIBRARIES if own.kind.counts_process else _CONTEXT
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, str(device)], capture_output=True, text=True, timeout=CHILD_SECONDS
        )
        found = int(done.stdout.split()[-1])
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError):
        return None
    n_bytes = found if own.kind.counts_process else free - found
    return n_bytes if 32 * MIB < n_bytes < 8 << 30 else None  # beyond that another process came or went


# --- disk -------------------------------------------------------------------------------------------------------------


def _disk(folder: Path, seconds: float, *, fraction: float) -> tuple[float, float, str]:
    """(bytes read per second, written per second, what to say of it), from one file that is gone afterwards."""
    n_pieces = max(1, round(fraction * DISK_BYTES / DISK_PIECE))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(folder).free < 2 * n_pieces * DISK_PIECE:
            return DISK_READ, DISK_WRITE, "; the disk is too full to be measured: its rates are assumed"
        with tempfile.TemporaryFile(dir=folder, prefix="lopt-measure-", buffering=0) as file:
            return _disk_rates(file.fileno(), n_pieces, seconds / 2)
    except OSError as error:
        raise InputError(
            f"cannot write in {folder} ({error.strerror or error})",
            where="page_dir",
            fix="choose a folder on a disk that you may write in",
        ) from None


def _disk_rates(number: int, n_pieces: int, seconds: float) -> tuple[float, float, str]:
    piece = os.urandom(DISK_PIECE)  # file systems that compress gain nothing
    start, written = time.perf_counter(), 0
    while written < n_pieces and (written == 0 or time.perf_counter() - start < seconds):
        view = memoryview(piece)
        while view:
            view = view[os.write(number, view) :]
        getattr(os, "fdatasync", os.fsync)(number)
        written += 1
    write_rate = written * DISK_PIECE / (time.perf_counter() - start)
    note = "" if hasattr(os, "posix_fadvise") else "; the disk was read from the system's cache"
    if not note:
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
    os.lseek(number, 0, os.SEEK_SET)
    start, n_bytes, buffer = time.perf_counter(), 0, bytearray(DISK_PIECE)
    while (got := os.readv(number, [buffer])) and (n_bytes == 0 or time.perf_counter() - start < seconds):
        n_bytes += got
    return n_bytes / (time.perf_counter() - start), write_rate, note
