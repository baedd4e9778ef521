"""What a broken tokenizer raises, as an InputError.

A tokenizer's files may be broken in ways that show only when a text is encoded (a word-level vocabulary without its unknown
token, a post-processor that names a token which is not there). The tokenizers library then raises plain Exceptions, and
where its Rust code panics a `PanicException`, which is no Exception at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lopt_edge.errors import InputError


@contextmanager
def tokenizer_faults(what: str, *, where: str, fix: str) -> Iterator[None]:
    """A context in which anything that goes wrong becomes an InputError: `what` cannot be done, and why."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{what} ({type(error).__name__}: {str(error)[:200]})", where=where, fix=fix) from None
