"""Finds what one decoder layer allocates, family by family, and writes lopt_edge/plan/costs/layer_bytes.json for the
planner.

The planner must know the bytes inside a layer without torch. transformers' layer code allocates in a fixed order, so this
tool runs the real executor over each family's layers (no weights: every module of ours is replaced by a stand-in that
allocates its result and nothing else), and logs every allocation and release (run/watch/tracker.py). The sizes of the model
and the batch are primes times powers of two, so that each size is a product of dimensions in one way only; a second run
with other primes must give the same products. The result is a *program* a op: its allocations and releases in order, with
marks where a module of ours works, whose own bytes are formulas (plan/costs/module_bytes.py). plan/costs/layer_bytes.py
replays it.

A linear layer with LoRA saves its input for its backward. Which ones have LoRA is a run's setting, so each is tried alone:
a release that it delays is written with its name. In a segment's first layer, whose input needs no gradient, the
backward is traced for each linear layer that may be the first one with LoRA.

How a program reads says lopt_edge/tracing/logs.py, where logs become programs; lopt_edge/tracing also has the stand-ins and
the step. Here are the families' cases and sizes; trace_step.py makes the model of a case, trace_inner.py traces what runs
many times inside one op, trace_shared.py makes layers share keys.

    python tools/trace_bytes.py            writes the table (minutes); --families a,b: traces these alone
    python tools/trace_bytes.py --check    exits with 1 if the committed table is not what this version gives
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trace_inner import traced_chunk, traced_tile
from trace_step import (
    SHARED_PARTS,
    Case,
    cases,
    delta_cases,
    make_model,
    run,
    sizes_of,
    tile_cases,
    variants,
)

from lopt_edge.plan.costs.shape import more_general
from lopt_edge.run.model import tiled
from lopt_edge.tracing.log import EventLog
from lopt_edge.tracing.logs import Log, log_of, merged
from lopt_edge.tracing.step import Trace, make_segments
from tools.tiny_models import FAMILIES

TABLE = Path(__file__).resolve().parent.parent / "lopt_edge" / "plan" / "costs" / "layer_bytes.json"
LETTERS = {"s": "sequences", "t": "tokens", "d": "hidden", "h": "heads", "k": "kv_heads", "e": "head_dim",
           "f": "that of layers without a window", "i": "intermediate", "q": "heads + 2 kv_heads", "u": "tokens + 1",
           "n": "rows of a tile", "v": "rows of a vocabulary chunk", "l": "a delta rule's key heads",
           "j": "its value heads", "m": "its key_dim", "o": "its value_dim", "c": "its 2 l m + j o",
           "x": "tokens of a chunk, and those before", "y": "experts", "p": "those that a token goes to",
           "w": "what a layer is told of a token",
           "z": "features of a head that are rotated, where not all are"}  # fmt: skip
# Two sets of sizes; each dimension has a prime of its own. `group` is heads / kv_heads (and group + 2 is prime, too), `r`
# is j / l (and c / l is prime; for that `o` differs where r is 1).
PRIMES = (
    {"s": 13, "t": 37, "u": 38, "d": 68, "k": 11, "e": 46, "f": 2 * 71, "i": 58, "n": 31, "v": 41, "group": 5,
     "l": 43, "r": 3, "m": 47, "o": 59, "o of 1": 73, "x": 67, "y": 83, "p": 79, "w": 61, "z": 106},
    {"s": 5, "t": 61, "u": 62, "d": 76, "k": 7, "e": 34, "f": 2 * 59, "i": 46, "n": 29, "v": 37, "group": 11,
     "l": 41, "r": 3, "m": 43, "o": 47, "o of 1": 53, "x": 71, "y": 97, "p": 89, "w": 79, "z": 134},
)  # fmt: skip
# Smaller ones for a chunk of a delta rule, which is computed.
NOT_IN_A_CHUNK = dict.fromkeys("tudkefinvypwz", 1) | {"group": 1}
CHUNK_PRIMES = (
    {**NOT_IN_A_CHUNK, "s": 3, "l": 5, "r": 7, "m": 11, "o": 13, "o of 1": 19, "x": 67},
    {**NOT_IN_A_CHUNK, "s": 5, "l": 7, "r": 3, "m": 13, "o": 11, "o of 1": 11, "x": 71},
)
ORDER = "nstuxdhkqefivlcjmoypwz"


def product(n_bytes: int, sizes: dict[str, int]) -> str:
    """The product that `n_bytes` is: a coefficient and letters, the dimensions whose primes divide it."""
    letters, rest, group = "", n_bytes, sizes["h"] // sizes["k"]
    factors = {"h": (group, sizes["k"]), "q": (group + 2, sizes["k"])} if group > 1 else {}
    if sizes["r"] > 1:
        factors["j"] = (sizes["r"], sizes["l"])
    factors["c"] = (sizes["c"] // sizes["l"], sizes["l"])
    factors |= {letter: (_prime(sizes[letter]), 1) for letter in "stdefinvuklmoxypwz"}
    for letter, (prime, with_it) in factors.items():
        while prime > 1 and rest % (prime * with_it) == 0:
            rest //= prime * with_it
            letters += letter
    letters = letters if group > 1 else letters.replace("k", "h")
    letters = letters if sizes["r"] > 1 else letters.replace("l", "j")
    coefficient = n_bytes / math.prod(sizes[letter] for letter in letters)
    return f"{coefficient:g}" + "".join(sorted(letters, key=ORDER.index))


def _prime(size: int) -> int:
    while size % 2 == 0:
        size //= 2
    return size


def programs(case: Case) -> dict[str, str]:
    """The programs of a case by op; both sets of primes must give the same."""
    found = [_programs(case, run(case, sizes), sizes) for sizes in (sizes_of(case, primes) for primes in PRIMES)]
    for name, text in found[0].items():
        if text != found[1][name]:
            different = [pair for pair in zip(text.split(), found[1][name].split(), strict=False) if pair[0] != pair[1]]
            raise SystemExit(f"{case.key}: {name} is not made of products of dimensions: {different[:3]}")
    return found[0]


def alone(trace: Trace, op: str, sizes: dict[str, int]) -> str:
    """The program of an op by itself."""
    return merged({"": log_of(trace, op, partial(product, sizes=sizes), numbers={})}, before=False)


def _programs(case: Case, trace: Trace, sizes: dict[str, int]) -> dict[str, str]:
    made = {"embed": alone(trace, "EMBED mb=0", sizes)}
    if case.both:
        return made
    wanted = variants(case)
    segments = make_segments([*(variant.n_layers for variant in wanted.values()), 1, 1])
    by_op: dict[str, dict[str, Log]] = {}
    for (kind, held), segment in zip(wanted, segments, strict=False):
        numbers: dict[int, str] = {}
        graph = log_of(trace, f"FORWARD {segment.last} mb=0 keep=graph", partial(product, sizes=sizes), numbers=numbers)
        backward = log_of(trace, f"BACKWARD {segment.last} mb=0", partial(product, sizes=sizes), numbers=numbers)
        entry = kind.partition(" ")[2]
        if kind == "rest":
            by_op.setdefault("graph", {})[held] = graph
            by_op.setdefault("backward", {})[held] = backward
        if entry and not held:
            abreast = set(entry.split(",")) <= set(SHARED_PARTS) and case.has_experts
            by_op.setdefault(f"graph first {kind}" if abreast else "graph first", {})["" if abreast else entry] = graph
        if kind == "first" and held in SHARED_PARTS:
            by_op.setdefault("graph first", {})[held] = graph
        if kind == "first" or kind.startswith("from"):
            by_op.setdefault(f"backward {kind}", {})[held] = backward
    made |= {op: merged(logs, before=op.startswith("backward")) for op, logs in by_op.items()}
    made["forward"] = merged(
        {"": log_of(trace, "FORWARD 0 mb=0 keep=input", partial(product, sizes=sizes), numbers={})}, before=False
    )
    for name, segment in (("task loss", segments[0]), ("reconstruct loss", segments[-2])):
        made[name] = merged(
            {"": log_of(trace, f"LOSS {segment.index} mb=0", partial(product, sizes=sizes), numbers={})}, before=False
        )
    return made


def special(text: str, case: Case) -> str:
    """The program of a more general case with this one's sizes."""

    def one(found: re.Match[str]) -> str:
        number, letters = float(found[1]), found[2].replace("s", "" if case.one else "s")
        if case.kv_heads == "equal" or case.heads.endswith(" equal"):
            number, letters = number * 3 ** letters.count("q"), letters.replace("k", "h").replace("q", "h")
            letters = letters.replace("l", "j")
        elif case.kv_heads == "single":
            letters = letters.replace("k", "")
        return f"{number:g}{''.join(sorted(letters, key=ORDER.index))}"

    return re.sub(r"(?<=[+:])([\d.]+)([a-z]*)(?![\w])", one, text)


