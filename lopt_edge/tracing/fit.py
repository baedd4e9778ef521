"""Products from numbers: the same program traced at a few sizes, each number of which must be one product in all of them.

Whoever has three traces of one op at sizes that are no multiples of each other has one exponent for each size and one
coefficient, or the number is no product and the program is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import product
from math import prod

MOST = 2  # of one letter in a product: tokens x tokens of a mask
NUMBER = re.compile(r"(?<=[+:])\d+\b")


def fitted(texts: Sequence[str], sizes: Sequence[Mapping[str, int]], letters: str, *, what: str) -> str:
    """The program of which these are traces. Raises ValueError where they differ in more than sizes explain."""
    words = [text.split() for text in texts]
    if len({len(each) for each in words}) != 1 or len({NUMBER.sub("#", text) for text in texts}) != 1:
        raise ValueError(f"{what}: what is allocated and released depends on the number of tokens")
    return " ".join(_word(column, sizes, letters, what) for column in zip(*words, strict=True))


def _word(column: Sequence[str], sizes: Sequence[Mapping[str, int]], letters: str, what: str) -> str:
    found = [[int(number) for number in NUMBER.findall(word)] for word in column]
    products = iter([_product(numbers, sizes, letters, what) for numbers in zip(*found, strict=True)])
    return NUMBER.sub(lambda _: next(products), column[0])


def _product(numbers: Sequence[int], sizes: Sequence[Mapping[str, int]], letters: str, what: str) -> str:
    """The coefficient and the letters of one number: the smallest number of letters that fits all."""
    for exponents in sorted(product(range(MOST + 1), repeat=len(letters)), key=sum):
        word = "".join(letter * n for letter, n in zip(letters, exponents, strict=True))
        each = [number / prod(one[letter] for letter in word) for number, one in zip(numbers, sizes, strict=True)]
        if len(set(each)) == 1:
            return f"{each[0]:.17g}{word}"
    raise ValueError(f"{what}: {numbers} bytes are no product of sequences and tokens ({[dict(one) for one in sizes]})")
