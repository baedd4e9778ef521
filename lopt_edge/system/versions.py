"""The versions of the packages that decide a run's numbers, as its records and checkpoints name them."""

from __future__ import annotations

from importlib.metadata import version

PACKAGES = ("lopt-edge", "torch", "transformers", "peft", "bitsandbytes", "safetensors")


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that matter to a run, by name."""
    return {name: version(name) for name in PACKAGES}
