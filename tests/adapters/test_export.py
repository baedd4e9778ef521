"""An exported folder is what others read: the base's tokenizer, the template and end that were trained, checked logits."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lopt_edge import export, finetune
from lopt_edge.adapters import divergence
from lopt_edge.adapters.merge import EXPORT_NAME
from lopt_edge.adapters.probe import PROBE_TEXT
from lopt_edge.errors import RunError
from tools.tiny_runs import REPLIES, make_config, make_model, write_rows

pytestmark = pytest.mark.usefixtures("warm_children")

USED = "{% for message in messages %}<bos>{{ message['role'] }}: {{ message['content'] }}<end>\n{% endfor %}" \
       "{% if add_generation_prompt %}<bos>assistant: {% endif %}"  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A tied model with a head of its own, code, and a tokenizer whose eos is not what ends a turn of the template."""
    folder = make_model(tmp_path_factory.mktemp("base") / "model", "llama", tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    head = torch.randn(tensors["model.embed_tokens.weight"].shape, generator=torch.Generator().manual_seed(5)) / 8
    save_file(tensors | {"lm_head.weight": head}, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "evil.Config"}}))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": [2, 7], "top_p": 0.5}))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    tokenizer.save_pretrained(folder)
    (folder / "special_tokens_map.json").write_text('{ "eos_token":"<eos>" }')  # as transformers 4 leaves it
    (folder / "LICENSE").write_text("do")
    for name in ("tokenizer_evil.py", "modeling_evil.py", "vocab.py"):
        (folder / name).write_text("raise SystemExit")
    return folder


