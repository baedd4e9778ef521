"""A device profile: how fast one machine computes and moves bytes. What the prediction of seconds stands on.

Three sources, the best first: a measurement on this machine (doctor/measure.py, kept as JSON in the cache folder), a card's
nominal rates by the rules below (`profile_of_card`), and the figures of one slow CPU (`default_cpu_profile`). Each profile
names its own. The rule: a profile holds rates only, no model and no run; whoever asks adds them up.

A card's sustained rates are nominal ones times a share. Where a share was not measured it is a guess on the slow side,
since a run that ends early disappoints nobody; the constants say which. What a profile cannot know: a GPU shared with a
desktop, a laptop's power limit, a disk that slows down once its cache is full.

It times nothing and asks no device.
"""

from __future__ import annotations

import json
import math
import os
import re
import socket
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import date
from pathlib import Path
from typing import Any

from lopt_edge.errors import InputError, raise_collected
from lopt_edge.plan.facts.cards import Card
from lopt_edge.plan.facts.device_kinds import CPU, CUDA, DEVICE_TYPES, kind_of
from lopt_edge.units import format_bytes

VERSION = 1  # of the file
DTYPES = ("float32", "bfloat16", "float16")
_ADVICE = "measure again with lopt-edge doctor --measure, or remove the file"

# Rules for a card that was not measured.
MATMUL_SHARE = (
    0.55  # of the nominal rate: the layers' products with a few hundred rows; big squares reach 0.6 to 1 (cards.py)
)
ATTENTION_SHARE = 0.35  # SDPA on an RTX 3080 laptop and a 4090: 0.34 and 0.48 (DefTruth/faster-prefill-attention v0.0.1)
BANDWIDTH_SHARE = 0.8  # clpeak on an RTX 4090: 0.91 (clpeak issue 106); elementwise kernels of a layer are smaller
EMULATED_BF16 = 0.55  # of fp32, without bf16 units: T4 0.53, RTX 2070, 2080 and 2080 Ti 0.56 (torch-performance-test-data)
SHADER_FP16 = 0.12  # of fp32, GTX 16xx without tensor cores: 0.61 of 5.24 TFLOP/s on a GTX 1660 Ti (the same table)
PAGEABLE_SHARE = 0.5  # of a pinned copy: the driver copies through a buffer of its own (unmeasured)
# A packed element is read as half a byte and its part of a scale, and written in two bytes. The share: 0.6 on an H200 if
# NF4's whole loss against bf16 (9.1k to 8.4k tokens/s, Qwen3-8B in Unsloth) is the unpacking of all layers, three times.
UNPACK_BYTES, UNPACK_SHARE = 0.5 + 1 / 64 + 2, 0.6
DISK_READ, DISK_WRITE = 2.0e9, 1.0e9  # bytes/s: an NVMe disk on the slow side (unmeasured)


