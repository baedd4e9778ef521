"""The planner's question, put together in one place: for `plan`, for `finetune`, and for a run that memory refused a step.

The rule: whatever does not change while the planner compares settings is a `Ground`, found once (worst_case.py without
data, from_data.py with it); `search_for` joins it to settings. So a search made again, for a smaller plan, asks for the
same run: the same steps, the same teacher, the same libraries. It measures nothing and chooses nothing. No torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from lopt_edge.config.settings import Config
from lopt_edge.plan.costs.shape import LayerShape
from lopt_edge.plan.costs.sizes import MicroBatchSize
from lopt_edge.plan.costs.teacher_pass import Teacher
from lopt_edge.plan.facts.device_kinds import TORCH
from lopt_edge.plan.facts.model import ModelFacts
from lopt_edge.plan.facts.profile import DeviceProfile, has_flash
from lopt_edge.plan.methods.course import kept_while_read
from lopt_edge.plan.schedule.ranks import largest_share
from lopt_edge.plan.search.search import Search
from lopt_edge.plan.search.workload import Workload
from lopt_edge.planning.settings import against_facts, search_space
from lopt_edge.planning.unlisted import make_ready


@dataclass(frozen=True)
class LargestStep:
    """The micro-batches of a run's largest step, the longest first, and its largest evaluation batch.

    `epochs` is how often the run comes by an example, where a number of steps decides that.
    """

    batches: tuple[MicroBatchSize, ...]
    evaluation: MicroBatchSize | None
    epochs: float | None = None


@dataclass(frozen=True, eq=False)
class Ground:
    """All that does not change while the planner compares settings: a model on a machine.

    `itemsize` is the compute dtype's, `vocabulary_itemsize` that of the stored vocabulary, `library_bytes` what the
    process takes beside its tensors, `kernels` whose run (torch's, or our own in Triton). `largest_step` finds the largest
    step of given settings, whose micro-batches may be split in another way. `teacher` is another model than the base.
    `pinned_bytes`: of host memory that may be page-locked.
    """

    facts: ModelFacts
    itemsize: int
    profile: DeviceProfile
    library_bytes: int
    vocabulary_itemsize: int
    largest_step: Callable[[Config], LargestStep]
    teacher: Teacher | None = None
    pinned_bytes: int | None = None
    kernels: str = TORCH


def search_for(config: Config, ground: Ground) -> Search:
    """The planner's search for a run with these settings. Raises InputError(s) for what the model does not allow."""
    course, targets, _ = against_facts(config, ground.facts)
    make_ready(ground.facts, itemsize=ground.itemsize, targets=targets, where=config.model)
    if ground.teacher is not None:
        make_ready(ground.teacher.facts, itemsize=ground.itemsize, targets=(), where=config.teacher or "teacher")
    step, device_type = ground.largest_step(config), ground.profile.device_type
    dropout, epochs = config.lora_dropout > 0, config.epochs if step.epochs is None else step.epochs
    if course.caches:
        course = replace(course, epochs=epochs)
    elif not dropout and not ground.facts.key_sources and config.ranks == 1:
        # dropout would change a boundary each time; keys it does not hold; of several ranks one would have it
        course = kept_while_read(course, epochs=epochs)
    shape = LayerShape(ground.facts, ground.itemsize, config.lora_r, targets, device_type, dropout=dropout)
    shape = replace(shape, has_flash=has_flash(ground.profile), deterministic=config.deterministic)
    shape = replace(shape, kernels=ground.kernels)
    workload = Workload(
        course,
        shape,
        tuple(largest_share(step.batches, config.ranks)),
        ground.profile,
        ground.library_bytes,
        ground.vocabulary_itemsize,
        evaluation=step.evaluation,
        clip_scope=config.clip_scope if config.clip else "none",
        teacher=ground.teacher,
        ranks=config.ranks,
        pinned_bytes=ground.pinned_bytes,
    )
    return Search(workload, search_space(config, ground.facts, device_type))
