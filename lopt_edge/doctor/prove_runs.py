"""Whole runs of `lopt-edge finetune` on a device, as children, for `lopt-edge doctor --prove`.

- At four lengths of sequences: the device memory that a run took, against what was planned for it.
- Under a budget: a run that is given no more than its plan says, and must hold it.
- Killed and resumed: a run that is killed behind its first checkpoint and resumed, against one left alone.

They train a tiny random Llama with a tokenizer of bytes on text drawn from a seed, all in one temporary folder; a child has
a cache of its own, so nothing of the user's is read or written. What a child says when it fails is the proof's fault.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from lopt_edge.adapters.base import RUN_NAME
from lopt_edge.doctor.prove_models import tiny_config
from lopt_edge.models.tiny import random_model
from lopt_edge.plan.facts.families import PLAIN
from lopt_edge.run.devices.interface import Device

LENGTHS = (64, 128, 256, 512)
MOST = 1.05  # times the planned bytes; less than planned is no fault
N_STEPS, SAVE_EVERY, N_TEXTS = 60, 3, 40
CHILD_SECONDS = 240
CHECKPOINT = "checkpoints/step-*/manifest.json"  # of a whole one: its folder gets this name when all is written
MIB = 1 << 20
CHILD = "from lopt_edge.cli.main import main; main()"
Work = Callable[[], float]


def run_proofs(own: Device) -> Iterator[tuple[str, float, Work]]:
    """Yield (name, bound, what gives the error) of each proof on a device. A share of bytes, or an error of
    numbers."""
    with tempfile.TemporaryDirectory(prefix="lopt-edge-prove-") as folder:
        bed = _Bed(own, Path(folder))
        for length in LENGTHS:
            yield f"memory taken of what was planned, {length} tokens", MOST, partial(bed.of_plan, length)
        yield "memory taken of a budget as small as the plan", 1.0, bed.of_budget
        yield "a run killed and resumed", bed.exact, bed.killed_and_resumed


class _Bed:
    """A model, its data, and the folder in which runs leave what they leave."""

    def __init__(self, own: Device, root: Path) -> None:
        self.own, self.root = own, root
        self.exact = 0.0 if own.kind.computes_on_cores else 1e-2  # a GPU's sums may come in another order
        self.planned: dict[int, int] = {}

    def of_plan(self, length: int) -> float:
        """The bytes that a run took, as a share of the planned ones."""
        planned, taken = self._bytes(length, [])
        self.planned[length] = planned
        return taken / planned

    def of_budget(self) -> float:
        """The bytes that a run took, as a share of its budget: as much as was planned for the longest sequences."""
        length = LENGTHS[-1]
        budget = -(-self.planned[length] // MIB)
        _, taken = self._bytes(length, ["--device-memory", f"{budget}MiB"])
        return taken / (budget * MIB)

    def killed_and_resumed(self) -> float:
        """The largest difference of a number in both adapters, relative to the largest number."""
        from quant.files import read_tensor
        from quant.headers import read_header

        words = ["--max-steps", str(N_STEPS), "--save-every", str(SAVE_EVERY), "--max-seq-len", str(LENGTHS[0])]
        alone, killed = self._run("alone", words), self.root / "killed"
        child = self._start("killed", words)
        deadline = time.monotonic() + CHILD_SECONDS
        while child.poll() is None and not any(killed.glob(CHECKPOINT)) and time.monotonic() < deadline:
            time.sleep(0.01)
        if child.poll() is not None:
            raise ValueError(f"the run ended before it was killed: {_last_words(child)}")
        child.kill()
        child.communicate()
        resumed = self._run("killed", [*words, "--resume", "auto"])
        worst = 0.0
        for name, entry in read_header(alone / "adapter_model.safetensors").items():
            expected = read_tensor(entry)
            found = read_tensor(read_header(resumed / "adapter_model.safetensors")[name])
            worst = max(worst, float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30)))
        return worst

    def _bytes(self, length: int, words: list[str]) -> tuple[int, int]:
        """What was planned for a run's device memory, and what it took."""
        name = f"length-{length}{'-budget' * bool(words)}"
        output = self._run(name, [*words, "--max-seq-len", str(length), "--max-steps", "4"])
        run = json.loads((output / RUN_NAME).read_text(encoding="utf-8"))
        return run["predicted"]["device_bytes"], run["peaks"]["peak_device_bytes"]

    # children --------------------------------------------------------------------------------------------------------

    def _run(self, name: str, words: list[str]) -> Path:
        child = self._start(name, words)
        try:
            child.wait(CHILD_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
        if child.wait():
            raise ValueError(f"a run of lopt-edge finetune failed: {_last_words(child)}")
        child.communicate()
        return self.root / name

    def _start(self, name: str, words: list[str]) -> subprocess.Popen[str]:
        model, data, device = self._model(), self._data(), self.own.kind.name
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        given = ["--model", str(model), "--data", str(data), "--output", str(self.root / name),
                 "--device", device, "--cache-dir", str(self.root / "cache"),
                 "--grad-accum", "2", "--lora-r", "4", *words]  # fmt: skip
        return subprocess.Popen(
            [sys.executable, "-c", CHILD, "finetune", *given],
            env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def _data(self) -> Path:
        path = self.root / "texts.jsonl"
        if not path.exists():
            drawn = random.Random(0)
            rows = ("".join(drawn.choices("abcdefgh ", k=max(LENGTHS) + 50)) for _ in range(N_TEXTS))
            path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
        return path

    def _model(self) -> Path:
        folder = self.root / "model"
        if not folder.exists():
            from tokenizers import Tokenizer, decoders, models, pre_tokenizers
            from transformers import PreTrainedTokenizerFast

            special = {f"{name}_token": f"<{name}>" for name in ("pad", "bos", "eos")}
            letters = sorted(pre_tokenizers.ByteLevel.alphabet())
            made = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
            made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
            made.add_special_tokens([*special.values()])
            fast: Any = PreTrainedTokenizerFast
            tokenizer = fast(tokenizer_object=made, **special)
            random_model(tiny_config(PLAIN)).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return folder


def _last_words(child: subprocess.Popen[str]) -> str:
    return " ".join(child.communicate()[0].split())[-300:]