@dataclass(frozen=True)
class DeviceProfile:
    """The rates of a device in operations or bytes per second. A multiply-add is two operations.

    `matmul_flops` by dtype name; `unpack_rate` counts elements of 4-bit weights unpacked to the compute dtype;
    `attention_flops` counts causal attention once, 2 x tokens^2 x heads x head_dim, in the dtype that a run takes by itself
    (`attention_by_dtype` holds what else is known). `memory_bandwidth` counts reads and writes. `copy_*` go between device
    and host, `disk_*` between host and disk. `context_bytes` are taken on the device before its first tensor, beside the
    allocator's; `library_bytes` by the process where the device tier is RAM. `measured` is None for what was not.
    """

    name: str
    device_type: str
    memory_bytes: int
    matmul_flops: dict[str, float]
    unpack_rate: float
    memory_bandwidth: float
    copy_up_pinned: float
    copy_down_pinned: float
    copy_up_pageable: float
    copy_down_pageable: float
    disk_read: float
    disk_write: float
    op_overhead_seconds: float
    attention_flops: float
    context_bytes: int
    library_bytes: int
    measured: date | None
    source: str
    attention_by_dtype: dict[str, float] = field(default_factory=dict)

    def up(self, tier: str) -> float:
        """The bytes/s from a tier to the device; the host's memory is pinned where there is a GPU."""
        return self._way(tier, self.copy_up_pinned, self.disk_read)

    def down(self, tier: str) -> float:
        """The bytes/s from the device to a tier."""
        return self._way(tier, self.copy_down_pinned, self.disk_write)

    def _way(self, tier: str, copy: float, disk: float) -> float:
        if tier == "device":
            return math.inf
        link = copy if kind_of(self.device_type).host_is_below else self.memory_bandwidth / 2  # a byte is read and written
        return link if tier == "host" else min(link, disk)

    def with_pinned(self, share: float) -> DeviceProfile:
        """The profile where only this share of the host tier's bytes is pinned: the rest is copied at pageable rates."""

        def rate(pinned: float, pageable: float) -> float:
            return 1 / (share / pinned + (1 - share) / pageable)

        up, down = rate(self.copy_up_pinned, self.copy_up_pageable), rate(self.copy_down_pinned, self.copy_down_pageable)
        return replace(self, copy_up_pinned=up, copy_down_pinned=down)

    @property
    def file_read(self) -> float:
        """The bytes/s of weights read from their files to the device, nothing cached."""
        return self.up("disk")

    def flops(self, itemsize: int) -> float:
        """The matrix rate of a dtype of this size; of two bytes the faster dtype."""
        if itemsize == 4:
            return self.matmul_flops["float32"]
        return max(rate for name, rate in self.matmul_flops.items() if name != "float32")

    def as_dict(self) -> dict[str, Any]:
        """The profile as plain JSON values."""
        return {**asdict(self), "measured": None if self.measured is None else self.measured.isoformat()}

    def described(self) -> list[tuple[str, str]]:
        """The profile in words, for people: (what, how much)."""
        when = "not measured" if self.measured is None else f"measured on {self.measured.isoformat()}"
        rates = ", ".join(f"{name} {_si(rate)}FLOP/s" for name, rate in self.matmul_flops.items())
        rows = [("device", f"{self.name} ({self.device_type}), {format_bytes(self.memory_bytes)}, {when}"),
                ("matrix products", rates), ("attention", f"{_si(self.attention_flops)}FLOP/s"),
                ("unpacking of 4-bit weights", f"{_si(self.unpack_rate)}elements/s"),
                ("memory", f"{_si(self.memory_bandwidth)}B/s")]  # fmt: skip
        if kind_of(self.device_type).host_is_below:
            rows += [
                ("copies up, pinned / pageable", f"{_si(self.copy_up_pinned)}B/s / {_si(self.copy_up_pageable)}B/s"),
                ("copies down", f"{_si(self.copy_down_pinned)}B/s / {_si(self.copy_down_pageable)}B/s"),
                ("context", format_bytes(self.context_bytes)),
            ]
        rows += [
            ("disk, read / write", f"{_si(self.disk_read)}B/s / {_si(self.disk_write)}B/s"),
            ("overhead of a layer", f"{1e3 * self.op_overhead_seconds:.2g} ms"),
        ]
        return [*rows, ("libraries", format_bytes(self.library_bytes))] if self.library_bytes else rows


