"""Bytes of a weight matrix in the 4-bit form, by arithmetic alone (no torch).

The form is bitsandbytes' NF4 with double quantisation: two 4-bit codes a byte; one absolute maximum per block of 64
elements, itself stored in 8 bits as an offset from the mean with one fp32 scale per 256 blocks; a 16-entry and a
256-entry code map. The rule: every number here equals the size of the tensor that `quant.nf4.pack` makes; a test checks
it. Beside them stand the sizes of the pieces in which our modules work; who predicts what they take reads them here. It
knows nothing of files or models.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, prod

BLOCK_ELEMENTS = 64
NESTED_BLOCK_ELEMENTS = 256
CODE_MAP_BYTES = 16 * 4
NESTED_MAP_BYTES = 256 * 4
MIXED_ELEMENTS = 1 << 20  # of each matrix, unpacked at a time where matrices are mixed
UNPACK_CHUNK = 1 << 18  # packed bytes unpacked at a time on the CPU: index 1 MiB + result 2 MiB stay near the core
DEVICE_UNPACK_CHUNK = 1 << 22  # on a device without a kernel for it: fewer launches, 48 MiB
DELTA_CHUNK = 64  # tokens of a delta rule at a time (run/model/delta_net.py), as many as transformers takes
DELTA_STATES_APART = 8  # chunks from one kept state to the next

# Bytes per element of the dtypes that occur in safetensors files, by their safetensors names.
DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "U32": 4, "U64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class PackedSizes:
    """The bytes of one packed matrix: the codes, the scales that belong to it, and the (shareable) code maps."""

    codes_bytes: int
    absmax_bytes: int
    nested_absmax_bytes: int
    maps_bytes: int

    @property
    def scales_bytes(self) -> int:
        """The bytes of the scales of both levels."""
        return self.absmax_bytes + self.nested_absmax_bytes

    @property
    def total_bytes(self) -> int:
        """The bytes of one matrix in memory; the code maps are shared by all matrices and left out."""
        return self.codes_bytes + self.scales_bytes


def packed_sizes(shape: tuple[int, ...]) -> PackedSizes:
    """The sizes of the packed form of a matrix of this shape."""
    n_elements = prod(shape)
    n_blocks = ceil(n_elements / BLOCK_ELEMENTS)
    return PackedSizes(
        codes_bytes=ceil(n_elements / 2),
        absmax_bytes=n_blocks,
        nested_absmax_bytes=4 * ceil(n_blocks / NESTED_BLOCK_ELEMENTS),
        maps_bytes=CODE_MAP_BYTES + NESTED_MAP_BYTES,
    )


def rows_at_once(out_features: int, in_features: int) -> int:
    """The number of rows of a matrix that are unpacked at a time where it is mixed with another one (quant/mixed.py).

    Rows can be cut out only where no quantisation block crosses them.
    """
    return out_features if in_features % BLOCK_ELEMENTS else min(out_features, max(1, MIXED_ELEMENTS // in_features))


def expert_tile(*, on_cpu: bool) -> int:
    """The number of an expert's tokens that are gathered at a time (quant/experts.py).

    On a CPU few, since the plan must hold as many even where each expert gets a handful.
    """
    return 256 if on_cpu else 1024


@dataclass(frozen=True)
class MlpPieces:
    """The pieces in which a gated MLP is computed (quant/gated_mlp.py): blocks of so many intermediate features, tiles of
    so many tokens. `joined`: gate and up are one product, which takes a third tensor of a piece's size in the forward."""

    features: int = 1024
    tokens: int = 1024
    joined: bool = False


PIECES = MlpPieces()  # where nothing else is asked for


def adds_apart(*, itemsize: int, widens: bool) -> bool:
    """Whether a product that is added to an fp32 sum is made beside it first (quant/products.py); `widens`: on this device
    products of half precision add to such a sum by themselves."""
    return itemsize != 4 and not widens


def unpack_chunk(*, on_cpu: bool) -> int:
    """The packed bytes that our code unpacks at a time (quant/nf4.py)."""
    return UNPACK_CHUNK if on_cpu else DEVICE_UNPACK_CHUNK
