"""What a family is: a record of all in which one `model_type` of transformers differs from another, as far as others ask.

The rule: nothing outside plan/facts compares a `model_type`, or knows a name in a checkpoint that a family may choose;
whoever needs such a thing asks a field of `facts.family`. Where families differ in a way that no field has yet, the field
is added here, with what most families do as its default, so that a family's record says only in what it is special.

What a config.json says about one model is read by model.py, through these records. What goes on inside a decoder layer (the
order of its norms, Granite's residual factor, the activation) is not here: transformers' own modules do it, and nobody
asks. This file knows no family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

# Types of layers, as transformers names them; LINEAR is a gated delta rule in the place of attention.
FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
ALWAYS = "always"  # a projection's bias, whatever the config says
ROOT_OF_HIDDEN = "root of hidden_size"  # an embedding factor


class Projection(NamedTuple):
    """One linear layer of a decoder layer: its path there, what it reads and writes, and when it has a bias, or is missing.

    `reads` and `writes` are words for sizes: hidden, inner (of the MLP), q and kv (all heads'), or a sum such as q+kv+kv;
    of a delta rule conv (queries, keys and values), value (of all heads) and `value heads` (how many); `own input` of
    what a token's id says to each layer anew; `one` number a token.
    `bias`: a key of the config that says so, ALWAYS, or nothing for never. `unless`: a key that says that there is none;
    `only`: one without which there is none.
    """

    name: str
    reads: str
    writes: str
    bias: str = ""
    unless: str = ""
    only: str = ""


def attention(*, bias: str = "", out_bias: str = "") -> tuple[Projection, ...]:
    """The projections of attention with a matrix each for queries, keys, values (`bias` is theirs) and output."""
    return (
        Projection("self_attn.q_proj", "hidden", "q", bias),
        Projection("self_attn.k_proj", "hidden", "kv", bias),
        Projection("self_attn.v_proj", "hidden", "kv", bias),
        Projection("self_attn.o_proj", "q", "hidden", out_bias),
    )


def gated_mlp(*, bias: str = "") -> tuple[Projection, ...]:
    """The projections of an MLP of three matrices: down(act(gate(x)) * up(x))."""
    return (
        Projection("mlp.gate_proj", "hidden", "inner", bias),
        Projection("mlp.up_proj", "hidden", "inner", bias),
        Projection("mlp.down_proj", "inner", "hidden", bias),
    )


LayerType = Callable[[Mapping[str, Any], int, int | None], str]  # (config, layer, its window) -> FULL or SLIDING


def full(_config: Mapping[str, Any], _layer: int, _window: int | None) -> str:
    """The layer type where every layer sees all earlier tokens."""
    return FULL


def windowed(_config: Mapping[str, Any], _layer: int, window: int | None) -> str:
    """The layer type where every layer sees a window of earlier tokens, if the model has one."""
    return FULL if window is None else SLIDING


Overrides = Callable[[Mapping[str, Any], int, str], Mapping[str, Any]]  # (config, layer, its type) -> other values


def none(_config: Mapping[str, Any], _layer: int, _layer_type: str) -> Mapping[str, Any]:
    """The overrides of a family whose layers all have the config's own heads."""
    return {}


def but_every_fourth(_config: Mapping[str, Any], layer: int, _window: int | None) -> str:
    """The layer type where three layers that see a window are followed by one that sees all."""
    return SLIDING if (layer + 1) % 4 else FULL


def nothing(_config: Mapping[str, Any]) -> bool:
    """Whether a config asks for layers that the record of its family does not have, where none does."""
    return False


TINY: Mapping[str, Any] = {  # sizes for `shown`, as models/tiny.py has them
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip


def everywhere(_config: Mapping[str, Any], _layer: int) -> bool:
    """Whether a layer has experts, where all layers have."""
    return True


@dataclass(frozen=True)
class Experts:
    """The experts that layers have in the place of an MLP: many gated MLPs, and a router that sends each token to a few.

    `count`, `active`, `inner`: keys of the config (the first of them that it has) for how many there are, for how many a
    token goes to, and for the features inside one. `lies_in`: which layers have them.
    `module` is transformers' module in the layer, with the router and the `experts`; what its name begins with is no
    projection of such a layer, but for what begins with `beside` (experts that all tokens go to). `renames`: what names in
    it begin with in transformers, and in checkpoints instead.
    `stored`: the names of an expert's matrices, {} being its number, in a published checkpoint or (`publishes_stacks`) in
    our 4-bit folders: those that read the hidden states, and last the one that writes them. `stacks`: where one tensor has
    all experts, the names that it may have (published ones first), and how many of the matrices stand in it one under the
    other. `takes_names`: peft takes the names of an MLP's matrices for those of experts in this family, so that no MLP of
    it can have an adapter. `full_weights`: the router gives the experts' weights in fp32, whatever the compute dtype.
    `transposed`: a stack has its matrices, one in each, as (in, out). `biases`: the names in transformers' module of the
    experts of what is added to their products, a tensor for all of them; `router_bias`: the router adds something, too.
    `in_mxfp4`: there are folders with NAME_blocks and NAME_scales in the place of each stack (quant/mxfp4).
    """

    count: tuple[str, ...] = ("num_experts", "num_local_experts")
    active: tuple[str, ...] = ("num_experts_per_tok",)
    inner: tuple[str, ...] = ("moe_intermediate_size",)
    lies_in: Callable[[Mapping[str, Any], int], bool] = everywhere
    module: str = "mlp"
    beside: str = ""
    renames: tuple[tuple[str, str], ...] = ()
    stored: tuple[str, ...] = ("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj", "mlp.experts.{}.down_proj")
    stacks: tuple[tuple[str, int], ...] = (("mlp.experts.gate_up_proj", 2), ("mlp.experts.down_proj", 1))
    takes_names: bool = True
    full_weights: bool = False
    publishes_stacks: bool = False
    transposed: bool = False
    biases: tuple[str, ...] = ()
    router_bias: bool = False
    in_mxfp4: bool = False

    def replaces(self, projection: str) -> bool:
        """Whether a projection of other layers is none of those that have experts."""
        beside = bool(self.beside) and projection.startswith(self.beside)
        return projection.startswith(f"{self.module}.") and not beside


class OwnInputNames(NamedTuple):
    """The names of what makes a token's own inputs to the layers: its embeddings, the matrix that its hidden states go
    through, and the norm behind that (which its tensors' names begin with)."""

    embedding: str
    projection: str
    norm: str


@dataclass(frozen=True)
class Layout:
    """The places of a model's parts: in a checkpoint by name, and in transformers' class.

    `decoder` is the module of the published class that has the layers (in `stack`) and the norm behind them (`last`); peft
    names adapters by it. All else are names of tensors in the checkpoint, or what such names begin with.
    """

    decoder: str = "model"
    layers: str = "model.layers."
    norm: str = "model.norm."
    embedding: str = "model.embed_tokens.weight"
    lm_head: str = "lm_head.weight"
    stack: str = "layers"
    last: str = "norm"

    @classmethod
    def under(cls, prefix: str, *, lm_head: str, decoder: str) -> Layout:
        """The layout of a model whose layers, norm and embedding lie under a prefix of names."""
        return cls(decoder, f"{prefix}layers.", f"{prefix}norm.", f"{prefix}embed_tokens.weight", lm_head)

    def layer(self, index: int) -> str:
        """The prefix of the names of a layer's tensors."""
        return f"{self.layers}{index}."

    @property
    def root(self) -> str:
        """What the names of the decoder's tensors begin with."""
        return self.layers.removesuffix(f"{self.stack}.")

    @property
    def own_inputs(self) -> OwnInputNames:
        """The tensors of which a token's own inputs to the layers are made."""
        return OwnInputNames(
            f"{self.root}embed_tokens_per_layer.weight",
            f"{self.root}per_layer_model_projection.weight",
            f"{self.root}per_layer_projection_norm.",
        )

    def head(self, *, tied: bool) -> str:
        """The name of the tensor that is multiplied for the logits."""
        return self.embedding if tied else self.lm_head


@dataclass(frozen=True)
class Unlisted:
    """What stands in the place of a record, for a family that has none: transformers' own code calls its layers, and what
    they take is traced on the user's machine.

    `config`: transformers', as JSON. `table`: the folder of the traced programs (tracing/unlisted.py) and of the proof.
    `gated_mlp`: its MLPs are gated ones, and may run in blocks. `n_results`: a layer gives a tuple of so many (0: one
    tensor). `attention`: that of transformers by name, or ours. `n_before`: earlier tokens that its convolutions see.
    """

    config: str
    table: str
    gated_mlp: bool
    n_results: int
    attention: str
    n_before: int


@dataclass(frozen=True)
class Family:
    """One family by its `model_type`. All fields but the name default to what Llama's layers without biases do.

    What a config says:
    `defaults`: what a config may leave out, as transformers fills it in.
    `asks`: keys that only some families ask, the others ignore them: `use_sliding_window` (false by default, and then there
    is no window) and `layer_types` (which replaces the function of that kind, `layer_type`).
    `overrides`: the numbers of heads that one layer has instead of the config's. `refuses`: keys that may not be set, and
    what they would mean; `requires`: the only value that a key may have. `inner`: the key for the features inside an MLP.
    `beyond`: whether a config asks for other layers than these, so that it is taken as if its family had no record.
    `projections`: the linear layers of a decoder layer, in the order in which they run; `projections_by_type`: those of
    layers of the types in which they are others. `experts`: what some or all layers have in the place of an MLP.
    `own_inputs`: the key for the features of what each layer is told anew of a token, and `own_vocabulary` for how many
    tokens have such. `shared_keys`: the key for how many last layers attend to the keys and values of the last layer of
    their type before them; `wider`: a key that says that those have MLPs twice as wide.

    What lies around the layers:
    `embedding_factor`: ROOT_OF_HIDDEN (rounded to the compute dtype), a key of the config, or nothing.
    `logit_divisor`, `logit_factor`, `logit_cap`: keys of the config for a divisor of the logits, for a factor, and for a
    soft cap on them, or nothing.
    `rotary_by_type`: there is one rotary table for each type of layer, not one for all. `rotary_share`: of a head's
    features so much is rotated where the config says no other `partial_rotary_factor`; None: all are, whatever it says.

    What lies within them, as far as bytes and kernels depend on it:
    `attention`: torch's scaled_dot_product_attention, or run/model/query_tiles.py where scores have a soft cap, for which
    torch has no fused kernel on the CPU (transformers' own is its eager attention), or where there are sinks.
    `sinks`: attention has a number for each head that takes part in the softmax of its scores, and gives no value.
    `norms`: of the hidden size, in a layer. `qk_norm`: those of queries and keys have the size of a head, of the whole
    projection, or there are none. `plain_norms`: a norm is x / rms(x) times its weight, which torch has in one kernel.
    `post_norm`: the layer reads its last projection's output once more, so whoever runs it
    again for its graph needs that value. `scalars`: numbers in a layer that are neither matrix, bias nor norm.
    `unlisted`: it has no record; this one was made of transformers' model (models/unlisted.py).
    `shown`: what a config says whose four layers show the family's kinds (doctor/prove_models.py), where neither a known
    model made smaller nor transformers' defaults do.
    """

    name: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    asks: tuple[str, ...] = ()
    projections: tuple[Projection, ...] = (*attention(), *gated_mlp())
    projections_by_type: Mapping[str, tuple[Projection, ...]] = field(default_factory=dict)
    experts: Experts | None = None
    layer_type: LayerType = full
    overrides: Overrides = none
    refuses: Mapping[str, str] = field(default_factory=dict)
    requires: Mapping[str, str] = field(default_factory=dict)
    beyond: Callable[[Mapping[str, Any]], bool] = nothing
    inner: str = "intermediate_size"
    embedding_factor: str = ""
    own_inputs: str = ""
    own_vocabulary: str = ""
    shared_keys: str = ""
    wider: str = ""
    logit_divisor: str = ""
    logit_factor: str = ""
    logit_cap: str = ""
    rotary_by_type: bool = False
    rotary_share: float | None = None
    attention: Literal["sdpa", "query tiles"] = "sdpa"
    norms: int = 2
    qk_norm: Literal["", "head", "projection"] = ""
    plain_norms: bool = True
    post_norm: bool = False
    scalars: int = 0
    sinks: bool = False
    layout: Layout = Layout()
    unlisted: Unlisted | None = None
    shown: Mapping[str, Any] = field(default_factory=dict)

    @property
    def layer_types(self) -> tuple[str, ...]:
        """The types that its layers may be of."""
        return (FULL, SLIDING, *(name for name in self.projections_by_type if name not in (FULL, SLIDING)))

    def projections_of(self, layer_type: str) -> tuple[Projection, ...]:
        """The linear layers of a decoder layer of a type, in the order in which they run."""
        return self.projections_by_type.get(layer_type, self.projections)


@dataclass(frozen=True)
class Wrapper:
    """A multimodal `model_type` whose language model is one of the families: its text is trained, the rest is not read.

    `text` names the family where the inner config does not, or names one of `inner`: types of its own, for layers that are
    the family's. `is_flat`: the config on the hub has the text model's values beside its own, without a `text_config`;
    where it has one, that may say that the head is tied.
    `ties`: whether the head is tied where the outer config does not say.
    The names of the text model's tensors begin with one of `prefixes`, each with the head's name beside it: first as
    transformers 5 has them in memory, then as hubs have them. `decoder` is the module of the published class (for image and
    text, and by transformers 5 for causal language models).
    """

    name: str
    text: str
    inner: tuple[str, ...] = ()
    is_flat: bool = False
    ties: bool = True
    decoder: str = "model.language_model"
    prefixes: tuple[tuple[str, str], ...] = (
        ("model.language_model.", "lm_head.weight"),
        ("language_model.model.", "language_model.lm_head.weight"),
    )

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """The layouts that a checkpoint may have."""
        return tuple(Layout.under(prefix, lm_head=head, decoder=self.decoder) for prefix, head in self.prefixes)
