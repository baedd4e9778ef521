"""A model as units that run one by one: token embedding, decoder layers, and what the head needs.

The layers are transformers' own modules, built without weights, in which every Linear is replaced by a `PackedLinear`, the
gated MLP by a `PackedGatedMLP`, experts by `PackedExperts`, a gated delta rule by a `DeltaNet`, and every other parameter
is read from the folder in the compute dtype. The rule: layer-by-layer logits equal `AutoModelForCausalLM`'s (design law 4;
tests/laws/test_families.py). A 4-bit folder is never requantised (what it left unpacked stays so); no adapter is made here.

Dropout that a config may ask for inside attention or residuals is off: layers run in evaluation mode; the only dropout of
a run is LoRA's, whose masks can be drawn again.

Shapes: B sequences, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from lopt_edge.errors import InputError
from lopt_edge.models.folder import tensor_entries
from lopt_edge.plan.facts.device_kinds import TORCH, TRITON
from lopt_edge.plan.facts.families.family import ROOT_OF_HIDDEN, SLIDING
from lopt_edge.plan.facts.layers import ExpertFacts, LinearFacts
from lopt_edge.plan.facts.model import ModelFacts
from lopt_edge.plan.schedule.knobs import ELSEWHERE, default_knobs, mlp_pieces, placement_of
from lopt_edge.run.model import query_tiles, sequences
from lopt_edge.run.model.classes import rotary_class, skeleton_of, unusable
from lopt_edge.run.model.context import LayerContext
from lopt_edge.run.model.own_body import OwnBody, compute_buffers, make_body, output_of
from lopt_edge.run.model.own_inputs import OwnInputs
from lopt_edge.run.model.placed import block_mlp, put_recurrence, tile_norms
from lopt_edge.run.model.rotated import rotate_by_kernel
from lopt_edge.run.model.sequences import Sequences
from lopt_edge.run.model.tiled import TokenTiled
from lopt_edge.run.model.vocabulary import Vocabulary
from lopt_edge.run.tiers.moves import Mover
from lopt_edge.run.tiers.weights import HoldsWeight, Weights, lay_out
from quant.experts import ExpertMatrix, Gate, PackedExperts
from quant.files import is_packed, packed_on_disk, read_tensor
from quant.gguf.weight import gguf_layout, read_gguf
from quant.headers import FolderError, TensorEntry
from quant.linear import DropoutClock, PackedLinear, UnpackBuffer
from quant.mxfp4.stacks import is_mxfp4
from quant.mxfp4.weight import mxfp4_on_disk
from quant.nf4 import pack
from quant.packed import Packed, PackedOnDisk
from quant.sizes import MlpPieces


class FarLayers(Protocol):
    """The adapters of layers that lie in other processes of a pipeline."""

    def shapes(self, layer: int) -> list[tuple[str, tuple[int, int], tuple[int, int]]]:
        """List (module, shape of A, shape of B) of each adapter of the layer."""

    def matrices(self, layer: int) -> Iterator[Tensor]:
        """Yield A and B of each adapter of the layer, in the order of `shapes`, fp32 on the CPU."""


@dataclass(eq=False)
class Model:
    """The frozen base model in units: embedding, layers, head. `clock` is shared by all layers' dropout."""

    facts: ModelFacts
    config: Any
    layers: list[nn.Module]
    norm: nn.Module
    rotary: nn.Module
    embedding: Vocabulary
    lm_head: Vocabulary
    device: torch.device
    dtype: torch.dtype
    clock: DropoutClock
    mover: Mover
    weights: Weights | None = None
    here: tuple[int, ...] = ()  # the layers that this process has
    far: FarLayers | None = None  # where the others are
    scratch: Tensor | None = None  # in which GGUF blocks are unpacked
    own_inputs: OwnInputs | None = None
    body: OwnBody | None = None  # of a family without a record
    kernels: str = TORCH

    def embed(self, ids_BT: Tensor) -> Tensor:
        """The hidden states (B, T, D) of token ids (B, T), in the compute dtype, with the family's embedding factor."""
        hidden_BTD = self.embedding.rows(ids_BT.reshape(-1)).view(*ids_BT.shape, -1)
        if self.body is not None:
            return self.body.embed(hidden_BTD)
        factor = self.facts.family.embedding_factor
        if factor == ROOT_OF_HIDDEN:
            # transformers rounds this factor to the embedding's dtype before it multiplies
            return hidden_BTD * torch.tensor(self.facts.hidden_size**0.5, dtype=self.dtype)
        return hidden_BTD * getattr(self.config, factor) if factor else hidden_BTD

    def layer_context(
        self,
        hidden_BTD: Tensor,
        ids_BT: Tensor | None = None,
        *,
        embedded: bool = True,
        lengths: tuple[int, ...] | None = None,
        cache: Any = None,
        start: int = 0,
    ) -> LayerContext:
        """The context of tokens at positions start .. start + T - 1; `embedded`: the hidden states are their embeddings.
        Some models' layers are told of the tokens anew, by their ids.

        `lengths`: of several sequences in one row; positions restart at each, and attention makes its own masks.
        """
        if self.body is not None:
            assert lengths is None, "packing is refused"
            calls = self.body.layer_calls(hidden_BTD, cache=cache)
            return LayerContext(torch.empty(0, device=self.device), {}, {}, {}, calls=calls)
        context = self._positions(hidden_BTD, lengths=lengths, cache=cache, start=start)
        if self.own_inputs is not None:
            assert ids_BT is not None
            embedded_BTD = hidden_BTD if embedded else self.embed(ids_BT)
            context.own_inputs_BTLP = self.own_inputs.of(ids_BT, embedded_BTD)
        return context

    def _positions(self, hidden_BTD: Tensor, *, lengths: tuple[int, ...] | None, cache: Any, start: int) -> LayerContext:
        """The positions, rotary tables and masks; a mask is None where the kernel's own causal mask does.

        Padding lies at the right end, where causal attention never looks from a real token, so no mask is made for it.
        """
        from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

        if lengths is not None:
            return self._context_of_a_row(hidden_BTD, Sequences(lengths))
        positions = torch.arange(start, start + hidden_BTD.shape[1], device=self.device).unsqueeze(0)
        arguments = {
            "config": self.config,
            "inputs_embeds": hidden_BTD,
            "attention_mask": None,
            "past_key_values": cache,
            "position_ids": None,  # else transformers looks for packed sequences in their values, and a GPU's host waits
        }
        make = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
        rotary = self._rotary(hidden_BTD, positions)
        masks = {kind: make[kind](**arguments) for kind in self.facts.attention_types}
        return LayerContext(positions, rotary, masks, {})  # type: ignore[arg-type]  # no BlockMask: flex attention is never asked

    def _context_of_a_row(self, hidden_BTD: Tensor, row: Sequences) -> LayerContext:
        positions = row.positions(self.device).unsqueeze(0)
        windows = {kind: self.facts.sliding_window if kind == SLIDING else None for kind in self.facts.layer_types}
        rows = {kind: replace(row, window=window) for kind, window in windows.items()}
        return LayerContext(positions, self._rotary(hidden_BTD, positions), {}, rows)

    def _rotary(self, hidden_BTD: Tensor, positions_1T: Tensor) -> dict[str, tuple[Tensor, Tensor]]:  # by type
        kinds, by_type = self.facts.attention_types, self.facts.family.rotary_by_type
        return {kind: self.rotary(hidden_BTD, positions_1T, *([kind] if by_type else [])) for kind in kinds}

    def run_layer(self, layer: int, hidden_BTD: Tensor, frame: LayerContext, *, cache: Any = None) -> Tensor:
        """The output (B, T, D) of layer `layer`, whose weights are resident."""
        if frame.calls:
            call = frame.calls[layer]
            return output_of(self.layers[layer](hidden_BTD, *call.arguments, **call.named))
        kind = self.facts.layer_types[layer]
        output: Tensor | tuple[Tensor, ...] = self.layers[layer](
            hidden_BTD,
            attention_mask=frame.masks.get(kind),
            position_embeddings=frame.rotary.get(kind),
            position_ids=frame.position_ids_1T,
            past_key_values=cache,
            use_cache=cache is not None,
            **({"sequences": frame.sequences[kind]} if frame.sequences else {}),
            **self._beside(layer, frame),
        )
        return output_of(output)

    def _beside(self, layer: int, frame: LayerContext) -> dict[str, Any]:
        """What only some families' layers are called with: a token's own input, others' keys and values."""
        own = frame.own_inputs_BTLP
        found: dict[str, Any] = {} if own is None else {"per_layer_input": own[:, :, layer]}
        return found | ({"shared_kv_states": frame.keys} if self.facts.key_sources else {})

    def run_all(
        self, hidden_BTD: Tensor, frame: LayerContext, *, cache: Any = None, layers: Sequence[int] | None = None
    ) -> Tensor:
        """Run all layers of this process in order (or those of `layers`), forward only; streamed ones come and go."""
        layers = self.here if layers is None else layers
        for layer in self.weights.stream(layers) if self.weights is not None else layers:
            hidden_BTD = self.run_layer(layer, hidden_BTD, frame, cache=cache)
        return hidden_BTD

    def rerun_layer(self, layer: int, hidden_BTD: Tensor, frame: LayerContext) -> Tensor:
        """Make a layer's graph anew for its backward. The output's values are undefined: its last product is left out.

        torch's non-reentrant checkpointing stops early to the same effect.
        """
        module = self.layers[layer].get_submodule(self.facts.layer(layer).last_module)
        last = cast(PackedLinear | PackedExperts, module)  # or a tracer's stand-in
        last.value_needed = self.facts.family.post_norm
        try:
            return self.run_layer(layer, hidden_BTD, frame)
        finally:
            last.value_needed = True


