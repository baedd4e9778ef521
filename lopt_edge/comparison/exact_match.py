"""How often a finished run's greedy completion is the reference, to the letter: `python -m
lopt_edge.comparison.exact_match`.

Of the first N rows of a data file, each with a prompt and a reference: a prompt/completion row, or a conversation, whose
last reply is the reference. Both sides are stripped of white space at their ends; nothing else is forgiven. The model, its
dtype and its template are those of the run. The whole 4-bit model stays in memory while it writes, whatever budget the
run had. `questions` needs no torch, so that a file that cannot be asked is refused before anything runs.

Not here: other measures than equality, and speed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

from lopt_edge.config.load import load_config
from lopt_edge.data import Conversation, Preference, PromptCompletion, detect_format, to_rows
from lopt_edge.data.formats import DataFormat
from lopt_edge.data.renamed import Renamed, mapping_of
from lopt_edge.data.sources import sources_of
from lopt_edge.errors import InputError
from lopt_edge.system.files import write_json

if TYPE_CHECKING:
    from lopt_edge.adapters.generation import TextGenerator

Question = tuple[str | Conversation, str]  # a text to continue or a conversation to answer, the reference


def questions(path: str, n_rows: int, data_format: DataFormat | None, *, columns: Iterable[str] = ()) -> list[Question]:
    """The prompts and references of a data file's first rows, `columns` (ours=theirs) under our names. Raises InputError
    where rows have no reference."""
    mapping = mapping_of(columns)
    sources = [Renamed(source.records(), mapping, name=path) for source in sources_of(path)]
    records = list(islice(chain.from_iterable(source.records for source in sources), n_rows))
    for theirs in mapping if records else ():
        if all(theirs in source.missing for source in sources):
            raise sources[0].no_such_column(theirs)
    found: list[Question] = []
    for row in to_rows(records, data_format=data_format or detect_format(records)[0]):
        if isinstance(row, PromptCompletion):
            found.append((row.prompt, row.completion))
        elif isinstance(row, Conversation):
            last = row.targets[-1]
            found.append((replace(row, messages=row.messages[:last]), row.messages[last].content))
        else:
            kind = "is a preference" if isinstance(row, Preference) else "has plain text"
            raise InputError(f"{kind}: no completion to compare with", where=row.where, fix="leave out --exact-match")
    return found


def count_matches(folder: Path, path: str, n_rows: int) -> dict[str, object]:
    """The count of completions that are the reference, by the adapter of a run's output folder."""
    from lopt_edge.adapters.generation import load_generator

    config = load_config(folder / "config.yaml")
    asked = questions(path, n_rows, config.data_format, columns=config.columns or ())
    generator = load_generator(
        config.model,
        str(folder),
        revision=config.revision,
        cache_dir=config.cache_dir,
        device=config.device,
        compute_dtype=config.compute_dtype,
        chat_template=config.chat_template,
    )
    return {"data": path, "asked": n_rows, "rows": len(asked), "matches": matches_of(generator, asked)}


def matches_of(generator: TextGenerator, asked: Sequence[Question]) -> int:
    """How many greedy completions are the reference."""
    from lopt_edge.adapters.generation import Sampling

    matches = 0
    for prompt, reference in asked:
        n_tokens = len(generator.tokenizer(reference, add_special_tokens=False)["input_ids"])
        sampling = Sampling(max_new_tokens=2 * n_tokens + 16)  # what is longer is no match, however it is split into tokens
        reply = (
            generator.continue_text(prompt, sampling)
            if isinstance(prompt, str)
            else generator.reply(prompt.messages, sampling, tools=prompt.tools)
        )
        matches += reply.strip() == reference.strip()
    return matches


def main(words: Sequence[str]) -> None:
    """Count the matches; the words are RUN-FOLDER DATA-FILE N RESULT.json."""
    folder, path, n_rows, target = words
    found = count_matches(Path(folder), path, int(n_rows))
    write_json(Path(target), found)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        sys.exit(f"error: {error}")
