"""What a model built without weights shows: where its parts lie, which linear layers it has, and how its layers behave.

Names and shapes are read off the skeleton, two habits (gated MLPs, results in tuples) off a tiny random model of the same
config that is run once. The rule: what has no place in a plan is refused here, by the name of what stands in the way. What
becomes of it is unlisted.py's matter.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lopt_edge.errors import InputError
from lopt_edge.models.conversions import conversions_of, experts_of, renames_of
from lopt_edge.models.tiny import random_model, smaller
from lopt_edge.plan.facts.families import name_of, unsupported
from lopt_edge.plan.facts.families.family import FULL, SLIDING, Layout
from lopt_edge.plan.facts.layers import LayerFacts, LinearFacts, MambaFacts

if TYPE_CHECKING:
    from torch import nn

ADVICE = "use a model of a supported family (lopt-edge models)"
NAMES_OF_MLP = ("gate_proj", "up_proj", "down_proj")
LEAST_MATRIX = 16  # rows and columns of a matrix in a stack; a convolution over tokens sees fewer


class Parts:
    """The parts of a skeleton by name."""

    layout: Layout
    tied: bool
    body: nn.Module

    def __init__(self, config: Any, model: Any, where: str) -> None:
        from torch import nn

        self.config, self.model, self.where = config, model, where
        self.n_layers: int = config.num_hidden_layers
        self.names = {id(module): name for name, module in model.named_modules()}
        self.stack = self._stack()
        owner, _, self.stack_name = self.names[id(self.stack)].rpartition(".")
        self.body = model.get_submodule(owner)
        self.conversions = conversions_of(name_of(config), type(model).__name__)
        self.full_weights = False  # of experts: habits() finds out
        self.heads = self._heads()
        self.window = self._window()
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
            raise self.refused("its embedding and its head are not two plain matrices")
        if head.bias is not None:
            raise self.refused("its head has a bias")
        if embedding.embedding_dim != config.hidden_size or head.in_features != config.hidden_size:
            raise self.refused("its embedding has another width than its hidden states")
        self.tied = bool(getattr(config, "tie_word_embeddings", False))
        last = self._last_norm()
        prefix = f"{owner}." if owner else ""
        self.layout = Layout(
            owner,
            f"{prefix}{self.stack_name}.",
            f"{prefix}{last}.",
            f"{self.names[id(embedding)]}.weight",
            self._stored(f"{self.names[id(head)]}.weight"),
            stack=self.stack_name,
            last=last,
        )
        inside = {id(module) for module in self.stack.modules()} | {id(head)}
        outside = [name for name, module in model.named_modules() if _is_matrix(module) and id(module) not in inside]
        if outside:
            raise self.refused(f"{outside[0]} is a linear layer outside of its {self.n_layers} layers")

    def refused(self, why: str) -> InputError:
        return InputError(unsupported(name_of(self.config), f": {why}"), where=self.where, fix=ADVICE)

    def key(self, name: str) -> str:
        """The name of a number of the config that is there and changes something, or nothing."""
        return name if getattr(self.config, name, None) not in (None, 1, 1.0) else ""

    @property
    def attention(self) -> str:
        """The attention by name: ours (""), where kernels are asked for by name, else torch's fused one as transformers
        calls it; transformers' own where scores have a cap or sinks, or it knows no other."""
        capped = getattr(self.config, "attn_logit_softcapping", None) is not None
        sinks = any("sink" in name for name, _ in self.stack.named_parameters())
        if capped or sinks or not getattr(self.model, "_supports_sdpa", False):
            return "eager"
        return "" if hasattr(sys.modules[type(self.model).__module__], "ALL_ATTENTION_FUNCTIONS") else "sdpa"

    @property
    def n_before(self) -> int:
        """The earlier tokens that the convolutions of its layers see."""
        from torch import nn

        found = {one.kernel_size[0] - 1 for one in self.stack.modules() if isinstance(one, nn.Conv1d)}
        if len(found) > 1:
            raise self.refused("its convolutions are of more than one width")
        return next(iter(found), 0)

    @property
    def table_bytes(self) -> int:
        """The bytes of tables that layers compute when they are made, and no checkpoint holds."""
        stored = self.stack.state_dict()
        return sum(buffer.nbytes for name, buffer in self.stack.named_buffers() if name not in stored)

    @property
    def beside_elements(self) -> int:
        """The numbers beside layers, embedding and head, without as many as a norm has that is always counted."""
        known = {*map(id, self.stack.parameters())}
        known |= {id(one.weight) for one in (self.model.get_input_embeddings(), self.model.get_output_embeddings())}
        n_elements = sum(one.numel() for one in self.model.parameters() if id(one) not in known)
        return int(n_elements) - int(self.config.hidden_size)

    def _stored(self, name: str) -> str:
        """What checkpoints call a tensor, where transformers renames it."""
        return next(
            (old + name.removeprefix(new) for new, old in renames_of(self.conversions) if name.startswith(new)), name
        )

    def _stack(self) -> nn.ModuleList:
        from torch import nn

        found = [one for one in self.model.modules() if isinstance(one, nn.ModuleList) and len(one) == self.n_layers]
        found = [one for one in found if any(_is_matrix(module) for module in one.modules())]
        if not found or (len(found) > 1 and self.names[id(found[1])].startswith(self.names[id(found[0])])):
            raise self.refused(f"it has no single list of {self.n_layers} layers")
        return found[0]

    def _last_norm(self) -> str:
        """The name in the decoder of the norm behind the layers: the last child that is a norm, else the last one named so
        before them."""
        norms = [name for name, module in self.body.named_children() if "norm" in type(module).__name__.lower()]
        names = [name for name, _ in self.body.named_children()]
        later = [name for name in norms if names.index(name) > names.index(self.stack_name)]
        if not norms:
            raise self.refused("it has no norm behind its layers")
        return str((later or norms)[-1])

    def _heads(self) -> tuple[int, int, int]:
        config, hidden = self.config, self.config.hidden_size
        n_heads = getattr(config, "num_attention_heads", None) or 1
        n_kv_heads = getattr(config, "num_key_value_heads", None) or n_heads
        head_dim = getattr(config, "head_dim", None) or hidden // n_heads if type(n_heads) is int else 0
        numbers = n_heads, n_kv_heads, head_dim
        if any(type(number) is not int or number < 1 for number in numbers):
            raise self.refused("its heads are not one number for all layers")
        return numbers

    def _window(self) -> int | None:
        window = getattr(self.config, "sliding_window", None)
        on = getattr(self.config, "use_sliding_window", True)
        return window if type(window) is int and window > 0 and on else None

    def layer_types(self) -> tuple[str, ...]:
        """FULL or SLIDING for each layer: which of them get another mask once a sequence is as long as the window."""
        given = getattr(self.config, "layer_types", None)
        types = given if isinstance(given, list | tuple) and len(given) == self.n_layers else None
        if types is None:
            return (FULL if self.window is None else SLIDING,) * self.n_layers
        slides = self.window is not None
        return tuple(SLIDING if slides and one == SLIDING else FULL for one in types)

    def layer(self, index: int) -> LayerFacts:
        """What a layer has."""
        module = self.stack[index]
        linears = tuple(
            LinearFacts(name, one.in_features, one.out_features, one.bias is not None) for name, one in _linears(module)
        )
        experts = experts_of(module, self.config, self.conversions, full_weights=self.full_weights)
        self._check(index, module, linears, "" if experts is None else f"{experts.module}.experts.")
        short = [linear.short_name for linear in linears]
        n_stored = sum(tensor.numel() for tensor in module.state_dict().values())
        small = n_stored - sum(linear.in_features * linear.out_features for linear in linears)
        small -= 0 if experts is None else experts.count * experts.n_packed
        inner = max(max(linear.in_features, linear.out_features) for linear in linears)
        if set(NAMES_OF_MLP) <= set(short):
            inner = linears[short.index("gate_proj")].out_features
        return LayerFacts(linears, *self.heads, small, inner, experts=experts, mamba=_mamba_of(module))

    def _check(self, index: int, module: nn.Module, linears: tuple[LinearFacts, ...], packed: str) -> None:
        names = {one.name for one in linears}
        short = [one.short_name for one in linears]
        if found := next((type(one).__name__ for one in module.modules() if type(one).__name__ == "Conv1D"), None):
            raise self.refused(f"its matrices are {found}s (transposed), not linear layers")
        if not linears:
            raise self.refused(f"layer {index} has no linear layers")
        if twice := sorted({name for name in short if short.count(name) > 1}):
            raise self.refused(f"layer {index} has two linear layers of the name {twice[0]}")
        largest = max(one.in_features * one.out_features for one in linears)
        for name, parameter in module.named_parameters():
            if packed and name.startswith(packed):
                continue
            stacked = parameter.ndim > 2 and min(parameter.shape[-2:]) > LEAST_MATRIX
            if name.removesuffix(".weight") not in names and (stacked or parameter.numel() > largest / 2):
                what = f"{name} of layer {index} is no linear layer, and would stay unpacked ({tuple(parameter.shape)})"
                raise self.refused(what)


