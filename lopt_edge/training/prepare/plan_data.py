"""What a plan knows of a run's data: its lengths, so that the answer is in hours of this run (`plan`, `compare --equal`).

The rule: data that is named and can be read is read as `finetune` reads it, and refused as there; data that cannot be (the
model is a preset, so there is no tokenizer; the example's file is not there yet) is said not to be, and the plan is that of
the longest sequence. Without data nothing here loads torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lopt_edge.config.settings import Config
from lopt_edge.errors import InputError, InputErrors
from lopt_edge.plan.search.run_plan import RunPlan
from lopt_edge.planning.question import LargestStep
from lopt_edge.planning.worst_case import NOT_GIVEN, Question

if TYPE_CHECKING:
    from lopt_edge.data import Dataset
    from lopt_edge.planning.duration import Duration


@dataclass(frozen=True, eq=False)
class PlannedData:
    """The data of a plan: what trains and what is evaluated, or why it was not read."""

    train: Dataset | None = None
    evaluated: tuple[Dataset, ...] = ()
    mismatched: tuple[Dataset, ...] = ()  # replies that an objective compares with
    why_not: str = ""

    @property
    def largest(self) -> Callable[[Config], LargestStep] | None:
        """What finds the largest step of given settings; None without data."""
        if self.train is None:
            return None
        from lopt_edge.planning.from_data import largest_step

        return partial(largest_step, (self.train, *self.evaluated, *self.mismatched))

    def duration(self, asked: Question, found: RunPlan) -> Duration | None:
        """The predicted duration of the whole run; None without data."""
        if self.train is None or found.chosen is None:
            return None
        from lopt_edge.planning.duration import duration

        config, workload = asked.config, asked.search.workload
        order = (config.batch_size, config.grad_accum)
        return duration(
            config,
            workload,
            found.chosen.knobs,
            train=self.train,
            evaluated=self.evaluated,
            order=order,
            mismatched=self.mismatched,
        )

    def words(self, expected: Duration | None) -> Iterator[str]:
        """The sentences on how long the run takes, or why that is not known."""
        if self.why_not:
            yield self.why_not
        if expected is None:
            return
        from lopt_edge.planning.duration import in_words

        speed = f"{expected.n_tokens:,} tokens, {expected.tokens_per_second:,.0f} tokens/s"
        evaluations = f", {in_words(expected.eval_seconds)} of it evaluation" if expected.eval_seconds >= 1 else ""
        yield (
            f"your data: about {in_words(expected.seconds)} for {expected.n_steps:,} steps over "
            f"{expected.n_examples:,} examples ({speed}){evaluations}"
        )


def read_data(config: Config) -> PlannedData:
    """The data of these settings, read as `finetune` reads it. Raises InputError(s) for what is wrong in it."""
    if config.data == NOT_GIVEN:
        return PlannedData()
    if not Path(config.model).expanduser().exists():
        return PlannedData(
            why_not=f"{config.data} was not read, which takes a model with its tokenizer: the plan is for the "
            "longest sequences"
        )
    from lopt_edge.data.sources import sources_of

    try:
        sources_of(config.data)
    except InputError as error:  # an example's file that is still to come; finetune refuses what is wrong
        told = error.errors if isinstance(error, InputErrors) else [error]
        reason = "; ".join(f"{one.where}: {one.what}" for one in told)
        return PlannedData(why_not=f"the data was not read ({reason}): the plan is for the longest sequences")
    from lopt_edge.models.folder import find_model
    from lopt_edge.models.tokenizer import load_tokenizer
    from lopt_edge.planning.settings import longest_sequence
    from lopt_edge.training.prepare.read import mismatched_of, read_datasets

    source = find_model(config.model, tokenizer=config.tokenizer, lay_out=False)
    longest = longest_sequence(source.facts, config.max_seq_len, is_given="max_seq_len" in config.model_fields_set)
    tokenizer = load_tokenizer(source.path, say=lambda text: None)
    train, *others = read_datasets(config, tokenizer, vocab_size=source.facts.vocab_size, max_seq_len=longest)
    beside = tuple(mismatched_of(config, train, others[0]).values())
    return PlannedData(train, tuple(data for data in others if data is not None), beside)


def as_values(expected: Duration | None) -> dict[str, Any]:
    """The duration as plain values under "run", for --json; nothing where no data was read."""
    return {} if expected is None else {"run": {**asdict(expected), "seconds": expected.seconds}}
