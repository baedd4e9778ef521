"""examples/notebook.ipynb runs from the first cell to the last, and draws the loss. It needs the extra `notebook`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_notebook_runs(tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HOME", str(tmp_path))  # the 4-bit copy
    shutil.copytree(ROOT / "examples" / "tiny-llama", tmp_path / "examples" / "tiny-llama")
    shutil.copytree(ROOT / "examples" / "data", tmp_path / "examples" / "data")
    notebook = nbformat.read(ROOT / "examples" / "notebook.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "it is kept without outputs"
    for cell in notebook.cells:
        cell.source = cell.source.replace("max_steps=30", "max_steps=5").replace("eval_every=10", "eval_every=5")
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    texts = " ".join(str(output.get("text", "")) + str(output.get("data", {}).get("text/plain", "")) for output in outputs)
    assert "Config(model='examples/tiny-llama'" in texts and "RunPlan(fits" in texts and "RunResult(" in texts
    pictures = [output["data"]["image/svg+xml"] for output in outputs if "image/svg+xml" in output.get("data", {})]
    assert pictures and "polyline" in pictures[-1]
    assert "json.dumps(obj) ->" in texts and (tmp_path / "outputs" / "notebook" / "report.html").exists()
