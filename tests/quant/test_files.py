"""Tensors on disk: what we write is what transformers loads, what transformers writes is what we load, bit for bit.

A 4-bit folder is untrusted input like any other: a quantisation state that does not fit the stored tensors is refused,
since the kernels behind it read raw memory.

transformers' side always runs in training mode: in evaluation mode, on CPUs with avx512_bf16, bitsandbytes repacks the
weights for a bf16 kernel that is about 1% off. No model here has dropout.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lopt_edge.models.folder import find_model
from lopt_edge.models.four_bit import four_bit_folder
from lopt_edge.plan.facts.model import facts_from_config
from lopt_edge.run.model.load import load_model
from lopt_edge.run.step.losses import logits
from quant.files import STATE_SUFFIX, packed_tensors, read_packed, read_tensor
from quant.headers import FolderError, read_header, read_headers
from quant.nf4 import pack, unpack_into
from quant.quantise import quantise_folder
from quant.sizes import packed_sizes
from tools.tiny_models import make_folder, tiny_config

NAME = "model.layers.0.mlp.up_proj.weight"
STATE = f"{NAME}{STATE_SUFFIX}nf4"
FUZZ = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
packs = facts_from_config(tiny_config("llama").to_dict(), where="here").packs
IDS = torch.randint(3, 320, (2, 13), generator=torch.Generator().manual_seed(0))


def our_logits(folder: Path, dtype: torch.dtype) -> torch.Tensor:
    model = load_model(folder, find_model(str(folder)).facts, device=torch.device("cpu"), dtype=dtype)
    hidden = model.embed(IDS)
    frame = model.layer_context(hidden)
    with torch.no_grad():
        for layer in range(model.facts.n_layers):
            hidden = model.run_layer(layer, hidden, frame)
    return logits(model, hidden.flatten(0, 1)).view(*IDS.shape, -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_loads_our_folder_with_the_same_weights(four_bit, dtype):
    folder = four_bit("llama", dtype)
    theirs = AutoModelForCausalLM.from_pretrained(folder).train()
    entries = read_headers(folder)
    seen = 0
    for name, module in theirs.named_modules():
        if not packs(f"{name}.weight"):
            continue
        packed = read_packed(entries, f"{name}.weight")
        assert packed.dtype is dtype
        ours = unpack_into(packed, torch.empty(packed.shape, dtype=dtype))
        assert torch.equal(ours, dequantize_4bit(module.weight.data, module.weight.quant_state)), name
        seen += 1
    assert seen == 4 * 7
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert torch.equal(read_tensor(entries[name]), theirs.get_parameter(name)), name


def test_what_is_not_packed_is_unchanged_and_small_files_come_along(tmp_path):
    source = make_folder(tmp_path / "source", "qwen2", dtype=torch.bfloat16)
    (source / "tokenizer.json").write_text("{}")
    (source / "pytorch_model.bin").write_bytes(b"not copied")
    before = load_file(source / "model.safetensors")
    quantise_folder(source, tmp_path / "target", should_pack=packs, dtype=torch.bfloat16)
    after = load_file(tmp_path / "target" / "model.safetensors")
    kept = [name for name in before if not packs(name)]
    assert any(name.endswith("q_proj.bias") for name in kept)
    for name in kept:
        assert torch.equal(before[name], after[name]), name
    names = sorted(path.name for path in (tmp_path / "target").iterdir())
    assert names == ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
    config = json.loads((tmp_path / "target" / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    assert config["quantization_config"]["bnb_4bit_compute_dtype"] == config["dtype"] == "bfloat16"


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_saved_by_transformers_loads_without_requantising(tmp_path, dtype, double):
    source = make_folder(tmp_path / "source", "llama", dtype=dtype, num_hidden_layers=2)
    settings_ = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double, bnb_4bit_compute_dtype=dtype
    )
    theirs = AutoModelForCausalLM.from_pretrained(source, quantization_config=settings_, dtype=dtype).train()
    theirs.save_pretrained(tmp_path / "saved")
    found = find_model(str(tmp_path / "saved"))
    assert found.facts.quantised
    folder, was_there = four_bit_folder(found, cache_dir=str(tmp_path / "cache"))
    assert (folder, was_there) == (tmp_path / "saved", True)
    assert not (tmp_path / "cache").exists(), "nothing is quantised again"
    with torch.no_grad():
        reference = theirs(IDS).logits.float()
    assert torch.equal(our_logits(folder, dtype), reference)


def test_our_quantisation_is_that_of_transformers(tmp_path):
    """The same source through transformers' own quantiser and through ours: the same bytes."""
    source = make_folder(tmp_path / "source", "llama", num_hidden_layers=1)
    settings_ = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    AutoModelForCausalLM.from_pretrained(source, quantization_config=settings_, dtype=torch.float32).save_pretrained(
        tmp_path / "theirs"
    )
    quantise_folder(source, tmp_path / "ours", should_pack=packs, dtype=torch.float32)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    for name in ours:
        if STATE_SUFFIX in name:  # a JSON text, ours padded with blanks
            mine, reference = (json.loads(bytes(side[name].tolist())) for side in (ours, theirs))
            assert mine == reference, name
        else:
            assert torch.equal(ours[name], theirs[name]), name


