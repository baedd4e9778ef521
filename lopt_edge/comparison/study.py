"""What a comparison is asked: settings, variants, seeds, learning rates, checked before anything runs.

All mistakes are reported together, the flags' beside the config's. What could be found out by a run alone is not looked for
here; what a model folder on this machine or a data file can say at once is. A `Study` also knows where each run lies, and
which learning rate a grid's runs speak for. No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lopt_edge.comparison.cells import Cell
from lopt_edge.comparison.closed_questions import check_questions
from lopt_edge.comparison.equal import BYTES_NAME, STEPS_NAME, Equal, faults, found_means
from lopt_edge.comparison.exact_match import questions
from lopt_edge.comparison.figures import ANSWERS_NAME, Asked, Closed, answers_of, outcome_of
from lopt_edge.comparison.tables import TABLES, is_ours
from lopt_edge.comparison.variants import NOT_HERE, Variant, check_variants, parse_variants, resolve
from lopt_edge.config.load import file_errors, load_config
from lopt_edge.config.settings import Config
from lopt_edge.errors import InputError, InputErrors, raise_collected
from lopt_edge.system.lock import LOCK_NAME


@dataclass(frozen=True)
class Study:
    """A comparison as it was asked for, read and checked; it also knows where each run lies."""

    base: Config
    variants: tuple[Variant, ...]
    only: tuple[Variant, ...]
    seeds: tuple[int, ...]
    grid: tuple[float, ...]  # empty: not tuned
    output: Path
    test_data: str | None
    n_exact: int
    jobs: int
    closed_questions: str | None = None
    equal: Equal = field(default_factory=Equal)

    def cell(self, variant: Variant, lr: float, seed: int, *, tuning: bool = False) -> Cell:
        """The run of a variant at a learning rate with a seed.

        Tuning runs have folders of their own only where their held-out data are others.
        """
        apart = tuning and self.test_data is not None
        folder = self.output / ("tuning" if apart else "runs") / variant.slug / f"lr-{lr!r}" / f"seed-{seed}"
        common: dict[str, Any] = {"seed": seed, "output": str(folder)}
        common |= self.equal.settings(variant.name)
        if self.test_data is not None and not tuning:
            common["eval_data"] = self.test_data
        return Cell(variant, lr, seed, resolve(variant, lr, base=self.base, common=common))

    def tuning_cells(self, variant: Variant) -> list[Cell]:
        """The runs of the grid, with the first seed; none without a grid."""
        return [self.cell(variant, lr, self.seeds[0], tuning=True) for lr in self.grid]

    def final_cells(self, variant: Variant, lr: float) -> list[Cell]:
        """The runs of all seeds at the learning rate taken."""
        return [self.cell(variant, lr, seed) for seed in self.seeds]

    def chosen_lr(self, variant: Variant) -> float | None:
        """The learning rate with the grid's lowest held-out loss; without a grid the stated one.

        None while runs of the grid are missing, or if none ended well.
        """
        if not self.grid:
            return self.base.lr if variant.own_lr is None else variant.own_lr
        outcomes = [outcome_of(cell) for cell in self.tuning_cells(variant)]
        losses = {outcome.cell.lr: outcome.eval_loss for outcome in outcomes if outcome.eval_loss is not None}
        if any(not outcome.figures and not outcome.failed for outcome in outcomes) or not losses:
            return None
        return min(losses, key=lambda lr: losses[lr])

    @property
    def held_out(self) -> str | None:
        """The file that the final losses are of; None for a part of the data."""
        return self.test_data or self.base.eval_data

    @property
    def answers_of_base(self) -> Path:
        """The file with the closed questions that the base answers."""
        return self.output / "runs" / f"base-{ANSWERS_NAME}"

    @property
    def closed(self) -> Closed | None:
        """The closed questions and the base's share; None where none are asked."""
        if self.closed_questions is None:
            return None
        path = str(Path(self.closed_questions).resolve())
        return Closed(path, answers_of(self.answers_of_base, path))

    @property
    def asked(self) -> Asked | None:
        """The rows whose completions are compared: file and count; None where none are."""
        return (str(Path(self.held_out).resolve()), self.n_exact) if self.n_exact and self.held_out else None


