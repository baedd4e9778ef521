"""`Loaded`: what one attempt at a run has in hand once its weights are there, as one frozen record; and how it is made.

The rule: it is complete when it exists, and nothing is put into it afterwards. It only reads the run's state; what loading
found out that belongs there (a replaced layer's losses, a step that begins again) is a field here, and session.py writes it
down. Opened are the tiers, the boundary caches, the teacher's features and the processes of a pipeline; all are closed when
the attempt ends, however it ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lopt_edge.adapters.save import AdapterShape
from lopt_edge.data import Window, micro_batches_of
from lopt_edge.models.four_bit import folder_bytes, four_bit_folder
from lopt_edge.plan.schedule.knobs import mlp_pieces
from lopt_edge.run.device import device_of, peak_device_bytes
from lopt_edge.run.model.load import Model, load_model
from lopt_edge.run.model.replaced import apply_replaced, fit_layers, loading_placement
from lopt_edge.run.step.batches import Batch
from lopt_edge.run.step.evaluation import losses
from lopt_edge.run.step.executor import Executor
from lopt_edge.run.step.op_faults import memory_faults
from lopt_edge.run.step.step_state import Cut
from lopt_edge.run.tiers.feature_cache import FeatureCache
from lopt_edge.run.tiers.moves import Mover
from lopt_edge.run.tiers.score_file import ScoreFile
from lopt_edge.run.watch.clock import PhaseClock
from lopt_edge.run.watch.first_steps import FirstSteps
from lopt_edge.run.watch.neighbours import Neighbours
from lopt_edge.system.allocator import release_free_memory, settle_host_allocator
from lopt_edge.system.files import JsonLines
from lopt_edge.system.memory import peak_rss_bytes
from lopt_edge.system.signals import Interrupts
from lopt_edge.training.checkpoint.resume import Start
from lopt_edge.training.checkpoint.run_state import RunState
from lopt_edge.training.checkpoint.snapshot import restore, restore_best
from lopt_edge.training.pipeline.coordinator import Coordinator, open_coordinator
from lopt_edge.training.prepare.boundary_cache import BoundaryCaches, boundary_caches
from lopt_edge.training.prepare.build import build_executor
from lopt_edge.training.prepare.inputs import Inputs
from lopt_edge.training.prepare.reference import fill_references, open_references
from lopt_edge.training.prepare.teacher import fill_features, teacher_features
from lopt_edge.training.prepare.tiers import open_tiers, peaks_below
from lopt_edge.training.ranks.leader import Leader, open_leader
from lopt_edge.training.session.ahead import Ahead
from lopt_edge.training.session.choices import ChosenBatches
from lopt_edge.training.session.progress import Progress
from lopt_edge.training.session.saving import Saver
from lopt_edge.training.session.step_kinds import StepKinds
from lopt_edge.units import format_bytes

if TYPE_CHECKING:
    from lopt_edge.run.link import Link


@dataclass(frozen=True, eq=False)
class RunContext:
    """The record of what all attempts at a run share."""

    progress: Progress
    clock: PhaseClock
    interrupts: Interrupts
    events: JsonLines


@dataclass(frozen=True)
class Replacement:
    """The losses of the intact model at the beginning of method repl, and what the mixtures leave unexplained of each
    matrix."""

    intact: Mapping[str, float]
    unexplained: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model ready to train, and what trains, saves and watches it.

    `evaluated` has the batches of each loss that is measured beside the steps, by the loss' name. `cut`: where the first
    step goes on, if it was left inside; `begins_again`: it was, but its micro-batches are cut in another way now.
    `coordinator`: of the other processes of a pipeline, or the leader of other ranks. `ahead`: the maker of the steps'
    batches; `chosen`: of those where preferences are learned.
    """

    inputs: Inputs
    folder: Path  # of the 4-bit weights
    cache_bytes: int  # 0: the model was in 4 bits already
    mover: Mover
    model: Model
    executor: Executor
    shape: AdapterShape
    evaluated: Mapping[str, Sequence[Batch]]
    kinds: StepKinds
    saver: Saver
    first_steps: FirstSteps
    caches: BoundaryCaches | None
    coordinator: Coordinator | Leader | None
    replacement: Replacement | None
    cut: Cut | None
    begins_again: bool
    ahead: Ahead
    chosen: ChosenBatches | None = None

    @property
    def link(self) -> Link | None:
        """The link to the other processes of a pipeline; None without one."""
        return None if self.leader is not None else self.executor.link

    @property
    def leader(self) -> Leader | None:
        """The leader of the ranks that share each step; None without such."""
        return self.coordinator if isinstance(self.coordinator, Leader) else None

    def batches(self, window: Window) -> list[Batch]:
        """The batches of a step; of preferences with what they are compared with."""
        if self.chosen is None:
            return self.ahead.batches(window)
        with memory_faults("comparing"):
            return self.chosen.of_step(self.model, window)

    def peaks(self) -> dict[str, int]:
        """The most bytes that this process took so far, on a CPU, on its device and on disk."""
        return _own_peaks(self.inputs, self.mover)


