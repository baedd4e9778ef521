"""A checkpoint that was written before the package moved into its folders (commit ebaa078) goes on to the same adapter.

`before-the-house/` holds step 1 of 3 of a run on the embedded model, and the adapter that the run ended with. Another
processor may round otherwise, so the two are compared within 1e-5 of the adapter's norm.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from lopt_edge import Config, finetune

ROOT = Path(__file__).parents[3]
FIXTURE = Path(__file__).parent / "before-the-house"
NAME = "adapter_model.safetensors"


def test_an_old_checkpoint_goes_on_to_the_adapter_of_its_time(tmp_path: Path) -> None:
    config = Config(
        model=str(ROOT / "examples" / "tiny-llama"),
        data=str(ROOT / "examples" / "study" / "narrow-valid.jsonl"),
        output=str(tmp_path / "out"),
        cache_dir=str(tmp_path / "cache"),
        resume=str(FIXTURE / "step-000001"),
        method="lopt",
        lora_r=1,
        lora_alpha=2,
        lora_targets=("q_proj",),
        max_seq_len=64,
        batch_size=4,
        grad_accum=2,
        max_steps=3,
        lr=3e-3,
        device="cpu",
        compute_dtype="float32",
        weights="disk",
        saved_inputs="disk",
    )
    result = finetune(config)
    assert result.steps == 3
    then, now = load_file(FIXTURE / NAME), load_file(tmp_path / "out" / NAME)
    begun = load_file(FIXTURE / "step-000001" / NAME)
    assert then.keys() == now.keys()
    norm = torch.cat([value.flatten() for value in then.values()]).norm()
    assert torch.cat([(then[name] - now[name]).flatten() for name in then]).norm() <= 1e-5 * norm
    assert torch.cat([(then[name] - begun[name]).flatten() for name in then]).norm() > 1e-2 * norm  # it did train
