"""What a run puts into a checkpoint and takes from it: adapters, aux heads, optimizer, gradients, random states, settings.

    adapter_model.safetensors, adapter_config.json   the adapter, as peft loads it: any checkpoint can be tried out
    training.safetensors                             by group: moments, aux heads' values, gradients inside a window;
                                                     averages of adapters
    replaced_layers.json                             with method repl: the mixing coefficients (run/model/replaced.py)
    best_adapter.safetensors                         with keep_best: the best adapter so far, and best_replaced_layers.json
    config.yaml, state.json                          settings as given; position, counts, fingerprints, versions

Tensors are written and read one group at a time, from whatever tier they lie on to whatever tier the plan has them on, so
a checkpoint takes the memory of one group. Values that are not finite are never written.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lopt_edge.adapters.save import AdapterShape, save_adapter
from lopt_edge.errors import InputError, NotFinite
from lopt_edge.plan.schedule.ops import GroupName
from lopt_edge.run.device import random_sources
from lopt_edge.run.devices.interface import Device
from lopt_edge.run.model.adapter_config import ADAPTER_NAME, REPLACED_NAME
from lopt_edge.run.step.executor import Executor
from lopt_edge.run.step.step_state import Cut
from lopt_edge.system.files import write_json, write_text
from lopt_edge.training.checkpoint.folder import STATE
from lopt_edge.training.checkpoint.output_folder import SETTINGS_NAME
from lopt_edge.training.checkpoint.run_state import RunState
from quant.files import read_tensor, tensor_bytes
from quant.headers import FolderError, SafetensorsWriter, TensorEntry, read_header

if TYPE_CHECKING:
    from lopt_edge.run.link import FarGroups

TENSORS_NAME, BEST_NAME = "training.safetensors", "best_adapter.safetensors"
BEST_REPLACED_NAME = f"best_{REPLACED_NAME}"
DTYPE_NAMES = {torch.float32: "F32", torch.uint8: "U8"}
HEADER_SHARE, FILES_BYTES = 1.05, 1 << 18  # headers and JSON files, for the check of free space


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint's content but for its tensors; `facts` are fingerprints, plan and versions (resume.py)."""

    state: RunState
    facts: dict[str, Any]
    settings: str
    shape: AdapterShape
    best: Path | None = None  # the adapter file


def write_snapshot(folder: Path, executor: Executor, snapshot: Snapshot, *, cut: Cut | None = None) -> None:
    """Write all files of a checkpoint but its manifest; `cut` is where the step under way was left.

    Raises NotFinite, RunError, OSError.
    """
    save_adapter(folder, executor.model, snapshot.shape, plain=True)
    parts = list(_parts(executor, cut))
    layout = [(part.name, DTYPE_NAMES[part.dtype], part.shape) for part in parts]
    with SafetensorsWriter(folder / TENSORS_NAME, layout) as writer:
        for part in parts:
            tensor = part.read()
            assert tensor is not None
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise NotFinite(f"{part.name} holds values that are not finite; no checkpoint was written")
            writer.write(part.name, tensor_bytes(tensor.contiguous()))
            del tensor
    if snapshot.best is not None:
        shutil.copyfile(snapshot.best, folder / BEST_NAME)
        if (replaced := snapshot.best.with_name(REPLACED_NAME)).exists():
            shutil.copyfile(replaced, folder / BEST_REPLACED_NAME)
    write_text(folder / SETTINGS_NAME, snapshot.settings)
    groups = {_key(name): group.steps for name, group in executor.optimizer.groups.items()}
    if executor.far is not None:
        groups |= {_key(name): group.steps for name, group in executor.far.groups.items()}
    python_random = random.getstate()
    write_json(
        folder / STATE,
        {
            "run": snapshot.state.as_dict(),
            "updates": groups,
            **snapshot.facts,
            "python_random": [python_random[0], list(python_random[1]), python_random[2]],
        },
    )


@dataclass(frozen=True)
class _Part:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor | None]


def _parts(executor: Executor, cut: Cut | None) -> Iterator[_Part]:
    optimizer, device = executor.optimizer, executor.model.device
    for name, group in optimizer.groups.items():
        flat = (group.n_elements,)
        if name[0] == "aux":
            yield _Part(f"{_key(name)}.values", torch.float32, flat, partial(group.values.detach().cpu))
        if group.moments is not None:
            yield _Part(
                f"{_key(name)}.moments", *optimizer.moments.form(group.n_elements), partial(optimizer.moments_copy, name)
            )
        if cut is not None and group.gradient is not None:
            yield _Part(f"{_key(name)}.gradient", torch.float32, flat, partial(cut.gradient, name))
    for layer, average in _averages(executor).items():
        yield _Part(f"average.{layer}", torch.float32, tuple(average.shape), average.cpu)
    if executor.far is not None:
        yield from _far_parts(executor, executor.far)
    for source in random_sources(device):
        yield _Part(_random_key(source), torch.uint8, tuple(source.random_state().shape), source.random_state)


