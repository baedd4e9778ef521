"""The sum of a parameter group's gradients over all ranks, begun by one call and ended by another.

The rule: every rank adds the same numbers in the same order (rank 0's, then rank 1's, ...), so all hold the same sum, and a
run repeats bit for bit. A ring's all-reduce would not promise that. Each rank sums one chunk of the flat gradient: it
receives all ranks' parts of it into one buffer, adds them up, and its sum goes to all others. So each sends about twice a
gradient's bytes, however many ranks there are. It allocates nothing but that buffer, which is planned
(plan/schedule/ranks.py).

It runs in a thread of its own, one group after the other as they are begun, which is the same order in every rank. On the
CPU bytes go by gloo over TCP; on CUDA by NCCL, on a side stream, and each rank needs a card of its own (NCCL refuses two on
one). A rank that is gone, or says nothing for too long, is a PeerLost where the sum is waited for. Which groups are summed,
and when, is the plan's matter.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor

from lopt_edge.plan.schedule.ranks import chunk_elements, exchange_elements
from lopt_edge.run.device import device_of
from lopt_edge.run.link import Link

GROUP = "gradients"  # the name of its process group at the meeting place


class Exchange:
    """This rank's end of the sums over all ranks. `delay` is for tests: it is called before and after each sum."""

    def __init__(self, link: Link, device: torch.device, *, delay: Callable[[], None] = lambda: None) -> None:
        self.link, self.delay, self.ranks = link, delay, len(link.parts)
        self.side = device_of(device).side_stream()
        self.group = link.group(GROUP, timeout=link.timeout) if self.side is None else link.group_on_devices(GROUP)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="lopt-reduce")
        self._thread.submit(lambda: None).result()  # it begins now, not where memory may have run out

    def begin(self, gradient: Tensor) -> Callable[[], None]:
        """Begin to sum a flat fp32 gradient, in its place. Returns what waits for the sum; until then it is not touched."""
        buffer = torch.empty(exchange_elements(len(gradient), self.ranks), dtype=gradient.dtype, device=gradient.device)
        mark = None if self.side is None else self.side.mark_compute()
        lent = [buffer]  # the thread gives it back before it is done, so that it goes where the plan says
        job = self._thread.submit(self._sum, gradient, lent, mark)
        return partial(self._end, job, buffer)

    def close(self) -> None:
        """Let the thread go; a sum under way is left to itself."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _end(self, job: Future[None], _buffer: Tensor) -> None:
        self.link.wait_for(job)

    def _sum(self, gradient: Tensor, lent: list[Tensor], mark: Any) -> None:
        self.delay()
        with torch.no_grad(), nullcontext() if self.side is None else self.side.after(mark):
            _sum_in_order(self.group, gradient, lent.pop(), rank=self.link.rank, ranks=self.ranks)
            if self.side is not None:
                self.side.record_event().synchronize()
        self.delay()


def _sum_in_order(group: Any, gradient: Tensor, buffer: Tensor, *, rank: int, ranks: int) -> None:
    """Leave the sum of all ranks' gradients in this one."""
    chunks = torch.split(gradient, chunk_elements(len(gradient), ranks))
    chunks += (gradient[:0],) * (ranks - len(chunks))
    sizes, own = [len(chunk) for chunk in chunks], chunks[rank]
    received = buffer[: ranks * len(own)]
    group.alltoall_base(received, gradient, [len(own)] * ranks, sizes).wait()
    if len(own):
        total, *others = received.view(ranks, -1)
        for part in others:
            total.add_(part)
        own.copy_(total)
    for root, chunk in enumerate(chunks):
        if len(chunk):
            options = distributed.BroadcastOptions()
            options.rootRank, options.rootTensor = root, 0
            group.broadcast([chunk], options).wait()