def without_special(found: dict[Case, dict[str, str]]) -> dict[str, dict[str, str]]:
    """The cases without those that a more general one gives with their sizes (plan/costs/programs.py looks there)."""
    kept = {case.key: ops for case, ops in found.items()}
    for case, ops in found.items():
        general = next((kept[key] for key in more_general(case.key) if key in kept), None)
        if general is not None and ops == {op: special(text, case) for op, text in general.items()}:
            del kept[case.key]
    return kept


def norm_programs(family: str, dtype: torch.dtype) -> dict[str, str]:
    """The programs of a tile of a norm (run/model/tiled.py): n rows of d, values and gradient."""
    found = []
    for sizes in (sizes_of(Case(family, dtype), primes) for primes in PRIMES):
        log = EventLog()
        inner = make_model(Case(family, dtype), sizes, 1, log).norm
        x, g = (torch.ones(sizes["n"], sizes["d"], dtype=dtype) for _ in range(2))
        trace = Trace(given={"norm_forward": {}, "norm_backward": {}}, result={"norm_forward": -1, "norm_backward": -1})
        with log:
            log.watch([x, g, inner.weight])
            log.events.clear()
            with torch.no_grad():
                inner(x)
            trace.spans["norm_forward"] = list(log.events)
            log.events.clear()
            tiled._tile_gradient(inner, x, g)
            trace.spans["norm_backward"] = list(log.events)
        found.append({op: alone(trace, op, sizes) for op in trace.spans})
    if found[0] != found[1]:
        raise SystemExit(f"{family}: a norm's tile is not made of products of dimensions")
    return found[0]


