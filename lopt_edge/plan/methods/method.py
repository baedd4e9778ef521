"""What a method is: a record of its name, its options, its course, and what contradicts or has no effect beside it.

The rule: a method is one file in this folder. It declares `METHODS`, one record for each name that it answers to, and is
found by being there; nothing else in the package compares a method's name. Its `Options` are fields of `Config` (so YAML
keys and flags stay flat), but only its own file reads them; what others need to know of them travels in the Course.

This file knows no method. What a method may ask of the settings that are not its own is `RunSettings`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from pydantic import BaseModel, Field

from lopt_edge.plan.methods.course import Course


class Options(BaseModel):
    """The options that the courses of several methods read; each method's own class adds its own to them."""

    num_segments: int = Field(2, ge=1, description="lopt, frozen: number of segments of equal depth (mlaan: 4 by default)")
    boundary_layers: tuple[int, ...] | None = Field(
        None, description="e.g. 12,20: each layer (from 0) begins the next segment; replaces num-segments"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="seed of adapters, data order and dropout")


class RunSettings(Protocol):
    """The settings of a run that a method's rules may look at, beside its own options. `Config` has them."""

    @property
    def model_fields_set(self) -> set[str]: ...
    @property
    def method(self) -> str: ...
    @property
    def num_segments(self) -> int: ...
    @property
    def boundary_layers(self) -> tuple[int, ...] | None: ...
    @property
    def choose_segments(self) -> bool: ...
    @property
    def boundary(self) -> str | None: ...
    @property
    def boundary_cache(self) -> str | None: ...
    @property
    def teacher(self) -> str | None: ...
    @property
    def objective(self) -> str: ...
    @property
    def epochs(self) -> int: ...
    @property
    def pipeline(self) -> int: ...
    @property
    def clip(self) -> float: ...
    @property
    def clip_scope(self) -> str: ...
    @property
    def apply(self) -> str: ...
    @property
    def weights(self) -> str: ...
    @property
    def lora_dropout(self) -> float: ...
    @property
    def init_adapter(self) -> str | None: ...
    @property
    def keep_best(self) -> bool: ...
    @property
    def eval_every(self) -> int | None: ...
    @property
    def eval_data(self) -> str | None: ...
    @property
    def eval_fraction(self) -> float: ...


class Problem(NamedTuple):
    """A problem of one setting: what is wrong with it beside the others, and what to do."""

    setting: str
    what: str
    fix: str


def no_problems(_options: Any, _run: RunSettings) -> Iterator[Problem]:
    """The problems of a method in which nothing contradicts: none."""
    return iter(())


def no_warnings(_options: Any, _run: RunSettings) -> Iterator[str]:
    """The warnings of a method in which everything has an effect: none."""
    return iter(())


def weight_warnings(run: RunSettings) -> Iterator[str]:
    """The warning of a local loss' weight that an update does not see; a global norm sees it."""
    if "local_weight" in run.model_fields_set and run.clip > 0 and run.clip_scope == "segment":
        yield (
            "local_weight has almost no effect: under per-segment clipping AdamW does not see the gradient's scale; "
            "lr_local is the knob"
        )


@dataclass(frozen=True)
class Method:
    """One method by its name.

    `course(options, n_layers)` raises InputError for what a depth does not allow. `problems` and `warnings` look at its own
    options and at the run's settings. `engine`: settings of the engine that only some methods can use, this one among them
    (`teacher`, `boundary`). `cuts`: num_segments and boundary_layers cut its depth; where they do not, `uncut` says what
    does. `pipelined`: its segments may lie in several processes. `caches`: whether some early segment never trains, so that
    its boundary can be kept. `local`: those of lr_local, lr_head and local_weight that it uses; `local_part`: lr over so
    much is lr_local's default. `defaults`: settings with another default than for the others. `meant_by`: settings that
    mean this method where none is named. `resident`: no layer's weights may be streamed. `phases_follow_steps`: another
    number of steps moves its phases. `pinned`: settings that decide when its phases end, so a resumed run must keep them.
    `learns`: which objectives may be its task loss (those without a reference alone; or replies alone), and `why_not` the
    others.
    """

    name: str
    options: type[Options]
    course: Callable[[Any, int], Course]
    problems: Callable[[Any, RunSettings], Iterator[Problem]] = no_problems
    warnings: Callable[[Any, RunSettings], Iterator[str]] = no_warnings
    engine: tuple[str, ...] = ()
    cuts: bool = False
    uncut: str = ""
    pipelined: bool = False
    caches: Callable[[Any], bool] = lambda _: False
    local: tuple[str, ...] = ()
    local_part: int = 1
    defaults: Mapping[str, int] = field(default_factory=dict)
    meant_by: tuple[str, ...] = ()
    resident: bool = False
    phases_follow_steps: bool = False
    learns: Literal["any objective", "no reference", "replies"] = "any objective"
    why_not: str = ""
    pinned: Callable[[Any], frozenset[str]] = lambda _: frozenset()

    @property
    def own_options(self) -> tuple[str, ...]:
        """The names of the options that are refused beside other methods."""
        own = tuple(name for name in self.options.model_fields if name not in Options.model_fields)
        return (*own, *self.engine)
