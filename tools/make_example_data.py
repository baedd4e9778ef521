"""Writes examples/data: the fine-tuning rows and the retention text that go with examples/tiny-llama.

Rows are chats in the OpenAI form: the user gives a signature with its module, the assistant answers with the first
sentence of its docstring. docstrings-train.jsonl is made from files that the model was pretrained on (the text is
known, the question is new); docstrings-eval.jsonl and retention.txt from held-out files that it never saw.
preferences.jsonl has pairs: the first training rows, each with the answer of the row after it as the rejected one.

The rule it keeps: no sentence stands twice, none stands in both sets, and a held-out file gives either rows or retention
text. Choice and order follow a hash of the name, so a set is an even sample and the same Python version writes the same
bytes. Python 3.11.7's library wrote the committed files; their text is Python's own, under the PSF licence.

What it does not do: no tokenizer is applied, so no row is cut; the limits below are in characters.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from pathlib import Path

from stdlib_corpus import DocEntry, SourceFile, doc_entries, read_files

TRAIN_ROWS, EVAL_ROWS, PAIRS = 2400, 150, 200
RETENTION_BYTES = 80_000  # the last file may exceed it
RETENTION_FILE = range(2_000, 20_000)  # characters; several small files instead of one large one
SIGNATURE, SENTENCE = range(8, 200), range(20, 240)  # characters
SIGNATURE_IN_SENTENCE = re.compile(r"^\S*\(.*\)|->|>>>")  # an old docstring style that repeats the question


def by_hash(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def is_good(entry: DocEntry) -> bool:
    return (
        len(entry.signature) in SIGNATURE
        and len(entry.sentence) in SENTENCE
        and entry.sentence.isascii()
        and len(entry.sentence.split()) >= 4
        and not SIGNATURE_IN_SENTENCE.search(entry.sentence)
    )


def choose(files: list[SourceFile], count: int, used: set[str]) -> list[DocEntry]:
    """The chosen entries, at most `count`, whose sentence is not in `used`, to which theirs are added."""
    entries = [entry for file in files for entry in doc_entries(file) if is_good(entry)]
    chosen = []
    for entry in sorted(entries, key=lambda entry: by_hash(entry.signature)):
        if len(chosen) < count and entry.sentence not in used:
            used.add(entry.sentence)
            chosen.append(entry)
    return chosen


def retention_files(heldout: list[SourceFile]) -> list[SourceFile]:
    chosen, size = [], 0
    for file in sorted(heldout, key=lambda file: by_hash(file.module)):
        if len(file.text) in RETENTION_FILE and size < RETENTION_BYTES:
            chosen.append(file)
            size += len(file.text.encode())
    return chosen


def write_rows(entries: list[DocEntry], path: Path) -> None:
    lines = []
    for entry in entries:
        turns = ("user", entry.signature), ("assistant", entry.sentence)
        lines.append(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}) + "\n")
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


def write_pairs(entries: list[DocEntry], path: Path) -> None:
    lines = []
    for entry, other in zip(entries, [*entries[1:], entries[0]], strict=True):
        reply = {"prompt": ("user", entry.signature), "chosen": ("assistant", entry.sentence)}
        reply["rejected"] = ("assistant", other.sentence)
        row = {name: [{"role": role, "content": text}] for name, (role, text) in reply.items()}
        lines.append(json.dumps(row) + "\n")
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "examples" / "data")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)

    files = read_files()
    heldout = [file for file in files if file.heldout]
    retention = retention_files(heldout)
    used: set[str] = set()
    rows = {
        "docstrings-eval.jsonl": choose([file for file in heldout if file not in retention], EVAL_ROWS, used),
        "docstrings-train.jsonl": choose([file for file in files if not file.heldout], TRAIN_ROWS, used),
    }
    for name, entries in rows.items():
        write_rows(entries, options.output / name)
    write_pairs(rows["docstrings-train.jsonl"][:PAIRS], options.output / "preferences.jsonl")
    text = "\n\n".join(file.text for file in retention)
    (options.output / "retention.txt").write_text(text, encoding="utf-8", newline="\n")
    for path in sorted(options.output.iterdir()):
        print(f"{path}  {path.stat().st_size:,} bytes")
    print({name: len(entries) for name, entries in rows.items()}, [file.module for file in retention])


if __name__ == "__main__":
    main()
