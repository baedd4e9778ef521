"""Feeds damaged input of every untrusted kind to lopt-edge, a million times, and reports whatever is not a plain refusal.

Each input must be taken, or refused by one of our errors (LoptError, FolderError, PlanTextError) that names its place: the
file, its line or the key. A failure is any other exception, a refusal without a place, more than `HANG_SECONDS` of CPU
time, more than `MEMORY_BYTES` of memory for one input (an input has at most some 100 kB; the limit is set on the process,
so that a claim of a terabyte fails at once), or the end of the process. It is saved for --replay; the run goes on.

    python tools/fuzz.py                                  all targets, 1,000,000 inputs (an hour of one core)
    python tools/fuzz.py --target data --inputs 5000 --seed 7
    python tools/fuzz.py --replay fuzz-failures/data--7-123--d.jsonl
    python tools/fuzz.py --target headers --atheris --seconds 60        coverage-guided, where atheris is installed

Each target runs in a child, which tells the number of the input that it is at; if it dies, or does not move for
`STUCK_SECONDS`, that input is a failure and a new child goes on behind it. What is fed in: fuzz_targets.py.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from argparse import Namespace
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from fuzz_targets import TARGETS, make_input, seeds_of  # noqa: E402

HANG_SECONDS = 2.0  # of CPU time, so that a busy machine makes no failures
STUCK_SECONDS = 30.0
MEMORY_BYTES = 512 * 2**20
MOST_SAVED = 50  # failures per target
SHARES = sum(target.share for target in TARGETS.values())
COLUMNS = ("date", "hardware", "versions", "commit", "mode", "seed", "target", "inputs", "accepted", "rejected", "failures",
           "seconds", "inputs_per_second", "peak_growth_mib")  # fmt: skip
PACKAGES = ("lopt-edge", "jinja2", "PyYAML", "pydantic", "pyarrow", "torch")


class Hang(BaseException):
    """The end of a reading that takes too long; no `except Exception` of the tried code may take it for an error of the
    input."""


@dataclass
class Counts:
    """The counts of what became of a target's inputs."""

    inputs: int = 0
    accepted: int = 0
    rejected: int = 0
    failures: int = 0
    seconds: float = 0.0
    growth_bytes: int = 0


class Shared(ctypes.Structure):
    """A child's counts, in memory that its parent reads. `at` is the number of the input being read."""

    _fields_ = (("at", ctypes.c_longlong), ("accepted", ctypes.c_longlong), ("rejected", ctypes.c_longlong),
                ("failures", ctypes.c_longlong), ("growth_bytes", ctypes.c_longlong))  # fmt: skip


# --- one input --------------------------------------------------------------------------------------------------------


def outcome(target: str, path: Path) -> str:
    """The outcome of reading one input: "accepted", "rejected", or what is wrong."""
    from lopt_edge.errors import LoptError
    from lopt_edge.plan.schedule.ops import PlanTextError
    from quant.headers import FolderError

    try:
        TARGETS[target].read(path)
        return "accepted"
    except (LoptError, FolderError, PlanTextError) as error:
        return "rejected" if has_place(error, path) else f"no place in: {type(error).__name__}: {error!s:.500}"
    except Hang:
        return f"hangs (more than {HANG_SECONDS:g} s)\n{traceback.format_exc()}"
    except BaseException:
        return traceback.format_exc()


def has_place(error: Exception, path: Path) -> bool:
    """Whether each fault names the file, a line, or (settings) the flag or key; a swallowed MemoryError does not.

    An error has no place either if a terminal cannot print it, or takes it for a command.
    """
    from quant.untrusted import printable

    text = str(error)
    if "MemoryError" in text or text != printable(text):
        return False
    return all(
        getattr(one, "where", "") or str(path.parent) in str(one) or str(one).startswith("line ")
        for one in getattr(error, "errors", (error,))
    )


def limit_process() -> None:
    """Set the memory limit and the watchdog of this process. Call it after the imports."""
    used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()  # data and stack
    resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY_BYTES, resource.RLIM_INFINITY))
    signal.signal(signal.SIGPROF, _hang)


def _hang(_: int, __: FrameType | None) -> None:
    raise Hang


def read_one(target: str, folder: Path, name: str, content: bytes) -> str:
    """Write the input into the folder and read it, watched."""
    path = folder / name
    with path.open("wb", buffering=0) as file:
        file.write(content)
    signal.setitimer(signal.ITIMER_PROF, HANG_SECONDS)
    try:
        return outcome(target, path)
    except Hang:
        return "hangs"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        path.unlink()


def warm_up(target: str, folder: Path) -> None:
    """Load all imports and caches before limits are set: the first inputs are read unwatched."""
    from lopt_edge.data import template_meter

    template_meter.MAX_SECONDS = HANG_SECONDS / 2  # else its own clock (5 s) would be taken for a hang
    for name, content in seeds_of(target):
        (folder / name).write_bytes(content)
        outcome(target, folder / name)
        (folder / name).unlink()


