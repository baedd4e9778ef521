"""The texts on which an exported model is compared: a few held-out rows of the run, or a fixed text.

Rows of the run's own kind say most about what it was trained for. They are read anew as the run read them, and taken only
if the part that trained is the same as then, so that what is called held-out was held out. An adapter from elsewhere, a run
without held-out rows, data that moved or changed: then the fixed text, and the reason is told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lopt_edge.adapters.base import run_of
from lopt_edge.data import READ_SETTINGS, Dataset, load_dataset, split
from lopt_edge.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE_TEXT = (
    "The committee met on Tuesday to decide how the river should be crossed. Two engineers had drawn a bridge of stone; a "
    "third, younger, wanted steel. def area(width, height): return width * height. In 1931 the price of bread doubled."
)
N_ROWS, N_TOKENS = 4, 128  # logits of a row of 128 tokens and a vocabulary of 150,000 are 77 MB


@dataclass(frozen=True)
class Probe:
    """Token ids to compare on, and where they come from."""

    rows: tuple[tuple[int, ...], ...]
    source: str

    @property
    def n_tokens(self) -> int:
        """The number of tokens of all rows."""
        return sum(map(len, self.rows))


def probe_of(adapter: Path, tokenizer: PreTrainedTokenizerBase) -> Probe:
    """The probe of a run's output folder; `tokenizer` has the template that the run used."""
    held_out, why = _held_out(run_of(adapter), tokenizer)
    if held_out is None:
        return Probe((tuple(tokenizer(PROBE_TEXT)["input_ids"][:N_TOKENS]),), f"a fixed text ({why})")
    rows = [tuple(example.input_ids)[:N_TOKENS] for example in held_out.examples[:N_ROWS]]
    return Probe(tuple(rows), f"{len(rows)} held-out rows of {why}")


def _held_out(run: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[Dataset | None, str]:
    """The held-out data of a run and its file; or nothing, and why."""
    config, kept = run.get("config"), run.get("data")
    if not isinstance(config, dict) or not isinstance(kept, dict):
        return None, "the folder has no run.json of a run"
    name = config.get("eval_data") or (config.get("data") if config.get("eval_fraction") else None)
    if not name:
        return None, "the run had no held-out rows"
    try:
        found = load_dataset(
            Path(name),
            tokenizer,
            max_seq_len=min(config["max_seq_len"], run["model"].get("max_positions") or config["max_seq_len"]),
            data_format=config.get("data_format"),
            **{name: config[name] for name in READ_SETTINGS if name in config},
        )
        if not config.get("eval_data"):
            train, found = split(found, fraction=config["eval_fraction"], seed=config["seed"])
            if train.fingerprint != kept.get("fingerprint"):
                return None, f"{name} is not what the run read"
    except (InputError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:  # run.json may say anything
        return None, f"{name} cannot be read as the run read it: {_first_line(error)}"
    return found, str(name)


def _first_line(error: Exception) -> str:
    lines: Sequence[str] = str(error).splitlines()
    return lines[0][:200] if lines else type(error).__name__
