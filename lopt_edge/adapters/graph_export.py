"""An adapter on its way to ONNX Runtime or OpenVINO: merged, and written as a graph by transformers' own exporters.

The merged folder is written first, beside the target, and removed at the end. The exporter then holds the whole model in
memory (fp32 for ONNX, bfloat16 weights for OpenVINO), in a process of its own (write_graph.py), which also opens the result
in its runtime and compares it, with a cache, with transformers on the run's own rows. The rule: a graph whose logits are
not the model's is not kept; the folder appears under its name only when it was compared.

What quantises, fuses or optimises a graph is its runtime's own tool. Which models can be traced is transformers' matter;
text models inside multimodal ones are refused.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Unpack

from lopt_edge.adapters.base import BaseOptions, base_of
from lopt_edge.adapters.gguf_export import Written
from lopt_edge.adapters.merge import export
from lopt_edge.adapters.probe import Probe, probe_of
from lopt_edge.errors import InputError, RunError
from lopt_edge.models.folder import ModelFolder
from lopt_edge.models.tokenizer import load_tokenizer
from lopt_edge.system.memory import available_bytes
from lopt_edge.units import format_bytes
from quant.folders import new_folder
from quant.untrusted import printable

PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("openvino",)}  # by runtime, which is the extra
NAMES = {"onnx": "ONNX Runtime", "openvino": "OpenVINO"}
DTYPES = {"onnx": "float32", "openvino": "bfloat16"}  # of the weights
COPIES, LIBRARIES_BYTES = 4, 1 << 30  # of the weights: the model, what is written, the runtime's, and fp32 to compare with
MOST_ERROR = 1e-3  # relative, of the logits; measured on the embedded model: 3e-7 and 4e-7


def export_graph(adapter: str | Path, folder: str | Path, *, runtime: str, **base: Unpack[BaseOptions]) -> Written:
    """Write the merged model as a graph for `runtime` ("onnx" or "openvino") into a new folder, with its tokenizer.

    Raises InputError for a folder that is no adapter, a target that exists, a package that is missing or a multimodal
    model, and RunError where memory does not suffice, transformers cannot trace the model, or the graph computes otherwise.
    """
    adapter, target = Path(adapter), Path(folder)
    _check(target, runtime)
    source = base_of(adapter, model=base.get("model"), revision=base.get("revision"), say=lambda text: None)
    if source.facts.wrapper:
        raise InputError(
            f"{source.name} is a multimodal model, whose text part the exporter does not take",
            where=f"--{runtime}",
            fix="write --merged and use the runtime's own tools",
        )
    try:
        with new_folder(target) as partial, tempfile.TemporaryDirectory(dir=target.parent) as beside:
            merged = export(adapter, merged=Path(beside) / "merged", dtype=DTYPES[runtime], onto=_onto(source), **base)
            _check_memory(merged.n_bytes)
            probe = probe_of(adapter, load_tokenizer(merged.folder, say=lambda text: None))
            figures = _traced(merged.folder, partial, probe, runtime)
            _take_tokenizer(merged.folder, partial)
            n_bytes = sum(path.stat().st_size for path in partial.iterdir())
    except OSError as error:
        raise RunError(f"cannot be written: {error.strerror}", where=str(target), fix="free space there") from None
    return Written(target, n_bytes, f"the merged model for {NAMES[runtime]} in {DTYPES[runtime]}; {figures}")


def _check(target: Path, runtime: str) -> None:
    missing = [name for name in PACKAGES[runtime] if find_spec(name) is None]
    if missing:
        raise InputError(
            f"needs {', '.join(missing)}",
            where=f"--{runtime}",
            fix=f"pip install 'lopt-edge[{runtime}]', or: pip install {' '.join(missing)}",
        )
    if target.exists():
        raise InputError("exists already", where=str(target), fix=f"choose a new folder for --{runtime}")


def _onto(source: ModelFolder) -> str:
    """The weights that the adapter is merged onto: the original ones, where they are there."""
    return "dequantized" if source.facts.quantised and source.facts.forms is None else "original"


def _check_memory(n_bytes: int) -> None:
    need, available = COPIES * n_bytes + LIBRARIES_BYTES, available_bytes()
    if need > available:
        raise RunError(
            f"would need about {format_bytes(need)} of memory, {format_bytes(available)} are left: the exporter holds the "
            "whole model",
            where="export",
            fix="write --merged here, and trace it on a larger machine",
        )


def _traced(merged: Path, target: Path, probe: Probe, runtime: str) -> str:
    """Write the graph in a process of its own; returns how near it is, in words. Raises RunError."""
    request = {"folder": str(merged), "target": str(target), "runtime": runtime, "rows": probe.rows}
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OPENVINO_TELEMETRY": "0"}
    command = [sys.executable, "-m", "lopt_edge.adapters.write_graph"]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        killed = done.returncode == -signal.SIGKILL
        told = "its process was killed, as the system does when memory runs out" if killed else _last_line(done.stderr)
        fix = "nothing was written; --merged and the runtime's own tools may do it"
        raise RunError(f"transformers cannot write this model for {NAMES[runtime]}: {told}", where="export", fix=fix)
    found = json.loads(done.stdout)
    error = found["error"] / found["size"]
    if not error <= MOST_ERROR:
        raise RunError(
            f"{NAMES[runtime]} computes other logits than transformers ({error:.2%}): nothing was written",
            where="export",
            fix="please report this with the model's name",
        )
    return (
        f"run there with its cache, against transformers: relative logit difference {error:.1e}, same top token "
        f"{found['same'] / found['n_tokens']:.0%} ({found['n_tokens']:.0f} tokens of {probe.source})"
    )


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return printable(lines[-1])[:300] if lines else "it says nothing"


def _take_tokenizer(merged: Path, target: Path) -> None:
    """Everything of the merged folder that is neither weights nor written by the exporter: tokenizer, template, licence."""
    for path in merged.iterdir():
        if not path.name.startswith("model") and path.name != "export.json" and not (target / path.name).exists():
            path.rename(target / path.name)
