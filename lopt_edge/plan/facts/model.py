"""Model facts: what config.json says about a model's shape, without loading anything.

A family is a `model_type` of transformers 5 whose layers we know how to run one by one. All in which families differ stands
in their records (families/), which this file reads configs through. The rule: every number comes from the config (or
transformers' documented default for that family), never from the weights, whose names decide two things only: whether the
head is tied to the embedding, and where in a multimodal checkpoint the language model lies (`of_checkpoint`); a family
without a record is refused with the list of those that have one. No torch, no transformers here.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any

from lopt_edge.errors import InputError, raise_collected
from lopt_edge.plan.facts.families import WRAPPERS, family_of
from lopt_edge.plan.facts.families.family import LINEAR, SLIDING, Family, Layout, Wrapper
from lopt_edge.plan.facts.forms import UNPACK_TIMES, Forms
from lopt_edge.plan.facts.layers import DELTA_KEYS, KEPT, OWN, SHARED, LayerFacts, OwnInputs, key_sources, layer_kind
from quant.gguf.types import SPLIT, parts_bytes
from quant.untrusted import printable_name

_OPTIONAL = ("num_key_value_heads", "head_dim", "sliding_window", "sliding_window_pattern", "max_position_embeddings",
             "no_rope_layer_interval", "max_window_layers", "full_attention_interval",
             "decoder_sparse_step")  # fmt: skip
MXFP4 = "mxfp4"  # `quant_method` of a folder that is read as it is, as bitsandbytes'
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@dataclass(frozen=True)
class ModelFacts:
    """The shape of a model, as far as planning needs it. All counts are exact."""

    model_type: str
    architecture: str
    n_layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    tied: bool
    kinds: tuple[LayerFacts, ...]  # of layers, each once
    kind_of_layer: tuple[int, ...]  # index into `kinds`
    layer_types: tuple[str, ...]
    sliding_window: int | None
    recorded_dtype: str
    quantised: bool
    max_positions: int | None
    gates_by_silu: bool = False  # the activation of its MLPs
    rotary_dim: int = 0  # the features of a head that are rotated, where that is a part of them
    rotary_turn: int | None = None  # a sequence of so many tokens has other rotary frequencies than a shorter one
    layout: Layout = field(default_factory=Layout)
    wrapper: str = ""  # the model_type of the multimodal model around it
    forms: Forms | None = None  # the types of its matrices, where they lie in blocks that are not NF4's
    own_inputs: OwnInputs | None = None
    key_sources: tuple[tuple[int, int], ...] = ()  # (layer, the earlier one to whose keys and values it attends)
    own_family: Family | None = None  # where it is not one of those that have a record
    table_bytes: int = 0  # of tables that its layers compute and keep
    beside_elements: int = 0  # numbers beside its layers that no field of a family has: tables of positions, other norms

    def __hash__(self) -> int:
        """A hash of a few fields: equal facts have equal hashes, and the planner's caches ask for it thousands of times."""
        return hash((self.architecture, self.n_layers, self.hidden_size, self.intermediate_size, self.vocab_size))

    @property
    def family(self) -> Family:
        """The model's family: all in which it differs from others."""
        return self.own_family or family_of(self.model_type)

    @cached_property
    def source_of(self) -> dict[int, int]:
        """The layer whose keys and values a layer attends to, where that is another one."""
        return dict(self.key_sources)

    def gives_back(self, layer: int, reached: Container[int]) -> bool:
        """Whether gradients of shared keys and values flow in a layer's backward, where a loss reaches these layers."""
        if layer in self.source_of:
            return self.source_of[layer] in reached
        return any(reader in reached for reader, source in self.key_sources if source == layer)

    @cached_property
    def linear_names(self) -> tuple[str, ...]:
        """The short names of the linear layers that may have adapters, each once, in the order in which they run."""
        experts = self.family.experts
        without = f"{experts.module}." if experts is not None and experts.takes_names else None
        linears = (linear for kind in self.kinds for linear in kind.linears if not kind.reads_past(linear))
        names = (linear.short_name for linear in linears if without is None or not linear.name.startswith(without))
        return tuple(dict.fromkeys(names))

    def stored_matrices(self, layer: int) -> Iterator[tuple[str, tuple[int, int], int]]:
        """Yield the block type and the shape of a layer's matrices, and how many there are of each; of those with forms."""
        if self.forms is not None:
            kind = self.layer(layer)
            for form, linear in zip(self.forms.layers[layer], kind.linears, strict=True):
                yield form, (linear.out_features, linear.in_features), 1
            if kind.experts is not None:
                for form, shape in zip(self.forms.experts_of(layer), kind.experts.shapes, strict=True):
                    yield form, shape, kind.experts.count

    @cached_property
    def unpack_times(self) -> float:
        """How many times the seconds of NF4 its matrices take to unpack, in the mean of their elements."""
        found = [one for layer in range(self.n_layers) for one in self.stored_matrices(layer)]
        n_elements = [prod(shape) * n_matrices for _, shape, n_matrices in found]
        return sum(UNPACK_TIMES[form] * n for (form, _, _), n in zip(found, n_elements, strict=True)) / sum(n_elements)

    @property
    def attention_types(self) -> tuple[str, ...]:
        """The types of its layers that have attention, sorted."""
        return tuple(sorted(set(self.layer_types) - {LINEAR}))

    def head_dim_of(self, layer_type: str) -> int:
        """The size of a head in layers of a type; the model's own where it has none of that type."""
        found = (self.layer(index).head_dim for index, each in enumerate(self.layer_types) if each == layer_type)
        return next(found, self.head_dim)

    def layer(self, index: int) -> LayerFacts:
        """What decoder layer `index` has."""
        return self.kinds[self.kind_of_layer[index]]

    @property
    def n_parameters(self) -> int:
        """The number of parameters of the language model."""
        layers = [self.layer(index) for index in range(self.n_layers)]
        return sum(layer.n_packed + layer.small_elements for layer in layers) + self._n_around

    @property
    def n_active(self) -> int:
        """The number of parameters without the experts to which a token does not go: all of them in a dense model."""
        return self.n_parameters - sum(self.layer(index).n_idle for index in range(self.n_layers))

    def folder_bytes(self, itemsize: int) -> int:
        """The bytes of its 4-bit folder, where the rest is stored in `itemsize` bytes a number."""
        layers = [self.layer(index) for index in range(self.n_layers)]
        packed = sum(layer.packed_bytes for layer in layers)
        if self.forms is not None:
            stored = (one for index in range(self.n_layers) for one in self.stored_matrices(index))
            packed = sum(n_matrices * sum(parts_bytes(form, shape)) for form, shape, n_matrices in stored)
        return packed + itemsize * (sum(layer.small_elements for layer in layers) + self._n_around)

    @property
    def _n_around(self) -> int:
        """The parameters of embedding, lm_head and last norm, and of what makes tokens' own inputs to the layers."""
        found = self.vocab_size * self.hidden_size * (1 if self.tied else 2) + self.hidden_size + self.beside_elements
        if (own := self.own_inputs) is not None:
            found += (own.n_tokens + self.hidden_size) * self.n_layers * own.width + own.width
        return found

    def with_recorded(self, dtype: str, *, quantised: bool, architecture: str) -> ModelFacts:
        """The facts of a folder of this model that records these."""
        return replace(self, recorded_dtype=dtype, quantised=quantised, architecture=architecture)

    def kinds_equal(self, *layers: int) -> bool:
        """Whether these decoder layers are all of one kind."""
        return len({self.kind_of_layer[layer] for layer in layers}) == 1

    def of_checkpoint(self, tensors: Container[str]) -> ModelFacts:
        """The facts where the checkpoint has tensors of these names: with an lm_head among them nothing is tied.

        transformers ties the two if they are equal, in spite of the config not if they differ: the same logits.
        """
        layouts = WRAPPERS[self.wrapper].layouts if self.wrapper else (self.layout,)
        layout = next((found for found in layouts if found.embedding in tensors), self.layout)
        heads = {found.lm_head for found in layouts}  # a text model's head may lie outside of its prefix
        head = next((name for name in sorted(heads, key=lambda name: name != layout.lm_head) if name in tensors), None)
        if head is None:
            return replace(self, layout=layout)
        return replace(self, layout=replace(layout, lm_head=head), tied=False)

    @cached_property
    def _packed_names(self) -> frozenset[str]:
        experts = (name for kind in self.kinds if kind.experts for name, _ in kind.experts.matrices())
        return frozenset([*(linear.name for kind in self.kinds for linear in kind.linears), *experts])

    @property
    def is_inner(self) -> bool:
        """Whether transformers has a class of its own for this text model, with the layers of the family."""
        return bool(self.wrapper and WRAPPERS[self.wrapper].inner)

    @property
    def outside(self) -> str | None:
        """A regular expression for the modules of a multimodal model that are not in its decoder, as peft takes it."""
        decoder = self.layout.decoder.replace(".", "\\.")
        return rf"(?!{decoder}\.).*" if self.wrapper else None

    def modules_beside(self, tensors: Iterable[str]) -> tuple[str, ...]:
        """The modules that a 4-bit folder leaves as they are, where transformers would not by itself: those of a
        multimodal model that are not its language model, and its head; the matrix behind tokens' own inputs to the layers.

        Each as it lies in the checkpoint and as transformers 5 has it in memory.
        """
        matrix = self.layout.own_inputs.projection.removesuffix(".weight")
        own = {matrix.rpartition(".")[2]} if self.own_inputs is not None else set()
        if not self.wrapper:
            return tuple(sorted({"lm_head", *own})) if own else ()
        words = (name.removeprefix("model.").split(".")[0] for name in tensors if not name.startswith(self.layout.root))
        found = {*words, "lm_head"} - {"language_model"}
        return tuple(sorted({*found, *(f"model.{word}" for word in found), *own}))

    def packs(self, name: str) -> bool:
        """Whether a tensor of the model's folder is stored in 4 bits: the matrices inside the decoder layers."""
        inside = name.removeprefix(self.layout.layers).partition(".")[2].removesuffix(".weight")
        return name.startswith(self.layout.layers) and name.endswith(".weight") and inside in self._packed_names


