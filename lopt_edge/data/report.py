"""What `lopt-edge data check` shows: the data as the model will see it.

Rule: what is trained on must be visible without colour, so targets stand in ⟦...⟧ as well as in green. Text from the
file is never read as markup, and its control characters are shown, not sent to the terminal.

Nothing is decided here; the figures are those of the `Dataset`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lopt_edge.data.dataset import Dataset
from lopt_edge.data.encode import Example
from quant.untrusted import printable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPEN, CLOSE = "⟦", "⟧"
SHOWN_TOKENS = 400  # of one example; the rest is counted
BINS, BAR = 8, 40
LONGEST_PLACE = 40  # letters of a panel's title


def check_facts(dataset: Dataset) -> dict[str, Any]:
    """The figures of the report as plain values (for --json and tests)."""
    lengths = dataset.lengths
    return {
        "format": dataset.format,
        "format_reason": dataset.reason,
        "template": dataset.template_reason,
        "max_seq_len": dataset.max_seq_len,
        "rows": dataset.n_rows,
        "examples": len(lengths),
        "truncated": dataset.n_truncated,
        "dropped": dataset.n_dropped,
        "last_turn_only": dataset.n_last_turn_only,
        "tokens": dataset.n_tokens,
        "supervised_tokens": dataset.n_supervised,
        "length_min": min(lengths),
        "length_median": median(lengths),
        "length_max": max(lengths),
        "fingerprint": dataset.fingerprint,
        "preferences": dataset.preferences,
        "preferred": sum(dataset.labels),
        "unused_columns": [*dataset.unused_columns],
        "ignored_columns": [*dataset.ignored_columns],
        "notes": [{"what": note.what, "rows": note.n_rows, "first": [*note.places]} for note in dataset.notes],
    }


def check_report(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, n_examples: int = 3) -> RenderableType:
    """The report for people: format, figures, length histogram and the first examples with their targets marked."""
    parts: list[RenderableType] = [_figures(dataset), Text("\nLengths in tokens"), _histogram(dataset.lengths)]
    shown = dataset.examples[: max(n_examples, 2 * dataset.together)]  # two pairs, where there are pairs
    if shown:
        legend = Text("\nThe first examples; ")
        what = "the replies that are compared" if dataset.labels else "what the model learns to write"
        legend.append(f"{OPEN}{what}{CLOSE}", style="green").append(f" {'are' if dataset.labels else 'is'} marked:")
        parts.append(legend)
    for index, example in enumerate(shown):
        label = f"{_label(dataset, index)}, " if dataset.labels else ""
        title = Text(printable(f"{_tail(example.where)}: {label}{len(example)} tokens, {example.n_supervised} supervised"))
        if example.truncated:
            title.append(", truncated", style="yellow")
        parts.append(Panel(_marked(example, tokenizer), title=title, title_align="left"))
    return Group(*parts)


def _label(dataset: Dataset, index: int) -> str:
    """What an example is among the preferences."""
    words = ("rejected", "chosen") if dataset.preferences == "pairs" else ("undesirable", "desirable")
    return words[dataset.labels[index]]


def _preferred(dataset: Dataset) -> str:
    """The counts of what is preferred."""
    pairs, n_preferred = dataset.preferences == "pairs", sum(dataset.labels)
    sums = [sum(one.n_supervised for one, label in zip(dataset.examples, dataset.labels, strict=True) if label is which)
            for which in (True, False)]  # fmt: skip
    what = f"{n_preferred:,} pairs" if pairs else f"{n_preferred:,} desirable, {len(dataset.labels) - n_preferred:,} not"
    first, second = ("chosen", "rejected") if pairs else ("desirable", "undesirable")
    return f"{what}; {sums[0]:,} supervised tokens {first}, {sums[1]:,} {second}"


def _tail(where: str) -> str:
    """The end of a place, which tells rows apart: a long path would push the figures out of a panel's title."""
    return where if len(where) <= LONGEST_PLACE else f"…{where[1 - LONGEST_PLACE :]}"


def _figures(dataset: Dataset) -> Table:
    facts = check_facts(dataset)
    table = Table.grid(padding=(0, 2))
    supervised_share = 100 * facts["supervised_tokens"] / facts["tokens"]
    rows = [
        ("format", f"{facts['format']} ({facts['format_reason']})"),
        ("chat template", facts["template"]),
        ("rows", f"{facts['rows']:,} -> {facts['examples']:,} examples"),
        ("truncated", f"{facts['truncated']:,} examples cut at {facts['max_seq_len']:,} tokens"),
        ("dropped", f"{facts['dropped']:,} rows with no token to learn from"),
        ("tokens", f"{facts['tokens']:,}, of them {facts['supervised_tokens']:,} supervised ({supervised_share:.1f}%)"),
    ]
    if dataset.labels:
        rows.append(("preferences", _preferred(dataset)))
    if facts["last_turn_only"]:
        rows.append(("last turn only", f"{facts['last_turn_only']:,} examples"))
    if dataset.unused_columns:
        rows.append(("not used", ", ".join(dataset.unused_columns) + " (known to hold nothing to learn)"))
    if dataset.ignored_columns:
        rows.append(("ignored", ", ".join(dataset.ignored_columns) + " (--ignore-columns)"))
    for name, value in rows:
        table.add_row(Text(name, style="bold"), Text(printable(value)))
    for note in dataset.notes:
        table.add_row(Text("note", style="bold yellow"), Text(printable(note.text())))
    return table


def _histogram(lengths: Sequence[int]) -> Table:
    """The lengths in equal bins from the shortest to the longest; a bin that is not empty has a bar."""
    low, high = min(lengths), max(lengths)
    width = max(-(-(high - low + 1) // BINS), 1)
    counts = [0] * (-(-(high - low + 1) // width))
    for length in lengths:
        counts[(length - low) // width] += 1
    table = Table.grid(padding=(0, 1))
    table.add_column(justify="right", no_wrap=True)
    table.add_column()
    table.add_column(justify="right", no_wrap=True)
    for index, count in enumerate(counts):
        first = low + index * width
        bar = "█" * max(round(BAR * count / max(counts)), count > 0)
        table.add_row(f"{first} - {min(first + width - 1, high)}", bar, f"{count:,}")
    return table


def _marked(example: Example, tokenizer: PreTrainedTokenizerBase) -> Text:
    text = Text()
    for piece, supervised in marked_pieces(example, tokenizer, limit=SHOWN_TOKENS):
        shown = printable(piece)
        text.append(f"{OPEN}{shown}{CLOSE}" if supervised else shown, style="green" if supervised else "")
    if len(example) > SHOWN_TOKENS:
        text.append(f" ... and {len(example) - SHOWN_TOKENS:,} more tokens", style="dim")
    return text


def marked_pieces(
    example: Example, tokenizer: PreTrainedTokenizerBase, *, limit: int | None = None
) -> Iterator[tuple[str, bool]]:
    """The runs of an example, as (text, whether it is a target).

    A run is the difference of two decoded prefixes: decoded alone, a SentencePiece run would lose its leading blank.
    """
    ids = example.input_ids.tolist()[:limit]
    done, before = 0, ""
    for supervised, run in groupby(example.supervised[: len(ids)]):
        done += len(list(run))
        upto = tokenizer.decode(ids[:done], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(upto, str)  # one sequence in, one text out
        yield upto[len(before) :], bool(supervised)
        before = upto
