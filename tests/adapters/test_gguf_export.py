"""Exports to GGUF: what is written computes what was trained, and what cannot be written leaves nothing behind."""

from __future__ import annotations

import json
import resource
import shutil
import signal
from pathlib import Path

import gguf
import pytest
import torch

from lopt_edge.adapters.generation import load_generator
from lopt_edge.adapters.gguf_export import export_gguf, export_gguf_adapter
from lopt_edge.adapters.ollama import FORMS, Form, form_of
from lopt_edge.config.settings import Config
from lopt_edge.data import ChatTemplate
from lopt_edge.errors import InputError, RunError
from lopt_edge.models.folder import find_model, tensor_entries
from lopt_edge.models.tokenizer import PROBES, load_tokenizer
from lopt_edge.run.step.losses import logits
from lopt_edge.training.run import finetune
from quant.gguf.weight import read_gguf
from tools.tiny_gguf import write_gguf

ROOT = Path(__file__).resolve().parents[2]
TINY, DATA = ROOT / "examples" / "tiny-llama", ROOT / "examples" / "data" / "docstrings-eval.jsonl"


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOPT_EDGE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Output folders of two short runs: on tiny-llama as GGUF, and as the folder that it is."""
    root = tmp_path_factory.mktemp("runs")
    rows = root / "rows.jsonl"
    rows.write_text("".join(DATA.read_text(encoding="utf-8").splitlines(keepends=True)[:8]), encoding="utf-8")
    bases = {"gguf": write_gguf(TINY, root / "tiny.gguf", ("Q8_0", "Q4_0"), vocabulary=True), "folder": TINY}
    for name, base in bases.items():
        finetune(
            Config(model=str(base), data=str(rows), output=str(root / name), max_seq_len=64, max_steps=4, grad_accum=2,
                   lr=0.02, lora_r=4, device="cpu", compute_dtype="float32", cache_dir=str(root / "cache"))
        )  # fmt: skip
    return {name: root / name for name in bases}


def scores(**which: object) -> torch.Tensor:
    """The logits of a model after a fixed text."""
    generator = load_generator(compute_dtype="float32", device="cpu", say=lambda text: None, **which)
    model, ids = generator.model, torch.arange(5, 60).unsqueeze(0)
    with torch.no_grad():
        hidden = model.embed(ids)
        return logits(model, model.run_all(hidden, model.layer_context(hidden))[0])


def unpacked(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file as the `gguf` package reads them."""
    tensors = gguf.GGUFReader(path).tensors
    return {one.name: torch.from_numpy(gguf.dequantize(one.data, one.tensor_type).copy()) for one in tensors}


def test_the_merged_file_computes_what_was_trained(runs, tmp_path):
    tuned, base = scores(adapter=str(runs["gguf"])), scores(model=str(runs["gguf"].parent / "tiny.gguf"))
    assert (tuned - base).abs().max() > 0.3
    for kind, most in (("f32", 1e-4), ("f16", 1e-2), ("q8_0", 0.1)):
        written = export_gguf(runs["gguf"], tmp_path / f"{kind}.gguf", kind=kind)
        assert written.n_bytes == written.path.stat().st_size
        merged = scores(model=str(written.path))
        assert (merged - tuned).abs().max() <= most * tuned.abs().max(), kind
    fields, own = (gguf.GGUFReader(path).fields for path in (tmp_path / "f16.gguf", runs["gguf"].parent / "tiny.gguf"))
    assert fields["general.file_type"].contents() == 1
    for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.token_type", "llama.rope.freq_base"):
        assert fields[key].contents() == own[key].contents() and fields[key].types == own[key].types


def test_the_adapter_file_is_the_difference_of_the_merged_one(runs, tmp_path):
    export_gguf(runs["gguf"], tmp_path / "merged.gguf", kind="f32")
    export_gguf_adapter(runs["gguf"], tmp_path / "adapter.gguf")
    reader = gguf.GGUFReader(tmp_path / "adapter.gguf")
    said = {key: field.contents() for key, field in reader.fields.items()}
    assert (said["general.type"], said["adapter.type"], said["general.architecture"]) == ("adapter", "lora", "llama")
    parts = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    merged, base = (
        {
            tensor.name: torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
            for tensor in reader.tensors
        }
        for reader in (gguf.GGUFReader(tmp_path / "merged.gguf"), gguf.GGUFReader(runs["gguf"].parent / "tiny.gguf"))
    )
    names = [name.removesuffix(".lora_a") for name in parts if name.endswith(".lora_a")]
    assert len(names) == 8 * 7
    for name in names:  # llama.cpp: W + alpha / rank B A, rows of q and k in its own order on both sides
        a, b = parts[f"{name}.lora_a"], parts[f"{name}.lora_b"]
        own = base[name] + said["adapter.lora.alpha"] / a.shape[0] * (b @ a)
        assert torch.allclose(own, merged[name], atol=1e-6), name


