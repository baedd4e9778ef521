"""transformers' classes for the model of a folder: found without a weight, refused in a sentence where they cannot be."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lopt_edge.errors import InputError
from lopt_edge.plan.facts.model import ModelFacts


def import_model_code(folder: Path) -> Any:
    """Import and return transformers' class for the model of a folder (some 110 MiB of modules).

    Raises InputError if transformers cannot build this model.
    """
    from transformers import AutoConfig

    try:
        return model_class(AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config())
    except Exception as error:  # transformers raises errors of any kind for values that it cannot use
        raise unusable(folder, error) from None


def model_class(config: Any) -> Any:
    """transformers' class that has the layers: for causal language models, or the text model of a multimodal one."""
    from transformers import AutoModel, AutoModelForCausalLM

    is_whole = type(config) in AutoModelForCausalLM._model_mapping
    return (AutoModelForCausalLM if is_whole else AutoModel)._model_mapping[type(config)]


def skeleton_of(config: Any, attention: str) -> nn.Module:
    """transformers' model of a config on the meta device, with this attention by name."""
    config._attn_implementation = attention
    with torch.device("meta"):
        found: nn.Module = model_class(config)(config).eval()
    return found


def rotary_class(skeleton: nn.Module, facts: ModelFacts) -> Any:
    """The class that makes the rotary tables: the family's own where the text model says that it is of another type.

    Such a text model (Qwen's VL) has three positions a token, for images; in a text they are equal, and so are the tables,
    which are made here without the other two.
    """
    from transformers import AutoModel
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if not facts.is_inner:
        return type(skeleton.rotary_emb)
    module = import_module(AutoModel._model_mapping[CONFIG_MAPPING[facts.family.name]].__module__)
    return next(value for name, value in vars(module).items() if name.endswith("RotaryEmbedding"))


def unusable(folder: Path, error: Exception) -> InputError:
    reason = f"{type(error).__name__}: {str(error)[:200]}"
    return InputError(
        f"transformers cannot build this model ({reason})",
        where=str(folder / "config.json"),
        fix="check the config's values against the model's page",
    )
