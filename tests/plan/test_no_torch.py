"""`plan` decides and never imports torch, so that it answers in a blink: held by a process in which torch cannot load."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import lopt_edge.plan

BLOCKED = """
import sys
from importlib.abc import MetaPathFinder

class Block(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "bitsandbytes", "peft", "numpy", "safetensors"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Block())
"""


def run_blocked(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", BLOCKED + code], capture_output=True, text=True)


def test_the_block_works():
    done = run_blocked("import quant.nf4")
    assert done.returncode != 0
    assert "torch is blocked" in done.stderr


def test_planning_needs_no_torch():
    names = [f"lopt_edge.plan.{module.name}" for module in pkgutil.walk_packages(lopt_edge.plan.__path__)]
    assert len(names) >= 5
    names += [
        "lopt_edge",
        "lopt_edge.config.settings",
        "lopt_edge.errors",
        "lopt_edge.models.folder",
        "quant.sizes",
        "quant.headers",
    ]
    done = run_blocked("".join(f"import {name}\n" for name in names) + "from lopt_edge import Config\n")
    assert done.returncode == 0, done.stderr


def test_a_plan_is_made_without_torch():
    done = run_blocked(
        "from lopt_edge.plan.facts.model import facts_from_config\n"
        "from lopt_edge.plan.schedule.knobs import Knobs, default_knobs\n"
        "from lopt_edge.plan.schedule.build import step_plan\n"
        "from lopt_edge.plan.schedule.passes import arrange\n"
        "from lopt_edge.plan.schedule.segments import cut_depth\n"
        "from lopt_edge.plan.schedule.validate import validate\n"
        "facts = facts_from_config({'model_type': 'llama', 'vocab_size': 99, 'hidden_size': 64, 'intermediate_size': 64,\n"
        "    'num_hidden_layers': 4, 'num_attention_heads': 4}, where='here')\n"
        "segments = cut_depth('reconstruct', n_layers=facts.n_layers, num_segments=2)\n"
        "plan = step_plan('lopt', segments, n_micro_batches=2)\n"
        "plain = arrange(plan, default_knobs(facts, 'cpu'))\n"
        "streamed = arrange(plan, Knobs(('disk',) * 4, ('page',) * 4, saved_inputs='disk', states='disk'))\n"
        "print(len(validate(plain).ops), len(validate(streamed).ops) > len(plain.ops))\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{2 * (1 + 4 + 2 + 4) + 5} True"


def test_plan_run_needs_no_torch():
    done = run_blocked(
        "from lopt_edge import plan_run\n"
        "found = plan_run('qwen3-0.6b', gpu='rtx4090', max_seq_len=512)\n"
        "print(found.fits, found.longest_context > 512, 'torch' in sys.modules)\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "True", "False"]


def test_the_plan_command_needs_no_torch(tmp_path):
    picture = tmp_path / "bytes.svg"
    words = [
        "plan",
        "--model",
        "qwen3-0.6b",
        "--device",
        "cpu",
        "--max-seq-len",
        "256",
        "--explain",
        "--timeline",
        str(picture),
    ]
    words += ["--device-memory", "4GB"]
    done = run_blocked(f"sys.argv = ['lopt-edge', *{words!r}]\nfrom lopt_edge.cli.main import main\nmain()\n")
    assert done.returncode == 0, done.stderr
    assert "fits: device" in done.stdout and "plan 4 method=e2e" in done.stdout
    assert picture.exists()
