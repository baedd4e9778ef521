"""The lower bounds of a combination of knobs: of its seconds, and of its bytes on each tier, from sums of few knobs.

The rule: a bound is never above what the clock or the replay finds for the combination (tests/plan/search/test_search.py
compares them), and it asks for no plan: what a bound refuses is never arranged. Seconds are all arithmetic, or what one
channel moves; device bytes what is steady, and what a segment needs where it turns round.

Nothing is chosen here (search.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from lopt_edge.plan.costs.predict import kept_at_the_end, slack_bytes
from lopt_edge.plan.costs.seconds import Costs
from lopt_edge.plan.costs.sizes import MicroBatchSize, Sizes
from lopt_edge.plan.schedule.build import StepKind, groups_of
from lopt_edge.plan.schedule.knobs import Knobs
from lopt_edge.plan.schedule.ops import Keep
from lopt_edge.plan.schedule.segments import Segment
from lopt_edge.plan.search.workload import Workload

T = TypeVar("T")


def _run(kind: StepKind) -> tuple[Segment, ...]:
    """The segments that run: those before a boundary that is read do not."""
    return tuple(segment for segment in kind.segments if segment.last >= (kind.reads or 0))


def _moved_bytes(costs: Costs, knobs: Knobs, batch: MicroBatchSize, layer: int, segment: Segment) -> tuple[int, str]:
    """The (bytes, tier) of what a layer's forward sends down for its backward."""
    if knobs.activations[layer] == "page":
        return costs.page_bytes(batch, layer, segment), knobs.pages
    if knobs.activations[layer] == "recompute" and knobs.saved_inputs != "device":
        return costs.sizes.hidden_bytes(batch), knobs.saved_inputs
    return 0, "device"


