"""The facts of a model whose family has no record: found in transformers' own model, built without weights.

A listed family says in its record where its parts lie and which linear layers it has. Here the same is read off the
skeleton of any decoder-only causal language model of transformers: where the list of layers is, the norm behind it, the
embedding and the head, which linear layers each layer has, and which layers are alike. How layers are called is not asked:
the model's own code calls them (run/model/own_body.py). That all this is right is not believed but proved, on a tiny random
model of the same config (tracing/proof.py), before anything trains.

The rule: what cannot be read off is refused with what stands in the way, never guessed. Not here: experts in another form
than two stacks of matrices (conversions.py), linear layers outside of the list of layers, and two of one name in a layer,
which adapters could not tell.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from lopt_edge.errors import InputError
from lopt_edge.models.conversions import record_of
from lopt_edge.models.skeleton import ADVICE, Parts, habits
from lopt_edge.plan.facts.families import FAMILIES, WRAPPERS, name_of, unsupported
from lopt_edge.plan.facts.families.family import Family, Unlisted
from lopt_edge.plan.facts.model import ModelFacts, facts_from_config, quantisation_of
from lopt_edge.system.cache import default_cache
from lopt_edge.system.versions import versions
from quant.untrusted import printable_name

if TYPE_CHECKING:
    from torch import nn

MOST_LAYERS, MOST_NUMBERS = 1000, 2**31
IDLE = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "quantization_config", "architectures")


def read_facts(config: object, *, where: str) -> ModelFacts:
    """The facts in a parsed config.json, of a listed family or of one that transformers knows. Raises InputError."""
    name = name_of(config)
    if not isinstance(config, dict) or not isinstance(name, str) or name in WRAPPERS:
        return facts_from_config(config, where=where)
    if name in FAMILIES and not FAMILIES[name].beyond(config):
        return facts_from_config(config, where=where)
    quantised = bool(quantisation_of(config, where))
    given = {key: value for key, value in config.items() if key not in IDLE}
    facts = _facts(json.dumps(given, sort_keys=True), where, str(config.get("transformers_version"))[:20])
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    named = config.get("architectures")
    architecture = printable_name(str(named[0])[:80]) if isinstance(named, list) and named else name
    return facts.with_recorded(dtype, quantised=quantised, architecture=architecture)


@lru_cache(maxsize=8)
def _facts(text: str, where: str, of_version: str) -> ModelFacts:
    config = config_of(text, where=where, of_version=of_version)
    skeleton = skeleton_of(config, where=where)
    try:
        return skeleton_facts(config, skeleton, where=where)
    except InputError:
        raise
    except Exception as error:  # of any kind, from values that nobody expects there
        raise _unusable(error, where) from None


def config_of(text: str, *, where: str, of_version: str = "") -> Any:
    """transformers' config of a JSON text. Raises InputError for what is no causal language model that it knows."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    values = _with_floats(json.loads(text))
    name, installed = name_of(values), version("transformers")
    if name not in CONFIG_MAPPING:
        newer = f" (the folder was written by {of_version})" if of_version not in ("", "None", installed) else ""
        what = unsupported(name, f", and not known to transformers {installed}{newer}")
        raise InputError(what, where=where, fix=f"install the version of transformers that has it, or {ADVICE}")
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        what = unsupported(name, f": no causal language model of transformers {installed}")
        raise InputError(what, where=where, fix=ADVICE)
    try:
        config = AutoConfig.for_model(**values)
    except Exception as error:  # transformers raises errors of any kind for values that it cannot use
        raise _unusable(error, where) from None
    sizes = {key: getattr(config, key, None) for key in ("num_hidden_layers", "hidden_size", "vocab_size")}
    for key, value in sizes.items():
        if type(value) is not int or not 1 <= value < (MOST_LAYERS if key == "num_hidden_layers" else MOST_NUMBERS):
            raise InputError(f"{key} must be a positive integer within reason, not {str(value)[:40]!r}", where=where)
    return config


def _with_floats(value: Any) -> Any:
    """A config's values, with infinite ones as transformers writes them ({"__float__": "Infinity"}) read."""
    if isinstance(value, dict):
        return float(value["__float__"]) if set(value) == {"__float__"} else {k: _with_floats(v) for k, v in value.items()}
    return [_with_floats(one) for one in value] if isinstance(value, list) else value


def _unusable(error: Exception, where: str) -> InputError:
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return InputError(f"transformers cannot build this model ({reason})", where=where, fix=ADVICE)


def skeleton_of(config: Any, *, where: str) -> nn.Module:
    """transformers' causal language model of a config, without weights (on the meta device). Raises InputError."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            classes: Any = AutoModelForCausalLM._model_mapping
            model: nn.Module = classes[type(config)](config).eval()
    except Exception as error:  # transformers raises errors of any kind for values that it cannot use
        raise _unusable(error, where) from None
    return model


def skeleton_facts(config: Any, model: nn.Module, *, where: str) -> ModelFacts:
    """The facts of a model of which the skeleton is there. Raises InputError for what has no place in a plan."""
    parts = Parts(config, model, where)
    layers = [parts.layer(index) for index in range(parts.n_layers)]
    is_gated, n_results, parts.full_weights = habits(config, layers, parts)
    layers = [parts.layer(index) for index in range(parts.n_layers)] if parts.full_weights else layers
    experts = next((layer.experts for layer in layers if layer.experts is not None), None)
    types = parts.layer_types()
    kinds = tuple(dict.fromkeys(layers))
    text = json.dumps(config.to_dict(), sort_keys=True, default=str)
    family = Family(
        name_of(config),
        experts=None if experts is None else record_of(experts, name_of(config)),
        logit_divisor=parts.key("logits_scaling"),
        logit_factor=parts.key("logit_scale") or parts.key("lm_head_multiplier"),
        logit_cap=parts.key("final_logit_softcapping"),
        post_norm=True,  # nobody knows what the layer does with its last product
        plain_norms=False,
        layout=parts.layout,
        unlisted=Unlisted(text, str(table_folder(text)), is_gated, n_results, parts.attention, parts.n_before),
    )
    return ModelFacts(
        model_type=name_of(config),
        architecture=name_of(config),
        n_layers=parts.n_layers,
        hidden_size=config.hidden_size,
        intermediate_size=max(layer.inner for layer in layers),
        vocab_size=config.vocab_size,
        n_heads=parts.heads[0],
        n_kv_heads=parts.heads[1],
        head_dim=parts.heads[2],
        tied=parts.tied,
        kinds=kinds,
        kind_of_layer=tuple(kinds.index(layer) for layer in layers),
        layer_types=types,
        sliding_window=parts.window,
        recorded_dtype="float32",
        quantised=False,
        max_positions=getattr(config, "max_position_embeddings", None),
        rotary_turn=None,
        layout=parts.layout,
        own_family=family,
        table_bytes=parts.table_bytes,
        beside_elements=parts.beside_elements,
    )


def table_folder(text: str) -> Any:
    """The folder of what was found out about a config: the proof that it runs, and the programs of its layers.

    Its name holds the versions of all whose code decides that.
    """
    deciding = [versions()[name] for name in ("lopt-edge", "torch", "transformers")]
    return default_cache() / "families" / hashlib.sha256(json.dumps([*deciding, text]).encode()).hexdigest()[:20]