def inner_programs(case: Case) -> dict[str, str]:
    """The programs of a chunk of a delta rule (its values and the state after it, and its gradients), or of a tile of an
    expert's tokens (its values, and its gradients)."""
    found, trace_of = [], traced_tile if case.heads == "tile" else traced_chunk
    for sizes in (sizes_of(case, primes) for primes in (PRIMES if case.heads == "tile" else CHUNK_PRIMES)):
        trace = trace_of(case, sizes)
        found.append({op: alone(trace, op, sizes) for op in trace.spans})
    if found[0] != found[1]:
        raise SystemExit(f"{case.key}: it is not made of products of dimensions: {found}")
    return found[0]


def table(families: Iterable[str], *, progress: bool = False) -> dict[str, Any]:
    """The table {"programs": texts, each once; "cases": case -> op -> index of its program}; none follows from another."""
    by_case: dict[str, dict[str, str]] = {}
    for family in families:
        found = without_special({case: programs(case) for case in cases(family)})
        for dtype in (torch.float32, torch.bfloat16):
            found[f"{family} {dtype.itemsize}"] = norm_programs(family, dtype)
        found |= without_special({case: inner_programs(case) for case in (*delta_cases(family), *tile_cases(family))})
        by_case |= found
        if progress:
            print(f"{family}: {len(found)} cases", flush=True)
    return folded(by_case)


def folded(by_case: dict[str, dict[str, str]]) -> dict[str, Any]:
    """The table of these texts by case and op, each text once."""
    texts: dict[str, int] = {}
    cases = {key: {op: texts.setdefault(text, len(texts)) for op, text in ops.items()} for key, ops in by_case.items()}
    return {"cases": cases, "programs": list(texts)}


def unfolded(found: dict[str, Any], families: Iterable[str]) -> dict[str, dict[str, str]]:
    """The texts of some families by case and op: what two tables are compared by."""
    wanted = {key: ops for key, ops in found["cases"].items() if key.split()[0] in families}
    return {key: {op: found["programs"][index] for op, index in ops.items()} for key, ops in wanted.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the committed table, write nothing")
    parser.add_argument("--families", default=",".join(FAMILIES), help="which to trace; the others stay (default: all)")
    arguments = parser.parse_args()
    families = arguments.families.split(",")
    found = table(families, progress=True)
    committed = json.loads(TABLE.read_text(encoding="utf-8"))
    if arguments.check:
        raise SystemExit(unfolded(committed, families) != unfolded(found, families))
    every: dict[str, dict[str, str]] = {}
    for family in FAMILIES:
        every |= unfolded(found if family in families else committed, [family])
    TABLE.write_text(json.dumps(folded(every), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