def load_model(
    folder: Path,
    facts: ModelFacts,
    *,
    device: torch.device,
    dtype: torch.dtype,
    placement: tuple[tuple[str, str], ...] | None = None,
    mover: Mover | None = None,
    pieces: MlpPieces | None = None,
    kernels: str = TORCH,
) -> Model:
    """Load a 4-bit folder (or, packing each matrix on the way, a full-precision one, resident only). Raises InputError.

    `placement` says where a plan has each unit's weights (default: all layers resident), `pieces` how MLPs are computed
    (default: as the device's kind does in the least memory); `mover` carries what is streamed; `kernels`: whose (torch's,
    or our own in Triton).
    """
    entries = tensor_entries(folder, facts)
    knobs = default_knobs(facts, device.type)
    placement, pieces = placement or placement_of(knobs), pieces or mlp_pieces(knobs, device.type)
    buffer = UnpackBuffer()
    shared: dict[object, Tensor] = {}
    head = dict(placement)["head"]
    model = make_skeleton(folder, facts, entries, device=device, dtype=dtype, head=head, mover=mover, shared=shared)
    layouts, places, model.kernels = {}, dict(placement), kernels
    maps: dict[int, dict[str, Tensor]] = {}
    model.here = tuple(index for index in range(facts.n_layers) if places[f"layer {index}"] != ELSEWHERE)
    try:
        for index in model.here:
            layer = model.layers[index]
            prefix, matrices = facts.layout.layer(index), list[tuple[HoldsWeight, PackedOnDisk]]()
            for module_index, linear in enumerate(facts.layer(index).linears):
                packed, on_disk = _packed_linear(linear, prefix, entries, model=model, buffer=buffer)
                packed.position = (index, module_index)
                layer.set_submodule(linear.name, packed)
                if on_disk is not None:
                    matrices.append((packed, on_disk))
            for matrix, on_disk in _packed_experts(layer, facts.layer(index).experts, prefix, entries, model, buffer):
                matrices.append((matrix, on_disk))
            maps |= {id(on_disk): on_disk.shared(device, shared) for _, on_disk in matrices}
            layouts[index] = lay_out(matrices)
            stored = facts.layer(index).stored_name
            fill_parameters(layer, prefix, entries, device=device, dtype=dtype, stored=stored)
            tile_norms(layer, facts, like=model.norm, kernels=kernels)
            if kernels == TRITON:
                rotate_by_kernel(layer)
            put_recurrence(layer, facts.layer(index))
            if facts.family.unlisted is None or facts.family.unlisted.gated_mlp:
                sizes = {id(module): on_disk.block_elements for module, on_disk in matrices}
                block_mlp(layer, sizes, pieces=pieces, kernels=kernels)
        packed_layers = {index: places[f"layer {index}"] for index, layout in layouts.items() if layout.matrices}
        model.scratch = shared.get("scratch")
        model.weights = Weights(layouts, packed_layers, maps=maps, mover=model.mover)
        model.weights.load()
    except FolderError as error:
        raise InputError(str(error), where="model", fix="download or quantise the model again") from None
    return model


