"""`lopt-edge export`: what was written, how far it is from what was trained, and what to do if that is far.

The rule: every figure is of the result (lopt_edge/adapters/merge.py); nothing is computed here.
"""

from __future__ import annotations

from collections.abc import Iterator

from lopt_edge.adapters.gguf_export import Written
from lopt_edge.adapters.merge import Merged


def written(found: Written) -> str:
    """The sentence about a file or folder for another program."""
    return f"{found.path}: {found.n_bytes / 2**20:.0f} MiB, {found.what}"


def lines(merged: Merged) -> Iterator[str]:
    """The sentences about an export."""
    found = merged.divergence
    size = f"{merged.n_bytes / 2**20:.0f} MiB in {merged.form or merged.dtype}"
    yield f"{merged.folder}: {size}, merged onto the {merged.onto} weights"
    yield (
        f"read by {found.reader}, against the adapter on the 4-bit base: mean KL {found.mean_kl:.2e} nats a token, "
        f"relative logit difference {found.relative_error:.2%}, same top token {found.same_top_token:.0%} "
        f"({found.n_tokens} tokens of {found.probe})"
    )
    if found.left_out:
        yield f"the check through transformers was left out: {found.left_out}"
    if merged.advice:
        yield f"this difference is large; {merged.advice}"