class Bounds:
    """The lower bounds of a combination, from sums that depend on few knobs."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self._parts: dict[Any, Any] = {}

    @property
    def _segments(self) -> tuple[Segment, ...]:
        """The segments of the first kind of step: what lives from step to step is the same in all of them."""
        return self.workload.kinds[0].segments

    @property
    def _training(self) -> list[Segment]:
        """The segments of all kinds that have a loss."""
        return [segment for kind in self.workload.kinds for segment in kind.segments if segment.has_loss]

    def _once(self, key: tuple[Any, ...], make: Callable[[], T]) -> T:
        if key not in self._parts:
            self._parts[key] = make()
        found: T = self._parts[key]
        return found

    # seconds

    def seconds(self, knobs: Knobs) -> float:
        """The least time of a step: of each phase all its arithmetic, or all bytes of the busier channel; without
        prefetching one after the other."""
        few = knobs.gradients == "device"  # which micro-batches are timed
        pieces = (knobs.token_tile, knobs.mlp_block)
        key: tuple[Any, ...] = (
            "beside",
            knobs.head,
            knobs.optimizer,
            knobs.states,
            knobs.apply,
            pieces,
            few,
            knobs.prefetch,
        )
        beside = self._once(key, lambda: self._over_kinds(self._beside, knobs))
        key = ("computed", knobs.activations, pieces, few)
        computed = self._once(key, lambda: self._over_phases(self._computed, knobs))
        key = ("fetched", knobs.weights, knobs.prefetch, few)
        fetched = self._once(key, lambda: self._over_phases(self._fetched, knobs))
        key = ("saved", knobs.activations, knobs.saved_inputs, knobs.pages, knobs.prefetch, few)
        saved = self._once(key, lambda: self._over_phases(self._saved, knobs))
        moved = [(weights + up, down) for (weights,), (up, down) in zip(fetched, saved, strict=True)]
        if not knobs.prefetch:
            return beside + sum(map(sum, computed)) + sum(up + down for up, down in moved)
        return beside + sum(max(*one, *other) for one, other in zip(computed, moved, strict=True))

    def _costs(self, knobs: Knobs) -> Costs:
        return Costs(self.workload.sizes(knobs), self.workload.batches, self.workload.profile)

    def _over_kinds(self, of_kind: Callable[[Costs, Knobs, StepKind], float], knobs: Knobs) -> float:
        """The mean over the kinds of step."""
        costs, shares = self._costs(knobs), self.workload.course.shares
        return sum(share * of_kind(costs, knobs, kind) for share, kind in zip(shares, self.workload.kinds, strict=True))

    def _over_phases(
        self, of_segment: Callable[[Costs, Knobs, MicroBatchSize, Segment], list[tuple[float, ...]]], knobs: Knobs
    ) -> list[tuple[float, ...]]:
        """The seconds in each phase (forward, backward) of each segment, times its share of a step: micro-batches of one
        size together."""
        costs, workload = self._costs(knobs), self.workload
        return [
            tuple(share * n_alike * seconds for seconds in phase)
            for share, kind in zip(workload.course.shares, workload.kinds, strict=True)
            for batch, n_alike in Counter(workload.timed(knobs)).items()
            for segment in _run(kind)
            for phase in of_segment(costs, knobs, batch, segment)
        ]

    def _beside(self, costs: Costs, knobs: Knobs, kind: StepKind) -> float:
        """The seconds of what lies between the phases: embeddings, losses, and updates with the movements of states. The
        passes that a fresh boundary adds are left out."""
        total = 0.0
        for batch, n_alike in Counter(self.workload.timed(knobs)).items():
            enter = costs.embed(batch) if kind.reads is None else costs.cache(batch, reads=True)
            losses = (
                costs.align(batch) if segment.loss == "align" else costs.loss(batch, task=segment.reads_out)
                for segment in _run(kind)
                if segment.has_loss
            )
            total += n_alike * (enter + sum(losses))
        groups = (*(group for segment in kind.segments for group in groups_of(segment)), *kind.resting)
        updates = sum(costs.update(group) for group in groups)
        if knobs.states == "device" or knobs.apply != "step":
            return total + updates
        n_bytes = sorted(map(costs.sizes.states_bytes, groups))[: max(0, len(groups) - knobs.prefetch - 1)]
        profile = costs.profile
        return total + max(updates, sum(n_bytes) / min(profile.up(knobs.states), profile.down(knobs.states)))

    def _computed(self, costs: Costs, knobs: Knobs, batch: MicroBatchSize, segment: Segment) -> list[tuple[float, ...]]:
        """The arithmetic of a segment's forwards, and of its backwards."""
        facts, kinds = self.workload.shape.facts, self.workload.shape.facts.kind_of_layer
        firsts = (kinds.index(each) for each in range(len(facts.kinds)))
        by_kind = [costs.layer(first, batch, trains=segment.loss != "none") for first in firsts]
        forward = sum(by_kind[kinds[layer]].forward for layer in segment.window)
        again = (by_kind[kinds[i]].again for i in segment.turned[:-1] if knobs.activations[i] == "recompute")
        return [(forward,), (sum(by_kind[kinds[layer]].backward for layer in segment.turned) + sum(again),)]

    def _fetched(self, costs: Costs, knobs: Knobs, batch: MicroBatchSize, segment: Segment) -> list[tuple[float, ...]]:
        """What comes up of weights beside a segment's forwards, and beside its backwards, less what a ring may hold."""
        bytes_of = costs.sizes.bytes_of_layers
        ups = {tier: costs.profile.up(tier) for tier in ("device", "host", "disk")}

        def fetched(layers: tuple[int, ...]) -> float:
            each = sorted(bytes_of[i] / ups[knobs.weights[i]] for i in layers if knobs.weights[i] != "resident")
            return sum(each[: max(0, len(each) - knobs.ring)])

        return [(fetched(segment.window),), (fetched(segment.turned),)]

    def _saved(self, costs: Costs, knobs: Knobs, batch: MicroBatchSize, segment: Segment) -> list[tuple[float, ...]]:
        """What comes up and goes down of pages and saved inputs beside a segment's forwards, and beside its backwards. A
        thing comes `prefetch` ops early, so as many may have come before the phase."""
        profile = costs.profile
        sent = [_moved_bytes(costs, knobs, batch, layer, segment) for layer in segment.turned[:-1]]
        down = sum(n_bytes / profile.down(tier) for n_bytes, tier in sent if n_bytes)
        back = sorted(n_bytes / profile.up(tier) for n_bytes, tier in sent if n_bytes)
        return [(0.0, down), (sum(back[: max(0, len(back) - max(0, knobs.prefetch - 1))]), 0.0)]

    # bytes

    def device_bytes(self, knobs: Knobs) -> int:
        """The least device bytes: what lives through the step, and the most that a segment needs where it turns round; or
        what is there when the run saves."""
        workload = self.workload
        own = knobs.gradients != "device" and knobs.apply != "layer"  # each group's gradients in a block of its own
        key: tuple[Any, ...] = ("steady", knobs.weights, knobs.states, own, knobs.head, knobs.prefetch, knobs.mlp_block)
        steady, saving = self._once(key, lambda: self._steady(workload.sizes(knobs), gradients_move=own))
        of_graphs = (knobs.activations, knobs.saved_inputs, knobs.prefetch)
        key = ("turning", *of_graphs, knobs.head, knobs.token_tile, knobs.mlp_block)
        moving, with_slack = self._once(key, lambda: self._turning(workload.sizes(knobs), knobs))
        slack = slack_bytes(workload.shape.device_type, moving)
        return max(steady + with_slack, saving) + slack + workload.library_bytes

    def _steady(self, sizes: Sizes, *, gradients_move: bool) -> tuple[int, int]:
        """What lives through the step, and what is there when the run saves (nothing is said where layers close)."""
        steady, saving_bytes = sizes.steady(self._segments, gradients_move=gradients_move), sizes.shape.kind.saving_bytes
        at_end = sum(kept_at_the_end(steady).values()) - sizes.ring_bytes + saving_bytes
        says = saving_bytes and not any(kind.closed for kind in self.workload.kinds)
        return sum(steady.values()), at_end if says else 0

    def host_bytes(self, knobs: Knobs) -> int:
        """The least bytes on the host."""
        return self._below_bytes(knobs, "host")

    def disk_bytes(self, knobs: Knobs) -> int:
        """The least bytes on the disk."""
        return self._below_bytes(knobs, "disk")

    def _below_bytes(self, knobs: Knobs, tier: str) -> int:
        """The bytes of a tier: what lies there through the step, and what a segment has there where it turns round."""
        sizes, segments = self.workload.sizes(knobs), self._segments
        key: tuple[Any, ...] = (tier, knobs.weights, knobs.states, "disk" in knobs.tiers)
        steady = self._once(key, lambda: sizes.persistent_below(segments)[tier])
        key = (f"{tier} turning", knobs.activations, knobs.saved_inputs, knobs.pages)
        return steady + self._once(key, lambda: self._turning_below(self._costs(knobs), knobs, tier))

    def _turning_below(self, costs: Costs, knobs: Knobs, wanted: str) -> int:
        batch, most = self.workload.batches[0], 0
        for segment in self._training:
            moved = (_moved_bytes(costs, knobs, batch, layer, segment) for layer in segment.turned[:-1])
            most = max(most, sum(n_bytes for n_bytes, tier in moved if tier == wanted))
        return most

    def _turning(self, sizes: Sizes, knobs: Knobs) -> tuple[int, int]:
        """The most that lives beside what is steady where a segment turns round, and the same with what the allocator keeps
        of it: in its loss, in its last layer's backward, and in that of the layer before it."""
        beside = sum(map(sizes.batch_bytes, self.workload.batches)) + sizes.layer_context_bytes(self.workload.batches[0])
        loads = [load for segment in self._training for load in self._loads(sizes, knobs, segment)]
        share = sizes.shape.kind.within_share
        kept = max(held + within + round(share * within) for held, within in loads)
        return beside + max(held + within for held, within in loads), beside + kept

    def _loads(self, sizes: Sizes, knobs: Knobs, segment: Segment) -> Iterator[tuple[int, int]]:
        """What a segment's ops hold when they begin, and what each takes on top: at least the hidden states or their
        gradient, and what the layers keep for their backward."""
        batch = self.workload.batches[0]
        hidden = sizes.hidden_bytes(batch)

        def graph_bytes(layer: int) -> int:
            graph = sizes.graph(batch, layer, segment)
            return graph.rest + (hidden if graph.holds_input else 0)

        def back(layer: int) -> int:
            """The bytes that come back from below for a layer's backward."""
            if knobs.activations[layer] == "page":
                return graph_bytes(layer)
            return hidden if knobs.activations[layer] == "recompute" and knobs.saved_inputs != "device" else 0

        def stays(layer: int) -> int:
            if knobs.activations[layer] == "recompute":
                return hidden if knobs.saved_inputs == "device" else 0
            return graph_bytes(layer) if knobs.activations[layer] == "keep" else 0

        *others, last = segment.turned
        coming = [back(layer) for layer in reversed(others)]  # each begins `prefetch` backwards before its own
        held = hidden + sum(map(stays, others))
        with_graph, aligns = held + graph_bytes(last), segment.loss == "align"
        yield with_graph, sizes.align_within(batch) if aligns else sizes.loss_within(batch, task=segment.reads_out)
        within = sizes.backward_within(batch, last, segment, kept=Keep.GRAPH, fresh=0)
        yield with_graph + sum(coming[: knobs.prefetch]), within
        if others:
            keep = {"keep": Keep.GRAPH, "recompute": Keep.INPUT, "page": Keep.PAGES}[knobs.activations[others[-1]]]
            within = sizes.backward_within(batch, others[-1], segment, kept=keep, fresh=0)
            yield held + sum(coming[: 1 + knobs.prefetch]), within
