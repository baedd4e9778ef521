"""What comes after a run: the commands, with the run's real paths, as one would type them."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def next_commands(result: Any) -> Iterator[str]:
    """The lines about a finished run's next steps. A run that replaced layers has no adapter of its own to give away."""
    output = Path(result.output)
    own, name = shlex.quote(str(output)), output.name or "model"
    beside = shlex.quote(str(output.with_name(f"{name}.gguf")))
    yield "next:"
    yield f"  lopt-edge chat --adapter {own}"
    yield f"  lopt-edge export {own} --gguf {beside} --type q8_0"
    if not result.replacement:
        yield f"  lopt-edge export {own} --ollama {shlex.quote(str(output.with_name(f'{name}-ollama')))}"
        yield f"  lopt-edge push {own} YOUR_NAME/{shlex.quote(name)}"
