"""Holds the losses of preferences against TRL's own trainers: the same rows, 4-bit base and adapter, in float32.

    pip install trl && python tools/compare_trl.py

An adapter is trained for three steps, so that it is not the reference. Then each objective takes one step over eight rows
from it, and its logged loss stands beside what TRL's trainer computes of the same token ids (ours: chat templates and ends
of texts are each tool's own). What TRL changes in a model that it is given is undone: a copy of the adapter as the
reference (here that is the base), and casts to bfloat16. Of ORPO the odds ratio is compared, since TRL's likelihood counts
the prompt. Exits with 1 where a loss differs by more than BOUND. TRL is no dependency of ours; read at 1.16.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lopt_edge import finetune
from lopt_edge.config.load import load_config
from lopt_edge.data import Dataset, Example, mismatched_part
from lopt_edge.training.prepare.read import read_inputs

EXAMPLES = Path(__file__).parents[1] / "examples"
BOUND, ROWS = 1e-5, 8
SETTINGS: dict[str, dict[str, float]] = {
    "dpo": {"beta": 0.3},
    "kto": {"beta": 0.2, "desirable_weight": 1.3, "undesirable_weight": 0.7},
    "simpo": {"beta": 2.0, "simpo_gamma": 0.5, "label_smoothing": 0.1},
    "orpo": {"orpo_lambda": 0.4},
}


def write_rows(root: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows by form, which are written to a file of its name."""
    pairs = [json.loads(line) for line in (EXAMPLES / "data" / "preferences.jsonl").read_text().splitlines()[:ROWS]]
    labelled = [
        {"prompt": row["prompt"], "completion": row["rejected" if at % 2 else "chosen"], "label": at % 2 == 0}
        for at, row in enumerate(pairs)
    ]
    for name, rows in (("pairs", pairs), ("labels", labelled)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"pairs": pairs, "labels": labelled}


def run(root: Path, output: str, objective: str, **settings: Any) -> tuple[dict[str, Any], Dataset]:
    """The first step's log line of a run, and what it was trained on."""
    data = str(root / ("labels.jsonl" if objective == "kto" else "pairs.jsonl"))
    shared = {
        "model": str(EXAMPLES / "tiny-llama"), "data": data, "output": str(root / output), "objective": objective,
        "cache_dir": str(root / "cache"), "device": "cpu", "compute_dtype": "float32", "max_seq_len": 256,
        "batch_size": ROWS, "grad_accum": 1, "packing": False, "lora_r": 4,
    }  # fmt: skip
    config = load_config(None, {**shared, **settings})
    train = read_inputs(config)[0].train
    finetune(config)
    lines = map(json.loads, (root / output / "metrics.jsonl").read_text().splitlines())
    return next(line for line in lines if "loss" in line), train


def padded(examples: Sequence[Example]) -> tuple[torch.Tensor, ...]:
    """Token ids, attention mask and mask of the reply, padded on the right."""
    longest = max(map(len, examples))
    ids, attention, reply = (torch.zeros(len(examples), longest, dtype=torch.int64) for _ in range(3))
    for row, example in enumerate(examples):
        ids[row, : len(example)] = torch.tensor(example.input_ids.tolist())
        attention[row, : len(example)] = 1
        reply[row, : len(example)] = torch.tensor(list(example.supervised))
    return ids, attention, reply


def named(examples: Sequence[Example], prefix: str) -> dict[str, torch.Tensor]:
    """A batch in the form of CPO and ORPO."""
    ids, attention, reply = padded(examples)
    labels = torch.where(reply.bool(), ids, -100)
    return {f"{prefix}_input_ids": ids, f"{prefix}_attention_mask": attention, f"{prefix}_labels": labels}


