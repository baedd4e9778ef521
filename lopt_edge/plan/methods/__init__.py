"""Methods: how far a gradient reaches. Each file opens with its paper, its definition, and where we deviate.

A method turns a model's depth and its own options into a course (course.py): segments with losses, in one or several
kinds of step. The op list, paging, memory, checkpoints are the same for all of them. What makes a file a method is that it
lies here and declares `METHODS` (method.py): no list names the files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from pkgutil import iter_modules

from lopt_edge.plan.methods.course import Course, cached
from lopt_edge.plan.methods.method import Method, Options, RunSettings


def _found() -> Iterator[Method]:
    for file in iter_modules(__path__):
        yield from getattr(import_module(f"{__name__}.{file.name}"), "METHODS", ())


METHODS: Mapping[str, Method] = {method.name: method for method in sorted(_found(), key=lambda method: method.name)}


def owners_of(setting: str) -> tuple[str, ...]:
    """The methods to which a setting belongs; none if it is every run's."""
    return tuple(name for name, method in METHODS.items() if setting in method.own_options)


def option_classes() -> tuple[type[Options], ...]:
    """The classes whose fields together are all methods' options, each once."""
    found = dict.fromkeys(method.options for method in reversed(tuple(METHODS.values())))
    return tuple(one for one in found if not any(one is not other and issubclass(other, one) for other in found))


def course_of(config: RunSettings, n_layers: int) -> Course:
    """The course of a run with these settings. Raises InputError for what this depth does not allow."""
    found = METHODS[config.method].course(config, n_layers)
    return found if config.boundary_cache is None else cached(found, epochs=config.epochs)
