"""Kills runs by SIGKILL, hundreds of times, and holds them to it: each resumes by itself and ends with the same bytes.

    python tools/chaos.py                      300 kills, four to eight minutes, a row in tools/results/chaos.csv
    python tools/chaos.py --kills 5 --in-checkpoint 1 --in-pages 1 --in-loading 1 --steps 4 --csv /tmp/chaos.csv

A run here is `lopt_edge.finetune` with `resume: auto` of a tiny model: everything paged to disk, a checkpoint after every
step and inside steps too, evaluation, the best adapter kept. An attempt at it (a forked child, chaos_child.py) is killed at
a random moment of the time that it is likely to take, or aimed at a phase: the parent waits a random time, then until
the child is in that phase, then a random part of the phase's usual time. The next attempt is the same call on the same
folders, until one ends by itself; then its result is compared with the undisturbed run's and a new output folder begins.
Some attempts are killed again while they start.

The rules:
- a kill counts for where the child was when it died, by marks that outlive it, not for where it was aimed at; what it left
  half written under its process id must agree with the marks; a quota that was not reached is a failure
- after each kill, before the next attempt: model and data are as they were; each `step-*` folder verifies, or has no
  manifest; the newest whole checkpoint is not older than before; at most `keep` + 1 are whole; an adapter is readable
- a run that ends has the undisturbed run's adapter, byte for byte, its log (without what is measured), its 4-bit copy, and
  leaves no lock, page file or half-written file (chaos_checks.py)
- a child that ends otherwise than by our kill or with exit code 0 is a failure, and its output is shown

Aimed at quantising, the 4-bit copy is removed from the cache before; what a killed attempt left there stays there. Faults
put into the product on purpose were found within 25 kills: a log that is not cut back, counts of updates that are not
restored, half-written folders that nobody removes. What this does not do: after a SIGKILL the system still writes what the
process gave it, so it says nothing of power cuts.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench_peers import append, check_csv, commit, versions
from chaos_checks import Chain, final_faults, final_of, half_written, hashes, stamps
from chaos_child import CHECKPOINTS, LOADING, PAGES, PAUSE_SECONDS, PHASES, Ended, Forks, Target

from lopt_edge.config.load import load_config
from lopt_edge.config.settings import Config
from lopt_edge.doctor.check_machine import cpu_device

SETTINGS: dict[str, Any] = {
    "weights": "disk", "activations": "page", "saved_inputs": "disk", "optimizer_states": "disk", "gradients": "disk",
    "method": "lopt", "batch_size": 2, "grad_accum": 2, "lora_r": 4, "lora_alpha": 8, "lr": 1e-2, "device": "cpu",
    "compute_dtype": "float32", "max_seq_len": 128, "eval_fraction": 0.2, "eval_every": 3, "keep_best": True,
    "save_every": 1, "save_minutes": 0.001, "keep": 2, "resume": "auto",
}  # fmt: skip
N_ROWS = 40  # eight windows of four: the run goes on into a second epoch
# Of this process, which must have one thread, so that forks are clean:
ALONE = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
MOST_FAULTS = 5
MOST_ATTEMPTS = 10  # for each kill asked for
MOST_IN_CHAIN = 40  # kills of one run: each is left alone after a random number of them
ENDING_SHARE = 0.2  # of a run after its start: evaluating and saving, which every attempt does
AGAIN_SHARE = 0.15  # of the kills are followed by one in the next attempt's start
COLUMNS = ("date", "hardware", "versions", "commit", "seed", "steps", "kills", "in_checkpoint", "half_written_checkpoints",
           "in_pages", "in_half_a_page", "in_loading", "in_quantise", "half_written_copies", "in_load", "in_start_again",
           "attempts", "runs", "longest_chain", "run_seconds", "seconds", "faults")  # fmt: skip


# what is counted, and what is asked for ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quotas:
    """The least number of kills, and of those inside each group of phases."""

    kills: int
    in_checkpoint: int
    in_pages: int
    in_loading: int


@dataclass
class Tally:
    """The count of what happened so far. A kill may have been in several phases."""

    kills: int = 0
    phases: Counter[str] = field(default_factory=Counter)
    in_checkpoint: int = 0
    in_pages: int = 0
    in_loading: int = 0
    in_start_again: int = 0  # kills in the start of an attempt that was to go on after a kill
    half_written: Counter[str] = field(default_factory=Counter)  # kills that left something half written, by phase
    attempts: int = 0
    runs: int = 0  # that ended and were compared
    longest_chain: int = 0  # of kills that one run survived
    faults: list[str] = field(default_factory=list)

    def add(self, phases: frozenset[str]) -> None:
        self.kills += 1
        self.phases.update(phases)
        self.in_checkpoint += bool(phases & CHECKPOINTS)
        self.in_pages += bool(phases & PAGES)
        self.in_loading += bool(phases & LOADING)

    def missing(self, quotas: Quotas) -> dict[str, int]:
        """The number of kills that are still to come, by quota; those that are reached are left out."""
        short = {name: wanted - getattr(self, name) for name, wanted in vars(quotas).items()}
        return {name: number for name, number in short.items() if number > 0}


def verdict(tally: Tally, quotas: Quotas) -> list[str]:
    """The reasons why this was no success; empty if it was."""
    said = [f"{name}: {number} fewer than asked for" for name, number in tally.missing(quotas).items()]
    return [*said, *([] if tally.runs else ["no run came to its end"]), *tally.faults]


# kills ------------------------------------------------------------------------------------------------------------------


class Chaos:
    """The attempts of one call of this tool, all of them in `folder`."""

    def __init__(self, options: Namespace, folder: Path) -> None:
        self.folder, self.steps = folder, options.steps
        self.model, self.data, self.cache = folder / "model", folder / "train.jsonl", folder / "cache"
        self.random, self.tally, self.n_runs = random.Random(options.seed), Tally(), 0
        self.quotas = Quotas(options.kills, options.in_checkpoint, options.in_pages, options.in_loading)
        self.forks = Forks(folder)
        self.forks.call(self._make_inputs)
        self.stamps, self.hashes = stamps(self.model, self.data), hashes(self.model)
        self.was_killed, self.chain_limit = False, 0
        self._undisturbed()
        self.chain = self._new_chain()

    def _make_inputs(self) -> None:
        from tools.tiny_runs import make_model, write_rows

        make_model(self.model)
        write_rows(self.data, N_ROWS)

    def _config(self, output: Path) -> Config:
        places = {"model": self.model, "data": self.data, "cache_dir": self.cache, "output": output}
        return load_config(None, {**SETTINGS, "max_steps": self.steps, **{name: str(at) for name, at in places.items()}})

    def _undisturbed(self) -> None:
        output, began = self.folder / "undisturbed", time.monotonic()
        ended = self.forks.run(self._config(output))
        if ended.code:
            sys.exit(f"the undisturbed run failed:\n{self.forks.log.read_text()}")
        self.run_seconds = time.monotonic() - began
        self.whole = final_of(output, self.cache)
        found = json.loads(self.forks.measured.read_text())
        self.phase_seconds = {phase: mean(seconds) if seconds else 0.0 for phase, seconds in found.items()}
        self.start_seconds = sum(sum(found[phase]) for phase in ("read inputs", "make ready", "quantise", "load"))

    def go(self) -> None:
        """Run and kill until every quota is reached; then the run under way is let to its end."""
        tally = self.tally
        while tally.missing(self.quotas) and tally.attempts < MOST_ATTEMPTS * (self.quotas.kills + 5):
            before = tally.kills
            self._attempt(self._target() if self.chain.kills < self.chain_limit else None)
            if len(tally.faults) >= MOST_FAULTS:
                return
            if tally.kills // 20 > before // 20:
                self._tell()
        if self.chain.kills or not tally.runs:
            self._attempt(None)
        if hashes(self.model) != self.hashes:
            tally.faults.append("the source model was changed")

    def _tell(self) -> None:
        tally = self.tally
        missing = ", ".join(f"{name} {number}" for name, number in tally.missing(self.quotas).items()) or "none"
        print(f"{tally.kills} kills, {tally.attempts} attempts, {tally.runs} runs ended; missing: {missing}", flush=True)

    def _attempt(self, target: Target | None) -> None:
        began = time.monotonic()
        ended = self.forks.run(self._config(self.chain.output), target)
        if ended.code == 0 and ended.phases is None and not self.chain.kills:
            self.run_seconds = time.monotonic() - began  # the machine is busier or less busy than it was
        self.tally.attempts += 1
        self.was_killed = ended.phases is not None
        if ended.phases is not None:
            self._after_kill(ended.child, ended.phases)
        elif ended.code == 0:
            self._after_end()
        else:
            self._failed(ended)

    def _after_kill(self, child: int, phases: frozenset[str]) -> None:
        tally, chain = self.tally, self.chain
        half = half_written(chain.output, self.cache, child=child)
        tally.add(phases)
        tally.half_written.update(half)
        tally.in_start_again += bool(chain.kills) and "start" in phases
        chain.kills += 1
        where = f"kill {tally.kills} ({', '.join(sorted(phases)) or 'between phases'})"
        self._blame(where, [*chain.faults(keep=SETTINGS["keep"]), *self._changed_inputs()])
        self._blame(where, [f"half written by it: a {phase}, but the marks say otherwise" for phase in half - phases])

    def _after_end(self) -> None:
        tally, chain = self.tally, self.chain
        tally.runs += 1
        tally.longest_chain = max(tally.longest_chain, chain.kills)
        found = [*final_faults(chain.output, self.cache, self.whole), *self._changed_inputs()]
        self._blame(f"{chain.output.name}, ended after {chain.kills} kills", found)
        if not found:
            shutil.rmtree(chain.output)
        self.chain = self._new_chain()

    def _failed(self, ended: Ended) -> None:
        what = "hung" if ended.code is None else f"ended with exit code {ended.code}"
        self._blame(f"{self.chain.output.name}, after {self.chain.kills} kills", [f"{what}:\n{self.forks.log.read_text()}"])
        self.chain = self._new_chain()

    def _blame(self, where: str, faults: Iterable[str]) -> None:
        for fault in faults:
            self.tally.faults.append(f"{where}: {fault}")
            print(f"FAULT {where}: {fault}", flush=True)

    def _changed_inputs(self) -> list[str]:
        return [] if stamps(self.model, self.data) == self.stamps else ["the model's files or the data were touched"]

    def _new_chain(self) -> Chain:
        self.n_runs += 1
        self.chain_limit = self.random.randint(1, MOST_IN_CHAIN)
        return Chain(self.folder / f"run-{self.n_runs}")

    # where the next kill is aimed at -----------------------------------------------------------------------------------

    def _target(self) -> Target:
        """The next target: in the start again after some kills, else by what the quotas lack; whatever they leave over is
        at random."""
        if self.was_killed and self.random.random() < AGAIN_SHARE:
            return Target(self.random.uniform(0, self.start_seconds))
        missing = self.tally.missing(self.quotas)
        left = missing.pop("kills", 0)
        weights = {**missing, "anywhere": max(left - sum(missing.values()), 0 if missing else 1)}
        aim = self.random.choices(list(weights), list(weights.values()))[0]
        to_do = 1 - (1 - ENDING_SHARE) * self.chain.newest[0] / self.steps
        likely = self.start_seconds + (self.run_seconds - self.start_seconds) * to_do
        if aim == "anywhere":
            return Target(self.random.uniform(0, likely))
        if aim == "in_loading":
            return self._loading()
        phases = CHECKPOINTS if aim == "in_checkpoint" else PAGES
        return self._inside(phases, self.random.uniform(0, 0.7 * likely))

    def _loading(self) -> Target:
        phase = self.random.choice(sorted(LOADING))
        if phase == "quantise" and self.cache.exists():
            for copy in self.cache.iterdir():
                if ".partial" not in copy.name:
                    shutil.rmtree(copy)
        return self._inside(frozenset({phase}), 0)

    def _inside(self, phases: frozenset[str], seconds: float) -> Target:
        usual = PAUSE_SECONDS if phases == PAGES else max(self.phase_seconds[phase] for phase in phases)
        return Target(seconds, phases, self.random.uniform(0, 0.8 * usual))


# what is said -----------------------------------------------------------------------------------------------------------


def table(tally: Tally, quotas: Quotas) -> str:
    asked = vars(quotas)
    lines = [("kills", tally.kills), *((f"  in {phase}", tally.phases[phase]) for phase in PHASES if tally.phases[phase]),
             ("in_checkpoint", tally.in_checkpoint), ("  left half written", tally.half_written["checkpoint"]),
             ("in_pages", tally.in_pages), ("in_loading", tally.in_loading),
             ("  left a 4-bit copy half written", tally.half_written["quantise"]),
             ("in the start after a kill", tally.in_start_again), ("attempts", tally.attempts),
             ("runs ended and compared", tally.runs), ("longest chain of kills of a run", tally.longest_chain),
             ("faults", len(tally.faults))]  # fmt: skip
    return "\n".join(f"{name:34}{number:6}" + (f"  of {asked[name]}" if name in asked else "") for name, number in lines)


def row_of(chaos: Chaos, options: Namespace, seconds: float) -> dict[str, Any]:
    tally, cpu = chaos.tally, cpu_device()
    counted = {name: getattr(tally, name) for name in COLUMNS if isinstance(getattr(tally, name, None), int)}
    return {
        **counted,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": f"{cpu.model}, {cpu.cores} cores",
        "versions": ", ".join([f"python {sys.version.split()[0]}", *versions()]),
        "commit": commit(),
        "seed": options.seed,
        "steps": options.steps,
        "half_written_checkpoints": tally.half_written["checkpoint"],
        "half_written_copies": tally.half_written["quantise"],
        "in_half_a_page": tally.phases["half a page"],
        "in_quantise": tally.phases["quantise"],
        "in_load": tally.phases["load"],
        "run_seconds": round(chaos.run_seconds, 2),
        "seconds": round(seconds, 1),
        "faults": len(verdict(tally, chaos.quotas)),
    }


def parse() -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300, help="at least so many (default: %(default)s)")
    parser.add_argument("--in-checkpoint", type=int, default=60, help="... of them inside a checkpoint write")
    parser.add_argument("--in-pages", type=int, default=60, help="... inside a page write or read")
    parser.add_argument("--in-loading", type=int, default=30, help="... while quantising or loading the model")
    parser.add_argument("--steps", type=int, default=8, help="of a run (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and targets; the machine adds its own chance")
    parser.add_argument("--folder", type=Path, help="on a disk, for everything (default: the temporary folder)")
    parser.add_argument("--csv", type=Path, default=Path(__file__).parent / "results" / "chaos.csv", help="appended to")
    options = parser.parse_args()
    if min(options.kills, options.steps) < 1 or min(options.in_checkpoint, options.in_pages, options.in_loading) < 0:
        parser.error("numbers of kills and steps must be positive")
    return options


def main() -> None:
    options = parse()
    check_csv(options.csv, COLUMNS)
    if any(os.environ.get(name) != value for name, value in ALONE.items()):  # they count when libraries are loaded
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ALONE})
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
    folder, began = Path(tempfile.mkdtemp(prefix="chaos-", dir=options.folder)), time.monotonic()
    chaos = Chaos(options, folder)
    print(f"an undisturbed run takes {chaos.run_seconds:.1f} s; everything is in {folder}", flush=True)
    chaos.go()
    print(table(chaos.tally, chaos.quotas))
    append(options.csv, [row_of(chaos, options, time.monotonic() - began)], COLUMNS)
    if said := verdict(chaos.tally, chaos.quotas):
        sys.exit(f"FAILED; {folder} is kept\n" + "\n".join(said))
    shutil.rmtree(folder)
    print("every run that was killed went on by itself and ended with the undisturbed run's bytes")


if __name__ == "__main__":
    main()
