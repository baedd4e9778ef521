"""`export --onnx` and `--openvino`: what is refused before anything is traced, and (`-m long`) graphs in their runtimes."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from lopt_edge import finetune
from lopt_edge.adapters import graph_export
from lopt_edge.adapters.graph_export import PACKAGES, export_graph
from lopt_edge.errors import InputError, RunError
from tools.tiny_runs import make_config, make_model


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("run")
    config = make_config(make_model(root / "model"), root, max_steps=1, n_rows=4, eval_fraction=0.5)
    finetune(config)
    return Path(config.output)


@pytest.fixture
def told(monkeypatch, run, tmp_path):
    """The message of an export that ends before a graph is traced, and leaves nothing behind."""

    def call(runtime: str, target: Path, kind: type[Exception], **changes: object) -> str:
        for name, value in changes.items():
            monkeypatch.setattr(graph_export, name, value)
        before = sorted(tmp_path.iterdir())
        with pytest.raises(kind) as error:
            export_graph(run, target, runtime=runtime)
        assert sorted(tmp_path.iterdir()) == before
        return str(error.value)

    return call


@pytest.mark.parametrize("runtime", PACKAGES)
def test_a_package_that_is_missing_is_named(told, tmp_path, runtime):
    text = told(runtime, tmp_path / "graph", InputError, find_spec=lambda name: None)
    assert f"--{runtime}" in text and all(name in text for name in PACKAGES[runtime]) and "pip install" in text


def test_a_folder_that_exists_is_not_written_to(told, tmp_path):
    (tmp_path / "graph").mkdir()
    assert "exists already" in told("onnx", tmp_path / "graph", InputError, find_spec=lambda name: True)


def test_too_little_memory_is_said_before_the_model_is_loaded(told, tmp_path):
    text = told("onnx", tmp_path / "graph", RunError, find_spec=lambda name: True, available_bytes=lambda: 1 << 29)
    assert "would need about" in text and "512 MiB are left" in text


@pytest.mark.long
@pytest.mark.parametrize("runtime", PACKAGES)
def test_a_graph_computes_what_was_merged(run, tmp_path, runtime):
    if any(find_spec(name) is None for name in PACKAGES[runtime]):
        pytest.skip(f"needs {PACKAGES[runtime]}")
    from transformers import AutoTokenizer

    found = export_graph(run, tmp_path / "graph", runtime=runtime)
    assert "same top token 100%" in found.what and "held-out rows" in found.what, "else the export would have failed"
    assert AutoTokenizer.from_pretrained(tmp_path / "graph").vocab_size
    assert [path.name for path in tmp_path.iterdir()] == ["graph"]


@pytest.mark.long
def test_a_graph_that_computes_otherwise_is_not_kept(run, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(graph_export, "MOST_ERROR", 0.0)
    with pytest.raises(RunError, match="other logits"):
        export_graph(run, tmp_path / "graph", runtime="onnx")
    assert list(tmp_path.iterdir()) == []
