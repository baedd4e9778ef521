"""A data file as a tuple of examples, with all that was counted and decided on the way.

Rule: what is lost is counted (truncated, dropped, rows of which only the last turn could be used), every automatic
choice carries its reason, and a file that would train nothing is refused instead of giving a loss of 0.0. The
fingerprint is a hash of ids and masks in order, so a checkpoint can tell that a resumed run sees the same data.

Not here: the order of an epoch (`order`), and any knowledge of tensors.
"""

from __future__ import annotations

import hashlib
import random
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lopt_edge.data.columns import Columns
from lopt_edge.data.encode import Example, RowEncoder
from lopt_edge.data.formats import DataFormat, detect_format
from lopt_edge.data.notes import Note, Notes
from lopt_edge.data.preferences import Wanted, mismatched, preferences_of, put_together, taken_apart
from lopt_edge.data.renamed import mapping_of
from lopt_edge.data.rows import Preferences
from lopt_edge.data.stored import LAST_TURN_ONLY, TRUNCATED, Gathered, StoredExamples, some_of, where_those_are
from lopt_edge.data.streamed import HowRead, SoundRows
from lopt_edge.data.template import ChatTemplate, load_template
from lopt_edge.data.thoughts import Think
from lopt_edge.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Dataset:
    """A data set: encoded examples in file order. `n_dropped` counts the rows of which no example is left.

    `labels` say of each example whether it is preferred, where the rows are preferences; of pairs the chosen example comes
    first, then the rejected one.
    """

    examples: Sequence[Example]
    format: DataFormat
    reason: str
    template: ChatTemplate | None  # None where no row is a conversation
    template_reason: str
    max_seq_len: int
    n_rows: int
    n_dropped: int
    fingerprint: str
    notes: tuple[Note, ...] = ()
    unused_columns: tuple[str, ...] = ()  # known to hold nothing to learn
    ignored_columns: tuple[str, ...] = ()  # named by --ignore-columns
    missing_columns: tuple[str, ...] = ()  # named by it, and in no row
    preferences: Preferences = "none"
    labels: tuple[bool, ...] = ()

    @property
    def together(self) -> int:
        """How many examples belong together: they share a micro-batch."""
        return 2 if self.preferences == "pairs" else 1

    @property
    def n_units(self) -> int:
        """The number of what a step counts: pairs, or single examples."""
        return len(self.examples) // self.together

    @cached_property
    def lengths(self) -> Sequence[int]:
        """The number of tokens of each example."""
        stored = self.examples
        return stored.lengths if isinstance(stored, StoredExamples) else tuple(len(example) for example in stored)

    @cached_property
    def target_counts(self) -> Sequence[int]:
        """The number of targets of each example."""
        stored = self.examples
        return stored.target_counts if isinstance(stored, StoredExamples) else tuple(one.n_supervised for one in stored)

    @property
    def largest_id(self) -> int:
        """A number that no token's id is above."""
        stored = self.examples
        if isinstance(stored, StoredExamples):
            return stored.store.largest_id
        return max((max(example.input_ids) for example in stored), default=0)

    @property
    def n_tokens(self) -> int:
        """The number of tokens of all examples."""
        return sum(self.lengths)

    @property
    def n_supervised(self) -> int:
        """The number of targets of all examples."""
        return sum(self.target_counts)

    @property
    def n_truncated(self) -> int:
        stored = self.examples
        return stored.count(TRUNCATED) if isinstance(stored, StoredExamples) else sum(one.truncated for one in stored)

    @property
    def n_last_turn_only(self) -> int:
        stored = self.examples
        if isinstance(stored, StoredExamples):
            return stored.count(LAST_TURN_ONLY)
        return sum(example.last_turn_only for example in stored)


READ_SETTINGS = ("think", "escape_special_tokens", "ignore_columns", "columns")  # of a run, beside format and template


