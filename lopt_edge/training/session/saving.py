"""When a checkpoint is due, and writing it: every N steps, every M minutes (inside a step too), at stops and at the end.

It is written between micro-batches, so its cost is seconds and no memory beyond one parameter group; the log is made
durable first, since the checkpoint names a place in it. Old checkpoints go when the new one is durable.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lopt_edge.adapters.save import AdapterShape
from lopt_edge.config.load import settings_text
from lopt_edge.run.model.adapter_config import ADAPTER_NAME
from lopt_edge.run.step.executor import Executor
from lopt_edge.run.step.op_faults import memory_faults
from lopt_edge.run.step.step_state import Cut
from lopt_edge.system.file_systems import check_free_space
from lopt_edge.system.files import JsonLines
from lopt_edge.system.versions import versions
from lopt_edge.training.checkpoint.folder import CHECKPOINTS, name_of, new_checkpoint, prune
from lopt_edge.training.checkpoint.resume import Start
from lopt_edge.training.checkpoint.run_state import RunState
from lopt_edge.training.checkpoint.snapshot import Snapshot, snapshot_bytes, write_snapshot
from lopt_edge.training.prepare.inputs import Inputs


class Saver:
    """The writer of a session's checkpoints. `seconds` are those of the run so far, by phase.

    `newest` is the last checkpoint that is whole, None before the first.
    """

    def __init__(
        self,
        inputs: Inputs,
        executor: Executor,
        shape: AdapterShape,
        *,
        state: RunState,
        start: Start | None,
        seconds: Mapping[str, float],
    ) -> None:
        self.inputs, self.config, self.executor, self.shape, self.state = inputs, inputs.config, executor, shape, state
        self.seconds = seconds
        self.output = Path(self.config.output)
        self.root = self.output / CHECKPOINTS
        self.newest: Path | None = None
        self.newest_steps, self.saved = -1, ""
        if start is not None:
            self.newest, self.newest_steps, self.saved = start.checkpoint.folder, state.steps, start.checkpoint.folder.name
        self.last = time.monotonic()
        self.n_bytes = snapshot_bytes(executor)
        check_free_space(self.output, need_bytes=(self.config.keep + 1) * self.n_bytes, what="checkpoints")

    @property
    def is_saved(self) -> bool:
        """Whether the state's place is that of the newest checkpoint."""
        return self.saved == name_of(self.state.steps, self.state.sequences)

    def minutes_are_up(self) -> bool:
        """Whether `save_minutes` have passed since the last checkpoint."""
        minutes = self.config.save_minutes
        return bool(minutes) and time.monotonic() - self.last >= 60 * minutes

    def due(self, *, last: bool) -> bool:
        """Whether a checkpoint is due after the step that was just finished."""
        every = self.config.save_every
        return last or self.minutes_are_up() or bool(every and self.state.steps % every == 0)

    def save(self, log: JsonLines, *, cut: Cut | None = None) -> None:
        """Write a checkpoint, unless this place is saved; `cut`: inside a step.

        Raises RunError, after which nothing of the new checkpoint is left and the older ones are whole.
        """
        if self.is_saved:
            return
        self.last = time.monotonic()  # a disk that refuses is not asked again at once
        log.sync()
        state = replace(self.state, log_bytes=log.n_bytes, loss_scale=self.executor.loss_scale, seconds=dict(self.seconds))
        best = self.output / ADAPTER_NAME if state.best is not None else None
        snapshot = Snapshot(state, self._facts(), settings_text(self.inputs.asked or self.config), self.shape, best)
        name = name_of(state.steps, state.sequences)
        with memory_faults("writing a checkpoint"), new_checkpoint(self.root, name, need_bytes=self.n_bytes) as folder:
            write_snapshot(folder, self.executor, snapshot, cut=cut)
        self.newest, self.newest_steps, self.saved = self.root / name, state.steps, name
        prune(self.root, keep=self.config.keep)

    def _facts(self) -> dict[str, Any]:
        inputs = self.inputs
        batch_size, grad_accum = inputs.order
        row_tokens = self.config.row_tokens if self.config.packing else None
        n_micro_batches = inputs.n_micro_batches if row_tokens else -(-batch_size * grad_accum // self.config.batch_size)
        return {
            "config": (inputs.asked or self.config).model_dump(mode="json"),
            "settled": {"batch_size": batch_size, "grad_accum": grad_accum, "num_segments": self.config.num_segments,
                        "token_tile": inputs.knobs.token_tile, "row_tokens": row_tokens},
            "model": inputs.model,
            "teacher": inputs.teacher_model,
            "data": {"fingerprint": inputs.train.fingerprint, "examples": len(inputs.train.examples),
                     "seed": self.config.seed, "epoch_sequences": len(inputs.train.examples)},
            "plans": {kind.name: inputs.plan(n_micro_batches, kind).hash() for kind in inputs.course.kinds},
            "versions": versions(),
            "device": inputs.device.type,
            "threads": torch.get_num_threads(),  # products of several threads are summed in another order
            "compute_dtype": str(inputs.dtype).removeprefix("torch."),
        }  # fmt: skip