# --- many inputs ------------------------------------------------------------------------------------------------------


def run_range(
    target: str, *, seed: int, first: int, last: int, folder: Path, failures: Path, end: float, shared: Any
) -> None:
    """Read inputs `first` to `last` (without it) of a target, until the clock reads `end`."""
    peak = peak_bytes()
    for number in range(first, last):
        shared.at = number
        if time.monotonic() > end:
            return
        name, content = make_input(target, seed, number)
        found = read_one(target, folder, name, content)
        grown = peak_bytes() - peak
        peak += max(grown, 0)
        shared.growth_bytes += max(grown, 0)
        if grown > MEMORY_BYTES // 2:
            found = f"takes {grown:,} bytes"
        if found in ("accepted", "rejected"):
            setattr(shared, found, getattr(shared, found) + 1)
            continue
        shared.failures += 1
        save_failure(failures, f"{target}--{seed}-{number}--{name}", content, found, total=shared.failures)
    shared.at = last


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def save_failure(folder: Path, name: str, content: bytes, found: str, *, total: int) -> None:
    if total <= MOST_SAVED:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
        (folder / f"{name}.txt").write_text(found, encoding="utf-8", errors="backslashreplace")
        print(f"failure: {folder / name}: {found.strip().splitlines()[-1][:200]}", file=sys.stderr)


def child(target: str, options: Namespace, first: int, last: int, folder: Path, end: float, shared: Any) -> None:
    warm_up(target, folder)
    limit_process()
    run_range(
        target, seed=options.seed, first=first, last=last, folder=folder, failures=options.failures, end=end, shared=shared
    )


def run_target(target: str, options: Namespace, n_inputs: int) -> Counts:
    """The counts of all inputs of a target, read in as many children as it takes."""
    context = multiprocessing.get_context("fork")
    shared: Any = context.Value(Shared, lock=False)
    start, first = time.monotonic(), 0
    end = start + options.seconds * n_inputs / options.inputs if options.seconds else float("inf")
    while first < n_inputs and time.monotonic() < end:
        with tempfile.TemporaryDirectory(prefix="fuzz-", dir=options.scratch) as folder:
            shared.at = first
            process = context.Process(target=child, args=(target, options, first, n_inputs, Path(folder), end, shared))
            process.start()
            reason = wait_for(process, shared)
        if not reason:
            break
        name, content = make_input(target, options.seed, shared.at)
        shared.failures += 1
        save_failure(
            options.failures, f"{target}--{options.seed}-{shared.at}--{name}", content, reason, total=shared.failures
        )
        first = shared.at + 1
    done = shared.accepted + shared.rejected + shared.failures
    return Counts(done, shared.accepted, shared.rejected, shared.failures, time.monotonic() - start, shared.growth_bytes)


def wait_for(process: Any, shared: Any) -> str:
    """The reason why the child ended before its work was done; "" if it did not."""
    at, since = shared.at, time.monotonic()
    while process.is_alive():
        process.join(timeout=0.5)
        if shared.at != at or process.exitcode is not None:
            at, since = shared.at, time.monotonic()
        elif time.monotonic() - since > STUCK_SECONDS + 30 * (shared.accepted + shared.rejected == 0):  # it imports first
            process.kill()
            process.join()
            return f"no end in {STUCK_SECONDS:g} s, inside one step in C"
    return f"the process ended with {process.exitcode}" if process.exitcode else ""


# --- the other modes --------------------------------------------------------------------------------------------------


def replay(path: Path) -> int:
    """Read one saved input again, without limits, and show what it gives."""
    target, _, name = path.name.split("--", 2)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        copy = Path(folder) / name
        copy.write_bytes(path.read_bytes())
        try:
            TARGETS[target].read(copy)
        except Exception:
            traceback.print_exc()
        found = outcome(target, copy)
    print(found if found in ("accepted", "rejected") else f"failure: {found}")
    return 0 if found in ("accepted", "rejected") else 1


