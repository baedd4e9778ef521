"""How far a merged folder is from the adapter on the 4-bit base, as transformers reads it, and as we do.

Three models read the same rows: the adapter on the packed base; the written folder layer by layer, with one full layer in
memory at a time; and transformers, in a process of its own (read_merged.py), since what counts is what other programs will
get. The rule: if transformers gets other logits than we do from the same files, the export fails. Where memory is too small
for the whole model, transformers is left out and that is told: nothing is killed for it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Generator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import IO

import torch
from torch import Tensor, nn

from lopt_edge.adapters.probe import Probe
from lopt_edge.errors import RunError
from lopt_edge.models.folder import find_model, tensor_entries
from lopt_edge.run.model.load import Model, fill_parameters, load_model, make_skeleton, put_experts
from lopt_edge.run.step.losses import logits
from lopt_edge.system.memory import available_bytes
from lopt_edge.units import format_bytes
from quant.experts import ExpertMatrix, PackedExperts
from quant.files import read_tensor, tensor_bytes
from quant.headers import TensorEntry
from quant.linear import UnpackBuffer
from quant.untrusted import printable

LARGE_KL = 0.02  # nats a token
# Relative difference of logits that are the same, by what computed them. 4 bits count as bfloat16: where the processor has
# its instructions, bitsandbytes computes so.
ALIKE = {"float32": 1e-3, "bfloat16": 5e-2}
LIBRARIES_BYTES, SPARE = 700 << 20, 1.1  # of a process with torch and transformers; tensors beside the weights


@dataclass(frozen=True)
class Divergence:
    """The difference of a merged model from the adapter on the 4-bit base, over `probe` (where its rows come from)."""

    mean_kl: float  # nats a token
    relative_error: float  # norm of the difference / norm of the logits
    same_top_token: float  # share of tokens
    probe: str
    n_tokens: int
    reader: str  # who read the merged folder
    left_out: str = ""  # why transformers did not


def measure(tuned: Model, merged: Path, probe: Probe, *, needs: Mapping[str, int]) -> Divergence:
    """Compare a merged folder with the adapter on its base. Raises RunError if transformers reads it otherwise than we.

    `needs` are the bytes of its weights in each dtype in which transformers may read it, the best first.
    """
    dtype, left_out = _affordable(needs)
    ours, entries = _as_we_read(merged, tuned)
    sums = _Sums()
    with closing(_through_transformers(merged, probe, dtype, n_columns=tuned.facts.vocab_size)) as theirs:
        for row in probe.rows:
            ids_BT = torch.tensor([row])
            found_TV = _read_through(ours, ids_BT, entries=entries)
            try:
                if not left_out:
                    found_TV = _same(next(theirs), found_TV, ALIKE[dtype] if entries is not None else ALIKE["bfloat16"])
            except _Killed:
                left_out = "its process was killed, as the system does when memory runs out"
            sums.add(_read_through(tuned, ids_BT), found_TV)
    if not isfinite(sums.kl):
        raise RunError("the merged model's logits are not numbers; nothing was written", where="export")
    return sums.divergence(probe, left_out)


def _as_we_read(merged: Path, tuned: Model) -> tuple[Model, dict[str, TensorEntry] | None]:
    """The merged model without its layers' weights, and where they lie; packed it is whole, and they are None."""
    facts = find_model(str(merged), say=lambda text: None).facts
    if facts.quantised:
        return load_model(merged, facts, device=tuned.device, dtype=tuned.dtype), None
    entries = tensor_entries(merged, tuned.facts)
    return make_skeleton(merged, tuned.facts, entries, device=tuned.device, dtype=tuned.dtype), entries


def _affordable(needs: Mapping[str, int]) -> tuple[str, str]:
    """The dtype in which the whole model fits the memory that is left; or why transformers is left out."""
    available, need = available_bytes(), 0
    for dtype, n_bytes in needs.items():
        need = round(SPARE * n_bytes) + LIBRARIES_BYTES
        if need <= available:
            return dtype, ""
    return "", f"it would need {format_bytes(need)} of memory, {format_bytes(available)} are left"


class _Killed(Exception):
    """The end of the other process by a signal that we did not send."""