def _far_parts(executor: Executor, far: FarGroups) -> Iterator[_Part]:
    """The tensors of the groups that lie in other processes of a pipeline."""
    for name, group in far.groups.items():
        dtype, shape = executor.optimizer.moments.form(group.n_elements)
        if name[0] == "aux":
            yield _Part(
                f"{_key(name)}.values",
                torch.float32,
                (group.n_elements,),
                partial(far.tensor, "values", name, (group.n_elements,), torch.float32),
            )
        if group.has_moments:
            yield _Part(f"{_key(name)}.moments", dtype, shape, partial(far.tensor, "moments", name, shape, dtype))


def _key(name: GroupName) -> str:
    return f"{name[0]}.{name[1]}"


def _random_key(source: Device) -> str:
    return f"random.{source.kind.name}"


def snapshot_bytes(executor: Executor) -> int:
    """The most bytes that a checkpoint takes of the disk (inside a window, after the first update)."""
    optimizer, total = executor.optimizer, FILES_BYTES
    sizes = [group.n_elements for group in optimizer.groups.values()]
    sizes += [group.n_elements for group in executor.far.groups.values()] if executor.far is not None else []
    for n_elements in sizes:
        dtype, shape = optimizer.moments.form(n_elements)
        total += prod(shape) * dtype.itemsize + 2 * 4 * n_elements  # moments; values, gradient
    total += sum(average.nbytes for average in _averages(executor).values())
    return round(HEADER_SHARE * total)


def _averages(executor: Executor) -> Mapping[int, Tensor]:
    return {} if executor.averages is None else executor.averages.flat


# taking up again -------------------------------------------------------------------------------------------------------


def restore(executor: Executor, folder: Path, values: dict[str, Any], *, tier: str) -> Callable[[GroupName], Tensor | None]:
    """Put optimizer, aux heads and random states of a verified checkpoint into place; `tier` is where the plan has
    moments.

    The adapter itself was attached before (training/prepare/build.py). Returns what reads a group's accumulated gradient.
    Raises InputError for a checkpoint of another shape.
    """
    where = str(folder / TENSORS_NAME)
    try:
        entries = read_header(folder / TENSORS_NAME)
        for name, group in executor.optimizer.groups.items():
            key, n_elements = _key(name), group.n_elements
            if name[0] == "aux":
                group.values.copy_(_read(entries, f"{key}.values", (n_elements,), where))
            moments = None
            if f"{key}.moments" in entries:
                dtype, shape = executor.optimizer.moments.form(n_elements)
                moments = _read(entries, f"{key}.moments", shape, where)
                if moments.dtype != dtype:
                    raise InputError(f"{key}.moments has dtype {moments.dtype}", where=where)
            executor.optimizer.put_state(name, moments=moments, steps=_count(values["updates"][key]), tier=tier)
            del moments
        for layer, average in _averages(executor).items():
            average.copy_(_read(entries, f"average.{layer}", tuple(average.shape), where))
        for source in random_sources(executor.model.device):
            key = _random_key(source)
            if key in entries or source.kind.computes_on_cores:  # a GPU's is not there if the run began on a CPU
                source.set_random_state(_read(entries, key, tuple(source.random_state().shape), where))
        version, numbers, gauss = values["python_random"]
        random.setstate((version, tuple(numbers), None if gauss is None else float(gauss)))
    except FolderError as error:
        raise InputError(str(error), where=where) from None
    except (
        KeyError,
        TypeError,
        ValueError,
        OverflowError,
        RuntimeError,
    ) as error:  # RuntimeError: torch's, of a random state
        raise InputError(f"does not fit this run ({str(error)[:100]})", where=where, fix="use another checkpoint") from None

    def gradient(name: GroupName) -> Tensor | None:
        entry = f"{_key(name)}.gradient"
        if entry not in entries:
            return None
        return _read(entries, entry, (executor.optimizer.groups[name].n_elements,), where)

    return gradient


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError("a number of updates is none")
    return value


def _read(entries: dict[str, TensorEntry], name: str, shape: tuple[int, ...], where: str) -> Tensor:
    entry = entries.get(name)
    if entry is None or entry.shape != shape:
        found = "is missing" if entry is None else f"has shape {list(entry.shape)}, not {list(shape)}"
        raise InputError(f"{name} {found}", where=where, fix="use another checkpoint")
    return read_tensor(entry)


def restore_best(folder: Path, output: Path, shape: AdapterShape) -> None:
    """Copy the best adapter so far from a checkpoint back into the output folder, where it has one."""
    if not (folder / BEST_NAME).exists():
        return
    output.mkdir(parents=True, exist_ok=True)
    for kept, name in ((BEST_NAME, ADAPTER_NAME), (BEST_REPLACED_NAME, REPLACED_NAME)):
        if (folder / kept).exists():
            beside = output / f"{name}.partial"
            shutil.copyfile(folder / kept, beside)
            beside.replace(output / name)
    write_json(output / "adapter_config.json", {"peft_type": "LORA", **shape.config()})
