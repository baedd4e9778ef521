"""What config and headers of a quantised folder say of its matrices: in which tensors they lie, in which blocks they will.

The rule: a plan needs no more than this, so no tensor is read for it, nothing is written, and torch is not imported.
folder.py lays out by the same tables, and laid_out.py asks the same function for the block type. What the tensors say
beyond their sizes (an order of groups, codes that do not fit) is found when they are laid out.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from quant.gguf.types import GROUP_ELEMENTS, GROUPED, ORDER, ORDER_BYTES, ORDER_SUFFIX, ORDERED, BlockType
from quant.headers import FolderError, TensorEntry

SCALES = {"F16", "BF16", "F32"}
WIDTHS = {2: "INT2", 3: "INT4", 4: "INT4", 8: "INT8"}  # 3 bits are stored in 4
FLOAT8, GEMV = "FP8", "gemv"


class Words(NamedTuple):
    """The last words of a matrix' tensors: of the one by which it is found, and of all that belong to it."""

    suffix: str
    parts: tuple[str, ...]


WORDS = {
    "gptq": Words("qweight", ("qweight", "qzeros", "scales", "g_idx")),
    "awq": Words("qweight", ("qweight", "qzeros", "scales")),
    "compressed-tensors": Words(
        "weight_scale",
        ("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "input_scale",
         "input_zero_point", "output_scale", "k_scale", "v_scale"),
    ),
    "fp8": Words("weight_scale_inv", ("weight", "weight_scale_inv", "input_scale", "activation_scale")),
}  # fmt: skip
FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")  # of compressed-tensors
Part = Callable[[str], TensorEntry | None]


class Matrix(NamedTuple):
    """The rows and columns of a matrix, the groups of a row, what codes (of WIDTHS, or FLOAT8) and what scales it has."""

    shape: tuple[int, int]
    n_groups: int
    code: str
    scale: str


def unreadable(quantisation: Mapping[str, Any]) -> str:
    """What of a quantization_config of these formats cannot be read here; "" if all can."""
    return _CHECKS[quantisation["quant_method"]](quantisation)


def _check_gptq(config: Mapping[str, Any]) -> str:
    if config.get("bits") not in WIDTHS:
        return f"bits is {str(config.get('bits'))[:20]!r}, known are {', '.join(map(str, WIDTHS))}"
    if config.get("checkpoint_format", "gptq") not in ("gptq", "gptq_v2"):
        return f"checkpoint_format {str(config['checkpoint_format'])[:40]!r} is not known (gptq, gptq_v2)"
    return ""


def _check_awq(config: Mapping[str, Any]) -> str:
    if config.get("bits", config.get("w_bit", 4)) != 4:
        return f"bits is {str(config.get('bits', config.get('w_bit')))[:20]!r}, known is 4"
    version, size = str(config.get("version", "gemm")).lower(), awq_group(config)
    if version not in ("gemm", GEMV):
        return f"version {version[:40]!r} is not known (gemm, {GEMV})"
    return (
        "" if version == "gemm" or (type(size) is int and (size > 0 or size == -1)) else f"group_size is {str(size)[:20]!r}"
    )


def is_ordered(config: Mapping[str, Any], n_groups: int) -> bool:
    """Whether a config says act-order, so that the inputs of a matrix of several groups may be out of order."""
    return config["quant_method"] == "gptq" and bool(config.get("desc_act")) and n_groups > 1


def is_gemv(config: Mapping[str, Any]) -> bool:
    """Whether an AWQ config is of the version whose words lie along the inputs."""
    return str(config.get("version", "gemm")).lower() == GEMV


def awq_group(config: Mapping[str, Any]) -> Any:
    """The inputs of a group as an AWQ config says; -1 are all."""
    return config.get("group_size", config.get("q_group_size", 128))