def read_study(
    config: str | Path | Config,
    methods: str,
    *,
    seeds: str,
    output: str | None,
    lr_grid: str,
    test_data: str | None,
    exact_match: int,
    only: str,
    jobs: int,
    equal: str = "",
    closed_questions: str | None = None,
) -> Study:
    """The study that the arguments ask for. Raises InputError(s), all that were found."""
    variants, errors = parse_variants(methods, "--methods")
    wanted, more = parse_variants(only, "--only") if only else (variants, [])
    errors += more
    base = _base(config, output, errors)
    for variant in wanted:
        if variant not in variants:
            errors.append(InputError("is not among --methods", where=f"--only {variant.name}", fix="add it there"))
    seed_values = [int(value) for value in _numbers(seeds, "--seeds", whole=True, errors=errors)]
    grid = _numbers(lr_grid, "--lr-grid", whole=False, errors=errors) if lr_grid else []
    errors += check_variants(variants, base, lrs=grid or [base.lr], tuned=bool(grid))
    errors += _against_model(base, variants, (grid or [base.lr])[0])
    errors += _faults(base, grid, test_data, exact_match, jobs)
    errors += _closed_faults(closed_questions)
    errors += faults(equal, base)
    folder = Path(base.output).expanduser()
    errors += _strangers(folder)
    raise_collected(errors)
    study = Study(
        base, tuple(variants), tuple(wanted), tuple(seed_values), tuple(grid), folder, test_data, exact_match, jobs,
        closed_questions,
    )  # fmt: skip
    study = replace(study, equal=found_means(equal, base, variants, lr=(grid or [base.lr])[0], folder=folder))
    raise_collected(_foreign_cells(study))
    return study


def _base(config: str | Path | Config, output: str | None, errors: list[InputError]) -> Config:
    """The settings that all variants share. Raises InputErrors: what is wrong there, and what was wrong before."""
    path, given = (None, config.model_dump(mode="json", exclude_unset=True)) if isinstance(config, Config) else (config, {})
    try:
        return load_config(path, {**given, "output": output or given.get("output")})
    except InputError as error:
        raise_collected([*(error.errors if isinstance(error, InputErrors) else (error,)), *errors])
        raise


def _numbers(text: str, flag: str, *, whole: bool, errors: list[InputError]) -> list[float]:
    found: list[float] = []
    for part in text.split(","):
        try:
            value = int(part) if whole else float(part)
        except ValueError:
            value = -1
        sound = (0 <= value < 2**63) if whole else (value > 0 and math.isfinite(value))
        if not sound or value in found:
            what = "is given twice" if sound else "must be a whole number from 0" if whole else "must be a number above 0"
            errors.append(InputError(f"{part.strip()!r} {what}", where=flag))
        else:
            found.append(value)
    return found


def _faults(base: Config, grid: Sequence[float], test_data: str | None, n_exact: int, jobs: int) -> Iterator[InputError]:
    if not test_data and not base.eval_data and not base.eval_fraction:
        yield InputError("is needed: methods are compared by it", where="eval_data", fix="give held-out data")
    if grid and not base.eval_data and not base.eval_fraction:
        yield InputError("needs eval_data or eval_fraction in the config, to choose by", where="--lr-grid")
    for name, why in NOT_HERE.items():
        if getattr(base, name) and (name != "keep_best" or test_data):
            yield InputError(f"cannot be compared with: {why}", where=name, fix="leave it out of the config")
    files = {
        "data": base.data,
        "eval_data": base.eval_data,
        "retention_data": base.retention_data,
        "--test-data": test_data,
    }
    yield from file_errors(files)
    if test_data is not None and _same_file(test_data, base.data):
        yield InputError("are the training data", where="--test-data", fix="name held-out data")
    if test_data is not None and grid and base.eval_data and _same_file(test_data, base.eval_data):
        yield InputError("are the data that the learning rate is chosen by", where="--test-data", fix="name other data")
    if jobs < 1:
        yield InputError(f"{jobs} is too few", where="--jobs", fix="use 1 or more")
    if n_exact < 0:
        yield InputError(f"{n_exact} is below 0", where="--exact-match", fix="say how many rows, or leave it out")
    if n_exact > 0:
        yield from _exact_faults(test_data or base.eval_data, n_exact, base)