@contextmanager
def loading(
    inputs: Inputs,
    start: Start | None,
    context: RunContext,
    *,
    state: RunState,
    predicted: Mapping[str, Any],
    most_loss_scale: float,
) -> Iterator[Loaded]:
    """A `Loaded` with everything opened and loaded; all is closed at the end.

    `predicted` has the bytes of the page files. `most_loss_scale`: a larger one overflowed before.
    """
    with context.clock.phase("quantise"):
        folder, was_there = four_bit_folder(inputs.source, cache_dir=inputs.config.cache_dir, say=context.progress.note)
    cache_bytes = 0 if inputs.source.facts.quantised else folder_bytes(folder)
    if cache_bytes:
        made = "" if was_there else f"quantised to 4 bits in {context.clock.seconds['quantise']:.0f} s; "
        tell = context.progress.detail if was_there else context.progress.note
        tell(f"{made}4-bit copy in {folder}: {format_bytes(cache_bytes)} of disk, apart from page files")
    tiers = open_tiers(
        inputs.config,
        inputs.own_knobs,
        device=inputs.device,
        budget=inputs.budget,
        need_disk_bytes=predicted["disk_bytes"],
        journal_bytes=predicted["journal_bytes"],
    )
    open_mover: list[Mover] = []
    opened = _others(inputs, start, context, report=lambda: _own_peaks(inputs, open_mover[0]))
    kept, own = (boundary_caches(inputs), teacher_features(inputs), open_references(inputs)), device_of(inputs.device)
    alike = own.made_deterministic() if inputs.config.deterministic else nullcontext()
    with kept[0] as caches, kept[1] as features, kept[2] as references, tiers as mover, opened as coordinator, alike:
        open_mover.append(mover)
        settle_host_allocator(inputs.workload.mmap_bytes(inputs.knobs))
        own.settle_allocator()
        with context.clock.phase("load"), memory_faults("loading"):
            loader = _Loader(inputs, start, context, folder=folder, mover=mover, features=features, references=references)
            found = loader.load(state, caches, coordinator, cache_bytes=cache_bytes)
            found.executor.loss_scale = min(found.executor.loss_scale, most_loss_scale)
            release_free_memory()
        yield found


def _others(
    inputs: Inputs, start: Start | None, context: RunContext, *, report: Callable[[], dict[str, int]]
) -> AbstractContextManager[Coordinator | Leader | None]:
    """Who leads the other processes of the run, opened; None where there are none."""
    if inputs.config.ranks > 1:
        return open_leader(inputs, start, report=report, heard=context.interrupts.note)
    return open_coordinator(inputs, start, report=report)


def _own_peaks(inputs: Inputs, mover: Mover) -> dict[str, int]:
    device = peak_device_bytes(inputs.device)
    return {"rss": peak_rss_bytes(), "device": device, "disk": peaks_below(mover).disk}


