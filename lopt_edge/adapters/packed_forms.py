"""The packed forms in which a merged model is written, and who packs: `nf4` by bitsandbytes, matrix by matrix.

The rule: only a maintained library that runs here packs; its codes go into the folder that transformers writes and reads,
so the bytes of every tensor are those of `from_pretrained(merged, quantization_config=...)` and `save_pretrained`
(tests/adapters/test_packed_forms.py), with one matrix in memory instead of the model. GPTQ and AWQ are refused by name:
they are calibrated on the whole model, by a program of its own on the merged folder. GPTQModel 7.7 asks for torch 2.14 and
llm-compressor 0.14 for transformers 5.17; auto-round 0.16 installs beside lopt-edge and writes both.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from lopt_edge.errors import InputError
from lopt_edge.models.folder import ModelFolder
from lopt_edge.plan.facts.model import ModelFacts
from quant.files import Layout, NamedTensor, four_bit_layout, four_bit_tensors, quantization_config

NF4 = "nf4"
CALIBRATED = {"gptq": "auto_gptq", "awq": "auto_awq"}  # as auto-round names them


def check_form(form: str | None) -> None:
    """Raise InputError for a form that is not written here, with the way to it."""
    if form in (None, NF4):
        return
    if form in CALIBRATED:
        what = f"{form} is calibrated on the whole model, which lopt-edge does not do"
        command = f"pip install auto-round, then: auto-round --model DIR --scheme W4A16 --format {CALIBRATED[form]}"
        raise InputError(what, where="--form", fix=f"write the folder in full precision; {command}")
    if form == "int8":
        what = "int8: no library here packs it in a form that can be trained on"
        raise InputError(what, where="--form", fix=f"choose {NF4}, or export --gguf --type q8_0")
    raise InputError(f"{str(form)[:40]!r} is unknown", where="--form", fix=f"choose {NF4}, or leave it out")


def check_packable(source: ModelFolder, form: str | None) -> None:
    """Raise InputError for a model of which the form packs nothing that matters."""
    if form is not None and any(kind.experts is not None for kind in source.facts.kinds):
        what = f"{source.name} has experts, which bitsandbytes leaves in full precision (it packs no stacks)"
        raise InputError(what, where="--form", fix="leave --form out, or export --gguf")


def packed(
    layout: Layout, tensors: Iterable[NamedTensor], facts: ModelFacts, *, dtype: str
) -> tuple[Layout, Iterable[NamedTensor]]:
    """The layout and the tensors of a merged model with its layers' matrices in NF4; `dtype` is recorded."""
    recorded = getattr(torch, dtype)
    return four_bit_layout(layout, facts.packs), four_bit_tensors(tensors, facts.packs, dtype=recorded)


def config_of_form(form: str | None, facts: ModelFacts, names: Sequence[str], *, dtype: str) -> dict[str, Any]:
    """What the config of the merged folder says of its form; `names` are its tensors."""
    if form is None:
        return {}
    return {"quantization_config": quantization_config(dtype, unpacked=facts.modules_beside(names))}