class Theirs:
    """TRL's trainers on the adapter in a folder."""

    def __init__(self, adapter: Path, rows: dict[str, list[dict[str, Any]]], output: Path) -> None:
        import datasets
        from transformers import AutoTokenizer

        self.adapter = adapter
        self.base = json.loads((adapter / "run.json").read_text())["quantised_folder"]
        self.rows = {name: datasets.Dataset.from_list(found) for name, found in rows.items()}
        self.tokenizer = AutoTokenizer.from_pretrained(EXAMPLES / "tiny-llama")
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.shared = {"output_dir": str(output), "report_to": [], "use_cpu": True, "bf16": False,
                       "per_device_train_batch_size": ROWS}  # fmt: skip

    def trainer(self, trainer: type, config: type, form: str, **settings: Any) -> Any:
        """A trainer whose model is the base and the adapter as they were saved, in float32."""
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        # in training mode: in evaluation mode bitsandbytes repacks the weights on some CPUs
        base = AutoModelForCausalLM.from_pretrained(self.base, attn_implementation="sdpa", dtype=torch.float32).train()
        model = PeftModel.from_pretrained(base, str(self.adapter), is_trainable=True)
        args = config(**self.shared, **settings)
        made = trainer(model=model, args=args, train_dataset=self.rows[form], processing_class=self.tokenizer)
        made._peft_has_been_casted_to_bf16 = False
        if "ref" in made.model.peft_config:
            made.model.delete_adapter("ref")
        saved = load_file(self.adapter / "adapter_model.safetensors")
        for name, parameter in made.model.named_parameters():
            if "lora_" in name:
                parameter.data = saved[name.replace(".default", "")].float().clone()
            elif parameter.is_floating_point():
                parameter.data = parameter.data.float()
        for module in made.model.modules():
            if hasattr(module, "compute_type_is_set"):  # a 4-bit linear layer
                module.compute_dtype, module.compute_type_is_set = torch.float32, True
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.dtype == torch.bfloat16:
                    setattr(module, name, buffer.float())
        return made

    @torch.no_grad()
    def losses(self, sets: dict[str, Dataset]) -> dict[str, float]:
        """The loss of each objective; of ORPO its odds ratio alone."""
        from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
        from trl.experimental.cpo import CPOConfig, CPOTrainer
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        chosen, rejected = sets["dpo"].examples[::2], sets["dpo"].examples[1::2]
        keys = ("input_ids", "attention_mask", "completion_mask")
        dpo = self.trainer(DPOTrainer, DPOConfig, "pairs", **SETTINGS["dpo"], max_length=None)
        found = {"dpo": float(dpo.compute_loss(dpo.model, dict(zip(keys, padded([*chosen, *rejected]), strict=True))))}
        how = {"max_length": None, "train_sampling_strategy": "sequential"}
        kto = self.trainer(KTOTrainer, KTOConfig, "labels", **SETTINGS["kto"], **how)
        own, other = padded(sets["kto"].examples), padded(mismatched_part(sets["kto"]).examples)
        batch = {**dict(zip(keys, own, strict=True)), "label": torch.tensor(sets["kto"].labels)}
        batch |= {f"KL_{key}": value for key, value in zip(keys, other, strict=True)}
        found["kto"] = float(kto.compute_loss(kto.model, batch))
        batch = {**named(chosen, "chosen"), **named(rejected, "rejected")}
        simpo = self.trainer(CPOTrainer, CPOConfig, "pairs", loss_type="simpo", cpo_alpha=0.0, **SETTINGS["simpo"])
        found["simpo"] = float(simpo.get_batch_loss_metrics(simpo.model, dict(batch), "train")[0])
        orpo = self.trainer(ORPOTrainer, ORPOConfig, "pairs", beta=SETTINGS["orpo"]["orpo_lambda"])
        loss, metrics = orpo.get_batch_loss_metrics(orpo.model, dict(batch), "train")
        found["orpo"] = float(loss) - float(metrics["nll_loss"])
        return found


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        rows, ours, sets = write_rows(root), dict[str, float](), dict[str, Dataset]()
        run(root, "start", "dpo", lr=1e-3, max_steps=3)
        for name, settings in SETTINGS.items():
            line, sets[name] = run(root, name, name, init_adapter=str(root / "start"), max_steps=1, **settings)
            ours[name] = line["loss"]
            if name == "orpo":
                n_targets = sum(example.n_supervised for example in sets[name].examples[::2])
                ours[name] += line["logps_chosen"] * ROWS / n_targets  # without its likelihood
        theirs = Theirs(root / "start", rows, root / "theirs").losses(sets)
    for name, loss in ours.items():
        print(f"{name}: ours {loss:.9f}, TRL {theirs[name]:.9f}, difference {abs(loss - theirs[name]):.1e}")
    return int(max(abs(loss - theirs[name]) for name, loss in ours.items()) > BOUND)


if __name__ == "__main__":
    sys.exit(main())
