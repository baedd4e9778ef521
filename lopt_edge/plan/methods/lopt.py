"""LoPT (arXiv 2605.04913): a gradient boundary; early segments learn a local loss, only the last one the task.

With blocks 1 .. k, x_j the detached input of block j, y_j = block_j(x_j), x_(j+1) = stop(y_j):

    L = task(y_k) + lambda * mean over j < k of local_j;     local_j = mean over tokens and elements of (aux_j(y_j) - x_j)^2

The op list runs a block's forward, loss and backward before the next block begins. When the updates come has two forms,
and both have a source:
- `boundary_update stale`, the default: all at the step's end, so the gradients are exactly those of the released code
  (github.com/HumyuShi/LoPT, modeling_lopt.py and train_sft.py at d4cb99e), which adds the losses of one forward and runs
  one joint backward, and so saves no activation memory.
- `boundary_update fresh`: an early block is updated first, and the next one sees the updated block's output (a forward more
  for each early block). It is probably the two-phase form that the paper describes; two readings of it say so.

Options, none of them the paper's own:
- `local_every N`: early blocks train on every N-th step and only run forward, saving nothing, on the others; 0: never, so
  their adapters stay as they are (fresh ones are zero, which makes it `frozen`).
- `local_loss`: `reconstruct`, the paper's; `next-token` reads out through the frozen norm and lm_head (the paper reports
  it as harmful) with next-token_j = mean over supervised tokens of the cross-entropy at y_j; `align` is the negative
  cosine to a teacher's last hidden state (methods/let.py says which), with a constant weight.
- `open_every N`: on every N-th step the boundary opens: an end-to-end step, in which the early layers get the task's
  gradient, at the task's learning rate; AdamW's moments are one set for both. At 1/N of its cost.
- `open_until S`: for that share of the steps the boundary is open, then it closes: the early layers keep what they have
  learned from the task, and rest (`local_every 0`, the default then) or train on the local loss. `reach` says the same for
  any schedule of depths (reach.py). What a closed boundary gives is kept where a later epoch reads it (`closed_cache`).
- `lr_local`: lr / 100 where nothing is set. There one rate is for all (2e-5, all parameters training); with LoRA's larger
  rates the reconstruction at the task's rate did harm on both tasks of our study (docs/methods.md), most of it with the aux
  head at that small rate, too. So the head, which is thrown away, has its own: `lr_head`, lr by default.
Where we deviate from the released code otherwise: docs/design.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import lcm
from typing import Literal

from pydantic import Field

from lopt_edge.errors import InputError
from lopt_edge.plan.methods import method, reach
from lopt_edge.plan.methods.course import Course, Phase
from lopt_edge.plan.methods.method import Method, Problem, RunSettings
from lopt_edge.plan.schedule.build import StepKind
from lopt_edge.plan.schedule.segments import Segment, cut_depth

LOCAL, REST, OPEN, CLOSED = "local", "rest", reach.OPEN, "closed"  # kinds of step
LOCAL_PART = 100  # one part in so many of lr is what the early segments get where nothing is set (docs/methods.md)
# They ask for a boundary: LoPT's, where no method is named.
BOUNDARY_SETTINGS = ("num_segments", "boundary_layers", "boundary", "boundary_update", "choose_segments", "local_every",
                     "local_loss", "local_weight", "lr_local", "lr_head", "open_every", "open_until", "reach")  # fmt: skip


class Options(method.Options):
    """The options of lopt: what decides when, how and with which loss the early segments train."""

    boundary_update: Literal["stale", "fresh"] = Field(
        "stale", description="lopt: update all segments together, or the early ones first and run them again"
    )
    local_loss: Literal["reconstruct", "next-token", "align"] = Field(
        "reconstruct", description="lopt: the early segments' loss"
    )
    local_every: int | None = Field(
        None,
        ge=0,
        le=100,
        description="lopt: train the early segments on every N-th step; 0: never (default: 1; 0 once closed)",
    )
    open_every: int = Field(0, ge=0, le=100, description="lopt: every N-th step is end to end, over the boundary; 0: none")
    open_until: float = Field(
        0.0, ge=0, lt=1, description="lopt: share of the steps in which the boundary is open; then it closes, and stays so"
    )
    reach: str | None = Field(
        None,
        description="lopt: how many of the last layers the task reaches, over the run: auto, or 0.1:all,0.3:3/4,1:half",
    )
    closed_cache: bool = Field(
        True, description="lopt: keep a closed boundary beside the output while later epochs read it"
    )

    @property
    def every(self) -> int:
        """How often the early segments train on their own loss: a boundary that closes has none unless asked for."""
        if self.local_every is not None:
            return self.local_every
        return 0 if self.open_until or self.reach else 1


def course(options: Options, n_layers: int) -> Course:
    """The course of early segments with a local loss, and a last one with the task's. Raises InputError for a wrong cut."""
    if options.reach is not None:
        return reach.course(options.reach, n_layers, method="lopt", keeps=options.closed_cache)
    opens = bool(options.open_every or options.open_until)
    early = options.local_loss if options.every else "rest" if opens else "none"
    segments = cut_depth(
        early, n_layers=n_layers, num_segments=options.num_segments, boundary_layers=options.boundary_layers
    )
    teacher = options.local_loss == "align" and any(segment.is_local for segment in segments)
    fresh = options.boundary_update == "fresh" and len(segments) > 1 and bool(options.every)
    kinds = {
        OPEN: StepKind(OPEN, (Segment(0, 0, n_layers - 1, "task"),)),
        LOCAL: StepKind(LOCAL, segments, fresh=fresh, teacher=teacher),
        REST: StepKind(REST, tuple(replace(s, loss="rest") if s.is_local else s for s in segments)),
    }
    if options.open_until and len(segments) > 1:
        return _closing(options, kinds, segments)
    cycle = _cycle(options.every, options.open_every)
    if set(cycle) == {LOCAL}:
        return Course("lopt", (replace(kinds[LOCAL], name=""),))
    return Course("lopt", tuple(kinds[name] for name in dict.fromkeys(cycle)), (Phase(1.0, cycle),))


