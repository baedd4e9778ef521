"""A model whose layers transformers' own code calls: what each layer is given is found by running that code without them.

For a family without a record nobody knows what its layers want: rotary tables, masks of one kind or another, biases for
distances, a cache. So the decoder itself runs, as transformers has it, with a recorder in the place of each layer, which
notes what it is called with and hands the hidden states on. What is noted goes to the real layers, one by one, when the
plan says so. The same run gives what comes before the first layer: factors, positions, a norm of the embeddings.

The rule: nothing is known of the decoder but the names of its list of layers and of the norm behind it. What a layer is
given may depend on the number of tokens and on a cache, not on the hidden states' values: the context of a micro-batch that
begins at a later layer is made from those (tracing/proof.py tries it). No gradient flows here; parts beside the layers
are frozen. Sequences packed in a row are not taken.

Shapes: B sequences, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from lopt_edge.errors import InputError
from lopt_edge.plan.facts.families.family import Layout


class Call(NamedTuple):
    """What a layer is called with behind its hidden states."""

    arguments: tuple[Any, ...]
    named: dict[str, Any]

    def tensors(self) -> Iterator[Tensor]:
        """Yield the tensors among it."""
        yield from _tensors((self.arguments, self.named))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for one in value:
            yield from _tensors(one)
    elif isinstance(value, dict):
        for one in value.values():
            yield from _tensors(one)


class Recorder(nn.Module):
    """A layer's place in its decoder: it notes the call, and hands the hidden states on (in a tuple of `n_results`, unless
    that is 0). All else is asked of the layer."""

    def __init__(self, layer: nn.Module, calls: list[tuple[Tensor, Call]], n_results: int) -> None:
        super().__init__()
        self.n_results = n_results
        self.__dict__["layer"], self.__dict__["calls"] = layer, calls  # not registered: nothing of it is the decoder's

    def __getattr__(self, name: str) -> Any:
        """What the decoder asks of its layer, such as the type of its attention."""
        return getattr(self.__dict__["layer"], name)

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """The hidden states as they came, in the form in which layers give them."""
        if arguments:
            hidden, *rest = arguments
        else:
            hidden, rest = named.pop("hidden_states"), []
        self.calls.append((hidden, Call(tuple(rest), named)))
        return (hidden, *(None,) * (self.n_results - 1)) if self.n_results else hidden


@dataclass(eq=False)
class OwnBody:
    """A decoder of transformers with recorders in the place of its layers. `of_layer`: whose call each layer's is, where
    not its own (tracing)."""

    decoder: nn.Module
    embedding: nn.Embedding
    calls: list[tuple[Tensor, Call]]
    of_layer: tuple[int, ...] | None = None

    @torch.no_grad()
    def embed(self, rows_BTD: Tensor) -> Tensor:
        """What the first layer gets for tokens with these rows of the embedding.

        The embedding is transformers' (it may multiply), with those rows alone as its matrix.
        """
        self.embedding.weight = nn.Parameter(rows_BTD.flatten(0, 1), requires_grad=False)
        places_BT = torch.arange(len(self.embedding.weight), device=rows_BTD.device).view(rows_BTD.shape[:2])
        self.decoder(input_ids=places_BT, use_cache=False)
        self.embedding.weight = nn.Parameter(rows_BTD.new_empty(0), requires_grad=False)
        return self._taken()[0][0]

    @torch.no_grad()
    def layer_calls(self, hidden_BTD: Tensor, *, cache: Any = None) -> tuple[Call, ...]:
        """Each layer's call, where hidden states are of this form."""
        self.decoder(inputs_embeds=hidden_BTD, past_key_values=cache, use_cache=cache is not None)
        calls = tuple(call for _, call in self._taken())
        return calls if self.of_layer is None else tuple(calls[index] for index in self.of_layer)

    def _taken(self) -> list[tuple[Tensor, Call]]:
        found, self.calls[:] = list(self.calls), []
        return found


def output_of(result: Any) -> Tensor:
    """The hidden states in what a layer gave."""
    return cast(Tensor, result if isinstance(result, Tensor) else result[0])


def make_body(model: nn.Module, layout: Layout, *, n_results: int) -> tuple[OwnBody, list[nn.Module], nn.Module]:
    """The body of a model, its layers, and the norm behind them: taken out of it, so that it holds what lies beside them.

    Its token embedding has no rows: whoever runs it has those.
    """
    decoder = model.get_submodule(layout.decoder)
    layers, norm = list(cast(nn.ModuleList, decoder.get_submodule(layout.stack))), decoder.get_submodule(layout.last)
    calls: list[tuple[Tensor, Call]] = []
    decoder.set_submodule(layout.stack, nn.ModuleList(Recorder(layer, calls, n_results) for layer in layers))
    decoder.set_submodule(layout.last, nn.Identity())
    embedding = cast(nn.Embedding, model.get_submodule(layout.embedding.removesuffix(".weight")))
    embedding.weight, embedding.padding_idx = nn.Parameter(torch.empty(0), requires_grad=False), None
    return OwnBody(decoder, embedding, calls), layers, norm


def compute_buffers(model: nn.Module, *, device: torch.device) -> None:
    """Compute the buffers that no checkpoint holds (frequencies, tables), by transformers' own code, for a skeleton that
    was built without numbers. Parameters are left as they are. Raises InputError for one that nobody computes."""
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers leaves those alone
    stored = {name for name, _ in model.named_buffers()} & set(model.state_dict())
    initialise = cast(Callable[[nn.Module], None], model._init_weights)
    missing: list[str] = []
    for path, buffer in list(model.named_buffers()):
        if not buffer.is_meta or path in stored:
            continue
        owner, _, name = path.rpartition(".")
        unknown = torch.nan if buffer.is_floating_point() else 0
        empty = torch.full(buffer.shape, unknown, dtype=buffer.dtype, device=device)
        model.get_submodule(owner).register_buffer(name, empty, persistent=False)
        missing.append(path)
    for path, module in model.named_modules():
        if any(name.startswith(f"{path}.".removeprefix(".")) for name in missing):
            initialise(module)  # a decoder may compute those of its layers
    for path in missing:
        if model.get_buffer(path).is_floating_point() and model.get_buffer(path).isnan().any():
            raise InputError(f"nothing computes its table {path}", where="model")