def make_skeleton(
    folder: Path,
    facts: ModelFacts,
    entries: dict[str, TensorEntry],
    *,
    device: torch.device,
    dtype: torch.dtype,
    head: str = "disk",
    mover: Mover | None = None,
    shared: dict[object, Tensor] | None = None,
) -> Model:
    """The model with its layers still without weights (on the meta device); the rest is ready. Raises InputError.

    `shared` holds what packed matrices share.
    """
    from transformers import AutoConfig

    layout, kernel = facts.layout, query_tiles if facts.family.attention == "query tiles" else sequences
    kernel.register()
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
        whole = skeleton_of(config, _attention_name(facts, kernel.NAME))
    except Exception as error:  # transformers raises errors of any kind for values that it cannot use
        raise unusable(folder, error) from None
    known, mover = {} if shared is None else shared, mover or Mover(device)

    def vocabulary(name: str, *, resident: bool) -> Vocabulary:
        stage, entry = mover.stage, _entry(entries, name)
        return Vocabulary(entry, device=device, dtype=dtype, resident=resident, shared=known, stage=stage)

    fill = partial(fill_parameters, entries=entries, device=device, dtype=dtype)
    own: OwnInputs | None = None
    try:
        if facts.family.unlisted is not None:
            compute_buffers(whole, device=device)
            body, layers, norm = make_body(whole, layout, n_results=facts.family.unlisted.n_results)
            fill(body.decoder, layout.root, but=body.embedding.weight)
            rotary: nn.Module = nn.Identity()  # the body has its own
        else:
            skeleton: Any = whole.get_submodule("model") if hasattr(whole, "model") else whole
            body, layers, norm = None, list(skeleton.layers), skeleton.norm
            rotary = rotary_class(skeleton, facts)(config=config).to(device)  # its tables are computed, not stored
        fill(norm, layout.norm)
        if facts.own_inputs is not None:
            fill(skeleton.per_layer_projection_norm, layout.own_inputs.norm)
            table, matrix = (vocabulary(name, resident=False) for name in layout.own_inputs[:2])
            own_norm = TokenTiled(skeleton.per_layer_projection_norm)
            own = OwnInputs(table, matrix, own_norm, facts.n_layers, facts.own_inputs.width)
        return Model(
            facts=facts,
            config=config,
            layers=layers,
            norm=norm,
            rotary=rotary,
            embedding=vocabulary(layout.embedding, resident=False),
            lm_head=vocabulary(layout.head(tied=facts.tied), resident=head == "resident"),
            device=device,
            dtype=dtype,
            clock=DropoutClock(),
            mover=mover,
            here=tuple(range(facts.n_layers)),
            own_inputs=own,
            body=body,
        )
    except FolderError as error:
        raise InputError(str(error), where="model", fix="download or quantise the model again") from None