def load_dataset(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_seq_len: int,
    data_format: DataFormat | None = None,
    chat_template: str | Path | None = None,
    think: Think | None = None,
    escape_special_tokens: bool = False,
    ignore_columns: Iterable[str] | None = None,
    columns: Iterable[str] | None = None,
    preferences: Wanted = "none",
) -> Dataset:
    """Read, detect, normalise, render and encode the data that `path` names (sources.py). Raises InputError(s).

    `preferences`: what the run's objective asks of the rows beside their text.
    """
    notes, fields = Notes(), Columns(ignore_columns or (), is_named=data_format is not None)
    detect = partial(detect_format, preferred=preferences != "none", ignored=tuple(ignore_columns or ()))
    rows = SoundRows(str(path), HowRead(data_format, mapping_of(columns or ()), detect), fields, notes)
    form = preferences_of(rows.formats, preferences, names=[source.text for source in rows.sources])
    template, template_reason = _template_for(rows.conversations, rows.tools, tokenizer, chat_template)
    how: dict[str, Any] = {"think": think, "escape": escape_special_tokens, "notes": notes}
    encoder = RowEncoder(tokenizer, template=template, max_seq_len=max_seq_len, **how)
    gathered = Gathered(in_file=rows.are_many)
    for some in rows.few():
        for found in put_together(some, encoder.encode(taken_apart(some)), form, notes):
            gathered.add(found)
    encoder.finish()
    if not gathered.labels:
        raise InputError(
            f"no token to learn from is left within {max_seq_len} tokens ({gathered.n_rows} rows, all dropped)",
            where=str(path),
            fix="raise --max-seq-len, or shorten the prompts so that the replies fit",
        )
    examples, labels = _ordered(gathered, form, of_pairs="preference" in rows.formats)
    return Dataset(
        examples=examples,
        format=rows.formats[0],
        reason=rows.reason,
        template=template,
        template_reason=template_reason,
        max_seq_len=max_seq_len,
        n_rows=gathered.n_rows,
        n_dropped=gathered.n_dropped,
        fingerprint=fingerprint_of(examples, labels),
        notes=notes.all(),
        unused_columns=fields.unused,
        ignored_columns=fields.ignored,
        missing_columns=fields.without_effect,
        preferences=form,
        labels=labels,
    )


def _ordered(gathered: Gathered, form: Preferences, *, of_pairs: bool) -> tuple[Sequence[Example], tuple[bool, ...]]:
    """The examples and their labels (none without preferences): where pairs serve as labels, first all chosen ones."""
    examples, labels = gathered.examples(), gathered.labels
    if form == "none":
        return examples, ()
    if form == "labels" and of_pairs:
        order = array("I", (index for label in (1, 0) for index in range(len(labels)) if labels[index] == label))
        examples, labels = some_of(examples, order), bytearray(sorted(labels, reverse=True))
    return examples, tuple(map(bool, labels))


def split(dataset: Dataset, *, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """The (train, held out) parts: a seeded choice of about `fraction` of the examples (or pairs), both in file order."""
    count = dataset.n_units
    if not 0 < fraction < 1:
        raise InputError(f"{fraction} is not between 0 and 1", where="eval-fraction", fix="use a value such as 0.1")
    if count < 2:
        fix = "give more data, or held-out data of its own with --eval-data"
        raise InputError("one example cannot be split in two", where="eval-fraction", fix=fix)
    n_held_out = min(max(round(count * fraction), 1), count - 1)
    held_out = set(random.Random(f"split {seed}").sample(range(count), n_held_out))
    parts = array("I"), array("I")
    for index in range(len(dataset.examples)):
        parts[index // dataset.together in held_out].append(index)
    return _part(dataset, parts[0], name="train"), _part(dataset, parts[1], name="held-out")


def mismatched_part(dataset: Dataset) -> Dataset:
    """A data set of the same prompts, each with another row's reply (preferences.py)."""
    found = mismatched(dataset.examples, max_seq_len=dataset.max_seq_len)
    examples = where_those_are(dataset.examples, found)
    return replace(
        dataset, examples=examples, preferences="none", labels=(), fingerprint=fingerprint_of(examples), notes=()
    )


def fingerprint_of(examples: Sequence[Example], labels: Sequence[bool] = ()) -> str:
    """The SHA-256 over the ids and masks of all examples, in order, and over their labels where they have some."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(len(example).to_bytes(8, "little"))
        digest.update(example.input_ids.tobytes())
        digest.update(example.supervised)
    digest.update(bytes(labels))
    return digest.hexdigest()


def _part(dataset: Dataset, indices: Sequence[int], *, name: str) -> Dataset:
    examples = some_of(dataset.examples, indices)
    labels = tuple(dataset.labels[index] for index in indices) if dataset.labels else ()
    return replace(
        dataset,
        examples=examples,
        labels=labels,
        reason=f"{dataset.reason}; {name} part of a seeded split",
        n_rows=examples.n_rows if isinstance(examples, StoredExamples) else len({one.where for one in examples}),
        n_dropped=0,
        fingerprint=fingerprint_of(examples, labels),
    )


def _template_for(
    conversations: bool, tools: bool, tokenizer: PreTrainedTokenizerBase, override: str | Path | None
) -> tuple[ChatTemplate | None, str]:
    """The template, for data that holds conversations, some of them with tools."""
    if conversations:
        return load_template(tokenizer, override, for_tools=tools)
    if override is not None:
        return None, "not used: this data holds no conversations, so --chat-template has no effect"
    return None, "not used: this data holds no conversations"