def _closing(options: Options, kinds: dict[str, StepKind], segments: tuple[Segment, ...]) -> Course:
    """The course that is open at first; the largest kind of step comes first, so a budget that is too small shows there."""
    kinds = {**kinds, CLOSED: StepKind(CLOSED, segments, closed=segments[-1].first)}
    cycle = _cycle(options.every, 0) if options.every else (CLOSED,)
    return Course(
        "lopt",
        tuple(kinds[name] for name in dict.fromkeys((OPEN, *cycle))),
        (Phase(options.open_until, (OPEN,)), Phase(1.0, cycle)),
        settles=not options.every,
        keeps=options.closed_cache and not options.every,
    )


def _cycle(local_every: int, open_every: int) -> tuple[str, ...]:
    """The kinds by step, the largest one first, so that it is seen at once: the open one, else the local one.

    Beside open steps the local one comes last in its turn; where both fall together the open one wins.
    """
    length, turn = lcm(max(1, local_every), max(1, open_every)), local_every - 1 if open_every else 0

    def name(step: int) -> str:
        if open_every and step % open_every == 0:
            return OPEN
        if open_every and not local_every:
            return REST
        return LOCAL if local_every <= 1 or step % local_every == turn else REST

    return tuple(name(step) for step in range(length))


def problems(options: Options, run: RunSettings) -> Iterator[Problem]:
    """The contradictions: `auto` beside boundaries, an update order beside a global norm, a gradient beside a pipeline."""
    fresh_global = run.clip and run.clip_scope == "global"
    if run.teacher and options.local_loss != "align":
        yield Problem("teacher", f"belongs to local_loss align, this is {options.local_loss}", "add --local-loss align")
    if run.boundary and (run.boundary_layers or "num_segments" in run.model_fields_set):
        what, fix = "auto chooses the boundaries, which are given too", "leave out boundary_layers and num_segments"
        yield Problem("boundary", what, fix)
    if run.boundary and run.boundary_cache:
        yield Problem("boundary", "auto needs early segments that train", "leave out boundary_cache")
    if options.local_loss == "next-token" and run.objective != "sft":
        what = (
            f"next-token cannot be with objective {run.objective}: it learns to write every reply, the rejected ones, too"
        )
        yield Problem("local_loss", what, "use another local_loss")
    yield from _reach_problems(options, run)
    if options.open_every == 1:
        what, fix = "1 opens the boundary on every step: that is end to end", "use --method e2e, or 2 and more"
        yield Problem("open_every", what, fix)
    if options.boundary_update == "fresh" and fresh_global:
        what = "fresh needs clip_scope segment: an early segment is updated before the norm of the others is known"
        yield Problem("boundary_update", what, "use --clip-scope segment or --clip 0")
    if run.pipeline > 1:
        yield from _pipeline_problems(options)


