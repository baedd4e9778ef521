"""Builds and loads shim.cpp, which lets a CPU build of torch hold CUDA tensors without memory.

It must be loaded before torch is imported, so the rig runs in a child process (child.py). Building takes 4 s of one core.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("shim.cpp")


def why_not() -> str | None:
    """The reason why the rig cannot run here, if there is one."""
    if shutil.which("g++") is None:
        return "the fake device needs g++ for its shim"
    if not (_torch() / "lib" / "libtorch_cpu.so").exists():
        return "the fake device needs torch's Linux libraries"
    if (_torch() / "lib" / "libtorch_cuda.so").exists():
        return "this build of torch has CUDA itself: its own hooks would win"
    return None


def build(folder: Path) -> Path:
    """Compile the shim into `folder` and return the library. Raises CalledProcessError, with g++'s words."""
    library = folder.absolute() / "shim.so"
    words = ["g++", "-O0", "-shared", "-fPIC", "-std=c++20", f"-I{_torch() / 'include'}", str(SOURCE), "-o", str(library)]
    subprocess.run([*words, f"-L{_torch() / 'lib'}", "-lc10", "-ltorch_cpu"], check=True, capture_output=True, text=True)
    return library


def load(library: Path) -> None:
    """Load the shim into this process, which must not have imported torch yet."""
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(os.fspath(_torch() / "lib" / name), ctypes.RTLD_GLOBAL)
    ctypes.CDLL(os.fspath(library))


def _torch() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent
