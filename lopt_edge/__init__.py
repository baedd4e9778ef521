"""lopt-edge: low-memory fine-tuning of large language models on one consumer GPU or a CPU laptop.

Public names: `Config`, `load_config`, `plan_run`, `finetune`, `compare`, `generate`, `load`, `export`, `InputError`,
`RunError`. They resolve on first use, so that importing the package (or planning) never loads torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lopt_edge.adapters.generation import generate, load
    from lopt_edge.adapters.merge import export
    from lopt_edge.comparison.run import compare
    from lopt_edge.config.load import load_config
    from lopt_edge.config.settings import Config
    from lopt_edge.errors import InputError, RunError
    from lopt_edge.planning.worst_case import plan_run
    from lopt_edge.training.run import finetune

__all__ = [
    "Config",
    "InputError",
    "RunError",
    "compare",
    "export",
    "finetune",
    "generate",
    "load",
    "load_config",
    "plan_run",
]

_HOMES = {
    "Config": "config.settings",
    "InputError": "errors",
    "RunError": "errors",
    "compare": "comparison.run",
    "export": "adapters.merge",
    "finetune": "training.run",
    "generate": "adapters.generation",
    "load": "adapters.generation",
    "load_config": "config.load",
    "plan_run": "planning.worst_case",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lopt_edge' has no attribute {name!r}")
    return getattr(import_module(f"lopt_edge.{_HOMES[name]}"), name)
