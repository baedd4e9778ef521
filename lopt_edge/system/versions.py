"""The versions of the packages that decide a run's numbers, as its records and checkpoints name them."""

from __future__ import annotations

from functools import lru_cache
from importlib.metadata import version

PACKAGES = ("lopt-edge", "torch", "transformers", "peft", "bitsandbytes", "safetensors")


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that matter to a run, by name."""
    return {name: version_of(name) for name in PACKAGES}


@lru_cache
def version_of(name: str) -> str:
    """Read once: a package's metadata take 10 ms to parse, and a run asks five times."""
    return version(name)
