"""Laws for families without a record (models/unlisted.py): what is found in transformers' own code is right, and planned.

Laws 2 and 4 are the proof that the program itself makes before it trains (tracing/proof.py): here it must pass, and must
not where something differs. Law 6: predicted bytes are the tracked ones. Law 8: peft and transformers read the result. The
families stand for the kinds of layers that there are: two norms and a plain MLP; parallel branches under one norm, with a
factor on logits and windows; short convolutions beside attention; distances as a bias, in layers that give tuples, with a
norm of embeddings; learned positions; a head that checkpoints call otherwise; low-rank keys beside experts, one shared; a
state space beside attention, and in its place with experts whose stacks checkpoints call otherwise.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from lopt_edge import export, finetune
from lopt_edge.adapters.generation import Sampling, generate_ids
from lopt_edge.errors import InputError
from lopt_edge.models.folder import ModelFolder, find_model
from lopt_edge.models.four_bit import four_bit_folder
from lopt_edge.models.tiny import random_model, smaller
from lopt_edge.planning.unlisted import make_ready
from lopt_edge.run.model.load import load_model
from lopt_edge.run.model.lora import load_adapters
from tests.laws.test_families import LONG, our_logits
from tests.laws.test_timeline import check_comparison
from tests.plan.plans import make_knobs
from tools.timeline_settings import Setting, compare_on
from tools.tiny_runs import make_config, save_tokenizer

FAMILIES = {
    "starcoder2": {"num_key_value_heads": 2},
    "cohere2": {"num_key_value_heads": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": 4},
    "bloom": {},
    "opt": {},
    "gpt_neox": {},
    "glm4_moe_lite": {},
    # every token goes to all experts: the most that a routing takes
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, "num_hidden_layers": 4, "num_local_experts": 2,
                         "num_experts_per_tok": 2},
    "falcon_h1": {},
}  # fmt: skip
PLANNED = (("starcoder2", torch.bfloat16), ("cohere2", torch.float32), ("lfm2", torch.float32), ("bloom", torch.float32),
           ("glm4_moe_lite", torch.bfloat16), ("granitemoehybrid", torch.bfloat16),
           pytest.param("falcon_h1", torch.float32, marks=pytest.mark.long))  # fmt: skip
TWO_KINDS = ("lfm2", "glm4_moe_lite", "granitemoehybrid")


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """family -> the folder of a tiny random model, made once; what is proved and traced lies in a cache beside it."""
    root, made = tmp_path_factory.mktemp("unlisted"), {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = root / family
            config = smaller(AutoConfig.for_model(family, **FAMILIES.get(family, {})), n_layers=4)
            random_model(config).save_pretrained(made[family])
            save_tokenizer(made[family])
        return made[family]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOPT_EDGE_CACHE", str(root / "cache"))
        yield get


@pytest.mark.parametrize(("family", "dtype"), PLANNED)
def test_predicted_bytes_are_the_tracked_ones(folder_of, tmp_path, family, dtype):
    source = find_model(str(folder_of(family)))
    facts = source.facts
    assert facts.own_family is not None and facts.n_layers == 4 and len(facts.kinds) == (2 if family in TWO_KINDS else 1)
    make_ready(facts, itemsize=dtype.itemsize, targets=facts.linear_names, where="here")
    knobs = make_knobs(4, activations=("recompute", "keep", "page", "recompute"), weights=("resident", "disk") * 2)
    lengths = ((150, 12), (70,)) if any(kind.mamba for kind in facts.kinds) else ((19, 12), (27,))  # in chunks of 64
    setting = Setting(family, dtype, lengths, knobs, "lopt", 2)
    check_comparison(compare_on(setting, four_bit_folder(source)[0], tmp_path))


LONGER = [pytest.param(family, marks=pytest.mark.long) for family in ("opt", "starcoder2", "falcon_h1")]


@pytest.mark.parametrize("family", ["gpt_neox", "lfm2", *LONGER])
def test_a_run_is_read_by_peft_and_transformers(folder_of, tmp_path, family):
    """Two steps; logits with the adapter are peft's on the same 4-bit folder, generation with a cache is that without."""
    folder = folder_of(family)
    config = make_config(folder, tmp_path, method="lopt", max_steps=2)
    finetune(config)
    quantised = Path(json.loads((Path(config.output) / "run.json").read_text())["quantised_folder"])
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(quantised), config.output).train(
        family != "opt"
    )
    ours = load_model(quantised, find_model(str(quantised)).facts, device=torch.device("cpu"), dtype=torch.float32)
    plain = our_logits(ours, LONG)
    load_adapters(ours, Path(config.output))
    with torch.no_grad():
        wanted = theirs(LONG, use_cache=False).logits.float()
    mine = our_logits(ours, LONG)
    assert (mine - wanted).norm() <= 1e-4 * wanted.norm()
    assert (mine - plain).norm() > 1e-3 * plain.norm()
    made = list(generate_ids(ours, LONG[0].tolist(), Sampling(max_new_tokens=4), stop=[]))
    every = torch.tensor([[*LONG[0].tolist(), *made]])
    assert our_logits(ours, every)[0, LONG.shape[1] - 1 : -1].argmax(-1).tolist() == made
    if family in ("gpt_neox", "lfm2"):
        export(config.output, merged=tmp_path / "merged", onto="original", dtype="float32", cache_dir=config.cache_dir)
        with torch.no_grad():
            merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(LONG, use_cache=False).logits
            base = AutoModelForCausalLM.from_pretrained(folder)(LONG, use_cache=False).logits
        assert merged.isfinite().all() and not torch.equal(merged, base)


def test_a_plan_says_that_the_family_is_not_a_tested_one(folder_of, command):
    status, out, _ = command("plan", "--model", folder_of("starcoder2"), "--max-seq-len", 64, "--device-memory", "2GB")
    assert status == 0 and "starcoder2 is not one of the tested families" in out


def ready(source: ModelFolder) -> None:
    make_ready(source.facts, itemsize=4, targets=source.facts.linear_names, where="here")


@pytest.mark.parametrize(
    ("family", "what"),
    [
        ("nanochat", "a tiny model of it does not run here: logits of 6 tokens differ"),
        ("minimax", "cannot be planned .*depends on the number of tokens"),
        ("gpt2", "its matrices are Conv1Ds"),
        ("llama4_text", "experts.gate_up_proj of layer 0 is no linear layer, and would stay unpacked"),
        ("bert", "its head has a bias"),
    ],
)
def test_what_does_not_run_here_as_there_is_refused(folder_of, family, what):
    with pytest.raises(InputError, match=f"(?s){family}.*{what}"):
        ready(find_model(str(folder_of(family))))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"model_type": "zeta9", "transformers_version": "9.1.0"}, r"not known to transformers .*written by 9\.1\.0"),
        ({"model_type": "vit"}, "no causal language model"),
        ({"hidden_size": "wide"}, "transformers cannot build this model|hidden_size must be"),
        ({"num_hidden_layers": 2_000}, "num_hidden_layers must be a positive integer within reason"),
    ],
)
def test_a_config_that_cannot_be_is_refused(folder_of, tmp_path, change, what):
    config = json.loads((folder_of("starcoder2") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(InputError, match=what):
        find_model(str(tmp_path))
