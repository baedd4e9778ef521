"""How a step's sequences become micro-batches: padded, or packed into rows; how large those are, and which is faster.

Packing lays several short sequences into one row, one after the other, without attention across them
(run/model/sequences.py). A step has the same sequences either way, `batch_size x grad_accum` of them, so its loss and
gradients are equal up to rounding (design law 5); what changes is how many micro-batches there are, and that none has
padding. So the planner may choose: where the settings do not say, the faster of the two on a few windows of the data is
taken, each with its own best memory settings. Rows are as long as the longest sequence, which takes no more memory than
that one alone, or as `row_tokens` (else `max_seq_len`) says. A gain below MARGIN is none: predictions are not that exact.

It reads lengths only. No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from heapq import nlargest
from statistics import mean
from typing import TypeVar

from lopt_edge.config.settings import Config
from lopt_edge.data import Dataset, Example, Window, epoch_windows, packed_window, split_window
from lopt_edge.plan.costs.sizes import MicroBatchSize
from lopt_edge.plan.facts.budget import Budget
from lopt_edge.plan.facts.model import ModelFacts
from lopt_edge.plan.schedule.knobs import Knobs
from lopt_edge.plan.schedule.ranks import largest_share
from lopt_edge.plan.search.search import Candidate, Search
from lopt_edge.plan.search.workload import Workload
from lopt_edge.planning.settings import settled

MARGIN = 0.95  # of the unpacked seconds: more are no gain
N_COMPARED = 4  # windows on which the two are compared
Asked = TypeVar("Asked")


def micro_batches(window: Window, dataset: Dataset, config: Config, facts: ModelFacts) -> Window:
    """The window's sequences in the micro-batches that these settings say."""
    if not config.packing:
        return split_window(window, config.batch_size * dataset.together)
    row_tokens = config.row_tokens or config.max_seq_len
    return packed_window(window, dataset.lengths, row_tokens=row_tokens, alone_from=facts.rotary_turn)


def size_of(examples: Sequence[Example], *, packed: bool, scored: int = 0) -> MicroBatchSize:
    """The size of a micro-batch of these examples; `scored` as a MicroBatchSize has it."""
    lengths = [len(example) for example in examples]
    n_supervised = sum(example.n_supervised for example in examples)
    if packed:
        return MicroBatchSize(1, sum(lengths), n_supervised, in_a_row=tuple(lengths), scored=scored)
    return MicroBatchSize(len(lengths), max(lengths), n_supervised, padded=min(lengths) < max(lengths), scored=scored)


def sizes_of(train: Dataset, window: Window, *, packed: bool) -> tuple[MicroBatchSize, ...]:
    """The sizes of a window's micro-batches, the longest first, as the workload wants them."""
    scored = train.together if train.labels else 0
    found = [size_of([train.examples[index] for index in batch], packed=packed, scored=scored) for batch in window]
    return tuple(sorted(found, key=lambda size: -size.n_rows))


def largest_rows(dataset: Dataset, *, row_tokens: int, n_sequences: int | None = None) -> list[MicroBatchSize]:
    """The rows of the longest `n_sequences` examples (None: of all), the largest first.

    No row of any window takes more than the first one, which is made as long as any may be.
    """
    order = nlargest(n_sequences or len(dataset.examples), range(len(dataset.examples)), key=dataset.lengths.__getitem__)
    rows = packed_window((tuple(order),), dataset.lengths, row_tokens=row_tokens)
    sizes = sizes_of(dataset, rows, packed=True)
    longest = dataset.lengths[order[0]]
    n_tokens = min(max(row_tokens, longest), sum(dataset.lengths[index] for index in order))
    most = nlargest(len(order), dataset.target_counts)
    first = replace(sizes[0], n_tokens=n_tokens, n_supervised=min(n_tokens, sum(most)), in_a_row=(longest,))
    return [first, *sizes[1:]]


def some_windows(train: Dataset, config: Config, *, order: tuple[int, int], n_windows: int) -> tuple[list[Window], int]:
    """A few windows of the first epoch, evenly spaced, and the number of all; `order`: batch_size and grad_accum."""
    windows = epoch_windows(
        train.lengths, seed=config.seed, epoch=0, batch_size=order[0], grad_accum=order[1], together=train.together
    )
    n_windows = min(n_windows, len(windows))
    return [windows[round(at * (len(windows) - 1) / max(1, n_windows - 1))] for at in range(n_windows)], len(windows)


def mean_seconds(config: Config, workload: Workload, knobs: Knobs, train: Dataset, windows: Sequence[Window]) -> float:
    """The mean of the seconds that steps over these windows take."""
    facts, packed = workload.shape.facts, bool(config.packing)

    def seconds(window: Window) -> float:
        sizes = sizes_of(train, micro_batches(window, train, config, facts), packed=packed)
        return replace(workload, batches=tuple(largest_share(sizes, config.ranks))).seconds(knobs).seconds

    return mean(map(seconds, windows))


def settled_on_data(
    config: Config,
    facts: ModelFacts,
    train: Dataset | None,
    *,
    ask: Callable[[Config], tuple[Asked, Candidate | None]],
    parts: Callable[[Asked], tuple[Config, Search]],
    budget: Budget,
) -> Asked:
    """The variant to run, packed or not; `ask` gives each with its best candidate, `parts` what is in an answer."""
    rows = _row_lengths(config, facts, train)
    if config.packing:
        config = config.model_copy(update={"row_tokens": min(rows, default=config.row_tokens or config.max_seq_len)})
    first = settled(config, facts, ask)
    settings, search = parts(first)
    if train is None or not rows:
        return first
    order = settings.batch_size, settings.grad_accum
    windows, _ = some_windows(train, config, order=order, n_windows=N_COMPARED)

    def timed() -> Iterator[tuple[float, Asked]]:
        if (best := search.within(budget).best) is not None:
            seconds = mean_seconds(settings, search.workload, best.knobs, train, windows)
            yield seconds * (1 if config.packing else MARGIN), first
        for row_tokens in rows:
            variant = settings.model_copy(update={"packing": True, "row_tokens": row_tokens})
            if (variant.packing, variant.row_tokens) != (settings.packing, settings.row_tokens):
                answer, best = ask(variant)
                if best is not None:
                    yield mean_seconds(variant, parts(answer)[1].workload, best.knobs, train, windows), answer

    return min(timed(), key=lambda pair: pair[0], default=(0.0, first))[1]


def _row_lengths(config: Config, facts: ModelFacts, train: Dataset | None) -> list[int]:
    """The lengths of rows to choose from, the shortest first; none where nothing is packed."""
    n_sequences = config.batch_size * config.grad_accum
    if (
        facts.own_family is not None
        or train is None
        or config.packing is False
        or n_sequences == 1
        or config.apply == "layer"
        or train.together > 1
    ):
        return []
    if config.row_tokens:
        return [config.row_tokens]
    lengths = sorted(train.lengths, reverse=True)[:n_sequences]
    return sorted({lengths[0], min(max(config.max_seq_len, lengths[0]), sum(lengths))})


def chosen_packing(asked: Config, found: Config) -> Iterator[str]:
    """A sentence on packing, where sequences are packed."""
    if found.packing:
        why = "as asked" if asked.packing else "predicted to be faster; --no-packing leaves it"
        yield f"packed: a step's sequences lie in rows of at most {found.row_tokens} tokens ({why})"
