"""Another rank and NCCL, played: the code that sums gradients on a card runs as it stands, in one process without one."""

from __future__ import annotations

from typing import Any

import torch

from lopt_edge.errors import NotFinite
from lopt_edge.plan.schedule.ranks import Rank


class PlayedGroup:
    """Stands for NCCL between two ranks: it reads and writes what that would, on the stream that is current."""

    def alltoall_base(self, received: torch.Tensor, gradient: torch.Tensor, outputs: Any, inputs: Any) -> PlayedGroup:
        for part in received.view(len(outputs), -1):
            part.copy_(gradient[: len(part)])
        return self

    def broadcast(self, chunks: list[torch.Tensor], options: Any) -> PlayedGroup:
        chunks[0].mul_(1.0)
        return self

    def wait(self) -> None:
        pass


class PlayedLink:
    """Stands for the link to one other rank, which has the same gradients."""

    parts, rank = (Rank(0), Rank(1)), 0

    def group_on_devices(self, name: str) -> PlayedGroup:
        return PlayedGroup()

    def wait_for(self, job: Any) -> None:
        job.result()

    def flush(self) -> None:
        pass

    def agree(self, fault: NotFinite | None, op: str) -> None:
        assert fault is None

    def gather(self, own: dict[str, Any]) -> list[dict[str, Any]]:
        return []
