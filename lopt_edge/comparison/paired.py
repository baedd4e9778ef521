"""Differences between variants, paired by seed: the mean of what a seed's two runs differ by, and its 95% interval.

Runs of one seed share data order, dropout and initial adapters, so their difference wavers less than either; a spread over
the seeds beside each mean says little about it. The interval is Student's, mean +- t(n - 1) s / sqrt(n) over the n seeds
that both have: with three seeds it is wide, and that is the truth of three seeds. The first variant is what the others are
compared with. Nothing is called significant: an interval that holds 0 is a tie, as docs/methods.md says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import mean, stdev

from lopt_edge.comparison.figures import FIGURES, Row

# Student's t, two-sided 95%, by degrees of freedom from 1; beyond, the normal's with a little to spare
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
T_FAR = 2.12
COMPARED = ("eval_loss", "preferred", "exact_match", "forgetting", "answers_after")


@dataclass(frozen=True)
class Difference:
    """A variant's figure minus the first one's: the mean over `n` seeds, half the width of its interval (None of one)."""

    mean: float
    half: float | None
    n: int

    def text(self, figure: str) -> str:
        """The difference in the figure's form, with its sign."""
        form = FIGURES[figure]
        factor, unit = (100.0, "%") if form.percent else (1.0, "")
        interval = "" if self.half is None else f" ± {self.half * factor:.{form.digits}f}"
        return f"{self.mean * factor:+.{form.digits}f}{interval}{unit}"


def difference(row: Row, first: Row, figure: str) -> Difference | None:
    """The paired difference of a figure; None without a seed that both have."""
    ours, theirs = (_by_seed(one, figure) for one in (row, first))
    pairs = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    if not pairs:
        return None
    n = len(pairs)
    if n == 1:
        return Difference(pairs[0], None, 1)
    t = T_95[n - 2] if n - 2 < len(T_95) else T_FAR
    return Difference(mean(pairs), t * stdev(pairs) / sqrt(n), n)


def differences(rows: Sequence[Row]) -> Mapping[str, Mapping[str, Difference]]:
    """The differences of every variant but the first, by name and figure."""
    if len(rows) < 2:
        return {}
    first, *others = rows
    found = {
        row.name: {figure: one for figure in COMPARED if (one := difference(row, first, figure)) is not None}
        for row in others
    }
    return {name: figures for name, figures in found.items() if figures}


def paired_table(rows: Sequence[Row]) -> list[list[str]]:
    """The table of differences to the first variant; empty where there are none."""
    found = differences(rows)
    figures = [figure for figure in COMPARED if any(figure in one for one in found.values())]
    if not figures:
        return []
    table = [[f"minus {rows[0].name}", "seeds", *(FIGURES[figure].heading for figure in figures)]]
    for name, one in found.items():
        n = max(difference.n for difference in one.values())
        table.append([name, str(n), *(one[figure].text(figure) if figure in one else "-" for figure in figures)])
    return table


def _by_seed(row: Row, figure: str) -> dict[int, float]:
    values = {outcome.cell.seed: outcome.figures.get(figure) for outcome in row.outcomes if outcome.figures is not None}
    return {seed: value for seed, value in values.items() if value is not None}
