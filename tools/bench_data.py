"""Measures what reading data takes in memory: the peak of a process that reads, encodes, splits and orders a data set.

    python tools/bench_data.py --mib 2048 --way rows
    python tools/bench_data.py --mib 256 --way mixture --way pairs --way rows-at-once

The rule: a data set is written to a folder (and removed), then read by `load_dataset` in a process of its own, as
`finetune` does it: a part is split off, the first epoch is put in order and some examples are read. The peak is the
resident set's (VmHWM), taken after a small data set was read, so libraries and tokenizer are not in `growth_bytes`. Rows
are of about `--row-bytes` bytes. Seconds are processor time.

    rows            prompts with completions in one .jsonl file
    rows-at-once    the same, kept in memory whatever their size, as small data sets are
    mixture         two .jsonl.gz files with weights and renamed columns
    parquet         the same rows in a Parquet file, a row group per 10,000
    pairs           preferences, for dpo

Rows are appended to tools/results/data.csv. It measures no training.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "tools" / "results" / "data.csv"
WAYS = ("rows", "rows-at-once", "mixture", "parquet", "pairs")
COLUMNS = (
    "date", "hardware", "versions", "commit", "way", "text_bytes", "rows", "examples", "tokens", "before_bytes",
    "peak_bytes", "growth_bytes", "growth_per_text_byte", "growth_per_example", "cpu_seconds", "fingerprint",
)  # fmt: skip
WORDS = (
    "lathe",
    "harbour",
    "kettle",
    "signal",
    "orchard",
    "ledger",
    "valve",
    "meadow",
    "pewter",
    "cobalt",
    "ferry",
    "quarry",
)


def texts(n_bytes: int, row_bytes: int) -> Iterator[str]:
    """Texts of together so many bytes, of half to one and a half times `row_bytes`; the same for the same numbers."""
    source = random.Random(0)
    while n_bytes > 0:
        length = source.randint(row_bytes // 2, row_bytes * 3 // 2)
        text = " ".join(source.choices(WORDS, k=max(4, length // 7)))
        n_bytes -= len(text)
        yield text


def rows_of(way: str, n_bytes: int, row_bytes: int) -> Iterator[dict[str, str]]:
    """The rows of a way: the first words of each text are its prompt."""
    for text in texts(n_bytes, row_bytes):
        cut = text.index(" ", len(text) // 3)
        prompt, completion = text[:cut], text[cut:]
        if way == "pairs":
            middle = completion.index(" ", len(completion) // 2)
            yield {"prompt": prompt, "chosen": completion[:middle], "rejected": completion[middle:]}
        else:
            yield {"prompt": prompt, "completion": completion}


def written(folder: Path, way: str, n_bytes: int, row_bytes: int) -> tuple[str, dict[str, Any]]:
    """The specification of a data set that is written there, and how it is read."""
    rows = rows_of(way, n_bytes, row_bytes)
    if way == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = pa.schema([("prompt", pa.string()), ("completion", pa.string())])
        with pq.ParquetWriter(folder / "rows.parquet", schema) as file:
            while some := list(islice(rows, 10_000)):
                file.write_table(pa.Table.from_pylist(some, schema=schema))
        return str(folder / "rows.parquet"), {}
    if way == "mixture":
        for name, share in (("a", 0.5), ("b", 0.5)):
            with gzip.open(folder / f"{name}.jsonl.gz", "wt", compresslevel=1) as packed:
                for row in rows_of(way, int(n_bytes * share), row_bytes):
                    packed.write(json.dumps({"question": row["prompt"], "answer": row["completion"]}) + "\n")
        return f"{folder}/a.jsonl.gz:0.8,{folder}/b.jsonl.gz:0.2", {"columns": ["prompt=question", "completion=answer"]}
    with (folder / "rows.jsonl").open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return str(folder / "rows.jsonl"), {"preferences": "pairs"} if way == "pairs" else {}


def peak_bytes() -> int:
    """The most resident memory of this process since it began (getrusage's has that of the process that forked)."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("VmHWM"))


def read(order: dict[str, Any]) -> dict[str, Any]:
    """Read a data set in this process, and say what that took."""
    from transformers import AutoTokenizer

    from lopt_edge.data import epoch_windows, load_dataset, split, streamed

    if order["way"] == "rows-at-once":
        streamed.STREAM_BYTES = 1 << 60
    tokenizer = AutoTokenizer.from_pretrained(order["model"])
    load_dataset(order["small"], tokenizer, max_seq_len=512)
    before, started = peak_bytes(), time.process_time()
    found = load_dataset(order["spec"], tokenizer, max_seq_len=512, **order["how"])
    train, _ = split(found, fraction=0.01, seed=0)
    windows = epoch_windows(train.lengths, seed=0, epoch=0, batch_size=2, grad_accum=4, together=train.together)
    for window in windows[:100]:
        assert all(len(train.examples[index]) for batch in window for index in batch)
    return {
        "rows": found.n_rows, "examples": len(found.examples), "tokens": found.n_tokens, "fingerprint": found.fingerprint,
        "before_bytes": before, "peak_bytes": peak_bytes(), "cpu_seconds": round(time.process_time() - started, 1),
    }  # fmt: skip


def measured(options: argparse.Namespace, way: str) -> dict[str, Any]:
    """The row of a way: its data set is written, read in a process of its own, and removed."""
    n_bytes = options.mib << 20
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        small = Path(folder) / "small.jsonl"
        small.write_text("".join(json.dumps(row) + "\n" for row in rows_of("rows", 1 << 20, options.row_bytes)))
        spec, how = written(Path(folder), way, n_bytes, options.row_bytes)
        order = {"way": way, "model": str(options.model), "small": str(small), "spec": spec, "how": how}
        command = [sys.executable, str(Path(__file__)), "--read", json.dumps(order)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    growth = found["peak_bytes"] - found["before_bytes"]
    return found | {
        "way": way, "text_bytes": n_bytes, "growth_bytes": growth, "growth_per_text_byte": round(growth / n_bytes, 4),
        "growth_per_example": round(growth / found["examples"], 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=64, help="text of each data set, in MiB")
    parser.add_argument("--row-bytes", type=int, default=1000)
    parser.add_argument("--way", action="append", choices=WAYS)
    parser.add_argument("--model", type=Path, default=ROOT / "examples" / "tiny-llama", help="whose tokenizer")
    parser.add_argument("--folder", type=Path, help="where data sets are written (else the system's temporary folder)")
    parser.add_argument("--csv", type=Path, default=RESULTS)
    parser.add_argument("--read", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        print(json.dumps(read(json.loads(options.read))))
        return
    from bench_peers import append, commit, versions

    from lopt_edge.doctor.check_machine import cpu_device

    cpu = cpu_device()
    for way in options.way or WAYS:
        found = measured(options, way)
        shared = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"), "hardware": f"{cpu.model}, {cpu.cores} cores",
            "versions": ", ".join(versions()), "commit": commit(),
        }  # fmt: skip
        append(options.csv, [shared | found], COLUMNS)
        mib = found["growth_bytes"] / 2**20
        print(f"{way}: {mib:,.0f} MiB more for {options.mib:,} MiB of text in {found['rows']:,} rows")


if __name__ == "__main__":
    main()
