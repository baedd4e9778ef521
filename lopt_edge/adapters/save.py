"""The output folder of a run: adapter, tokenizer, logs (JSON lines), run.json, model card.

The adapter is peft's form (`adapter_model.safetensors`, and `adapter_config.json` with all keys that peft writes, in
checkpoints those that matter), so that plain peft loads it. The same run writes the same bytes: peft's own writer puts sets
down in hash order. Rules: the output folder must be new, empty, or hold nothing but the
logs of a run that saved nothing, so no run is overwritten (resuming is another matter); a file is written beside and
renamed, a log line is written whole or not at all; an adapter that holds a number that is not finite is never saved.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lopt_edge.adapters.peft_keys import KEYS
from lopt_edge.errors import RunError
from lopt_edge.run.model.adapter_config import ADAPTER_CONFIG_NAME, ADAPTER_NAME, REPLACED_NAME
from lopt_edge.run.model.load import Model
from lopt_edge.run.model.lora import write_adapter
from lopt_edge.run.model.replaced import replaced_values
from lopt_edge.system.files import write_json


@dataclass(frozen=True)
class AdapterShape:
    """The content of adapter_config.json: rank, alpha, dropout, modules, layers, the base, how alpha scales."""

    r: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    layers: tuple[int, ...]
    n_layers: int
    base: str
    revision: str | None = None
    rslora: bool = False
    excluded: str | None = None  # a regular expression for modules of a multimodal model that carry none

    def config(self) -> dict[str, Any]:
        """The shape by peft's keys; what is not named has peft's default."""
        layers = sorted(self.layers)
        return {
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base,
            "revision": self.revision,
            "inference_mode": True,
            "r": self.r,
            "lora_alpha": self.alpha if self.alpha % 1 else int(self.alpha),
            "use_rslora": self.rslora,
            "lora_dropout": self.dropout,
            "target_modules": sorted(self.targets),
            **({"exclude_modules": self.excluded} if self.excluded else {}),
            "layers_to_transform": None if len(layers) == self.n_layers else layers,
            "bias": "none",
        }


def save_adapter(folder: Path, model: Model, shape: AdapterShape, *, plain: bool = False) -> None:
    """Write adapter_model.safetensors, adapter_config.json, and replaced_layers.json where layers are replaced.

    With `plain` its config names only what is not peft's default: a test checks that peft reads the same. Raises NotFinite,
    RunError.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replaced = replaced_values(model)
        write_adapter(model, folder / ADAPTER_NAME)
        if replaced is not None:
            write_json(folder / REPLACED_NAME, replaced)
        if plain:
            write_json(folder / ADAPTER_CONFIG_NAME, {"peft_type": "LORA", **shape.config()})
        else:
            write_json(folder / ADAPTER_CONFIG_NAME, _all_keys(shape))
    except OSError as error:
        raise RunError(f"the adapter cannot be written: {error}", where=str(folder), fix="free space there") from None


def _all_keys(shape: AdapterShape) -> dict[str, Any]:
    """The config with every key of peft's, in its order of writing: sorted, sets too."""
    values = KEYS | shape.config()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in sorted(values.items())}