def _mamba_of(layer: nn.Module) -> MambaFacts | None:
    """The state space of a layer, where transformers computes it by its function for chunks."""
    for name, module in layer.named_modules():
        own: Any = module
        if hasattr(module, "A_log") and hasattr(sys.modules[type(module).__module__], "mamba2_chunk_scan"):
            return MambaFacts(own.num_heads, own.head_dim, own.ssm_state_size, name)
    return None


def _is_matrix(module: nn.Module) -> bool:
    from torch import nn

    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _linears(layer: nn.Module) -> Iterator[tuple[str, Any]]:
    from torch import nn

    return ((name, module) for name, module in layer.named_modules() if isinstance(module, nn.Linear))


def habits(config: Any, layers: list[LayerFacts], parts: Parts) -> tuple[bool, int, bool]:
    """What a tiny model shows: whether the MLPs may run in blocks, how many results a layer gives (0: one that is no
    tuple), and whether experts get their weights in fp32 whatever the dtype."""
    import torch

    try:
        model = random_model(smaller(config, n_layers=layers_to_show(parts.layer_types(), layers)))
        stack = model.get_submodule(f"{parts.layout.decoder}.{parts.stack_name}".removeprefix("."))
        watched = _watched(stack[0])
        stack[0] = watched
        with torch.no_grad():
            ids = torch.arange(3, 9).view(1, -1)
            model(ids, use_cache=False)
            is_gated, n_results = _is_gated(watched.layer, layers), watched.n_results
            return is_gated, n_results, _gives_full_weights(model, layers, ids)
    except Exception as error:  # of any kind, from code that is not ours
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise parts.refused(f"no tiny model of it can be made and run, to prove that it runs here ({reason})") from None


