"""Writes examples/study: the data of the study that compares fine-tuning methods on examples/tiny-llama.

Two tasks of different kind, as prompt/completion rows:
  broad   prompt: a sentence of Python's reference manual, completion: the sentence after it. The text is that of
          `help("topics")` (pydoc_data/topics.py), which the pretraining left out: English prose about grammar, another
          kind of text than the sources and docstrings that the model knows. Measured by the held-out loss.
  narrow  prompt: a def line, completion: the names of its parameters, without self, cls and defaults. Exactly one answer
          is right, so exact match means something; the untrained model never gives it.
retention.txt is held-out library source: ordinary text of the pretraining's kind, to see what a run forgets.

The rules it keeps:
- A topic or a module gives rows to one split only. In valid and test it gives 20 at most; its other rows are left out.
- No prompt stands twice. In broad no sentence of one split stands in another, on either side (topics quote each other),
  and none is taken that stands in a pretrained module (the debugger's topic and pdb.py share some).
- narrow-train is made from modules that the model was pretrained on (def lines known, question new); narrow-valid and
  narrow-test from held-out modules (stdlib_corpus.py), without the lines that some pretrained module has too. So no line
  can be remembered. Answers can: half of the held-out ones ("path") also answer some other line in train.
- A module gives either retention text or narrow rows. One seed and one Python version write the same bytes.

Measured with the committed configs (e2e, seed 0, one thread, 15 to 20 s): broad 4.80 -> 4.08 held out, retention 3.43 ->
3.60; narrow 7.20 -> 1.30, exact match 0 -> 51 of the first 100, retention 3.43 -> 4.37. Two of three narrow rows have one
name; of the 32 with two or three, 3 were right. Camel case from snake_case, and calls with keywords, stayed near 0.

The committed files are Python 3.11.7's, seed 0; its texts are Python's own, under the PSF licence. Another Python has
other texts, so a study reads the committed files and does not write them anew.

What it does not do: no tokenizer is applied; the limits below are in characters.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import itertools
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

from stdlib_corpus import SourceFile, read_files

TRAIN_ROWS, HELDOUT_ROWS = 1600, 120  # of each task; fewer where the texts give no more
SENTENCE = range(20, 240)
SENTENCE_END = re.compile(r"(?<=[a-z)\"*][.]) +(?=[A-Z])")
DEF_LINE = range(49)
PARAMETERS = range(1, 4)  # without self and cls
ROWS_OF_A_SOURCE = 20  # in valid and test, so that no single topic or module decides
RETENTION_BYTES = 24_000  # the last file is cut there, at a line's end
RETENTION_FILE = range(2_000, 20_000)


@dataclass(frozen=True)
class Row:
    source: str  # topic or module
    prompt: str
    completion: str


@dataclass(frozen=True)
class Splits:
    train: list[Row]
    valid: list[Row]
    test: list[Row]


def by_hash(seed: int, name: str) -> str:
    return hashlib.sha256(f"{seed} {name}".encode()).hexdigest()


def without_repeats(rows: Iterable[Row], *, seed: int) -> list[Row]:
    """The rows in the order of a hash; of rows with the same prompt the first one."""
    unique: dict[str, Row] = {}
    for row in rows:
        unique.setdefault(row.prompt, row)
    return sorted(unique.values(), key=lambda row: by_hash(seed, row.prompt))


def two_halves(rows: list[Row], *, seed: int, enough: int) -> tuple[list[Row], list[Row]]:
    """The rows in two halves: whole sources, in the order of a hash, to whichever half has fewer rows, until both have
    enough."""
    halves: tuple[list[Row], list[Row]] = ([], [])
    for source in sorted({row.source for row in rows}, key=lambda source: by_hash(seed, source)):
        smaller = min(halves, key=len)
        if len(smaller) < enough:
            smaller += [row for row in rows if row.source == source][:ROWS_OF_A_SOURCE]
    return halves


# broad ----------------------------------------------------------------------------------------------------------------


def is_prose(sentence: str) -> bool:
    letters = sum(character.isalpha() or character == " " for character in sentence)
    return (
        len(sentence) in SENTENCE
        and sentence.isascii()
        and sentence[0].isupper()
        and sentence.endswith((".", ".)"))
        and letters > 0.8 * len(sentence)
    )


def manual_rows(topic: str, text: str) -> list[Row]:
    """The sentences with their successors, where both are prose; not across a paragraph that is code or a table."""
    sentences = [s for paragraph in text.split("\n\n") for s in SENTENCE_END.split(" ".join(paragraph.split()))]
    return [
        Row(topic, first, f" {second}")
        for first, second in itertools.pairwise(sentences)
        if is_prose(first) and is_prose(second)
    ]


def sentences_of(rows: list[Row]) -> set[str]:
    return {row.prompt for row in rows} | {row.completion.strip() for row in rows}


class Text:
    """A text with single spaces, and whether a sentence stands in it: searched through only where each two words in a row
    inside the sentence are such two somewhere, which is seldom."""

    def __init__(self, words: list[str]) -> None:
        self.text, self.pairs = " ".join(words), set(itertools.pairwise(words))

    def __contains__(self, sentence: str) -> bool:
        whole = sentence.split(" ")[1:-1]  # of the first and last word the text may have more
        return all(pair in self.pairs for pair in itertools.pairwise(whole)) and sentence in self.text


def broad_splits(files: list[SourceFile], *, seed: int, train: int, heldout: int) -> Splits:
    pretrained = Text([word for file in files if not file.heldout for word in file.text.split()])
    found = (row for name, text in sorted(topics.items()) for row in manual_rows(name, text))
    new = (row for row in found if not any(sentence in pretrained for sentence in sentences_of([row])))
    rows = without_repeats(new, seed=seed)
    valid, test = two_halves(rows, seed=seed, enough=heldout)
    valid, test = valid[:heldout], test[:heldout]
    other = sentences_of(valid)
    test = [row for row in test if not sentences_of([row]) & other]
    other |= sentences_of(test)
    taken = {row.source for row in valid + test}
    rest = [row for row in rows if row.source not in taken and not sentences_of([row]) & other]
    return Splits(rest[:train], valid, test)


# narrow ---------------------------------------------------------------------------------------------------------------


def parameter_rows(file: SourceFile) -> list[Row]:
    """The file's functions of a plain parameter list: no stars, no annotations."""
    rows = []
    for node in ast.walk(ast.parse(file.text)):
        if not isinstance(node, ast.FunctionDef):
            continue
        listed = node.args
        line = f"def {node.name}({ast.unparse(listed)}):"
        names = [argument.arg for argument in listed.posonlyargs + listed.args if argument.arg not in ("self", "cls")]
        starred = listed.vararg or listed.kwarg or listed.kwonlyargs or listed.posonlyargs
        annotated = any(argument.annotation for argument in listed.args)
        if len(line) in DEF_LINE and line.isascii() and len(names) in PARAMETERS and not starred and not annotated:
            rows.append(Row(file.module, f"{line}\n#", f" {', '.join(names)}"))
    return rows


