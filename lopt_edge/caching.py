"""A run's boundary cache: of what it is, whether it may be, and the space that it takes.

Where the segments before the boundary never change, their output for an example is always the same: `--boundary-cache
FOLDER` keeps it, so that from the second time on an example is seen those layers are neither fetched nor run. The folder
outlives the run and serves every later one with the same model, data, boundary and dtype (another learning rate, say). Its
bytes are apart from the page files' budget, told before the run, and checked against the free space.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lopt_edge.artifacts import check_free_space
from lopt_edge.errors import InputError
from lopt_edge.output_lock import output_lock
from lopt_edge.plan.course import READ
from lopt_edge.run.feature_cache import IDENTITY_NAME, FeatureCache
from lopt_edge.run.lora import ADAPTER_NAME

if TYPE_CHECKING:
    from lopt_edge.preparation import Inputs


def identity(inputs: Inputs) -> dict[str, Any]:
    """What the boundary's hidden states depend on."""
    adapter = inputs.config.init_adapter
    carried = hashlib.sha256((Path(adapter) / ADAPTER_NAME).read_bytes()).hexdigest() if adapter else None
    return {
        "model": inputs.model,
        "data": inputs.train.fingerprint,
        "boundary": inputs.course.named[READ].reads,
        "compute_dtype": str(inputs.dtype).removeprefix("torch."),
        "adapter": carried,
    }


def check_boundary_cache(inputs: Inputs) -> None:
    """Before anything is written. Raises InputError(s)."""
    folder = inputs.config.boundary_cache
    if folder is None:
        return
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise InputError("is no folder", where=f"boundary_cache {folder}", fix="name a new folder")
    if (path / IDENTITY_NAME).exists():
        _open(inputs, path).close()
        return
    need = 2 * inputs.source.facts.hidden_size * inputs.train.n_tokens
    check_free_space(path, need_bytes=need, what="the boundary cache")


@contextmanager
def boundary_cache(inputs: Inputs) -> Iterator[FeatureCache | None]:
    """The cache that the settings name, locked; None without one."""
    if inputs.config.boundary_cache is None:
        yield None
        return
    path = Path(inputs.config.boundary_cache)
    with output_lock(path):
        cache = _open(inputs, path)
        try:
            yield cache
        finally:
            cache.close()


def _open(inputs: Inputs, path: Path) -> FeatureCache:
    return FeatureCache(path, identity=identity(inputs), lengths=inputs.train.lengths,
                        width=inputs.source.facts.hidden_size)  # fmt: skip