def _attention_name(facts: ModelFacts, ours: str) -> str:
    own = facts.family.unlisted
    return ours if own is None or not own.attention else own.attention


def _packed_linear(
    linear: LinearFacts, prefix: str, entries: dict[str, TensorEntry], *, model: Model, buffer: UnpackBuffer
) -> tuple[PackedLinear, PackedOnDisk | None]:
    """The module of a linear layer, and where its weight lies on disk; None if the weight is in the module already."""
    packed = PackedLinear(linear.in_features, linear.out_features, buffer=buffer)
    shape = (linear.out_features, linear.in_features)
    packed.weight, on_disk = _weight(f"{prefix}{linear.name}.weight", shape, entries, model)
    if linear.bias:
        bias = read_tensor(_entry(entries, f"{prefix}{linear.name}.bias", (linear.out_features,)))
        packed.bias = bias.to(device=model.device, dtype=model.dtype)
    packed.clock = model.clock
    return packed, on_disk


def _weight(
    name: str, shape: tuple[int, int], entries: dict[str, TensorEntry], model: Model
) -> tuple[Packed | Tensor | None, PackedOnDisk | None]:
    """A matrix in memory, or where it lies on disk: one of the two. Raises FolderError."""
    on_disk: PackedOnDisk | None = None
    found: Packed | Tensor | None = None
    if is_packed(entries, name):
        on_disk = packed_on_disk(entries, name)
    elif is_mxfp4(entries, name):
        on_disk = mxfp4_on_disk(entries, name)
    elif model.facts.forms is not None:
        _entry(entries, name, shape)
        on_disk = gguf_layout(entries, name)
    elif model.facts.quantised:  # a folder that leaves some matrices unpacked means it
        found = read_tensor(_entry(entries, name)).to(device=model.device, dtype=model.dtype)
    else:
        found = pack(read_tensor(_entry(entries, name)).to(model.device))
    if (weight := found if on_disk is None else on_disk) is not None and tuple(weight.shape) != shape:
        raise FolderError(f"{name} has shape {tuple(weight.shape)}, not what config.json says")
    return found, on_disk