def test_a_folder_becomes_a_file_with_the_same_tokens(runs, tmp_path):
    written = export_gguf(runs["folder"], tmp_path / "x.gguf", kind="f32")
    found = find_model(str(written.path))
    ours, theirs = load_tokenizer(found.path), load_tokenizer(TINY)
    assert all(ours(text)["input_ids"] == theirs(text)["input_ids"] for text in PROBES)
    assert ours.chat_template == theirs.chat_template
    entries = tensor_entries(TINY)  # merged onto the original weights: what no adapter is on is as it was
    for name in (there := tensor_entries(found.path)):
        if "proj" not in name:
            assert torch.equal(read_gguf(there, name), read_gguf(entries, name).float()), name


def test_the_command_writes_several_forms(runs, tmp_path, command):
    code, out, _ = command("export", runs["gguf"], "--gguf-adapter", tmp_path / "a.gguf", "--ollama", tmp_path / "ollama")
    assert code == 0 and "ollama create gguf" in out
    assert (tmp_path / "ollama" / "adapter.gguf").read_bytes() == (tmp_path / "a.gguf").read_bytes()
    lines = (tmp_path / "ollama" / "Modelfile").read_text(encoding="utf-8")
    assert lines.startswith(f"FROM {runs['gguf'].parent / 'tiny.gguf'}\nADAPTER ./adapter.gguf\nTEMPLATE ")
    assert 'PARAMETER stop "<|im_end|>"' in lines


def as_jinja(form: Form) -> str:
    """A known form as a chat template."""
    cases = []
    for word, (role, turn) in zip(("if", "elif", "elif"), form.turns.items(), strict=True):
        cases.append(f"{{% {word} m.role == '{role}' %}}" + turn.replace("{}", "{{ m.content }}"))
    turns = "".join(["{% for m in messages %}", *cases, "{% endif %}{% endfor %}"])
    return turns + "{% if add_generation_prompt %}" + form.reply + "{% endif %}"


def test_every_known_form_is_recognised_and_no_other():
    tokenizer = load_tokenizer(TINY)
    for name, form in FORMS.items():
        found, _, default = form_of(ChatTemplate(as_jinja(form), "here"), tokenizer)
        assert (found, default) == (name, "")
        polite = "{% if messages[0].role != 'system' %}" + form.turns["system"].replace("{}", "Be kind") + "{% endif %}"
        found, _, default = form_of(ChatTemplate(polite + as_jinja(form), "here"), tokenizer)
        assert (found, default) == (name, "Be kind")
    with pytest.raises(InputError, match="none of those that are known"):
        form_of(ChatTemplate("{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}", "here"), tokenizer)


def test_what_cannot_be_written_is_a_sentence(runs, tmp_path, command):
    for words, sentence in (
        ((), "names nothing to write"),
        (("--gguf", tmp_path / "x.gguf", "--onto", "original"), "has no effect without --merged"),
        (("--gguf", tmp_path / "x.gguf", "--type", "q9"), "'q9' is unknown"),
        (("--gguf", DATA), "exists already"),
        (("--gguf", tmp_path / "none" / "x.gguf"), "its folder does not exist"),
        (("--gguf-adapter", tmp_path / "x.gguf", "--model", TINY), "was trained on another model"),
    ):
        code, _, err = command("export", runs["gguf"], *words)
        assert code == 2 and sentence in " ".join(err.split()), (words, err)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(runs, tmp_path):
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1][1]))
    try:
        with pytest.raises(RunError, match="cannot be written"):
            export_gguf(runs["gguf"], tmp_path / "x.gguf", kind="f16")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before[1])
        signal.signal(signal.SIGXFSZ, before[0])
    assert not list(tmp_path.iterdir())


def test_the_model_may_have_moved(runs, tmp_path):
    moved = tmp_path / "moved.gguf"
    shutil.copy(runs["gguf"].parent / "tiny.gguf", moved)
    export_gguf_adapter(runs["gguf"], tmp_path / "a.gguf", model=str(moved))
    assert json.loads((runs["gguf"] / "adapter_config.json").read_text())["base_model_name_or_path"].endswith("tiny.gguf")
