"""One decoder layer in a real shape on the card in name: the kernels that it launches, and what they read and write.

The layer is the middle one of three, end to end with recomputation, so that it has what most layers have: a FORWARD that
keeps its input, and a BACKWARD that makes the graph again and gives a gradient to the layer before. Its 4-bit folder is a
sparse file of zeros: values do not matter here, and nothing of its size is computed or written.

Bytes are those of a kernel's inputs and outputs, each once; of a view that repeats numbers the numbers themselves.
PRODUCTS are left out of the sum: matrix products and attention, whose time is arithmetic.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lopt_edge.models.folder import find_model
from lopt_edge.plan.facts.device_kinds import TORCH
from lopt_edge.plan.facts.model import facts_from_config
from lopt_edge.plan.facts.presets import PRESETS
from lopt_edge.plan.schedule.knobs import default_knobs
from lopt_edge.plan.schedule.ops import Op
from quant.files import STATE_BYTES, STATE_SUFFIX, four_bit_layout, quantization_config
from quant.headers import SINGLE_NAME
from quant.sizes import BLOCK_ELEMENTS, DTYPE_BYTES, NESTED_BLOCK_ELEMENTS
from tests.fake_device.card import FakeCard, installed
from tests.laws.bench import make_bench, random_batch

N_LAYERS, WATCHED = 3, 1
PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_flash_attention_backward", "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_efficient_attention_backward")  # fmt: skip


@dataclass(frozen=True)
class LayerCount:
    """What one op on the layer asks of the card: kernels by name, and the bytes of each name."""

    op: str
    kernels: dict[str, int]
    n_bytes: dict[str, int]

    @property
    def n_kernels(self) -> int:
        """All kernels, products too."""
        return sum(self.kernels.values())

    @property
    def bytes_outside(self) -> int:
        """The bytes outside matrix products and attention."""
        return sum(n for name, n in self.n_bytes.items() if name not in PRODUCTS)


def count_layer(
    root: Path, *, preset: str, n_tokens: int, block: int, rank: int = 16, kernels: str = TORCH
) -> list[LayerCount]:
    """The counts of FORWARD and BACKWARD of a layer of a model by name, in bfloat16, MLPs in blocks of so many features."""
    folder, card = root / preset, FakeCard()
    if not folder.exists():
        _write_empty_model(folder, preset)
    knobs = replace(default_knobs(find_model(str(folder)).facts, "cuda"), mlp_block=block)
    with installed(card):
        bench = make_bench(
            folder, method="e2e", num_segments=1, dtype=torch.bfloat16, device="cuda", rank=rank, page_dir=root,
            knobs=knobs, kernels=kernels,
        )  # fmt: skip

        def observe(op: Op, over: bool) -> None:
            card.op = "-" if over else f"{op.kind.name} {op.target}"

        bench.executor.observers.append(observe)
        batch = random_batch((n_tokens,), device="cuda")
        bench.executor.run(bench.plan, [batch], step=1, learning_rates={0: 1e-3})
        bench.executor.mover.close()
    return [_counted(card, name) for name in (f"FORWARD {WATCHED}", f"BACKWARD {WATCHED}")]


def _counted(card: FakeCard, op: str) -> LayerCount:
    kernels: Counter[str] = Counter({name: n for (where, name), n in card.names.items() if where == op})
    n_bytes = {name: n for (where, name), n in card.n_bytes.items() if where == op}
    return LayerCount(op, dict(kernels.most_common()), n_bytes)


def _write_empty_model(folder: Path, preset: str) -> None:
    """Write a 4-bit folder of the preset's shape, with few layers and a small vocabulary: zeros, but for what says how
    matrices are packed."""
    values = {**PRESETS[preset].config, "num_hidden_layers": N_LAYERS, "vocab_size": 320}
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device("meta"):
        tensors = AutoModelForCausalLM.from_config(config).state_dict()
    facts = facts_from_config(config.to_dict(), where=preset)
    layout = four_bit_layout([(name, "BF16", tuple(one.shape)) for name, one in tensors.items()], facts.packs)
    folder.mkdir()
    written = config.to_dict() | {"quantization_config": quantization_config("bfloat16"), "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(written))
    header, end, states = {}, 0, {}
    for name, dtype, shape in layout:
        begin, end = end, end + prod(shape) * DTYPE_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        if name.endswith(f"{STATE_SUFFIX}nf4"):
            states[begin] = _state(tuple(tensors[name.removesuffix(f"{STATE_SUFFIX}nf4")].shape))
    text = json.dumps(header).encode()
    with (folder / SINGLE_NAME).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        start = file.tell()
        file.truncate(start + end)
        for position, state in states.items():
            file.seek(start + position)
            file.write(state)


def _state(shape: tuple[int, ...]) -> bytes:
    found = {"quant_type": "nf4", "blocksize": BLOCK_ELEMENTS, "dtype": "bfloat16", "shape": list(shape),
             "nested_blocksize": NESTED_BLOCK_ELEMENTS, "nested_dtype": "float32", "nested_offset": 0.0}  # fmt: skip
    return json.dumps(found).encode().ljust(STATE_BYTES)
