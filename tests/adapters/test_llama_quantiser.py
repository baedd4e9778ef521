"""K types are made by llama.cpp's quantiser, called as its program wants it; nothing half written stays; without one the
type is refused. The real one (`real`): its blocks unpack to the merged matrices up to their own rounding."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
import torch

from lopt_edge import finetune
from lopt_edge.adapters import llama_quantiser
from lopt_edge.adapters.gguf_export import export_gguf
from lopt_edge.errors import InputError, RunError
from lopt_edge.models.folder import find_model, tensor_entries
from quant.gguf.weight import read_gguf
from tools.tiny_models import make_folder
from tools.tiny_runs import make_config

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny-llama"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    config = make_config(TINY, root, max_steps=1, method="e2e", cache_dir=str(root / "cache"))
    finetune(config)
    return config


def put_program(folder: Path, script: str, monkeypatch) -> None:
    """A `llama-quantize` that is the only one on the PATH."""
    program = folder / "bin" / llama_quantiser.PROGRAM
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}:/bin:/usr/bin")


def test_the_program_is_called_as_it_wants_and_its_file_is_what_stays(run, tmp_path, monkeypatch, command):
    put_program(tmp_path, f'cp "$1" "$2"; echo "$#" "$3" > {tmp_path}/said', monkeypatch)
    words = ("--gguf", tmp_path / "x.gguf", "--type", "q4_k", "--cache-dir", run.cache_dir)
    code, out, err = command("export", run.output, *words)
    assert code == 0 and "the merged model in Q4_K_M" in out, err
    assert (tmp_path / "said").read_text().split() == ["3", "Q4_K_M"]
    assert sorted(one.name for one in tmp_path.iterdir()) == ["bin", "said", "x.gguf"]
    assert {entry.dtype for entry in tensor_entries(find_model(str(tmp_path / "x.gguf")).path).values()} == {"F16", "F32"}


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ('head -c 9000 "$1" > "$2"; echo "write failed: no space" >&2; exit 1', "quantiser failed: write failed: no space"),
        ('head -c 90000 "$1" > "$2"', "left a damaged file"),
        ("exit 0", "quantiser failed"),
    ],
)
def test_nothing_stays_of_what_failed(run, tmp_path, monkeypatch, script, told):
    put_program(tmp_path, script, monkeypatch)
    with pytest.raises(RunError, match=told):
        export_gguf(run.output, tmp_path / "x.gguf", kind="q6_k", cache_dir=run.cache_dir)
    assert [one.name for one in tmp_path.iterdir()] == ["bin"]


def test_without_a_quantiser_it_is_refused_first(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(llama_quantiser, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"q5_k_m needs llama\.cpp's quantiser, which is not installed"):
        export_gguf(tmp_path, tmp_path / "x.gguf", kind="q5_k_m")


@pytest.mark.real
def test_the_real_one(tmp_path, monkeypatch):
    pytest.importorskip("cyllama")
    monkeypatch.setenv("PATH", str(tmp_path))
    folder = make_folder(
        tmp_path / "model",
        "llama",
        hidden_size=256,
        intermediate_size=512,
        head_dim=64,
        num_hidden_layers=2,
        vocab_size=4096,
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((TINY / name).read_bytes())
    config = make_config(folder, tmp_path, max_steps=1, method="e2e")
    finetune(config)
    wide, narrow = (export_gguf(config.output, tmp_path / f"{kind}.gguf", kind=kind) for kind in ("f32", "q4_k_m"))
    entries, wanted = (tensor_entries(find_model(str(one.path)).path) for one in (narrow, wide))
    kinds = {entries[name].dtype for name in entries if "proj" in name}
    assert {"Q4_K"} < kinds <= {"Q4_K", "Q5_K", "Q6_K"}
    for name in entries:
        found, exact = read_gguf(entries, name).float(), read_gguf(wanted, name).float()
        assert found.shape == exact.shape and (found - exact).norm() <= 0.12 * exact.norm(), name
    assert torch.equal(read_gguf(entries, "model.norm.weight"), read_gguf(wanted, "model.norm.weight"))