def layers_to_show(types: tuple[str, ...], layers: Sequence[object]) -> int:
    """The number of layers, from the first on, that show each kind and each type of attention; two at least."""
    pairs = list(zip(types, layers, strict=True))
    return min(len(pairs), max(2, *(pairs.index(pair) + 1 for pair in pairs)))


def _watched(layer: nn.Module) -> Any:
    """The layer in a module that notes how many results it gives, and the dtypes that it is given."""
    from torch import Tensor, nn

    class Watched(nn.Module):
        n_results, dtypes = 0, list[Any]()

        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def __getattr__(self, name: str) -> Any:
            own = self.__dict__["_modules"].get(name)
            return getattr(self.__dict__["_modules"]["layer"], name) if own is None else own

        def forward(self, *arguments: Any, **named: Any) -> Any:
            self.dtypes = [one.dtype for one in (*arguments, *named.values()) if isinstance(one, Tensor)]
            found = self.layer(*arguments, **named)
            self.n_results = len(found) if isinstance(found, tuple) else 0
            return found

    return Watched()


def _gives_full_weights(model: Any, layers: list[LayerFacts], ids: Any) -> bool:
    """Whether the router of a model in bfloat16 gives experts weights in fp32."""
    import torch

    found = next((layer.experts for layer in layers if layer.experts is not None), None)
    if found is None:
        return False
    path = next(name for name, _ in model.named_modules() if name.endswith(f".{found.module}.experts"))
    watched = _watched(model.get_submodule(path))
    model.set_submodule(path, watched)
    model.to(torch.bfloat16)(ids, use_cache=False)
    return bool(watched.dtypes[-1] == torch.float32)


def _is_gated(layer: Any, layers: list[LayerFacts]) -> bool:
    """Whether the MLP is a gated one: by its names, and by what it computes on a few numbers."""
    import torch

    if not all({f"mlp.{name}" for name in NAMES_OF_MLP} <= {linear.name for linear in one.linears} for one in layers):
        return False
    mlp = layer.mlp
    x = torch.linspace(-2, 2, 3 * mlp.gate_proj.in_features).view(3, -1)
    return hasattr(mlp, "act_fn") and torch.equal(mlp(x), mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)))
