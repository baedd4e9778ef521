"""Families' records: complete, true of transformers' own modules, and the only place that knows a family's name.

What a config says through a record is held against transformers in test_model.py, the numbers that come out (embedding and
logit factors, soft caps, rotary tables) in tests/laws/test_families.py, peft's names in tests/laws/test_peft.py.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

import lopt_edge
from lopt_edge.errors import InputError
from lopt_edge.plan.costs.programs import program
from lopt_edge.plan.costs.shape import case_key
from lopt_edge.plan.facts import families
from lopt_edge.plan.facts.families import FAMILIES, family_of
from lopt_edge.plan.facts.families.family import ALWAYS, LINEAR, ROOT_OF_HIDDEN, Family, everywhere
from lopt_edge.plan.facts.model import ModelFacts, facts_from_config
from tools.tiny_models import tiny_config

PACKAGE = Path(lopt_edge.__file__).parent
KNOWS_FAMILIES = PACKAGE / "plan" / "facts"


@pytest.fixture(params=FAMILIES, scope="module")
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def theirs(family: Family) -> tuple[ModelFacts, PreTrainedConfig, torch.nn.Module]:
    """Our facts of a tiny model, transformers' config of it and its model without weights."""
    config = tiny_config(family.name)
    facts = facts_from_config(config.to_dict() | {"model_type": family.name}, where="config.json")
    with torch.device("meta"):
        return facts, config, AutoModelForCausalLM.from_config(config)


# records ---------------------------------------------------------------------------------------------------------------


def test_every_file_but_the_records_own_declares_families():
    files = {path.stem for path in Path(families.__file__).parent.glob("*.py")} - {"__init__", "family"}
    declared = [one for file in files for one in __import__(f"{families.__name__}.{file}", fromlist="F").FAMILIES]
    assert {one.name: one for one in declared} == FAMILIES and len(declared) == len(FAMILIES)


def test_a_record_is_complete(family):
    kinds = get_type_hints(Family)
    assert family.attention in get_args(kinds["attention"]) and family.qk_norm in get_args(kinds["qk_norm"])
    assert set(family.asks) <= {"use_sliding_window", "layer_types"}
    for layer_type in family.layer_types:
        projections = family.projections_of(layer_type)
        mixing = ("conv", "value", "value heads") if layer_type == LINEAR else ("q", "kv")
        words = {"hidden", "inner", "own input", "one", *mixing}
        assert len({one.name for one in projections}) == len(projections)
        for projection in projections:
            assert {*projection.reads.split("+"), *projection.writes.split("+")} <= words
            assert projection.bias in ("", ALWAYS, "attention_bias", "attention_out_bias", "mlp_bias", "use_bias")
    kinds_of_layers = {family.layer_type(family.defaults, layer, window) for layer in range(9) for window in (None, 4)}
    refused = {LINEAR} if family.name == "granitemoehybrid" else set()  # mamba, where a config names no layer's type
    assert kinds_of_layers - refused <= set(family.layer_types)
    layout = family.layout
    assert layout.layer(3).startswith(layout.layers) and layout.head(tied=True) == layout.embedding != layout.lm_head


def test_a_family_has_programs(family):
    all_experts = family.experts is not None and family.experts.lies_in is everywhere
    assert program(case_key(family.name, 2, "grouped experts" if all_experts else "grouped"), "graph")
    assert program(case_key(family.name, 4), "norm_forward")


def test_an_unknown_family_is_refused():
    for unknown in ("gpt2", None, ["llama"]):
        with pytest.raises(InputError, match=r"(?s)here.*is not supported.*llama, ministral3, mistral"):
            family_of(unknown, where="here")


# transformers ----------------------------------------------------------------------------------------------------------


def test_keys_of_the_config_exist(family, theirs):
    _, config, _ = theirs
    for key in {family.embedding_factor, family.logit_divisor, family.logit_cap} - {"", ROOT_OF_HIDDEN}:
        assert hasattr(config, key)
    assert hasattr(config, "logits_scaling") == bool(family.logit_divisor)
    assert hasattr(config, "final_logit_softcapping") == bool(family.logit_cap)
    assert hasattr(config, "embedding_multiplier") == (family.embedding_factor not in ("", ROOT_OF_HIDDEN))
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    assert family.attention == ("query tiles" if capped or family.sinks else "sdpa")