class _Loader:
    """The stages between open tiers and a Loaded, in program order."""

    def __init__(
        self,
        inputs: Inputs,
        start: Start | None,
        context: RunContext,
        *,
        folder: Path,
        mover: Mover,
        features: FeatureCache | None,
        references: Mapping[str, ScoreFile],
    ) -> None:
        self.inputs, self.start, self.context, self.folder = inputs, start, context, folder
        self.mover, self.features, self.references = mover, features, references

    def load(
        self, state: RunState, caches: BoundaryCaches | None, coordinator: Coordinator | Leader | None, *, cache_bytes: int
    ) -> Loaded:
        inputs, start = self.inputs, self.start
        model = self._model()
        evaluated = {name: inputs.batches(data) for name, data in inputs.evaluated.items()}
        replacement = self._replace(model, evaluated)
        if self.features is not None:
            self._learn_from_teacher(model, self.features)
        if self.references:
            self._ask_reference(model)
        adapter = inputs.config.init_adapter if start is None else str(start.checkpoint.folder)
        executor, shape = build_executor(inputs, model, adapter=adapter)
        executor.caches = {} if self.features is None else {"teacher": self.features}
        kinds = StepKinds(inputs, state, executor, caches)
        if coordinator is not None:
            coordinator.join(executor)
        cut, begins_again = (None, False) if start is None else self._go_on_from(start, executor, shape)
        saver = Saver(inputs, executor, shape, state=state, start=start, seconds=self.context.clock.seconds)
        first_steps = FirstSteps(executor, evaluated=state.evaluated < 0)
        ahead = Ahead(inputs, model)
        if self.mover.stage is not None:
            makes_ready = inputs.objective is None  # else the model has a say in a batch
            executor.optimizer.meanwhile = [self._neighbours().look, *([ahead.make_ready] if makes_ready else [])]
        return Loaded(
            inputs, self.folder, cache_bytes, self.mover, model, executor, shape, evaluated, kinds, saver, first_steps,
            caches, coordinator, replacement, cut, begins_again, ahead,
            None if inputs.objective is None else ChosenBatches(inputs, inputs.objective, self.references),
        )  # fmt: skip

    def _neighbours(self) -> Neighbours:
        inputs, context = self.inputs, self.context

        def tell(sentence: str) -> None:
            context.progress.warn(sentence)
            context.events.write({"event": "other programs", "reason": sentence})

        need, library = inputs.predict().device_bytes, inputs.workload.library_bytes
        return Neighbours(device_of(inputs.device), need_bytes=need, context_bytes=library, tell=tell)

    def _model(self) -> Model:
        inputs = self.inputs
        return load_model(
            self.folder,
            inputs.source.facts,
            device=inputs.device,
            dtype=inputs.dtype,
            placement=loading_placement(inputs.own_knobs, inputs.course.replaced),
            mover=self.mover,
            pieces=mlp_pieces(inputs.own_knobs, inputs.device.type),
            kernels=inputs.ground.kernels,
        )

    def _replace(self, model: Model, evaluated: Mapping[str, Sequence[Batch]]) -> Replacement | None:
        """Apply the checkpoint's replaced layers (method repl); at the beginning measure the intact model, and fit them."""
        layers, context = self.inputs.course.replaced, self.context
        if self.start is not None:
            apply_replaced(model, self.start.checkpoint.folder)
        if self.start is not None or not layers:
            return None
        with context.clock.phase("evaluate"), memory_faults("evaluation"):
            tile = self.inputs.knobs.token_tile
            intact = losses(model, evaluated, token_tile=tile, between=context.interrupts.check)
        left = {str(layer): by_linear for layer, by_linear in fit_layers(model, layers).items()}
        shares = [share for by_linear in left.values() for share in by_linear.values()]
        context.progress.note(
            f"replaced layers {', '.join(map(str, layers))}: mixtures of the layers beside them leave "
            f"{min(shares):.1%} to {max(shares):.1%} of each matrix unexplained"
        )
        return Replacement(intact, left)

    def _learn_from_teacher(self, model: Model, features: FeatureCache) -> None:
        context = self.context
        with context.clock.phase("teacher"), context.interrupts.deferred():
            check = context.interrupts.check
            n_examples = fill_features(self.inputs, features, model, mover=self.mover, between=check)
        if n_examples:
            size = format_bytes(features.held_bytes)
            context.progress.note(
                f"the teacher's features of {n_examples} examples were computed: {size} of disk until the end"
            )

    def _ask_reference(self, model: Model) -> None:
        context = self.context
        with context.clock.phase("reference"), context.interrupts.deferred():
            n_sequences = fill_references(
                self.inputs,
                self.references,
                model,
                token_tile=self.inputs.knobs.token_tile,
                between=context.interrupts.check,
            )
        if n_sequences:
            context.progress.note(f"the reference's log-probabilities of {n_sequences:,} sequences were computed")

    def _go_on_from(self, start: Start, executor: Executor, shape: AdapterShape) -> tuple[Cut | None, bool]:
        """Restore optimizer, loss scale and best adapter; returns where the step goes on, and whether it begins again."""
        folder, state = start.checkpoint.folder, start.state
        gradient = restore(executor, folder, start.values, tier=self.inputs.knobs.states)
        executor.loss_scale = state.loss_scale
        restore_best(folder, Path(self.inputs.config.output), shape)
        if not state.sequences:
            return None, False
        micro_batch = micro_batches_of(next(self.inputs.windows(first=state.steps)), state.sequences)
        row_tokens = start.values["settled"].get("row_tokens")
        together = self.inputs.config.ranks == 1  # else its micro-batches are dealt anew
        same_rows = together and row_tokens == (self.inputs.config.row_tokens if self.inputs.config.packing else None)
        if micro_batch is None or not same_rows:  # the checkpoint's were smaller ones, or rows with others in them
            self.context.progress.warn(
                f"step {state.steps + 1} begins again: its micro-batches are cut or dealt in another way now"
            )
            return None, True
        losses = {int(segment): loss for segment, loss in state.losses.items()}
        return Cut(micro_batch, lambda: losses, gradient), False
