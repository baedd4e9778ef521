"""K types of GGUF files, which llama.cpp's own quantiser makes: its program `llama-quantize`, or the package cyllama.

The rule: the quantiser runs in a process of its own, on a half-precision file that is written first and removed in any
case; what it leaves is read as every GGUF file is, every tensor within the file, before it gets its name. After a fault
nothing is left. Without a quantiser the type is refused before anything is written, with how to get one.

Run as a module it is that process where cyllama is used: FROM, TO, and the number of the type (llama.h, `llama_ftype`).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from lopt_edge.errors import InputError, RunError
from quant.gguf.header import read_gguf_header
from quant.headers import FolderError
from quant.untrusted import printable

PROGRAM, PACKAGE = "llama-quantize", "cyllama"
FTYPES = {
    "Q2_K": 10, "Q2_K_S": 21, "Q3_K_S": 11, "Q3_K_M": 12, "Q3_K_L": 13, "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16,
    "Q5_K_M": 17, "Q6_K": 18, "IQ4_NL": 25, "IQ4_XS": 30,
}  # fmt: skip
SHORT = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}  # as llama-quantize understands them


def check_quantiser(kind: str) -> None:
    """Raise InputError where nothing is installed that makes this type."""
    if shutil.which(PROGRAM) is None and find_spec(PACKAGE) is None:
        what = f"{kind.lower()} needs llama.cpp's quantiser, which is not installed"
        fix = f"pip install {PACKAGE}, or put llama.cpp's {PROGRAM} on the PATH; f16, q8_0, q4_0, ... need neither"
        raise InputError(what, where="--type", fix=fix)


def quantised(path: Path, kind: str, write: Callable[[Path], object]) -> None:
    """Make the file `path` (new) of a K type; `write` writes the half-precision one, and may raise. Raises RunError."""
    wide = path.with_name(f"{path.name}.f16-{os.getpid()}")
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        write(wide)
        _run(wide, partial, kind)
        read_gguf_header(partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except FolderError as error:
        raise RunError(
            f"llama.cpp's quantiser left a damaged file ({error})", where=str(path), fix="free space there"
        ) from None
    except OSError as error:
        raise RunError(f"cannot be written: {error.strerror}", where=str(path), fix="free space there") from None
    finally:
        for left in (wide, partial):
            left.unlink(missing_ok=True)


def _run(source: Path, target: Path, kind: str) -> None:
    program = shutil.which(PROGRAM)
    command = [program or sys.executable, *(() if program else ("-m", __name__))]
    command += [str(source), str(target), kind if program else str(FTYPES[kind])]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if done.returncode or not target.exists():
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        last = printable(lines[-1])[:300] if lines else f"exit code {done.returncode}"
        raise RunError(f"llama.cpp's quantiser failed: {last}", where=str(target.parent), fix="nothing was written")


def main() -> None:
    """Quantise a file by cyllama."""
    from cyllama.llama.llama_cpp import LlamaModelQuantizeParams, model_quantize

    source, target, number = sys.argv[1:]
    settings = LlamaModelQuantizeParams()
    settings.ftype = int(number)
    model_quantize(source, target, settings)


if __name__ == "__main__":
    main()
