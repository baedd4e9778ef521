"""A model of a family without a record: what is refused beforehand, what is proved and traced once, and what a user hears.

The rule: nothing is planned or trained before a tiny random model of the same config has run here as it does in
transformers (tracing/proof.py), and what its layers take has been traced (tracing/unlisted.py). Both are kept in the cache.
Torch is imported only where there is something to prove or to trace.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lopt_edge.config.settings import Config
from lopt_edge.errors import InputError, raise_collected
from lopt_edge.plan.costs.shape import table_file
from lopt_edge.plan.facts.model import ModelFacts
from lopt_edge.plan.methods.course import Course


def check_unlisted(config: Config, course: Course, facts: ModelFacts) -> None:
    """Refuse what only listed families have. Raises InputErrors."""
    if facts.own_family is None:
        return
    what, errors = f"is not there for {facts.model_type}, which is not one of the tested families", []
    if config.packing:
        errors.append(InputError(f"packing {what}", where="packing", fix="leave it out"))
    if course.replaced:
        errors.append(InputError(f"{course.method} {what}", where="method", fix="use lopt or e2e"))
    if config.pipeline > 1:
        errors.append(InputError(f"a pipeline {what}", where="pipeline", fix="leave it out"))
    raise_collected(errors)


def make_ready(facts: ModelFacts, *, itemsize: int, targets: tuple[str, ...], where: str) -> None:
    """Prove and trace a model whose family has no record, unless that was done. Raises InputError for what cannot be."""
    own = facts.family.unlisted
    if own is None:
        return
    if (Path(own.table) / "proof.json").exists() and Path(table_file(own.table, itemsize, targets)).exists():
        return
    from lopt_edge.tracing.proof import ensure_proved
    from lopt_edge.tracing.unlisted import ensure_table

    try:
        ensure_proved(facts, where=where)
        ensure_table(facts, itemsize=itemsize, targets=targets, where=where)
    except OSError as error:
        what = f"what was found out about the model cannot be kept ({error.strerror})"
        fix = "free space there, or set LOPT_EDGE_CACHE to another folder"
        raise InputError(what, where=own.table, fix=fix) from None


def about_unlisted(facts: ModelFacts) -> Iterator[str]:
    """Yield a sentence on a family that is not one of the tested ones."""
    if facts.own_family is not None:
        proved = "its layers run as transformers calls them, proved here on a tiny random model of the same config"
        yield f"{facts.model_type} is not one of the tested families: {proved}"
