"""`lopt-edge compare`: methods side by side, on the same data, seeds, tokens and budget, in program order.

Read and check everything (study.py); make the 4-bit copy; tune the learning rates, if
there is a grid; run what is missing; ask for exact matches; write the tables. Each run is a process of its own
(cells.py), and what is known of it is read from its folder: so the same command goes on where an earlier one was
stopped, and the tables are made of all that is there.

The rules: a learning rate is chosen by the held-out loss of the config's eval data on the first seed alone; with
`test_data` the final runs are new runs whose held-out data are these, so that nothing that was chosen saw them. A run that
fails costs its place in the table and nothing else. Nothing is called the best.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lopt_edge.comparison.cells import Cell, Job, failure_of, finetune_job, quantise_job, run_jobs
from lopt_edge.comparison.closed_questions import OF_BASE
from lopt_edge.comparison.figures import (
    ANSWERS_NAME,
    MATCH_NAME,
    Asked,
    Closed,
    Outcome,
    Row,
    answers_of,
    match_of,
    outcome_of,
)
from lopt_edge.comparison.page import page
from lopt_edge.comparison.study import Study, read_study
from lopt_edge.comparison.tables import TABLES, as_csv, as_json, as_markdown, write
from lopt_edge.comparison.variants import Variant
from lopt_edge.config.settings import Config
from lopt_edge.system.lock import output_lock
from lopt_edge.units import format_bytes

Say = Callable[[str], None]


@dataclass(frozen=True)
class Comparison:
    """The answer of `compare`: what was asked, a row a variant, remarks, and the tables as Markdown.

    `problems` are of the variants that were to be run: runs that failed, exact matches not counted.
    """

    study: Study
    rows: tuple[Row, ...]
    remarks: tuple[str, ...]
    problems: tuple[str, ...]
    markdown: str


def compare(
    config: str | Path | Config,
    methods: str | Sequence[str],
    *,
    seeds: str | Sequence[int] = (0, 1, 2),
    output: str | None = None,
    lr_grid: str | Sequence[float] = (),
    test_data: str | None = None,
    exact_match: int = 0,
    only: str | Sequence[str] = (),
    jobs: int = 1,
    equal: str = "",
    closed_questions: str | None = None,
    say: Say = lambda text: None,
) -> Comparison:
    """Run what is missing, and write compare.md, compare.csv, compare.json and compare.html into the output folder.

    `config` is a file or a Config; `say` hears of each run. `equal` "seconds": each variant gets the steps that the
    planner's seconds of the first one allow; "bytes": all have the device budget that its plan takes; or both, with a
    comma. `closed_questions` are asked of the base and after each run. Raises InputError(s) before anything runs; a run
    that fails is in the answer.
    """
    study = read_study(
        config,
        _text(methods),
        seeds=_text(seeds),
        output=output,
        lr_grid=_text(lr_grid),
        test_data=test_data,
        exact_match=exact_match,
        only=_text(only),
        jobs=jobs,
        equal=equal,
        closed_questions=closed_questions,
    )
    with output_lock(study.output, warn=say):
        for name, text in study.equal.files(study.variants[0].name):
            write(study.output / name, text)
        _run_missing(study, [cell for variant in study.only for cell in study.tuning_cells(variant)], say)
        finals = [
            cell
            for variant in study.only
            if (lr := study.chosen_lr(variant)) is not None
            for cell in study.final_cells(variant, lr)
        ]
        _run_missing(study, finals, say)
        unmatched = [*_count_matches(study, finals, say), *_count_answers(study, finals, say)]
        rows = tuple(_row(study, variant) for variant in study.variants)
        remarks = tuple(_remarks(study, rows))
        names = {variant.name for variant in study.only}
        problems = (*(problem for row in rows if row.name in names for problem in row.problems), *unmatched)
        settings, shown = shared_settings(study), (*remarks, *unmatched)
        found = Comparison(study, rows, remarks, problems, as_markdown(rows, settings, shown))
        texts = (as_json(rows, settings, shown), found.markdown, as_csv(rows), page(rows, settings, shown))
        for name, text in zip(TABLES, texts, strict=True):
            write(study.output / name, text)
    return found


def _text(values: str | Sequence[Any]) -> str:
    return values if isinstance(values, str) else ",".join(map(str, values))


# --- what is run ------------------------------------------------------------------------------------------------------


def _run_missing(study: Study, cells: Sequence[Cell], say: Say) -> None:
    missing = [cell for cell in cells if not cell.done]
    if missing:
        run_jobs([quantise_job(study.base, study.output / "runs" / "4-bit-copy.log")], at_once=1, say=say)
        run_jobs([finetune_job(cell) for cell in missing], at_once=study.jobs, say=say)


def _count_matches(study: Study, cells: Sequence[Cell], say: Say) -> list[str]:
    """Count the matches that were not counted yet; returns a sentence for each run where that failed."""
    asked = study.asked
    if asked is None:
        return []
    todo = [cell for cell in cells if cell.done and match_of(cell.folder, asked) is None]
    run_jobs([_match_job(cell, asked) for cell in todo], at_once=study.jobs, say=say)
    return [
        f"exact matches of {cell.name} were not counted: {_match_failure(cell)}"
        for cell in todo
        if match_of(cell.folder, asked) is None
    ]


def _match_job(cell: Cell, asked: Asked) -> Job:
    target = cell.folder / MATCH_NAME
    target.unlink(missing_ok=True)  # another question's answer
    words = (
        sys.executable,
        "-m",
        "lopt_edge.comparison.exact_match",
        str(cell.folder),
        asked[0],
        str(asked[1]),
        str(target),
    )
    log = cell.beside(".exact-match.log")
    return Job(words, log, f"exact match of {cell.name}", lambda: "done" if target.exists() else "FAILED")


def _count_answers(study: Study, cells: Sequence[Cell], say: Say) -> list[str]:
    """Ask the closed questions where they were not asked yet; returns a sentence for each run where that failed."""
    closed, done = study.closed, [cell for cell in cells if cell.done]
    if closed is None or not done:
        return []
    of_base, log = study.answers_of_base, study.answers_of_base.with_suffix(".log")
    todo = [cell for cell in done if answers_of(cell.folder / ANSWERS_NAME, closed.path) is None]
    jobs = [_answers_job(cell, closed, cell.folder / ANSWERS_NAME, cell.beside(".closed.log")) for cell in todo]
    if closed.of_base is None:
        jobs.insert(0, _answers_job(done[0], closed, of_base, log, OF_BASE))
    run_jobs(jobs, at_once=study.jobs, say=say)
    failed = {f"{cell.name}": cell.beside(".closed.log") for cell in todo
              if answers_of(cell.folder / ANSWERS_NAME, closed.path) is None}  # fmt: skip
    failed |= {"the base": log} if answers_of(of_base, closed.path) is None else {}
    return [f"closed questions of {name} were not asked: {_failure_in(log)}" for name, log in failed.items()]


def _answers_job(cell: Cell, closed: Closed, target: Path, log: Path, *rest: str) -> Job:
    target.unlink(missing_ok=True)  # another file's answers
    module = "lopt_edge.comparison.closed_questions"
    words = (sys.executable, "-m", module, str(cell.folder), closed.path, str(target), *rest)
    whose = "the base" if rest else cell.name
    return Job(words, log, f"closed questions of {whose}", lambda: "done" if target.exists() else "FAILED")


def _match_failure(cell: Cell) -> str:
    return _failure_in(cell.beside(".exact-match.log"))


def _failure_in(log: Path) -> str:
    try:
        return failure_of(log.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return "its log is gone"


# --- what is shown ----------------------------------------------------------------------------------------------------


def _row(study: Study, variant: Variant) -> Row:
    lr = study.chosen_lr(variant)
    tuning = tuple(outcome_of(cell) for cell in study.tuning_cells(variant))
    finals = (
        () if lr is None else tuple(outcome_of(cell, study.asked, study.closed) for cell in study.final_cells(variant, lr))
    )
    return Row(variant.name, variant.slug, lr, finals, tuning)


def shared_settings(study: Study) -> dict[str, Any]:
    """The settings that all variants share: the config file's as given, and the comparison's own."""
    varied = {"output", "seed", "method", *(key for variant in study.variants for key, _ in variant.settings)}
    varied |= {"lr"} if study.grid else set()
    given = study.base.model_dump(mode="json", exclude_unset=True)
    own = {
        "seeds": list(study.seeds),
        "lr_grid": list(study.grid) or None,
        "test_data": study.test_data,
        "exact_match_rows": study.n_exact or None,
        "closed_questions": study.closed_questions,
        "steps_of_equal_seconds": ", ".join(f"{name}: {n}" for name, n in study.equal.steps.items()) or None,
        "budget_of_equal_bytes": study.equal.device_bytes and format_bytes(study.equal.device_bytes),
        "runs_at_once": study.jobs,
    }
    found = {key: value for key, value in given.items() if key not in varied and value is not None}
    return {**found, **({} if study.grid else {"lr": study.base.lr}), **{key: value for key, value in own.items() if value}}


def _remarks(study: Study, rows: Sequence[Row]) -> Iterator[str]:
    """The sentences that a reader must know to take the numbers for what they are."""
    seeds = ", ".join(map(str, study.seeds))
    yield f"mean ± standard deviation over the seeds {seeds}" if len(study.seeds) > 1 else f"one seed ({seeds}): no spread"
    if len(study.seeds) == 2:
        yield "fewer than three seeds: the spread says little"
    what = study.held_out or f"{study.base.eval_fraction:g} of the training data, another part for each seed"
    objective = study.base.objective
    yield f"held-out loss: {'task loss' if objective == 'sft' else f'that of objective {objective}'} on {what}"
    if study.grid:
        yield from _tuning_remarks(study, rows)
    if not study.base.retention_data:
        yield "no retention_data were given: what is forgotten was not measured"
    else:
        yield f"forgetting: retention loss after minus before, on {study.base.retention_data}"
    if study.test_data and study.base.eval_fraction and not study.base.eval_data:
        yield "the final runs train on all of the data, the tuning runs without the part that was held out"
    yield "peaks: on a CPU the whole process, on a GPU what the allocator reserved; evaluation included"
    shared = any(outcome.cell.shared_machine for row in rows for outcome in row.outcomes)
    yield (
        "step s: median of a run's steps but the first two"
        + ("; from a shared machine (several runs at once): not to be compared" if shared else "")
    )
    yield "tokens/s: over the same steps together (their seconds differ where a method has several kinds of step)"
    yield "moved a step: bytes between tiers that the plan predicts for its largest step"
    if study.equal.device_bytes is not None:
        yield f"equal bytes: all have the device memory that the plan of {study.variants[0].name} takes as a budget"
    if study.equal.steps:
        yield f"equal seconds: each variant has the steps that take the planner's seconds of {study.variants[0].name}"
    if study.closed_questions:
        yield f"answers: closed questions of {study.closed_questions} whose greedy completion begins with the answer"
    if len(study.seeds) > 1 and len(rows) > 1:
        yield "differences: of the runs of one seed, mean ± 95% interval (Student's t) over the seeds"
    yield from _differences([outcome for row in rows for outcome in row.outcomes if outcome.figures])


def _tuning_remarks(study: Study, rows: Sequence[Row]) -> Iterator[str]:
    grid = ", ".join(f"{lr:g}" for lr in study.grid)
    yield f"learning rates: the one of {grid} with the lowest held-out loss of seed {study.seeds[0]}, for each variant"
    if not study.test_data:
        yield "the learning rates were chosen on the split that the losses are of: they flatter all variants a little"
    edges = {min(study.grid), max(study.grid)}
    at_edge = [row.name for row in rows if row.lr in edges]
    if at_edge:
        yield f"chosen at the grid's edge, so a better one may lie beyond: {', '.join(at_edge)}"


def _differences(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """A sentence for each fact that differs between runs of one seed."""
    unequal = ("steps", "tokens") if len({outcome.cell.config.max_steps for outcome in outcomes}) > 1 else ()  # on purpose
    for name in (name for name in (outcomes[0].facts if outcomes else ()) if name not in unequal):
        by_seed: dict[int, set[str]] = {}
        for outcome in outcomes:
            by_seed.setdefault(outcome.cell.seed, set()).add(str(outcome.facts[name]))
        differing = [seed for seed, values in by_seed.items() if len(values) > 1]
        if differing:
            values = sorted(by_seed[differing[0]])
            yield f"UNEQUAL: {name} differ between variants ({' / '.join(value[:80] for value in values)})"