def _packed_experts(
    layer: nn.Module,
    facts: ExpertFacts | None,
    prefix: str,
    entries: dict[str, TensorEntry],
    model: Model,
    buffer: UnpackBuffer,
) -> Iterator[tuple[ExpertMatrix, PackedOnDisk]]:
    """Put packed experts into a layer that has some; yields those matrices that lie on disk, and where."""
    for name, matrix in put_experts(layer, facts, buffer=buffer):
        matrix.weight, on_disk = _weight(f"{prefix}{name}.weight", matrix.shape, entries, model)
        if on_disk is not None:
            yield matrix, on_disk


def put_experts(layer: nn.Module, facts: ExpertFacts | None, *, buffer: UnpackBuffer) -> list[tuple[str, ExpertMatrix]]:
    """Put `PackedExperts` in the place of a layer's own, if it has any; returns the (still empty) matrices by name."""
    if facts is None:
        return []
    path = f"{facts.module}.experts"
    own: Any = layer.get_submodule(path)
    named = [(name, ExpertMatrix(shape)) for name, shape in facts.matrices()]
    n_each, matrices = len(facts.stored), [matrix for _, matrix in named]
    by_expert = [matrices[start : start + n_each] for start in range(0, len(matrices), n_each)]
    gate = cast(Gate, own._apply_gate)  # transformers': the activation, and what a family does beside it
    biases = {name: own.get_parameter(name) for name in facts.biases}  # read with the layer's other small tensors
    layer.set_submodule(path, PackedExperts(by_expert, gate=gate, buffer=buffer, biases=biases))
    return named


def fill_parameters(
    module: nn.Module,
    prefix: str,
    entries: dict[str, TensorEntry],
    *,
    device: torch.device,
    dtype: torch.dtype,
    stored: Callable[[str], str] = str,
    but: Tensor | None = None,
) -> None:
    """Replace every meta tensor of `module` that is stored by the folder's, frozen, in the compute dtype.

    `stored` says what the folder calls a tensor, where that is not its name here; `but` is not read.

    Raises FolderError for a tensor that is missing or of another shape, InputError for one that no file can give.
    """
    parameters = dict(module.named_parameters())
    for name, tensor in module.state_dict(keep_vars=True).items():
        if tensor is but:
            continue
        _entry(entries, prefix + stored(name), tuple(tensor.shape))
        value = read_gguf(entries, prefix + stored(name))  # a router may lie in blocks
        value = value.to(device=device, dtype=dtype)
        owner, _, leaf = name.rpartition(".")
        found = nn.Parameter(value, requires_grad=False) if name in parameters else value
        setattr(module.get_submodule(owner), leaf, found)
    left = [name for name, tensor in [*module.named_parameters(), *module.named_buffers()] if tensor.is_meta]
    if left:
        raise InputError(f"this model needs {left[0]!r}, which its folder does not hold", where="model")


def _entry(entries: dict[str, TensorEntry], name: str, shape: tuple[int, ...] | None = None) -> TensorEntry:
    if name not in entries:
        raise FolderError(f"tensor {name!r} is missing")
    if shape is not None and entries[name].shape != shape:  # a single number would be broadcast without a word
        raise FolderError(f"tensor {name!r} has shape {entries[name].shape}, config.json says {shape}")
    return entries[name]
