"""Tasks of lm-evaluation-harness on our 4-bit model, with or without an adapter.

The rules: tasks are named as the harness names them, its own (whose data it fetches) or those of a folder, which needs no
network where its data lies there too; a task is a program of its author's, whose functions the harness runs. A name that is
no task is refused before a model is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lopt_edge.errors import InputError

if TYPE_CHECKING:
    from lopt_edge.adapters.generation import TextGenerator

BOOTSTRAPS = 1000  # for the errors of metrics that have no formula for theirs


@dataclass(frozen=True)
class Asked:
    """What is asked: tasks by name, a folder with more of them, at most so many rows of each, so many examples before."""

    tasks: tuple[str, ...]
    folder: str | None = None
    limit: int | None = None
    few_shot: int | None = None
    as_chat: bool = False


def manager_of(asked: Asked) -> Any:
    """The harness' register of tasks. Raises InputError where it is not installed, and for a name that is no task."""
    if find_spec("lm_eval") is None:
        raise InputError("needs the package lm-eval", where="--tasks", fix="pip install 'lopt-edge[eval]'")
    if asked.folder is not None and not Path(asked.folder).is_dir():
        raise InputError(
            "no such folder", where=f"--task-folder {asked.folder}", fix="name the folder of the tasks' YAML files"
        )
    from lm_eval.tasks import TaskManager

    found = TaskManager(include_path=asked.folder)
    missing = [task for task in asked.tasks if task not in found.all_tasks]
    if missing:
        fix = "name tasks that the harness has (lm-eval ls tasks), or those of a folder with --task-folder"
        raise InputError(f"{missing[0][:80]!r} is no task", where="--tasks", fix=fix)
    return found


def run_tasks(generator: TextGenerator, asked: Asked, manager: Any, *, max_seq_len: int | None = None) -> dict[str, Any]:
    """The figures of each task, by its name and the metric's (`acc`; with a filter `exact_match,strict`)."""
    from lm_eval import simple_evaluate

    from lopt_edge.adapters.harness_model import HarnessModel

    if asked.as_chat and generator.template is None:
        raise InputError("this model has no chat template", where="--as-chat", fix="leave it out")
    longest = generator.model.facts.max_positions or 2048
    done = simple_evaluate(
        HarnessModel(generator, max_length=min(max_seq_len or longest, longest)),
        tasks=list(asked.tasks),
        limit=asked.limit,
        num_fewshot=asked.few_shot,
        apply_chat_template=asked.as_chat,
        bootstrap_iters=BOOTSTRAPS,
        log_samples=False,
        task_manager=manager,
    )
    return {task: _figures(values) for task, values in done["results"].items()}


def _figures(values: dict[str, Any]) -> dict[str, float]:
    named = {name.removesuffix(",none"): value for name, value in values.items() if name != "alias"}
    return {name: float(value) for name, value in named.items() if isinstance(value, (int, float))}


def figures_of(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """The (task, metric) pairs that any of the results has, their errors left out."""
    found = ((task, name) for row in rows for task, figures in row.items() for name in figures)
    return list(dict.fromkeys((task, name) for task, name in found if "_stderr" not in name and name != "sample_len"))
