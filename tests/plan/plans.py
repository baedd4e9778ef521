"""Plans of every method, shape and memory knob, for the tests of passes and validator. Not a test itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from lopt_edge.config.settings import Config
from lopt_edge.plan.methods import course_of
from lopt_edge.plan.methods.course import Course
from lopt_edge.plan.schedule.build import step_plan
from lopt_edge.plan.schedule.knobs import ACTIVATIONS, TOKEN_TILES, WEIGHTS, Knobs
from lopt_edge.plan.schedule.ops import Plan
from lopt_edge.plan.schedule.passes import arrange
from lopt_edge.plan.schedule.segments import Segment


def make_course(method: Any, *, n_layers: int, **options: Any) -> Course:
    """A method's course, with the settings that it reads."""
    return course_of(Config(model="m", data="d", output="o", method=method, **options), n_layers)


def make_segments(method: Any, *, n_layers: int, **options: Any) -> tuple[Segment, ...]:
    """Those of the first kind of step."""
    return make_course(method, n_layers=n_layers, **options).kinds[0].segments


CLIP_SCOPES = {"step": ("global", "segment", "none"), "segment": ("segment", "none"), "layer": ("none",)}


@dataclass(frozen=True)
class Case:
    """A run's kind of step. `clip_scope` is one that the knobs' `apply` allows."""

    method: Any
    num_segments: int
    n_micro_batches: int
    knobs: Knobs
    clip_scope: str = "segment"

    @property
    def plain(self) -> Plan:
        """All on the device: the method's own list, without placement."""
        n_layers = len(self.knobs.weights)
        segments = make_segments(self.method, n_layers=n_layers, num_segments=self.num_segments)
        return step_plan(self.method, segments, n_micro_batches=self.n_micro_batches)

    @property
    def plan(self) -> Plan:
        return arrange(self.plain, self.knobs)


def make_knobs(n_layers: int, **changes: Any) -> Knobs:
    """All on the device, recomputed layer by layer, but for `changes`; a single word goes for all layers."""
    values = {"weights": "resident", "activations": "recompute", **changes}
    for name in ("weights", "activations"):
        if isinstance(values[name], str):
            values[name] = (values[name],) * n_layers
    return Knobs(**values)


@st.composite
def cases(draw: st.DrawFn, *, max_layers: int = 8) -> Case:
    n_layers = draw(st.integers(1, max_layers))
    tier = st.sampled_from(["device", "host", "disk"])
    apply = draw(st.sampled_from(sorted(CLIP_SCOPES)))
    knobs = Knobs(
        weights=draw(_per_layer(WEIGHTS, n_layers)),
        activations=draw(_per_layer(ACTIVATIONS, n_layers)),
        saved_inputs=draw(tier),
        pages=draw(st.sampled_from(["host", "disk"])),
        states=draw(tier),
        gradients=draw(tier),
        apply=apply,
        prefetch=draw(st.integers(0, 3)),
        head=draw(st.sampled_from(["resident", "disk"])),
        token_tile=draw(st.sampled_from(TOKEN_TILES)),
        mlp_block=draw(st.sampled_from([1024, 4096, 256])),
    )
    return Case(
        method=draw(st.sampled_from(["lopt", "e2e", "frozen"])),
        num_segments=draw(st.integers(1, n_layers)),
        n_micro_batches=1 if apply == "layer" else draw(st.integers(1, 3)),  # config.py asks for no accumulation there
        knobs=knobs,
        clip_scope=draw(st.sampled_from(CLIP_SCOPES[apply])),
    )


def _per_layer(choices: tuple[str, ...], n_layers: int) -> st.SearchStrategy[tuple[str, ...]]:
    """One choice for all layers, or one for each."""
    choice = st.sampled_from(choices)
    return choice.map(lambda found: (found,) * n_layers) | st.tuples(*[choice] * n_layers)
