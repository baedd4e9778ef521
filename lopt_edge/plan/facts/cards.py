"""Graphics cards and chips by name: how much memory they give, and their nominal rates.

For planning a run on a machine that is not at hand. Each figure comes from a table that `source` names or from a rule that
stands here; a measured profile (`lopt-edge doctor --measure`) beats both. The rules:
- memory is what CUDA reports (torch's total_memory, the lowest seen on Linux), which is less than the box says: a "24 GB"
  card holds 24 GiB, of which the driver keeps some. Where no report was found, a GeForce card counts for its GiB less 5%
  or 0.55 GiB, whichever is less: the most that was seen (7.60 of 8 GiB, 15.47 of 16, 23.61 of 24; torch out-of-memory
  messages in public issues). Windows reports nearly all of it
- the bf16 rate is the dense one with fp32 accumulation. GeForce cards halve it there: twice the fp32 rate of the shaders
  since Ampere, four times on Turing. Professional cards do not: four times (A100 and newer as published). Big square
  products reach it: RTX 3090 76 of 71 TFLOP/s, 4090 165 of 165, 3060 laptop 26 of 26 (torch-performance-test-data, see
  `_MEASURED`); an A100 reaches 80% of it, an L4 at its 72 W 59%
- before Ampere there is no bf16 (`has_bf16`), and the rate is that of fp16. A GTX 16xx has no tensor cores: its rate is 0
- a laptop's chip is an own card. Its rate is that of the highest boost clock in NVIDIA's range; one at a low power limit
  reaches half of it
- a link carries 80% of what PCIe's lanes could (a rule, unmeasured): 25 GB/s for generation 4 with 16 lanes. How many lanes
  a laptop connects is not published; 8 are assumed. A slower slot in the host is not known here.

Apple's chips share one memory; lopt-edge computes on their CPU in float32, so no rate of their GPU stands here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Literal

Kind = Literal["desktop", "laptop", "data-centre", "apple", "cpu"]
GIB, MIB, GB, TERA = 1 << 30, 1 << 20, 10**9, 10**12
LOST_SHARE, LOST_BYTES = 0.05, round(0.55 * GIB)  # of a GeForce's GiB, where no report was found
PCIE_SHARE = 0.8  # of what the lanes could
LANE = {3: 15.75 * GB / 16, 4: 31.5 * GB / 16, 5: 63.0 * GB / 16}  # bytes/s one way, by PCIe generation
_N_NEAR = 4

_TABLE = "fp32 and bandwidth: acarl005/GPU-specs nvidia_gpu_specs.md at d49de188"
_WIKIPEDIA = "cores, clock and bandwidth: Wikipedia's List of Nvidia GPUs, as in jaeseok614/gpu-specs-kr on 2026-08-16"
_MEASURED = "zzc0721/torch-performance-test-data database.md, seen 2026-11"
_HF = "fp32: huggingface.js hardware-nvidia.ts at 013c6b9c"


@dataclass(frozen=True)
class Card:
    """A graphics card, by its nominal figures. `bf16_flops`: dense, fp32 accumulation; fp16's where `has_bf16` is false; 0
    without tensor cores, or unknown.

    Bandwidths are in bytes/s, that of PCIe one way; 0 where there is no link.
    """

    name: str
    memory_bytes: int
    memory_bandwidth: float
    bf16_flops: float
    fp32_flops: float
    pcie_bandwidth: float
    has_bf16: bool
    kind: Kind
    source: str


def _link(generation: int, lanes: int) -> float:
    return PCIE_SHARE * LANE[generation] * lanes


def _geforce(
    name: str,
    gib: int,
    bandwidth: float,
    fp32: float,
    link: tuple[int, int] = (4, 16),
    *,
    seen_mib: int | None = None,
    per_fp32: float = 2,
    bf16: float | None = None,
    kind: Kind = "desktop",
    source: str = _TABLE,
) -> Card:
    """A GeForce card: `bandwidth` in GB/s, `fp32` and `bf16` in TFLOP/s, `link` (PCIe generation, lanes), `per_fp32` bf16
    over fp32."""
    lost = min(round(LOST_SHARE * gib * GIB), LOST_BYTES)
    memory = gib * GIB - lost if seen_mib is None else seen_mib * MIB
    how = "estimated from its GiB" if seen_mib is None else "as torch reported it"
    flops = per_fp32 * fp32 if bf16 is None else bf16
    return Card(
        name,
        memory,
        bandwidth * GB,
        flops * TERA,
        fp32 * TERA,
        _link(*link),
        has_bf16=True,
        kind=kind,
        source=f"{source}; memory {how}",
    )


def _turing(
    name: str,
    gib: int,
    bandwidth: float,
    fp32: float,
    *,
    seen_mib: int | None = None,
    per_fp32: float = 4,
    source: str = _TABLE,
) -> Card:
    card = _geforce(name, gib, bandwidth, fp32, (3, 16), seen_mib=seen_mib, per_fp32=per_fp32, source=source)
    return replace(card, has_bf16=False)


def _laptop(
    name: str, gib: int, bandwidth: float, cores: int, boost_mhz: int, generation: int, source: str = _WIKIPEDIA
) -> Card:
    fp32 = 2 * cores * boost_mhz * 1e6 / TERA  # a multiplication and an addition per core and tick
    return _geforce(name, gib, bandwidth, fp32, (generation, 8), kind="laptop", source=source)


def _centre(
    name: str,
    mib: int,
    bandwidth: float,
    fp32: float,
    bf16: float,
    generation: int,
    source: str,
    *,
    has_bf16: bool = True,
    kind: Kind = "data-centre",
) -> Card:
    return Card(
        name,
        mib * MIB,
        bandwidth * GB,
        bf16 * TERA,
        fp32 * TERA,
        _link(generation, 16),
        has_bf16=has_bf16,
        kind=kind,
        source=source,
    )


def _apple(name: str, gib: int, bandwidth: float) -> Card:
    """An Apple chip with the smallest memory that is sold with it."""
    source = (
        "bandwidth: Apple, as in llama.cpp discussion 4167 and release 0.3.59 of autonomous-grid; memory: the least sold"
    )
    return Card(name, gib * GIB, bandwidth * GB, 0.0, 0.0, 0.0, has_bf16=False, kind="apple", source=source)


_GTX_16 = "cores and clocks: guru3d, GTX 1660 SUPER review page 5"
_LAPTOP_50 = "cores and bus: neowin 2025-01-07; clock: hmc-tech.com"
_PRO = f"{_HF}; bf16 = 4 x fp32"
_HOPPER = "NVIDIA's table at archive-lib.hpctech.co.jp, half of the sparse rate"
_ALL = (
    # Turing without tensor cores, 6 GB: fp16 products are slower there than fp32 (0.6 against 5.2 TFLOP/s, _MEASURED)
    _turing("GTX 1660", 6, 192, 5.03, per_fp32=0, source=_GTX_16),
    _turing("GTX 1660 SUPER", 6, 336, 5.03, per_fp32=0, source=_GTX_16),
    _turing("GTX 1660 Ti", 6, 288, 5.44, per_fp32=0, seen_mib=5936, source=_GTX_16),
    # Turing
    _turing("RTX 2060", 6, 336, 6.45, seen_mib=5934),
    _turing("RTX 2060 12GB", 12, 336, 7.18, source="hmc-tech.com, RTX 2060 12GB; bandwidth as RTX 2060"),
    _turing("RTX 2060 SUPER", 8, 448, 7.18),
    _turing("RTX 2070", 8, 448, 7.46),
    _turing("RTX 2070 SUPER", 8, 448, 9.06),
    _turing("RTX 2080", 8, 448, 10.07),
    _turing("RTX 2080 SUPER", 8, 496, 11.15),
    _turing("RTX 2080 Ti", 11, 616, 13.45, seen_mib=11019),
    # Ampere
    _geforce("RTX 3050", 8, 224, 9.1, (4, 8), source="cputronic.com and somagnews.com, RTX 3050 8 GB"),
    _geforce("RTX 3060", 12, 360, 12.74, seen_mib=11909),
    _geforce("RTX 3060 Ti", 8, 448, 16.20),
    _geforce("RTX 3070", 8, 448, 20.31),
    _geforce("RTX 3070 Ti", 8, 608, 21.75),
    _geforce("RTX 3080", 10, 760, 29.77),
    _geforce("RTX 3080 12GB", 12, 912, 30.65),
    _geforce("RTX 3080 Ti", 12, 912, 34.10),
    _geforce("RTX 3090", 24, 936, 35.58, seen_mib=24259),
    _geforce("RTX 3090 Ti", 24, 1008, 40.00),
    _laptop("RTX 3050 Laptop 6GB", 6, 168, 2560, 1492, 4, f"{_WIKIPEDIA} (14 Gbit/s memory)"),
    _laptop("RTX 3060 Laptop", 6, 336, 3840, 1702, 4),
    _laptop("RTX 3070 Laptop", 8, 448, 5120, 1720, 4),
    _laptop("RTX 3070 Ti Laptop", 8, 448, 5888, 1485, 4),
    _laptop("RTX 3080 Laptop", 8, 448, 6144, 1810, 4),
    _laptop("RTX 3080 Laptop 16GB", 16, 448, 6144, 1810, 4),
    _laptop("RTX 3080 Ti Laptop", 16, 512, 7424, 1590, 4),
    # Ada
    _geforce("RTX 4060", 8, 272, 15.11, (4, 8)),
    _geforce("RTX 4060 Ti", 8, 288, 22.06, (4, 8)),
    _geforce("RTX 4060 Ti 16GB", 16, 288, 22.06, (4, 8)),
    _geforce("RTX 4070", 12, 504, 29.15),
    _geforce("RTX 4070 SUPER", 12, 504, 35.48),
    _geforce("RTX 4070 Ti", 12, 504, 40.09),
    _geforce("RTX 4070 Ti SUPER", 16, 672, 44.10, seen_mib=15934),
    _geforce("RTX 4080", 16, 717, 48.74, seen_mib=16049),
    _geforce("RTX 4080 SUPER", 16, 736, 52.22),
    _geforce("RTX 4090", 24, 1008, 82.58, seen_mib=24176),
    _laptop("RTX 4050 Laptop", 6, 192, 2560, 2370, 4),
    _laptop("RTX 4060 Laptop", 8, 256, 3072, 2370, 4),
    _laptop("RTX 4070 Laptop", 8, 256, 4608, 2175, 4),
    _laptop("RTX 4080 Laptop", 12, 432, 7424, 2280, 4),
    _laptop("RTX 4090 Laptop", 16, 576, 9728, 2040, 4, f"{_WIKIPEDIA}; clock: notebookcheck.net 11437"),
    # Blackwell
    _geforce("RTX 5050", 8, 320, 13.17, (5, 8), source=f"{_HF}; bandwidth: goldmidi.com on NVIDIA's announcement"),
    _geforce("RTX 5060", 8, 448, 19.18, (5, 8)),
    _geforce("RTX 5060 Ti", 8, 448, 23.70, (5, 8)),
    _geforce("RTX 5060 Ti 16GB", 16, 448, 23.70, (5, 8), seen_mib=15841),
    _geforce("RTX 5070", 12, 672, 30.87, (5, 16)),
    _geforce("RTX 5070 Ti", 16, 896, 43.95, (5, 16)),
    _geforce("RTX 5080", 16, 960, 56.29, (5, 16), seen_mib=15841, source=f"{_TABLE}; memory as a 16 GB RTX 5060 Ti"),
    _geforce("RTX 5090", 32, 1792, 104.75, (5, 16), seen_mib=32109),
    # the last three: measured products (bf16, and half of it for fp32), for want of a published clock
    _geforce("RTX 5050 Laptop", 8, 384, 13.5, (5, 8), kind="laptop", source=f"{_MEASURED}; bandwidth: goldmidi.com"),
    _geforce("RTX 5060 Laptop", 8, 384, 18.0, (5, 8), kind="laptop", source=f"{_MEASURED}; bandwidth as RTX 5070 Laptop"),
    _geforce("RTX 5070 Ti Laptop", 12, 672, 29.6, (5, 8), kind="laptop",
             source=f"{_MEASURED}; bandwidth: 192 bit at 28 Gbit/s"),
    _laptop("RTX 5070 Laptop", 8, 384, 4608, 2347, 5, "cores and clock: tinhte.mywebsite.vn 5079; 128 bit at 24 Gbit/s"),
    _laptop("RTX 5080 Laptop", 16, 896, 7680, 2287, 5, f"{_LAPTOP_50}; 28 Gbit/s"),
    _laptop("RTX 5090 Laptop", 24, 896, 10496, 2160, 5, f"{_LAPTOP_50}; 28 Gbit/s"),
    # professional and data-centre
    _centre("RTX A6000", 48 * 1024, 768, 38.7, 154.8, 4, f"{_PRO}; {_WIKIPEDIA}; memory nominal", kind="desktop"),
    _centre("RTX 6000 Ada", 48 * 1024, 960, 91.1, 364.4, 4, f"{_PRO}; {_WIKIPEDIA}; memory nominal", kind="desktop"),
    _centre("T4", 15079, 320, 8.1, 65, 3, "RajBhope/gpu-runtime-predictor gpu_catalog.json; no bf16: fp16; torch's memory",
            has_bf16=False),
    _centre("A10", 22587, 600, 31.24, 125, 4, f"{_PRO}; {_WIKIPEDIA}; memory as torch reported an A10G's"),
    _centre("L4", 22559, 300, 30.29, 121, 4, f"{_PRO}; {_WIKIPEDIA}; memory: 22.03 GiB in out-of-memory messages"),
    _centre("L40S", 45589, 864, 91.61, 366, 4, f"{_PRO}; bandwidth as L40 ({_WIKIPEDIA}); torch's memory"),
    _centre("A100 40GB", 40326, 1555, 19.5, 312, 4, f"{_TABLE}; bf16: gpu_catalog.json (as T4); torch's memory"),
    _centre("A100 80GB", 81039, 2039, 19.5, 312, 4, f"{_TABLE}; bf16 as A100 40GB; 79.14 GiB in out-of-memory messages"),
    _centre("H100 PCIe", 81008, 2000, 51, 756, 5, f"{_HOPPER}; torch's memory"),
    _centre("H100", 81082, 3350, 67, 989, 5, f"{_HOPPER}; torch's memory (SXM)"),
    _centre("H200", 143156, 4800, 67, 989, 5, "itkb.uw.cz 2026-06, from NVIDIA's data sheet; torch's memory (SXM)"),
    _centre("B200", 182631, 7700, 75, 2250, 5, "HGX B200 in NVIDIA's data sheet (zdszero.github.io; half of the sparse "
            "rate); torch's memory"),
    # Apple
    _apple("M1", 8, 68.25), _apple("M1 Pro", 16, 200), _apple("M1 Max", 32, 400), _apple("M1 Ultra", 64, 800),
    _apple("M2", 8, 100), _apple("M2 Pro", 16, 200), _apple("M2 Max", 32, 400), _apple("M2 Ultra", 64, 800),
    _apple("M3", 8, 100), _apple("M3 Pro", 18, 150), _apple("M3 Max", 36, 300), _apple("M3 Ultra", 96, 819),
    _apple("M4", 16, 120), _apple("M4 Pro", 24, 273), _apple("M4 Max", 36, 410), _apple("M5", 16, 153),
    Card("CPU", 16 * GIB, 51.2 * GB, 0.0, 0.126 * TERA, 0.0, has_bf16=False, kind="cpu",
         source="an assumed laptop: 16 GiB, two channels of DDR4-3200; fp32 measured on 2 cores of an AMD EPYC"),
)  # fmt: skip
CARDS = {card.name: card for card in _ALL}


def find_card(name: str) -> Card | None:
    """The card that is meant by `rtx4090`, `4090`, `rtx-4060-laptop`, or torch's name of a device; None if there is none.

    A memory size in the name (`RTX 3060 12GB`) must be the card's.
    """
    plain = _plain(name)
    for wanted in (plain, plain.replace("pcie", "")):
        size = re.search(r"(?<!\d)(\d{1,3})gb$", wanted) or re.search(r"(\d{1,2})gb$", wanted)
        found = next((card for card in _ALL if wanted and wanted in _keys(card)), None)
        if found is None and size is not None:
            base = wanted[: size.start()]
            fitting = (card for card in _ALL if base and base in _keys(card) and _holds(card, int(size[1])))
            found = next(fitting, None)
        if found is not None:
            return found
    return None


def near_cards(name: str) -> list[str]:
    """The names of cards that the user may have meant, the nearest first."""
    keys = {key: card.name for card in _ALL for key in sorted(_keys(card))}
    found = get_close_matches(_plain(name), keys, n=2 * _N_NEAR, cutoff=0.6)
    return list(dict.fromkeys(keys[key] for key in found))[:_N_NEAR]


_NOISE = re.compile(r"nvidia|geforce|tesla|graphics|card|apple|\bgeneration\b|\bgpu\b|\bsxm\d?\b|\bhbm\d\w?\b")


def _plain(name: str) -> str:
    text = re.sub(r"[^a-z0-9]+", " ", name.lower())
    text = re.sub(r"\bmobile\b", "laptop", _NOISE.sub(" ", text))
    return re.sub(r"\bgib\b|(?<=\d)gib\b", "gb", text).replace(" ", "")


def _keys(card: Card) -> set[str]:
    """The words by which a card is found: its name, and that without rtx or gtx."""
    plain = _plain(card.name)
    return {plain, re.sub(r"^[rg]tx", "", plain)}


def _holds(card: Card, gib: int) -> bool:
    """Whether a card with this memory is sold as one of `gib` GB."""
    return abs(card.memory_bytes / GIB - gib) < 0.09 * gib