def _through_transformers(merged: Path, probe: Probe, dtype: str, *, n_columns: int) -> Generator[Tensor]:
    """Yield transformers' logits (T, V) of each row of the probe. Raises _Killed, and RunError for an unreadable folder."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, "-m", "lopt_edge.adapters.read_merged"]
    with tempfile.TemporaryFile() as told:
        child = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=told)
        try:
            assert child.stdin is not None and child.stdout is not None
            with suppress(BrokenPipeError):
                child.stdin.write(json.dumps({"folder": str(merged), "dtype": dtype, "rows": probe.rows}).encode())
                child.stdin.close()
            for row in probe.rows:
                logits_TV = torch.empty(len(row), n_columns)
                if child.stdout.readinto(tensor_bytes(logits_TV)) != 4 * logits_TV.numel():  # type: ignore[attr-defined]
                    raise _failure(child.wait(), told)
                yield logits_TV
        finally:
            child.kill()
            child.wait()


def _failure(code: int, told: IO[bytes]) -> Exception:
    told.seek(0)
    lines = told.read()[-4000:].decode("utf-8", "replace").strip().splitlines()
    last = lines[-1] if lines else f"exit code {code}"
    if code == -signal.SIGKILL or "MemoryError" in last or "can't allocate memory" in last:
        return _Killed()
    return RunError(
        f"transformers cannot read the merged folder: {printable(last)[:300]}",
        where="export",
        fix="nothing was written; please report this with the model's name",
    )


def _same(theirs_TV: Tensor, ours_TV: Tensor, alike: float) -> Tensor:
    """Transformers' logits, if they are ours up to rounding. Raises RunError."""
    error = ((theirs_TV - ours_TV).norm() / ours_TV.norm()).item()
    if error > alike:
        raise RunError(
            f"transformers gets other logits from the merged folder than lopt-edge (relative difference {error:.1%})",
            where="export",
            fix="nothing was written; please report this with the model's name",
        )
    return theirs_TV


@dataclass
class _Sums:
    kl: float = 0.0
    squared_error: float = 0.0
    squared_norm: float = 0.0
    n_same: int = 0
    n_tokens: int = 0

    def add(self, wanted_TV: Tensor, found_TV: Tensor) -> None:
        p_TV, q_TV = wanted_TV.log_softmax(1), found_TV.log_softmax(1)
        self.kl += (p_TV.exp() * (p_TV - q_TV)).sum().item()
        self.squared_error += (wanted_TV - found_TV).square().sum().item()
        self.squared_norm += wanted_TV.square().sum().item()
        self.n_same += int((wanted_TV.argmax(1) == found_TV.argmax(1)).sum())
        self.n_tokens += len(wanted_TV)

    def divergence(self, probe: Probe, left_out: str) -> Divergence:
        return Divergence(
            mean_kl=max(0.0, self.kl / self.n_tokens),  # rounding may leave -1e-8
            relative_error=(self.squared_error / self.squared_norm) ** 0.5,
            same_top_token=self.n_same / self.n_tokens,
            probe=probe.source,
            n_tokens=self.n_tokens,
            reader="lopt-edge" if left_out else "transformers",
            left_out=left_out,
        )


@torch.no_grad()
def _read_through(model: Model, ids_BT: Tensor, *, entries: dict[str, TensorEntry] | None = None) -> Tensor:
    """The model's logits (T, V); with `entries` each layer's weights are read just before it runs and dropped after it."""
    hidden_BTD = model.embed(ids_BT)
    frame = model.layer_context(hidden_BTD, ids_BT)
    for index, layer in enumerate(model.layers):
        if entries is not None:
            _fill_layer(model, index, entries)
        hidden_BTD = model.run_layer(index, hidden_BTD, frame)
        if entries is not None:
            layer.to("meta")
            for matrix in _matrices_of_experts(layer):
                matrix.weight = None
    return logits(model, hidden_BTD[0])


def _fill_layer(model: Model, index: int, entries: dict[str, TensorEntry]) -> None:
    """Read a layer's weights in full precision, those of its experts into the modules that run them one by one."""
    layer, prefix, experts = model.layers[index], model.facts.layout.layer(index), model.facts.layer(index).experts
    if not _matrices_of_experts(layer):
        put_experts(layer, experts, buffer=UnpackBuffer())
    stored = model.facts.layer(index).stored_name
    fill_parameters(layer, prefix, entries, device=model.device, dtype=model.dtype, stored=stored)
    names = (name for name, _ in experts.matrices()) if experts is not None else ()
    for name, matrix in zip(names, _matrices_of_experts(layer), strict=True):
        matrix.weight = read_tensor(entries[f"{prefix}{name}.weight"]).to(model.dtype)


def _matrices_of_experts(layer: nn.Module) -> list[ExpertMatrix]:
    found = (module.matrices for module in layer.modules() if isinstance(module, PackedExperts))
    return [matrix for matrices in found for expert in matrices for matrix in expert]
