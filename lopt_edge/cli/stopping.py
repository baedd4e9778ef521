"""What a signal does to a command that makes files and trains nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from lopt_edge.cli.terminal import say, streams
from lopt_edge.errors import Interrupted


@contextmanager
def stoppable() -> Iterator[None]:
    """Let SIGHUP, SIGINT and SIGTERM end what is inside, which makes files, with a sentence and exit code 128 + number."""
    from lopt_edge.system.signals import Interrupts

    streams.result_is_on_disk = True
    try:
        with Interrupts().listening():
            yield
    except Interrupted as stop:
        say(str(stop))
        raise typer.Exit(stop.exit_code) from None