def test_a_failed_quantisation_leaves_nothing(tmp_path):
    source = make_folder(tmp_path / "source", "llama", num_hidden_layers=1)
    weights = source / "model.safetensors"
    seen: list[str] = []

    def cut_short(name: str) -> None:  # the file shrinks while it is read
        seen.append(name)
        os.truncate(weights, weights.stat().st_size // 2)

    with pytest.raises(FolderError, match=r"model\.safetensors.*truncated"):
        quantise_folder(source, tmp_path / "target", should_pack=packs, dtype=torch.float32, on_tensor=cut_short)
    assert seen
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.int64,
        torch.int8,
        torch.uint8,
        torch.bool,
        torch.float8_e4m3fn,
    ],
)
def test_tensors_are_read_as_they_were_saved(tmp_path, dtype):
    tensor = torch.arange(24).view(2, 3, 4).to(dtype)
    save_file({"a": tensor, "empty": tensor[:0].clone(), "scalar": tensor[0, 0, 1].clone()}, tmp_path / "x.safetensors")
    entries = read_header(tmp_path / "x.safetensors")
    for name, original in (("a", tensor), ("empty", tensor[:0]), ("scalar", tensor[0, 0, 1])):
        found = read_tensor(entries[name])
        assert (found.dtype, found.shape) == (dtype, original.shape)
        assert torch.equal(
            found.view(torch.uint8) if dtype.itemsize == 1 else found,
            original.view(torch.uint8) if dtype.itemsize == 1 else original,
        )


def packed_file(folder: Path, **changes: object) -> Path:
    """A file with one packed 64 x 128 matrix; `changes`: state entries (None drops one)."""
    tensors = dict(packed_tensors(NAME, pack(torch.randn(64, 128, generator=torch.Generator().manual_seed(1)))))
    state = json.loads(bytes(tensors[STATE].tolist())) | changes
    text = json.dumps({key: value for key, value in state.items() if value is not None}).encode()
    tensors[STATE] = torch.tensor(list(text), dtype=torch.uint8)
    save_file(tensors, folder / "x.safetensors")
    return folder / "x.safetensors"


def rewritten(path: Path, name: str, tensor: torch.Tensor | None) -> Path:
    tensors = load_file(path)
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    save_file(tensors, path)
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": [64, 64]}, {"shape": [64, 129]}, {"shape": [2**40, 2**40]}, {"shape": [10**400, 1]}, {"shape": [64]},
        {"shape": [-64, -128]}, {"shape": [0, 128]}, {"shape": [64.0, 128]}, {"shape": "ab"}, {"shape": None},
        {"blocksize": 128}, {"blocksize": 1}, {"blocksize": 64.0}, {"blocksize": "64"}, {"dtype": "int8"},
        {"dtype": "nn"}, {"dtype": []}, {"quant_type": "int4"}, {"quant_type": "fp4"}, {"nested_blocksize": 64},
        {"nested_blocksize": 0}, {"nested_blocksize": 256.0}, {"nested_offset": None}, {"nested_offset": "1"},
        {"nested_offset": True}, {"nested_offset": float("nan")}, {"nested_offset": float("inf")},
        {"nested_offset": 10**400},
    ],
)  # fmt: skip
def test_a_state_that_does_not_fit_is_refused(tmp_path, changes):
    entries = read_header(packed_file(tmp_path, **changes))
    with pytest.raises(FolderError, match=r"x\.safetensors.*up_proj"):
        read_packed(entries, NAME)