def _closed_faults(path: str | None) -> Iterator[InputError]:
    """What is wrong with a file of closed questions."""
    if path is None:
        return
    if not Path(path).is_file():
        yield InputError("is no file", where=f"--closed-questions {path}", fix="give rows of prompt and completion")
        return
    try:
        check_questions(path)
    except InputErrors as errors:
        yield from errors.errors
    except InputError as error:
        fix = "give rows of prompt and completion" if "plain text" in error.what else error.fix
        yield InputError(error.what, where=error.where, fix=fix)


def _exact_faults(held_out: str | None, n_exact: int, base: Config) -> Iterator[InputError]:
    if held_out is None:
        yield InputError("needs held-out rows of its own", where="--exact-match", fix="give eval_data or --test-data")
    elif Path(held_out).is_file():
        try:
            questions(held_out, n_exact, base.data_format, columns=base.columns or ())
        except InputErrors as errors:
            yield from errors.errors
        except InputError as error:
            yield error


def _same_file(one: str, other: str) -> bool:
    return Path(one).exists() and Path(other).exists() and Path(one).samefile(other)


def _strangers(folder: Path) -> list[InputError]:
    """An error for what lies in the output folder and is of no comparison."""
    where, fix = f"output {folder}", "add --output DIR: a new folder, or that of an earlier comparison"
    if not folder.exists():
        return []
    try:
        found = {path.name for path in folder.iterdir()}
    except OSError as error:
        return [InputError(f"cannot be read: {error.strerror}", where=where, fix=fix)]
    if found & {"config.yaml", "run.json"}:
        return [InputError("holds a run of finetune", where=where, fix=fix)]
    written = (*TABLES, STEPS_NAME, BYTES_NAME)
    own = {*written, *(f"{name}.partial" for name in written), "runs", "tuning", LOCK_NAME}
    if strange := sorted(found - own):
        return [InputError(f"holds {strange[0]!r}, which is of no comparison", where=where, fix=fix)]
    if found & set(TABLES) and not is_ours(folder):
        return [InputError(f"holds a {sorted(found & set(TABLES))[0]} that lopt-edge did not write", where=where, fix=fix)]
    return []


def _foreign_cells(study: Study) -> list[InputError]:
    """Errors for folders of runs with other settings, in the places of ours."""
    lrs = {variant: study.grid or (study.chosen_lr(variant),) for variant in study.variants}
    cells = [cell for variant in study.variants for lr in lrs[variant] if lr for cell in study.final_cells(variant, lr)]
    cells += [cell for variant in study.variants for cell in study.tuning_cells(variant)]
    errors: dict[Path, InputError] = {}
    for cell in cells:
        try:
            cell.check()
        except InputError as error:
            errors[cell.folder] = error
    return list(errors.values())


def _against_model(base: Config, variants: Sequence[Variant], lr: float) -> Iterator[InputError]:
    """Errors that a model folder on this machine shows of a variant (segments beyond its depth, say).

    A hub id is not asked.
    """
    from lopt_edge.models.folder import find_model
    from lopt_edge.planning.settings import against_facts

    if not Path(base.model).expanduser().is_dir() and base.model.count("/") == 1:
        return
    try:
        facts = find_model(base.model).facts
    except InputError as error:
        yield error
        return
    for variant in variants:
        try:
            config = resolve(variant, lr, base=base, common={})
        except InputError:  # reported where the variants are checked
            continue
        try:
            against_facts(config, facts)
        except InputError as error:
            faults = error.errors if isinstance(error, InputErrors) else (error,)
            yield from (
                InputError(f"{one.where}: {one.what}", where=f"--methods {variant.name}", fix=one.fix) for one in faults
            )
