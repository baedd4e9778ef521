"""What comes after a run: the commands, with the run's real paths, as one would type them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lopt_edge.plan.facts.gguf_architectures import can_be_written


def next_commands(result: Any) -> Iterator[str]:
    """The lines about a finished run's next steps, those alone that work.

    A run that replaced layers has no adapter of its own to give away; not every family can be written as GGUF.
    """
    output = Path(result.output)
    own, name = shlex.quote(str(output)), output.name or "model"
    beside = shlex.quote(str(output.with_name(f"{name}.gguf")))
    yield "next:"
    yield f"  lopt-edge chat --adapter {own}"
    gguf = can_be_written(json.loads((output / "run.json").read_text(encoding="utf-8"))["model"])
    if gguf:
        yield f"  lopt-edge export {own} --gguf {beside} --type q8_0"
    else:
        yield f"  lopt-edge export {own} --merged {shlex.quote(str(output.with_name(f'{name}-merged')))}"
    if not result.replacement:
        if gguf:
            yield f"  lopt-edge export {own} --ollama {shlex.quote(str(output.with_name(f'{name}-ollama')))}"
        yield f"  lopt-edge push {own} YOUR_NAME/{shlex.quote(name)}"
