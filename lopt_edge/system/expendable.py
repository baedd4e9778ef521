"""A process of its own for what may take too much memory: the first that the kernel ends, and silent but for its answer.

The rule: if memory runs short, the process that was asked to try goes, not the one that asked. Whatever a library prints
is sent to standard error, so that standard output holds the answer alone. What the answer is, is for both sides to know.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO


def answer_stream() -> BinaryIO:
    """The former standard output of this process, for its answer; from then on it is expendable (where Linux is)."""
    with suppress(OSError):  # not Linux
        Path("/proc/self/oom_score_adj").write_text("1000")
    answer = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints is no answer
    return answer
