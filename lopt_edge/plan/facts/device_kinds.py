"""What the planner must know of a kind of device: one row a kind, by torch's name of its type.

The rule: whoever asks how a CPU differs from a GPU asks a field of the row, which says what it means; no other file under
plan/ compares a device's name, and no table is keyed by one. A size that decides both what is run and what is predicted
stands here once, if it differs by device, else in plan/costs/tiles.py or quant/sizes.py: the planner and the code that runs
read the same one. What torch can do on a device is run/devices', one class a kind.

So a further kind is a row here and a class there: settings, messages, planner and runtime take it from these two. Rates of
its cards would be a matter of cards.py and `profile_of_card`, which know NVIDIA's.

It asks no machine and never imports torch. A card's own figures are cards.py's, a machine's measured ones profile.py's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

MIB = 1 << 20
TORCH, TRITON = "torch", "triton"  # whose kernels a layer runs with, where there are both


@dataclass(frozen=True)
class DeviceKind:
    """One kind of device. The first fields say what it is, the others what was measured or chosen for it.

    `host_is_below`: a host tier lies between the device and the disk, in pinned memory, over a link. `counts_process`: its
    memory is the resident set of all processes of a run, their libraries and the heap's gaps included; else it is what one
    process' allocator has reserved, and the driver's context. `computes_on_cores`: arithmetic is done by this machine's
    cores, so that the number of threads decides bits. `shares_ram`: its memory is the machine's, so that the host is no
    tier, although a GPU's tensors are copied on their way to the disk. `unpacks_here`: 4-bit weights are unpacked by our
    code (quant/nf4.py), not by bitsandbytes' kernel. `widens_products`: products of half precision add to fp32 sums by
    themselves (quant/products.py). `has_float64`: sums of losses may be kept in it.
    """

    name: str  # torch's name of the type
    title: str  # in sentences
    host_is_below: bool
    counts_process: bool
    computes_on_cores: bool
    shares_ram: bool
    unpacks_here: bool
    widens_products: bool
    has_float64: bool
    beside: str  # what its memory holds beside tensors and the allocator's slack
    watcher: str  # the command that shows who uses its memory

    vocabulary_chunk: int  # rows of the lm_head multiplied at a time
    score_bytes: int  # of a tile's attention scores in fp32 (run/model/query_tiles.py)
    attention_bytes: int  # that a fused backward may take beside its gradients (fused_attention.py); 0: torch chooses
    norm_tile_bytes: int  # of a tile's rows in a norm (run/model/tiled.py)
    fuses_norms: bool  # torch has one kernel for a norm there
    mlp_blocks: tuple[int, ...]  # features of an MLP at a time, the fastest first (quant/gated_mlp.py); 0: all of them
    mlp_tile: int  # tokens of an MLP at a time
    joins_products: bool  # gate and up are one product
    triton_capabilities: tuple[str, ...]  # for which our kernels (run/kernels) are compiled in a test; (): they never run

    library_bytes: int  # of the process before its first tensor, where they count
    context_bytes: int  # of the driver before the first tensor, beside the allocator's
    slack_bytes: int  # what the allocator keeps between tensors (plan/costs/predict.py)
    slack_share: float  # the same, of what a step moves
    within_share: float  # the same, of what an op takes on top of what lives when it begins
    saving_bytes: int  # of code that is loaded when a run saves, where code counts
    later_part: int  # one part in so many is added for what comes after the watched steps (plan/costs/correction.py)
    op_overhead_seconds: float  # of a layer
    block_seconds: float  # of launching what a further block of an MLP adds to a forward; 0: it adds none

    measured_products: tuple[tuple[int, int, int], ...]  # (rows, in, out): micro-batches and layers (doctor/measure.py)
    measured_dtypes: tuple[str, ...]
    measured_tokens: int  # of attention
    is_untried: bool = False  # no run has met one, nor is one played in tests
    score_copies: int = 0  # of each attention score, in bytes, that torch's own attention takes beside its results

    @property
    def has_host_tier(self) -> bool:
        """Whether host memory is a tier of its own, between the device and the disk."""
        return self.host_is_below and not self.shares_ram


CPU = DeviceKind(
    name="cpu",
    title="CPU",
    host_is_below=False,
    counts_process=True,
    computes_on_cores=True,
    shares_ram=True,
    unpacks_here=True,
    widens_products=False,
    has_float64=True,
    beside="library",
    watcher="top",
    # Smaller chunks cost no time (1024, 2048, 4096, 8192 rows: 1.73, 1.76, 1.72, 1.7 s for 512 tokens, Qwen2.5-0.5B shape)
    # and take less: 540, 574, 579, 608 MiB of peak.
    vocabulary_chunk=1024,
    score_bytes=4 * MIB,
    attention_bytes=0,
    norm_tile_bytes=MIB,  # few enough for the caches
    fuses_norms=False,
    mlp_blocks=(1024,),
    mlp_tile=1024,
    joins_products=False,  # a third tensor for nothing
    triton_capabilities=(),
    library_bytes=350 * MIB,  # torch 218 MiB, transformers' model code 113, the rest of a run 20
    context_bytes=0,
    # With the heap trimmed before each op a process takes 22 to 29 MiB beside library and tensors, whatever the shape (20
    # of them code that a first step loads), and in an op up to 1.2 of its own bytes again: 17 to 20 of 14 to 17 MiB. The
    # rest of the slack is for holes, which are given back only where they would go beyond it.
    slack_bytes=42 * MIB,
    slack_share=0.0,
    within_share=1.2,
    saving_bytes=3 * MIB,  # 0.2 to 2.7 above the steps' peak (examples/tiny-llama); peft, which took 43, is not imported
    later_part=50,
    op_overhead_seconds=1.2e-3,  # measured (doctor/measure.py) on an AMD EPYC core
    block_seconds=0.0,
    measured_products=((512, 2048, 2048), (256, 4096, 4096)),
    measured_dtypes=("float32", "bfloat16"),
    measured_tokens=1024,
)

CUDA = DeviceKind(
    name="cuda",
    title="CUDA",
    host_is_below=True,
    counts_process=False,
    computes_on_cores=False,
    shares_ram=False,
    unpacks_here=False,
    widens_products=True,
    has_float64=True,
    beside="CUDA context",
    watcher="nvidia-smi",
    vocabulary_chunk=8192,  # a GPU wants larger products
    score_bytes=32 * MIB,
    attention_bytes=256 * MIB,  # of an 8B all heads up to 6,000 tokens; beyond that a part is work enough
    norm_tile_bytes=32 * MIB,  # enough work for a kernel
    fuses_norms=True,
    mlp_blocks=(0, 4096, 1024),
    mlp_tile=4096,  # a GPU wants larger products than a CPU
    joins_products=True,
    triton_capabilities=("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0"),
    library_bytes=0,
    context_bytes=512 * MIB,  # 0.46 and 0.49 GiB beside torch's own in an RTX 4090's out-of-memory messages (public issues)
    slack_bytes=96 * MIB,  # cuBLAS workspaces
    slack_share=0.04,  # rounding to 2 MiB blocks
    within_share=0.0,
    saving_bytes=0,
    later_part=100,
    op_overhead_seconds=3e-4,  # unmeasured: Python takes as long as there, but most of it passes while the device computes
    block_seconds=1e-4,  # unmeasured: a dozen launches (tools/count_kernels.py) of 8 us
    measured_products=((2048, 2048, 2048), (2048, 4096, 4096)),
    measured_dtypes=("float32", "bfloat16", "float16"),
    measured_tokens=2048,
)

# Intel's and Apple's GPUs: nothing of them is measured. Sizes are CUDA's, but for what torch or bitsandbytes lack there.
XPU = replace(
    CUDA,
    name="xpu",
    title="XPU",
    beside="driver's context",
    watcher="xpu-smi",
    unpacks_here=True,
    widens_products=False,
    has_float64=False,
    attention_bytes=0,
    fuses_norms=False,
    triton_capabilities=(),
    is_untried=True,
)
MPS = replace(
    XPU,
    name="mps",
    title="MPS",
    beside="Metal's own",
    watcher="Activity Monitor",
    shares_ram=True,
    context_bytes=256 * MIB,
    score_copies=12,  # scores in the compute dtype and their softmax, and both gradients: an upper guess
)

KINDS = {kind.name: kind for kind in (CPU, CUDA, XPU, MPS)}
DEVICE_TYPES = tuple(KINDS)
AUTO = "auto"  # the setting that leaves the choice to run/device.py


def kind_of(device: str) -> DeviceKind:
    """The row of a device, by torch's name of its type (`cuda`) or of itself (`cuda:1`)."""
    return KINDS[device] if device in KINDS else KINDS[device.partition(":")[0]]  # a search asks 200,000 times


def in_words(*names: str) -> str:
    """The names as a sentence lists a choice: `auto, cpu or cuda`."""
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last