@pytest.mark.parametrize(
    ("part", "tensor"),
    [
        (NAME, torch.zeros(10, 1, dtype=torch.uint8)),
        (NAME, torch.zeros(4096, 1, dtype=torch.int8)),
        (f"{NAME}.absmax", torch.zeros(127, dtype=torch.uint8)),
        (f"{NAME}.absmax", torch.zeros(128, dtype=torch.float32)),  # fp32 belongs to single quantisation
        (f"{NAME}.quant_map", torch.zeros(15)),
        (f"{NAME}.quant_map", torch.zeros(16, dtype=torch.uint8)),
        (f"{NAME}.nested_absmax", torch.zeros(2)),
        (f"{NAME}.nested_absmax", torch.zeros(1, dtype=torch.uint8)),
        (f"{NAME}.nested_quant_map", torch.zeros(100)),
        (f"{NAME}.nested_quant_map", torch.zeros(256, dtype=torch.uint8)),
        (f"{NAME}.nested_quant_map", None),
        (f"{NAME}.nested_absmax", None),
        (f"{NAME}.quant_map", None),
        (f"{NAME}.absmax", None),
        (STATE, None),
        (STATE, torch.zeros(5000, dtype=torch.uint8)),
        (STATE, torch.zeros(256, dtype=torch.uint8)),
        (STATE, torch.tensor(list(b"[" * 3000), dtype=torch.uint8)),
        (STATE, torch.ones(20, dtype=torch.float32)),
        (STATE, torch.full((20,), -1, dtype=torch.int64)),
    ],
)
def test_parts_that_do_not_fit_are_refused(tmp_path, part, tensor):
    entries = read_header(rewritten(packed_file(tmp_path), part, tensor))
    with pytest.raises(FolderError, match=r"x\.safetensors.*up_proj"):
        read_packed(entries, NAME)


@FUZZ
@given(data=st.data())
def test_any_state_text_is_read_or_refused(tmp_path, data):
    """A damaged state: a FolderError, or a weight that really unpacks."""
    path = packed_file(tmp_path)
    text = bytearray(load_file(path)[STATE].tolist())
    for position in data.draw(st.lists(st.integers(0, len(text) - 1), min_size=1, max_size=3)):
        text[position] = data.draw(st.sampled_from(list(b'0123456789.-eE[]{}",: ntf')))
    entries = read_header(rewritten(path, STATE, torch.tensor(list(text), dtype=torch.uint8)))
    try:
        packed = read_packed(entries, NAME)
    except FolderError:
        return
    assert torch.isfinite(unpack_into(packed, torch.empty(packed.shape))).all()


MEASURE = """
import re, sys, torch
from pathlib import Path
torch.set_num_threads(1)
from quant.nf4 import pack
from quant.quantise import quantise_folder
from quant.sizes import packed_sizes
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
pack(torch.ones(64, 64))  # imports bitsandbytes
baseline = peak()
quantise_folder(Path(sys.argv[1]), Path(sys.argv[2]), should_pack=lambda n: "_proj" in n, dtype=torch.bfloat16)
print(peak() - baseline)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_quantising_holds_one_tensor_at_a_time(tmp_path):
    """Peak above the imports: the largest tensor + its packed form + 32 MiB (what glibc keeps of freed smaller blocks).

    The folder holds 40 small matrices and, side by side, two large ones of each sort (packed, copied): holding two of
    them, or bitsandbytes' temporaries for a whole one (14 bytes an element), would be noticed.
    """
    large, small = 48 << 20, 1 << 20  # bytes
    shapes = [(f"layers.{i}.up_proj.weight", (256, 1024)) for i in range(40)]
    shapes += [(f"{name}.weight", (3072, 4096)) for name in ("a_proj", "b_proj", "embed", "head")]
    begins = [4 * sum(a * b for _, (a, b) in shapes[:i]) for i in range(len(shapes) + 1)]
    header = {
        name: {"dtype": "F32", "shape": shape, "data_offsets": begins[i : i + 2]} for i, (name, shape) in enumerate(shapes)
    }
    assert begins[-1] == 40 * small + 4 * large
    text = json.dumps(header).encode()
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text("{}")
    with (source / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + begins[-1])  # a sparse file of zeros
    command = [sys.executable, "-c", MEASURE, str(source), str(tmp_path / "target")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    allowed = large + packed_sizes((3072, 4096)).total_bytes + (32 << 20)
    assert allowed < 2 * large, "or two at a time would pass"
    assert int(done.stdout) < allowed, f"{int(done.stdout) >> 20} MiB, allowed {allowed >> 20}"
    written = read_headers(tmp_path / "target")
    assert sum(".absmax" in name and "nested" not in name for name in written) == 42