def narrow_splits(files: list[SourceFile], *, seed: int, train: int, heldout: int) -> Splits:
    """The splits of the narrow task; `files`: all but those that give retention text."""
    known = without_repeats((row for file in files if not file.heldout for row in parameter_rows(file)), seed=seed)
    prompts = {row.prompt for row in known}
    new = (row for file in files if file.heldout for row in parameter_rows(file) if row.prompt not in prompts)
    valid, test = two_halves(without_repeats(new, seed=seed), seed=seed, enough=heldout)
    return Splits(known[:train], valid[:heldout], test[:heldout])


# retention and files --------------------------------------------------------------------------------------------------


def retention_files(files: list[SourceFile], *, seed: int) -> list[SourceFile]:
    chosen, size = [], 0
    for file in sorted(files, key=lambda file: by_hash(seed, file.module)):
        if file.heldout and file.text.isascii() and len(file.text) in RETENTION_FILE and size < RETENTION_BYTES:
            chosen.append(file)
            size += len(file.text)
    return chosen


def write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def write_splits(folder: Path, task: str, splits: Splits) -> None:
    for name, rows in (("train", splits.train), ("valid", splits.valid), ("test", splits.test)):
        lines = [json.dumps({"prompt": row.prompt, "completion": row.completion}) + "\n" for row in rows]
        write_text(folder / f"{task}-{name}.jsonl", "".join(lines))
        sources = len({row.source for row in rows})
        print(f"{task}-{name}: {len(rows)} rows from {sources} {'topics' if task == 'broad' else 'modules'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "examples" / "study")
    parser.add_argument("--seed", type=int, default=0, help="chooses rows and who goes into valid and test")
    parser.add_argument("--train-rows", type=int, default=TRAIN_ROWS, help="at most so many in each task")
    parser.add_argument("--heldout-rows", type=int, default=HELDOUT_ROWS, help="at most so many in each valid and test")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    sizes = {"train": options.train_rows, "heldout": options.heldout_rows}

    files = read_files()
    retention = retention_files(files, seed=options.seed)
    rest = [file for file in files if file not in retention]
    write_splits(options.output, "broad", broad_splits(files, seed=options.seed, **sizes))
    write_splits(options.output, "narrow", narrow_splits(rest, seed=options.seed, **sizes))
    text = "\n\n".join(file.text for file in retention)[:RETENTION_BYTES]
    write_text(options.output / "retention.txt", text[: text.rindex("\n") + 1])
    print("retention:", ", ".join(file.module for file in retention))
    for path in sorted(options.output.glob("*.*")):
        print(f"{path}  {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