def _reach_problems(options: Options, run: RunSettings) -> Iterator[Problem]:
    """The contradictions of a boundary that closes: two schedules at once, or what takes a boundary that always is."""
    named = "reach" if options.reach is not None else "open_until"
    if options.reach is None and not options.open_until:
        return
    others: dict[str, bool] = {"open_every": options.open_every > 0, "boundary": run.boundary is not None}
    if options.reach is not None:
        others |= {
            "open_until": options.open_until > 0,
            "num_segments": "num_segments" in run.model_fields_set,
            "choose_segments": run.choose_segments,
            "boundary_layers": run.boundary_layers is not None,
            "local_every": bool(options.local_every),
        }
        try:
            reach.parse(options.reach)
        except InputError as error:
            yield Problem("reach", error.what, error.fix)
    elif run.num_segments == 1 and not run.boundary_layers:
        yield Problem("open_until", "has no boundary to close: num_segments is 1", "use 2 and more, or --method e2e")
    for setting, given in others.items():
        if given:
            yield Problem(
                setting, f"cannot be with {named}, which says when the boundary is where", f"leave out {setting} or {named}"
            )
    if run.pipeline > 1:
        what = "cannot be with pipeline: where the boundary is open a gradient crosses it"
        yield Problem(named, what, f"leave {named} out")
    if run.boundary_cache and run.lora_dropout:
        what = "cannot be with lora_dropout where adapters lie before the boundary: dropout changes it each time"
        yield Problem("boundary_cache", what, "add --lora-dropout 0")


def _pipeline_problems(options: Options) -> Iterator[Problem]:
    """What makes one process wait for another, where the segments lie in several."""
    if options.local_loss == "align":
        what = "cannot be with pipeline: a teacher's features lie with one process"
        yield Problem("local_loss", what, "use another local_loss")
    if options.open_every > 0:
        what = "cannot be with pipeline: in an open step a gradient crosses the boundary"
        yield Problem("open_every", what, "leave open_every out")
    if options.boundary_update == "fresh":
        what = "cannot be with pipeline: fresh makes each process wait for the update of the one before"
        yield Problem("boundary_update", what, "use --boundary-update stale")


def warnings(options: Options, run: RunSettings) -> Iterator[str]:
    """The settings of the local loss that change nothing, a sentence for each."""
    given = run.model_fields_set
    if not options.every:
        local = ("lr_local", "lr_head", "local_weight", "local_loss", "boundary_update", "teacher")
        why = "local_every is 0" + ("" if options.local_every == 0 else " once the boundary is closed, unless it is set")
        yield from (f"{name} has no effect: {why}" for name in local if name in given)
    elif "lr_head" in given and options.local_loss != "reconstruct":
        yield f"lr_head has no effect: local_loss {options.local_loss} has no aux head"
    if "closed_cache" in given and not (options.reach is not None or options.open_until):
        yield "closed_cache has no effect: the boundary never closes"
    if options.every:
        yield from method.weight_warnings(run)


def pinned(options: Options) -> frozenset[str]:
    """The settings that a resumed run must keep: the number of steps decides when the boundary closes."""
    return frozenset({"max_steps", "epochs"} if options.reach is not None or options.open_until else ())


METHODS = (
    Method(
        "lopt",
        Options,
        course,
        problems,
        warnings,
        engine=("boundary", "teacher"),
        cuts=True,
        pipelined=True,
        caches=lambda options: not (options.every or options.open_every),
        local=("lr_local", "lr_head", "local_weight"),
        local_part=LOCAL_PART,
        meant_by=BOUNDARY_SETTINGS,
        pinned=pinned,
    ),
)