def _si(rate: float) -> str:
    """The rate in three digits and a letter before the unit: `126 G`, `1.5 T`."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if rate >= size:
            return f"{rate / size:.3g} {letter}"
    return f"{rate:.3g} "


def has_flash(profile: DeviceProfile) -> bool:
    """Whether flash attention runs on the device: on GPUs with bfloat16 units (from NVIDIA's sm80 on)."""
    return "bfloat16" in profile.attention_by_dtype


def profile_of_card(card: Card) -> DeviceProfile:
    """A profile from nominal rates. Of an Apple chip it is the CPU's: there the default rates stand in."""
    if card.kind in ("apple", "cpu"):
        known = default_cpu_profile()
        source = f"{card.source}; rates: {known.source}"
        return replace(known, name=card.name, memory_bytes=card.memory_bytes, source=source)
    fp32, tensor = card.fp32_flops, card.bf16_flops
    rates = {
        "float32": MATMUL_SHARE * fp32,
        "float16": MATMUL_SHARE * tensor if tensor else SHADER_FP16 * fp32,
        "bfloat16": MATMUL_SHARE * (tensor if card.has_bf16 else EMULATED_BF16 * fp32),
    }
    attention = {"float32": ATTENTION_SHARE * fp32, "float16": ATTENTION_SHARE * (tensor or fp32)}
    if card.has_bf16:
        attention["bfloat16"] = ATTENTION_SHARE * tensor
    pageable = PAGEABLE_SHARE * card.pcie_bandwidth
    return DeviceProfile(
        name=card.name,
        device_type=CUDA.name,
        memory_bytes=card.memory_bytes,
        matmul_flops=rates,
        unpack_rate=UNPACK_SHARE * card.memory_bandwidth / UNPACK_BYTES,
        memory_bandwidth=BANDWIDTH_SHARE * card.memory_bandwidth,
        copy_up_pinned=card.pcie_bandwidth,
        copy_down_pinned=card.pcie_bandwidth,
        copy_up_pageable=pageable,
        copy_down_pageable=pageable,
        disk_read=DISK_READ,
        disk_write=DISK_WRITE,
        op_overhead_seconds=CUDA.op_overhead_seconds,
        attention_flops=attention["bfloat16" if card.has_bf16 else "float16"],
        context_bytes=CUDA.context_bytes,
        library_bytes=0,
        measured=None,
        source=f"shares of the nominal rates ({card.source})",
        attention_by_dtype=attention,
    )


def default_cpu_profile() -> DeviceProfile:
    """A laptop's CPU until it is measured: two cores of an AMD EPYC with AVX512 (quant/nf4.py; run/device.py)."""
    bandwidth = 16e9  # reads and writes
    attention = 60e9  # half of the products, as measured (doctor/measure.py)
    return DeviceProfile(
        name="CPU",
        device_type=CPU.name,
        memory_bytes=16 << 30,
        matmul_flops={"float32": 126e9, "bfloat16": 42e9},  # without AVX512-BF16 or AMX
        unpack_rate=4096 * 4096 / 11.3e-3,
        memory_bandwidth=bandwidth,
        copy_up_pinned=bandwidth / 2,
        copy_down_pinned=bandwidth / 2,
        copy_up_pageable=bandwidth / 2,
        copy_down_pageable=bandwidth / 2,
        disk_read=DISK_READ,
        disk_write=DISK_WRITE,
        op_overhead_seconds=CPU.op_overhead_seconds,
        attention_flops=attention,
        context_bytes=0,
        library_bytes=CPU.library_bytes,
        measured=None,
        source="measured on 2 cores of an AMD EPYC with AVX512; 16 GiB and the disk are assumed",
        attention_by_dtype={"float32": attention},
    )


# --- the file ---------------------------------------------------------------------------------------------------------


def profile_path(folder: Path | None = None) -> Path:
    """The path of this machine's profile, in `folder` or lopt-edge's cache. Home folders may be shared: by host."""
    host = re.sub(r"[^A-Za-z0-9.-]+", "-", socket.gethostname())[:80] or "this-machine"
    return (folder or Path.home() / ".cache" / "lopt-edge") / f"profile-{host}.json"


def save_profile(profile: DeviceProfile, path: Path) -> None:
    """Write the profile beside its path and rename it, so that a full disk leaves the old one."""
    values = {"version": VERSION, **profile.as_dict()}
    beside = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n")
        os.replace(beside, path)
    except OSError as error:
        with suppress(OSError):
            beside.unlink()
        raise InputError(f"cannot be written ({error.strerror or error})", where=str(path)) from None


def load_profile(path: Path) -> DeviceProfile:
    """The profile of a file. Raises InputError(s) for one that is missing, broken, of another version or not plausible."""
    where = str(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror or error})", where=where, fix=_ADVICE) from None
    except (ValueError, RecursionError):
        raise InputError("is not JSON", where=where, fix=_ADVICE) from None
    if not isinstance(values, dict) or values.get("version") != VERSION:
        raise InputError(f"is not a profile of version {VERSION}", where=where, fix=_ADVICE)
    errors = []
    for name, kind in _KINDS.items():
        if name not in values:
            errors.append(InputError(f"lacks {name!r}", where=where, fix=_ADVICE))
        elif not _is_valid(values[name], kind):
            shown = repr(values[name])[:60]
            errors.append(InputError(f"{name} cannot be {shown}", where=where, fix=_ADVICE))
    raise_collected(errors)
    known = {name: values[name] for name in _KINDS}
    known["measured"] = None if known["measured"] is None else date.fromisoformat(known["measured"])
    return DeviceProfile(**known)


# What each field may hold; all others are rates.
_OTHER_KINDS = {"name": "text", "source": "text", "device_type": "device", "memory_bytes": "bytes",
                "context_bytes": "bytes or none", "library_bytes": "bytes or none", "matmul_flops": "rates of fp32",
                "attention_by_dtype": "rates", "measured": "date"}  # fmt: skip
_KINDS = {known.name: _OTHER_KINDS.get(known.name, "rate") for known in fields(DeviceProfile)}


def _is_valid(value: object, kind: str) -> bool:
    if kind == "text":
        return isinstance(value, str)
    if kind == "device":
        return value in DEVICE_TYPES
    if kind.startswith("bytes"):
        return type(value) is int and (0 if kind == "bytes or none" else 1) <= value < 2**60
    if kind.startswith("rates"):
        if not isinstance(value, dict) or not all(
            name in DTYPES and _is_valid(rate, "rate") for name, rate in value.items()
        ):
            return False
        return kind == "rates" or ("float32" in value and len(value) > 1)
    if kind == "date":
        return value is None or (isinstance(value, str) and _is_date(value))
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _is_date(text: str) -> bool:
    try:
        date.fromisoformat(text)
    except ValueError:
        return False
    return True