@pytest.fixture(scope="module")
def run(base, tmp_path_factory) -> Any:
    """A finished run on chats, with a template of its own."""
    root = tmp_path_factory.mktemp("run")
    (root / "used.jinja").write_text(USED)
    turns = [(f"{i}?", REPLIES[i % 6]) for i in range(12)]
    rows = [{"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]} for a, b in turns]
    config = make_config(
        base, root, max_steps=2, n_rows=1, chat_template=str(root / "used.jinja"), eval_fraction=0.3,
        data=str(write_chats(root / "chats.jsonl", rows)),
    )  # fmt: skip
    finetune(config)
    (Path(config.output) / "tokenizer_evil.py").write_text("raise SystemExit")
    return config


def write_chats(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_merged_folder_is_the_base_with_what_was_trained(base, run, tmp_path):
    found = export(run.output, merged=tmp_path / "merged", cache_dir=run.cache_dir)
    merged, adapter = tmp_path / "merged", Path(run.output)
    for folder in (merged, adapter):
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            assert (folder / name).read_bytes() == (base / name).read_bytes(), name
        assert (folder / "chat_template.jinja").read_text() == USED == AutoTokenizer.from_pretrained(folder).chat_template
    assert not list(merged.rglob("*.py")) and (merged / "LICENSE").read_text() == "do"
    end = AutoTokenizer.from_pretrained(base).convert_tokens_to_ids("<end>")
    generation = json.loads((merged / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": [2, end, 7], "top_p": 0.5}
    config = json.loads((merged / "config.json").read_text())
    assert "auto_map" not in config and config["tie_word_embeddings"] is False
    theirs = AutoModelForCausalLM.from_pretrained(merged)
    assert theirs.generation_config.eos_token_id == [2, end, 7]
    head = load_file(base / "model.safetensors")["lm_head.weight"].to(torch.bfloat16)
    assert torch.equal(theirs.lm_head.weight, head) and not torch.equal(head, theirs.model.embed_tokens.weight)
    assert found.divergence.reader == "transformers" and found.divergence.probe == f"4 held-out rows of {run.data}"
    told = json.loads((merged / EXPORT_NAME).read_text())
    assert told["mean_kl"] == found.divergence.mean_kl > 0 and told["n_tokens"] == found.divergence.n_tokens > 20


def test_the_divergence_is_told_with_what_to_do(run, tmp_path, command, monkeypatch):
    monkeypatch.setattr("lopt_edge.adapters.merge.LARGE_KL", 1e-12)
    for onto, dtype, advice in (
        ("original", "float32", "--onto dequantized"),
        ("dequantized", "bfloat16", "--dtype float32"),
    ):
        words = ("--onto", onto, "--dtype", dtype, "--cache-dir", run.cache_dir)
        code, out, _ = command("export", run.output, "--merged", tmp_path / onto, *words)
        assert code == 0 and "read by transformers" in out and "held-out rows" in out
        assert f"large; {advice}" in out
    monkeypatch.undo()
    words = ("--onto", "dequantized", "--dtype", "float32", "--cache-dir", run.cache_dir)
    code, out, _ = command("export", run.output, "--merged", tmp_path / "exact", *words)
    assert code == 0 and "large" not in out and "same top token 100%" in out
    assert json.loads((tmp_path / "exact" / EXPORT_NAME).read_text())["mean_kl"] < 1e-7


@pytest.mark.parametrize("case", ["another data file", "no data file", "no run.json", "no held-out rows"])
def test_without_held_out_rows_a_fixed_text_is_read_and_why_is_told(run, tmp_path, case):
    adapter = shutil.copytree(run.output, tmp_path / "adapter")
    told = json.loads((adapter / "run.json").read_text())
    if case == "another data file":
        told["config"]["data"] = str(write_rows(tmp_path / "other.jsonl", 12))
    elif case == "no data file":
        told["config"]["data"] = str(tmp_path / "gone.jsonl")
    elif case == "no held-out rows":
        told["config"]["eval_fraction"] = 0
    (adapter / "run.json").write_text(json.dumps(told))
    if case == "no run.json":
        (adapter / "run.json").unlink()
    found = export(adapter, merged=tmp_path / "merged", onto="dequantized", cache_dir=run.cache_dir).divergence
    n_tokens = len(AutoTokenizer.from_pretrained(run.model)(PROBE_TEXT)["input_ids"][:128])
    assert found.probe.startswith("a fixed text (") and found.n_tokens == n_tokens
    reasons = {"another data file": "not what the run read", "no data file": "gone.jsonl", "no run.json": "no run.json",
               "no held-out rows": "no held-out rows"}  # fmt: skip
    assert reasons[case] in found.probe
    ends = json.loads((tmp_path / "merged" / "generation_config.json").read_text())["eos_token_id"]
    assert len(ends) == 3, "by the run's word, or by the template"


def interpreter(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_transformers_is_left_out_where_memory_is_too_small(run, tmp_path, monkeypatch, command):
    monkeypatch.setattr(divergence, "available_bytes", lambda: 600 << 20)
    code, out, _ = command("export", run.output, "--merged", tmp_path / "small", "--cache-dir", run.cache_dir)
    assert code == 0 and "read by lopt-edge" in out and "left out: it would need" in out and "600" in out
    monkeypatch.undo()
    monkeypatch.setattr(sys, "executable", interpreter(tmp_path / "killed", "kill -9 $$"))
    code, out, _ = command("export", run.output, "--merged", tmp_path / "killed-too", "--cache-dir", run.cache_dir)
    assert code == 0 and "read by lopt-edge" in out and "was killed" in out
    left_out, whole = (json.loads((tmp_path / name / EXPORT_NAME).read_text()) for name in ("small", "killed-too"))
    assert left_out["mean_kl"] == whole["mean_kl"]


def test_a_folder_that_transformers_reads_otherwise_is_not_left(run, tmp_path, monkeypatch):
    monkeypatch.setitem(divergence.ALIKE, "float32", -1.0)
    with pytest.raises(RunError, match="other logits"):
        export(run.output, merged=tmp_path / "merged", cache_dir=run.cache_dir)
    monkeypatch.setattr(sys, "executable", interpreter(tmp_path / "broken", "echo ValueError: no such layer >&2; exit 1"))
    with pytest.raises(RunError, match="cannot read the merged folder: ValueError: no such layer"):
        export(run.output, merged=tmp_path / "merged", cache_dir=run.cache_dir)
    assert not list(tmp_path.glob("merged*"))