def test_the_parts_lie_where_the_layout_says(family, theirs):
    """Every tensor of transformers' model is one that we read, under the name by which we read it."""
    facts, _, model = theirs
    layout, tensors = family.layout, dict(model.state_dict())
    for layer in range(facts.n_layers):
        for linear in facts.layer(layer).linears:
            weight = tensors[f"{layout.layer(layer)}{linear.name}.weight"]
            assert weight.shape == (linear.out_features, linear.in_features)
    assert tensors[layout.embedding].shape == tensors[layout.lm_head].shape == (facts.vocab_size, facts.hidden_size)
    assert (model.lm_head.weight is model.get_parameter(layout.embedding)) == facts.tied
    around = {name for name in tensors if not name.startswith(layout.layers)}
    assert around == {layout.embedding, layout.lm_head, f"{layout.norm}weight"}
    decoder = model.get_submodule(layout.decoder)
    assert len(decoder.layers) == facts.n_layers and decoder.norm.weight is model.get_parameter(f"{layout.norm}weight")


def test_norms(family, theirs):
    facts, _, model = theirs
    index = facts.layer_types.index(facts.attention_types[0])
    layer, kind = model.get_submodule(family.layout.decoder).layers[index], facts.layer(index)
    shapes = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters() if name.endswith("norm.weight")}
    of_heads = {name: shapes.pop(name) for name in list(shapes) if "_attn." in name}
    assert list(shapes.values()) == [(facts.hidden_size,)] * family.norms
    q_size, kv_size = kind.n_heads * kind.head_dim, kind.n_kv_heads * kind.head_dim
    expected = {"": [], "head": [(kind.head_dim,)] * 2, "projection": [(q_size,), (kv_size,)]}
    assert list(of_heads.values()) == expected[family.qk_norm]
    assert bool({"post_feedforward_layernorm.weight", "post_mlp_layernorm.weight"} & set(shapes)) == family.post_norm


def test_what_is_not_packed_is_counted(theirs):
    facts, _, model = theirs
    for index, layer in enumerate(model.get_submodule(facts.layout.decoder).layers):
        packed = {f"{linear.name}.weight" for linear in facts.layer(index).linears}
        packed |= {name for name, _ in facts.family.experts.stacks} if facts.family.experts else set()
        small = sum(tensor.numel() for name, tensor in layer.state_dict().items() if name not in packed)
        assert small == facts.layer(index).small_elements


def test_rotary_tables(family, theirs):
    rotary = theirs[2].get_submodule(family.layout.decoder).rotary_emb
    assert ("layer_type" in inspect.signature(rotary.forward).parameters) == family.rotary_by_type


# the rule --------------------------------------------------------------------------------------------------------------


def known(code: str) -> Iterator[str]:
    """What a file knows of families, comments and docstrings aside."""
    tree = ast.parse(code)
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "model_type":
            yield f"{node.lineno}: .model_type"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            words = set(re.split(r"[\s,;:()'\"]+", node.value)) & {*FAMILIES, "model_type"}
            yield from (f"{node.lineno}: {word!r}" for word in sorted(words))
            if re.search(r"\bmodel\.(layers|embed_tokens|norm)\b|\blm_head\.(weight|bias)", node.value):
                yield f"{node.lineno}: {node.value!r} (a name in a checkpoint)"


@pytest.mark.parametrize(
    ("code", "n_found"),
    [
        ("if facts.model_type == x: ...", 1),
        ("if facts.family.name in ('gemma2', 'olmo2'): ...", 2),
        ("config.get('model_type')", 1),
        ("SOME = 'qwen2 qwen3'.split()", 2),
        ("name = f'model.layers.{i}.mlp.up_proj.weight'", 1),
        ("entries['lm_head.weight']", 1),
        ('"""A docstring on gemma2, model.layers.0."""\n# and a comment: gemma2', 0),
        ("fix = 'add --model FOLDER or a preset (llama-3.1-8b)'", 0),
        ("import transformers.models.llama.modeling_llama", 0),
        ("for layer in model.layers: ...", 0),
        ("where = 'the lm_head'", 0),
    ],
)
def test_the_check_finds_what_it_looks_for(code, n_found):
    assert len(list(known(code))) == n_found


def test_nothing_else_knows_a_family():
    files = [path for path in sorted(PACKAGE.rglob("*.py")) if KNOWS_FAMILIES not in path.parents]
    assert len(files) > 100
    found = {str(path.relative_to(PACKAGE)): list(known(path.read_text(encoding="utf-8"))) for path in files}
    assert {path: lines for path, lines in found.items() if lines} == {}