def facts_from_config(config: object, *, where: str) -> ModelFacts:
    """The facts in a parsed config.json; `where` names it in errors. Raises InputError for what is unknown or missing."""
    if not isinstance(config, dict):
        raise InputError("is not a JSON object", where=where)
    quantisation = quantisation_of(config, where)
    wrapper, outer = _wrapper_of(config), config
    if wrapper is not None:
        config = _text_config(config, wrapper, where)
    family = family_of(config.get("model_type"), where=where)
    known = {**family.defaults, **{key: value for key, value in config.items() if value is not None}}
    _check_numbers(known, where, (family.inner, *(DELTA_KEYS if LINEAR in family.layer_types else ())))
    _refuse_unsupported(known, family, where)
    n_layers, hidden, n_heads = (known[key] for key in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    given_null = "num_key_value_heads" in config and config["num_key_value_heads"] is None
    n_kv_heads = n_heads if given_null else known.get("num_key_value_heads", n_heads)
    head_dim = (config if config.get("head_dim", 0) is None else known).get("head_dim") or hidden // n_heads
    window = known.get("sliding_window")
    if ("sliding_window" in config and config["sliding_window"] is None) or (
        "use_sliding_window" in family.asks and not known.get("use_sliding_window")
    ):
        window = None
    layer_types = _layer_types(known, family, n_layers, window, where)
    known |= {"num_key_value_heads": n_kv_heads, "head_dim": head_dim}
    own_inputs = _own_inputs(known, family, where)
    sources = key_sources(known, family, layer_types, where)
    keys = [SHARED if layer in sources else OWN for layer in range(n_layers)]
    for kind in set(layer_types) if sources else ():  # transformers keeps those of each type, read or not
        keys[max(layer for layer in range(n_layers) if layer_types[layer] == kind and layer not in sources)] = KEPT
    layers = [layer_kind(known, family, i, each, keys=keys[i], where=where) for i, each in enumerate(layer_types)]
    kinds = tuple(dict.fromkeys(layers))
    if quantisation == MXFP4 and not all(kind.experts and family.experts and family.experts.in_mxfp4 for kind in kinds):
        raise _unknown_quantisation(MXFP4, where)
    architectures = outer.get("architectures")
    dtype = outer.get("dtype") or outer.get("torch_dtype") or config.get("dtype") or config.get("torch_dtype") or "float32"
    found = ModelFacts(
        model_type=family.name,
        architecture=printable_name(str(architectures[0])[:80])
        if isinstance(architectures, list) and architectures
        else family.name,
        n_layers=n_layers,
        hidden_size=hidden,
        intermediate_size=known[family.inner],
        vocab_size=known["vocab_size"],
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        tied=_is_tied(known, outer, wrapper),
        kinds=kinds,
        kind_of_layer=tuple(kinds.index(layer) for layer in layers),
        layer_types=layer_types,
        sliding_window=window,
        recorded_dtype=str(dtype).removeprefix("torch."),
        quantised=bool(quantisation),
        max_positions=known.get("max_position_embeddings"),
        gates_by_silu=(known.get("hidden_activation") or known.get("hidden_act")) in ("silu", "swish"),
        rotary_dim=_rotary_dim(known, family, head_dim, where),
        rotary_turn=_rotary_turn(known),
        layout=family.layout if wrapper is None else wrapper.layouts[0],
        wrapper="" if wrapper is None else wrapper.name,
        own_inputs=own_inputs,
        key_sources=tuple(sources.items()),
    )
    return replace(found, forms=_experts_in_mxfp4(found)) if quantisation == MXFP4 else found


def _refuse_unsupported(known: dict[str, Any], family: Family, where: str) -> None:
    """Raise InputError for what a family's layers may be asked for and are not here."""
    dense = known.get("mlp_only_layers", [])
    if not isinstance(dense, list) or any(type(layer) is not int for layer in dense):
        what = f"mlp_only_layers must be a list of layers (integers), not {str(dense)[:40]!r}"
        raise InputError(what, where=where)
    for key, meaning in family.refuses.items():
        if known.get(key):
            raise InputError(f"{meaning} not supported yet ({key})", where=where, fix="use another model of the family")
    for key, value in family.requires.items():
        if known.get(key) != value:
            what = f"{key} {str(known.get(key))[:40]!r} is not supported, only {value!r}"
            raise InputError(what, where=where, fix="use another model of the family")
    if known.get("use_bidirectional_attention") not in (None, False, "vision"):  # Gemma 4: of the tokens of an image
        raise InputError("bidirectional attention is not supported", where=where, fix="use a causal language model")


def _experts_in_mxfp4(facts: ModelFacts) -> Forms:
    """The forms of a folder whose experts are in MXFP4, and all else in half precision; its tensors may say float32."""
    layers = [facts.layer(index) for index in range(facts.n_layers)]
    plain = tuple(("BF16",) * len(layer.linears) for layer in layers)
    packed = tuple((next(iter(SPLIT)),) * len(layer.experts.stored if layer.experts else ()) for layer in layers)
    return Forms(plain, "BF16", "BF16", packed)


def _own_inputs(known: dict[str, Any], family: Family, where: str) -> OwnInputs | None:
    """What each layer is told of a token anew, if anything. Raises InputError."""
    if not (family.own_inputs and known.get(family.own_inputs)):
        return None
    width, n_tokens = known[family.own_inputs], known.get(family.own_vocabulary)
    raise_collected(
        [
            InputError(f"{key} must be a positive integer, not {str(value)[:40]!r}", where=where)
            for key, value in ((family.own_inputs, width), (family.own_vocabulary, n_tokens))
            if type(value) is not int or not 1 <= value < 2**31
        ]
    )
    return OwnInputs(width, n_tokens)  # type: ignore[arg-type]  # checked above


def _rope(known: dict[str, Any]) -> dict[str, Any]:
    rope = known.get("rope_parameters") or known.get("rope_scaling")
    return rope if isinstance(rope, dict) else {}


def _rotary_dim(known: dict[str, Any], family: Family, head_dim: int, where: str) -> int:
    """The features of a head that are rotated, in a family that may rotate a part of them; else 0. Raises InputError."""
    if family.rotary_share is None:
        return 0
    name = "partial_rotary_factor"
    share = next((values[name] for values in (_rope(known), known) if values.get(name) is not None), family.rotary_share)
    if type(share) not in (int, float) or not 0 < share <= 1 or int(head_dim * share) < 2:
        what = f"must be a number up to 1 that leaves 2 of {head_dim} features, not {str(share)[:40]!r}"
        raise InputError(f"{name} {what}", where=where)
    return 2 * len(range(0, int(head_dim * share), 2))  # in pairs


def _rotary_turn(known: dict[str, Any]) -> int | None:
    """The tokens from which on transformers takes other rotary frequencies for a whole micro-batch (longrope, dynamic)."""
    found = _rope(known)
    if found.get("rope_type", found.get("type")) not in ("longrope", "dynamic"):
        return None
    name = "original_max_position_embeddings"
    limit = found.get(name) or known.get(name) or known.get("max_position_embeddings")
    return limit + 1 if type(limit) is int else None


def _wrapper_of(config: dict[str, Any]) -> Wrapper | None:
    name = config.get("model_type")
    return WRAPPERS.get(name) if isinstance(name, str) else None


def _text_config(config: dict[str, Any], wrapper: Wrapper, where: str) -> dict[str, Any]:
    """The part of a multimodal model's config that says what its language model is. Raises InputError."""
    text = config.get("text_config")
    if text is None and wrapper.is_flat:
        return {**config, "model_type": wrapper.text}
    if not isinstance(text, dict):
        raise InputError("text_config is not an object", where=where, fix="the model folder is incomplete")
    own = text.get("model_type")
    return {**text, "model_type": wrapper.text if own is None or own in wrapper.inner else own}


def _is_tied(known: dict[str, Any], outer: dict[str, Any], wrapper: Wrapper | None) -> bool:
    """Whether the config ties the head to the embedding; of a multimodal model the outer one says so."""
    inner = known.get("tie_word_embeddings", False)
    if wrapper is None:
        return bool(inner)
    return bool(outer.get("tie_word_embeddings", wrapper.ties) or (wrapper.is_flat and inner))


def quantisation_of(config: dict[str, Any], where: str) -> str:
    """The form of a folder: bitsandbytes' 4-bit one, MXFP4, or "" (full precision); others are refused by name."""
    quantisation = config.get("quantization_config")
    if not isinstance(quantisation, dict):
        return ""
    method = str(quantisation.get("quant_method"))
    if method == MXFP4 or (method == "bitsandbytes" and quantisation.get("load_in_4bit")):
        return method
    raise _unknown_quantisation(method, where)


def _unknown_quantisation(method: str, where: str) -> InputError:
    return InputError(
        f"this folder is quantised with {method!r}, which lopt-edge cannot train on",
        where=where,
        fix="use the full-precision model, or one in bitsandbytes' 4-bit, GPTQ, AWQ, compressed-tensors, FP8 or GGUF form",
    )


def _check_numbers(known: dict[str, Any], where: str, more: tuple[str, ...]) -> None:
    errors = []
    for key in (*_REQUIRED, *_OPTIONAL, *more):
        value, least = known.get(key), 0 if key == "max_window_layers" else 1
        if value is None and key in _REQUIRED:
            errors.append(InputError(f"lacks {key!r}", where=where, fix="the model folder is incomplete"))
        elif value is not None and (type(value) is not int or not least <= value < 2**31):
            errors.append(InputError(f"{key} must be a positive integer, not {str(value)[:40]!r}", where=where))
    raise_collected(errors)
    if known["num_hidden_layers"] > 10_000:
        raise InputError(f"num_hidden_layers {known['num_hidden_layers']} is out of reason", where=where)


def _layer_types(known: dict[str, Any], family: Family, n_layers: int, window: int | None, where: str) -> tuple[str, ...]:
    """The type of each layer, one of those that the family's record knows, as transformers 5 derives it."""
    given = known.get("layer_types") if "layer_types" in family.asks else None
    if given is None:
        kinds = tuple(family.layer_type(known, i, window) for i in range(n_layers))
    else:
        kinds = tuple(given) if isinstance(given, list) else ()
    if len(kinds) != n_layers or any(kind not in family.layer_types for kind in kinds):
        words = " or ".join(family.layer_types)
        raise InputError(f"layer_types must name {words} for each of {n_layers} layers", where=where)
    if SLIDING in kinds and window is None:
        raise InputError("has sliding-window layers but no sliding_window", where=where)
    return kinds