def run_atheris(options: Namespace) -> None:
    """Run libFuzzer's loop over one target; the first byte of an input chooses which of the target's files it is."""
    import atheris

    target = options.target[0]
    with atheris.instrument_imports(include=["lopt_edge", "quant"]):
        import lopt_edge.config.settings
        import lopt_edge.data
        import lopt_edge.errors
        import lopt_edge.plan.facts.model
        import lopt_edge.plan.schedule.ops  # noqa: F401
        import quant.headers  # noqa: F401
    scratch = Path(tempfile.mkdtemp(prefix="fuzz-", dir=options.scratch))
    names = sorted({name for name, _ in seeds_of(target, count=200)})
    corpus = options.failures / f"corpus-{target}"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, (name, content) in enumerate(seeds_of(target, count=200)):
        (corpus / f"seed-{number}").write_bytes(bytes([names.index(name)]) + content)
    warm_up(target, scratch)

    def one_input(data: bytes) -> None:
        name, content = names[data[0] % len(names) if data else 0], data[1:]
        (scratch / name).write_bytes(content)
        found = outcome(target, scratch / name)
        (scratch / name).unlink()
        if found not in ("accepted", "rejected"):
            save_failure(options.failures, f"{target}--atheris-{abs(hash(data))}--{name}", content, found, total=1)
            raise RuntimeError(found)

    flags = [f"-seed={options.seed + 1}", f"-max_total_time={options.seconds}", f"-atheris_runs={options.inputs}",
             "-max_len=20000", f"-timeout={int(HANG_SECONDS) + 3}", f"-artifact_prefix={options.failures}/"]  # fmt: skip
    atheris.Setup([sys.argv[0], *flags, str(corpus)], one_input)
    atheris.Fuzz()


# --- the command line -------------------------------------------------------------------------------------------------


def show(found: dict[str, Counts]) -> None:
    heads = [field.name for field in fields(Counts)]
    print("".join(f"{head:>14}" for head in ("target", *heads[:-1], "inputs/s", "growth MiB")))
    for target, counts in found.items():
        cells = (counts.inputs, counts.accepted, counts.rejected, counts.failures, f"{counts.seconds:.1f}")
        rate = f"{counts.inputs / max(counts.seconds, 1e-9):,.0f}"
        print("".join(f"{cell:>14}" for cell in (target, *cells, rate, f"{counts.growth_bytes / 2**20:.0f}")))


def write_rows(options: Namespace, found: dict[str, Counts]) -> None:
    from importlib.metadata import version

    from bench_peers import append, check_csv, commit

    from lopt_edge.doctor.check_machine import cpu_device

    cpu = cpu_device()
    common = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": f"{cpu.model}, {cpu.cores} cores",
        "versions": ", ".join([f"python {sys.version.split()[0]}", *(f"{name} {version(name)}" for name in PACKAGES)]),
        "commit": commit(),
        "mode": "mutations",
        "seed": options.seed,
    }
    rows = [
        common
        | {
            "target": target,
            "inputs": counts.inputs,
            "accepted": counts.accepted,
            "rejected": counts.rejected,
            "failures": counts.failures,
            "seconds": round(counts.seconds, 1),
            "inputs_per_second": round(counts.inputs / max(counts.seconds, 1e-9)),
            "peak_growth_mib": round(counts.growth_bytes / 2**20),
        }
        for target, counts in found.items()
    ]
    check_csv(options.csv, COLUMNS)
    append(options.csv, rows, COLUMNS)
    print(f"{len(rows)} rows appended to {options.csv}")


def parse(arguments: list[str]) -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--target", action="append", choices=TARGETS, help="repeatable (default: all)")
    add("--inputs", type=int, default=SHARES, help="of all targets together, shared out among them (default: %(default)s)")
    add("--seconds", type=int, default=0, help="at most this long, shared out in the same way (default: no limit)")
    add("--seed", type=int, default=0, help="another seed gives other inputs (default: %(default)s)")
    add("--failures", type=Path, default=Path("fuzz-failures"), help="folder of failing inputs (default: %(default)s)")
    add("--scratch", type=Path, help="where the inputs are written, one at a time (default: the system's)")
    add("--replay", type=Path, metavar="FILE", help="read one saved input again and show what it gives")
    add("--atheris", action="store_true", help="coverage-guided, one target, until --seconds or a failure")
    add("--csv", type=Path, default=Path(__file__).parent / "results" / "fuzz.csv", help="appended to")
    add("--no-csv", action="store_true", help="write no results")
    options = parser.parse_args(arguments)
    options.target = options.target or list(TARGETS)
    if options.inputs < 1 or options.seconds < 0:
        parser.error("--inputs must be at least 1 and --seconds at least 0")
    if options.atheris and len(options.target) != 1:
        parser.error("--atheris takes one --target")
    return options


def main() -> None:
    options = parse(sys.argv[1:])
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if options.replay:
        sys.exit(replay(options.replay))
    if options.atheris:
        run_atheris(options)
        return
    total = sum(TARGETS[target].share for target in options.target)
    found = {}
    for target in dict.fromkeys(options.target):
        n_inputs = -(-options.inputs * TARGETS[target].share // total)
        found[target] = run_target(target, options, n_inputs)
        print(f"{target}: {found[target].inputs:,} inputs in {found[target].seconds:.0f} s", file=sys.stderr)
    show(found)
    if not options.no_csv:
        write_rows(options, found)
    sys.exit(1 if any(counts.failures for counts in found.values()) else 0)


if __name__ == "__main__":
    main()