def _check_compressed(config: Mapping[str, Any]) -> str:
    if config.get("format") not in FORMATS:
        return f"format {str(config.get('format'))[:40]!r} is not known ({', '.join(FORMATS)})"
    groups = config.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ({},):
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict) or weights.get("num_bits") not in (4, 8):
            return "config_groups does not say 4 or 8 num_bits of weights"
        if weights.get("actorder") not in (None, "weight", "static", "dynamic"):
            return f"actorder {str(weights['actorder'])[:40]!r} is not known"
    sparsity = config.get("sparsity_config") or {}
    return "sparsity_config is not known" if sparsity.get("format", "dense") != "dense" else ""


def _check_fp8(config: Mapping[str, Any]) -> str:
    block = config.get("weight_block_size")
    is_square = isinstance(block, (list, tuple)) and len(block) == 2 and all(type(one) is int and one > 0 for one in block)
    return "" if is_square else f"weight_block_size is {str(block)[:40]}, two sizes are expected"


def block_type(code: str, *, n_columns: int, n_groups: int, scale: str, where: str) -> BlockType:
    """The type of the blocks in which a matrix is laid out. Raises FolderError for sizes that make no blocks."""
    sizes = GROUP_ELEMENTS if n_groups and n_columns % n_groups == 0 else ()
    elements = next((one for one in sizes if n_columns // n_groups % one == 0), 0)
    if not elements:
        raise FolderError(f"{where}: {n_columns} columns in {n_groups} groups cannot be laid out in blocks of 32 or more")
    if scale not in SCALES:
        raise FolderError(f"{where}: its scales are {scale}, known are {', '.join(sorted(SCALES))}")
    return GROUPED[f"{code}_G{elements}_{scale}"]


def matrices_in(entries: Mapping[str, TensorEntry], method: str) -> list[str]:
    """The names of the quantised matrices of a folder, without their last word."""
    return sorted(name.rpartition(".")[0] for name in entries if name.rpartition(".")[2] == WORDS[method].suffix)


def plain_in(entries: Mapping[str, TensorEntry], method: str) -> list[str]:
    """The names of the tensors that belong to no quantised matrix."""
    taken = {f"{matrix}.{part}" for matrix in matrices_in(entries, method) for part in WORDS[method].parts}
    return sorted(set(entries) - taken)


def planned_entries(entries: Mapping[str, TensorEntry], quantisation: Mapping[str, Any]) -> dict[str, TensorEntry]:
    """The tensors as they will be once they are laid out in blocks; where they lie is not known yet. Raises FolderError."""
    method = quantisation["quant_method"]
    found = {name: entries[name] for name in plain_in(entries, method)}
    for name in matrices_in(entries, method):
        entry = entries[f"{name}.{WORDS[method].suffix}"]
        where = f"{entry.path}: {name}"

        def part(word: str, name: str = name) -> TensorEntry | None:
            return entries.get(f"{name}.{word}")

        shape, n_groups, code, scale = _READERS[method](part, quantisation, where)
        kind = block_type(code, n_columns=shape[1], n_groups=n_groups, scale=scale, where=where)
        weight = f"{name}.weight"
        if is_ordered(quantisation, n_groups):
            kind = ORDERED[kind.name + ORDER_SUFFIX]
            order, n_bytes = f"{weight}{ORDER}", ORDER_BYTES * shape[1]
            found[order] = TensorEntry(order, entry.path, "I32", shape[1:], 0, n_bytes)
        found[weight] = TensorEntry(weight, entry.path, kind.name, shape, 0, kind.n_bytes(shape))
    return found


def _two(part: Part, word: str, where: str) -> TensorEntry:
    entry = part(word)
    if entry is None or len(entry.shape) != 2:
        raise FolderError(f"{where}: {word} is {'missing' if entry is None else list(entry.shape)}")
    return entry


def _gptq(part: Part, quantisation: Mapping[str, Any], where: str) -> Matrix:
    words, scales, n_bits = _two(part, "qweight", where), _two(part, "scales", where), quantisation["bits"]
    return _packed(words.shape[1], words.shape[0] * 32 // n_bits, (part, scales), n_bits, where)


def _awq(part: Part, quantisation: Mapping[str, Any], where: str) -> Matrix:
    words, scales = _two(part, "qweight", where), _two(part, "scales", where)
    if not is_gemv(quantisation):
        return _packed(words.shape[1] * 8, words.shape[0], (part, scales), 4, where)
    n_rows, n_columns, size = words.shape[0], words.shape[1] * 8, awq_group(quantisation)
    n_groups, beyond = divmod(n_columns, n_columns if size == -1 else size)
    width = scales.shape[1]  # padded
    if beyond or scales.shape[0] != n_rows or width < n_groups or _two(part, "qzeros", where).shape != (n_rows, width // 8):
        raise FolderError(f"{where}: qweight, qzeros and scales do not belong together (is the group size right?)")
    return Matrix((n_rows, n_columns), n_groups, WIDTHS[4], scales.dtype)


def _packed(n_rows: int, n_columns: int, beside: tuple[Part, TensorEntry], n_bits: int, where: str) -> Matrix:
    """A matrix of words, if the other two tensors have its sizes. Raises FolderError."""
    part, scales = beside
    zeros, n_groups = _two(part, "qzeros", where), scales.shape[0]
    if scales.shape[1] != n_rows or zeros.shape != (n_groups, n_rows * n_bits // 32) or n_columns % max(1, n_groups):
        raise FolderError(f"{where}: qweight, qzeros and scales do not belong together (is the group size right?)")
    return Matrix((n_rows, n_columns), n_groups, WIDTHS[n_bits], scales.dtype)


def _compressed(part: Part, quantisation: Mapping[str, Any], where: str) -> Matrix:
    scales = part("weight_scale")
    if scales is None or (packed := part("weight_packed")) is None:
        plain = _two(part, "weight", where)
        code, shape, scales = (
            WIDTHS[8] if plain.dtype == "I8" else FLOAT8,
            (plain.shape[0], plain.shape[1]),
            scales or plain,
        )
    else:
        shape = _shape(part("weight_shape"), where)
        code = WIDTHS.get(32 * _two(part, "weight_packed", where).shape[1] // max(1, shape[1]), "")
        if not code or packed.shape[0] != shape[0]:
            raise FolderError(f"{where}: weight_packed {packed.shape} is not {shape[0]} x {shape[1]} in 4 or 8 bits")
    n_scales = scales.shape[-1] if len(scales.shape) == 2 else 1
    return Matrix(shape, n_scales, code, scales.dtype)


def _shape(entry: TensorEntry | None, where: str) -> tuple[int, int]:
    """The two numbers of `weight_shape`, which are read: its codes' width follows from them."""
    forms = {"I64": "<2q", "I32": "<2i"}
    if entry is None or entry.dtype not in forms or entry.shape != (2,):
        raise FolderError(f"{where}: weight_shape is missing")
    try:
        with entry.path.open("rb") as file:
            file.seek(entry.start)
            n_rows, n_columns = struct.unpack(forms[entry.dtype], file.read(entry.n_bytes))
    except (OSError, struct.error):
        raise FolderError(f"{entry.path}: ends inside tensor {entry.name!r}") from None
    return n_rows, n_columns


def _fp8(part: Part, quantisation: Mapping[str, Any], where: str) -> Matrix:
    weight, scales = _two(part, "weight", where), _two(part, "weight_scale_inv", where)
    n_rows, n_columns = quantisation["weight_block_size"]
    if scales.shape != (-(-weight.shape[0] // n_rows), -(-weight.shape[1] // n_columns)) or weight.shape[1] % n_columns:
        raise FolderError(f"{where}: weight_scale_inv {scales.shape} is not for {weight.shape} by {n_rows}")
    return Matrix((weight.shape[0], weight.shape[1]), scales.shape[1], FLOAT8, "F32")


_READERS = {"gptq": _gptq, "awq": _awq, "compressed-tensors": _compressed, "fp8": _fp8}
assert _READERS.keys() == WORDS.keys()
_CHECKS = {"gptq": _check_gptq, "awq": _check_awq, "compressed-tensors": _check_compressed, "fp8": _check_fp8}
assert _CHECKS.keys() == WORDS.keys()
