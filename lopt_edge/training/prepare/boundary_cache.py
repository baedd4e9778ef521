"""A run's boundary caches: of what they are, whether they may be, and the space that they take.

Where the segments before a boundary do not change, their output for an example is always the same: `--boundary-cache
FOLDER` keeps it, so that from the second time on an example is seen those layers are neither fetched nor run. The folder
outlives the run and serves every later one with the same model, data, boundary and dtype (another learning rate, say). With
stages (segprop), and where a boundary closes (reach.py), the adapters before it have learned in the run: each stage has a
cache in a folder of its own, named by the adapters' sum, and the stage before is removed. Their bytes are checked against
the free space before the run; those of a named folder are apart from the page files' budget.

A boundary that closes while epochs are left is kept without being asked, in OUTPUT.boundary, until the run is finished: a
stopped run goes on with it. Its bytes count in the disk budget beside the page files.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lopt_edge.errors import InputError, RunError
from lopt_edge.plan.schedule.build import StepKind
from lopt_edge.run.model.adapter_config import ADAPTER_NAME, read_adapter_config
from lopt_edge.run.step.executor import Executor
from lopt_edge.run.tiers.feature_cache import IDENTITY_NAME, FeatureCache, claim
from lopt_edge.system.file_systems import check_free_space
from lopt_edge.system.lock import output_lock
from lopt_edge.units import format_bytes

if TYPE_CHECKING:
    from lopt_edge.training.prepare.inputs import Inputs

STAGE = "stage-"
OURS = ".boundary"  # behind the output's name: the folder that a run makes for itself, and removes


class BoundaryCaches:
    """The caches in the folder that the settings name; one is open at a time."""

    def __init__(self, inputs: Inputs) -> None:
        named = inputs.config.boundary_cache
        self.inputs, self.is_ours = inputs, named is None
        self.root = Path(f"{inputs.config.output}{OURS}") if named is None else Path(named)
        self.open: FeatureCache | None = None
        self.boundary = -1

    def identity(self, boundary: int | None) -> dict[str, Any]:
        """The facts that the boundary's hidden states depend on; without a boundary, those that all stages share."""
        inputs, adapter = self.inputs, self.inputs.config.init_adapter
        carried = _identity_of(Path(adapter)) if adapter else None
        return {
            "model": inputs.model,
            "data": inputs.train.fingerprint,
            "boundary": boundary if boundary is not None else "by stage",
            "compute_dtype": str(inputs.dtype).removeprefix("torch."),
            "adapter": carried,
        }

    def check(self) -> None:
        """Refuse a folder of something else or too little room, before anything is written. Raises InputError(s)."""
        where = f"boundary_cache {self.root}"
        need = 2 * self.inputs.source.facts.hidden_size * self.inputs.train.n_tokens
        limit, paged = self.inputs.budget.disk_bytes, self.inputs.predict().disk_bytes
        if self.is_ours and limit is not None and need + paged > limit:
            what = f"the closed boundary takes {format_bytes(need)} beside page files of {format_bytes(paged)}"
            raise InputError(what, where="disk_memory", fix="allow more, or add --no-closed-cache")
        try:
            if self.root.exists() and not self.root.is_dir():
                raise InputError("is no folder", where=where, fix="name a new folder")
            if self.root.is_dir() and any(self.root.iterdir()) and not self.is_left_over:
                self._claim()
                return
        except OSError as error:
            raise InputError(f"cannot be used: {error.strerror}", where=where, fix="name another folder") from None
        check_free_space(self.root, need_bytes=need, what="the boundary cache")

    @property
    def is_left_over(self) -> bool:
        """Whether the folder is what another run of this output left when it was stopped; then it is removed."""
        if not (self.is_ours and (self.root / IDENTITY_NAME).is_file()):
            return False
        try:
            claim(self.root, self.identity(None))
        except InputError:
            return True
        return False

    def _claim(self) -> None:
        if self.inputs.course.learns_before:
            claim(self.root, self.identity(None))
        else:
            (kind,) = (kind for kind in self.inputs.course.kinds if kind.reads is not None)
            self._cache(self.root, kind.reads or 0).close()

    def of(self, kind: StepKind, executor: Executor) -> FeatureCache:
        """The cache of a kind of step that reads or fills one; whichever was open before is closed."""
        boundary = kind.reads or kind.writes or 0
        if self.open is None or self.boundary != boundary:
            self.close()
            self.boundary = boundary
            self.open = self._cache(self._folder(boundary, executor), boundary)
        return self.open

    def _folder(self, boundary: int, executor: Executor) -> Path:
        if not self.inputs.course.learns_before:
            return self.root
        self.root.mkdir(parents=True, exist_ok=True)
        claim(self.root, self.identity(None))
        digest = hashlib.sha256()
        for (unit, layer), group in executor.optimizer.groups.items():
            if unit == "layer" and layer < boundary:
                digest.update(group.values.detach().cpu().numpy().data)
        folder = self.root / f"{STAGE}{boundary}-{digest.hexdigest()[:16]}"
        for other in self.root.glob(f"{STAGE}*"):
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise RunError(f"cannot be made: {error.strerror}", where=str(folder), fix="check the disk") from None
        return folder

    def _cache(self, folder: Path, boundary: int) -> FeatureCache:
        inputs = self.inputs
        return FeatureCache(
            folder, identity=self.identity(boundary), lengths=inputs.train.lengths, width=inputs.source.facts.hidden_size
        )

    def summary(self, *, n_read: int, n_steps: int) -> str:
        """A sentence for the end of a run: what is cached, and that `n_read` of `n_steps` steps read it."""
        assert self.open is not None
        there, size = f"{len(self.open.known):,} of {len(self.open.lengths):,} examples", format_bytes(self.open.held_bytes)
        return f"boundary cache {self.open.folder}: {there}, {size} of disk; {n_read} of {n_steps} steps read it"

    def close(self) -> None:
        """Close the cache that is open, if one is."""
        if self.open is not None:
            self.open.close()
            self.open = None


def _identity_of(adapter: Path) -> str:
    """A digest of what an adapter computes: its matrices, and how they are scaled."""
    config = read_adapter_config(adapter)
    digest = hashlib.sha256((adapter / ADAPTER_NAME).read_bytes())
    digest.update(f"\nalpha {config.alpha} rslora {config.rslora}".encode())
    return digest.hexdigest()


def check_boundary_cache(inputs: Inputs) -> None:
    """Refuse a boundary cache that cannot be used, before anything is written. Raises InputError(s)."""
    if inputs.course.caches:
        BoundaryCaches(inputs).check()


@contextmanager
def boundary_caches(inputs: Inputs) -> Iterator[BoundaryCaches | None]:
    """The caches in the folder that the settings name, or in one of the run's own, locked while it is open; None where no
    step has a use for one. What is the run's own goes when it is finished."""
    if not inputs.course.caches:
        yield None
        return
    found = BoundaryCaches(inputs)
    if found.is_left_over:
        shutil.rmtree(found.root, ignore_errors=True)
    with output_lock(found.root, setting="boundary_cache"):
        try:
            yield found
        finally:
            found.close()
    if found.is_ours:
        shutil.rmtree(found.root, ignore_errors=True)
