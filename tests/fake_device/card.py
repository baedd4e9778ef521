"""A card that exists in name: CUDA tensors are shapes without values, everything on the host is real.

`FakeCard` is a dispatch mode. A call without a CUDA tensor runs as ever, on real tensors: files are read, page files are
written, masks of padding are made. A call with one goes to torch's FakeTensorMode, which computes shapes and dtypes and
raises where tensors of two devices meet; what comes back to the host is a real tensor of zeros. So a whole step runs, and
what is looked at is what a card would be asked to do:
- `kernels`: how many calls each op of the plan launches (views and empty tensors launch none)
- `n_bytes`: what those read and write, by op and name: each input and each output once, of a view what it spans
- `waits`: where the host would wait for the card, by op of the plan and by what waits: a number read (`.item()`, `bool`), a
  shape that depends on values, a copy that is not asked to run beside or whose host side is not pinned
What is played beside it: streams and events (they do nothing), the driver's registering of memory (a ledger), the card's
figures, and the kernel that attention takes on a card of a given age (`attention_kernel`).

What it cannot show: wrong numbers, races (test_happens_before.py's matter), what kernels allocate inside.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from lopt_edge.run import ranks
from lopt_edge.run.kernels.operators import SPACE
from lopt_edge.run.tiers import moves
from lopt_edge.run.watch.tracker import MemoryTracker
from tests.fake_device.ledger import Ledger

CARD = torch.device("cuda", 0)
SHAPES_FROM_VALUES = ("nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal", "is_nonzero")
NO_KERNEL = (
    "empty", "view", "_unsafe_view", "expand", "slice", "select", "t", "transpose", "permute", "unsqueeze", "squeeze",
    "split", "split_with_sizes", "unbind", "as_strided", "detach", "alias", "_reshape_alias", "empty_like", "new_empty",
    "empty_strided", "new_empty_strided", "lift_fresh", "set_", "unfold", "resize_", "view_as_real", "view_as_complex",
    "sym_size", "diagonal", "chunk",
)  # fmt: skip


class FakeCard(TorchDispatchMode):
    """The mode. `op` is set by an observer to the op under way; `capability` is the card's age, as (8, 9)."""

    def __init__(self, *, capability: tuple[int, int] = (8, 9), total_bytes: int = 24 << 30) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.capability, self.total_bytes, self.ledger = capability, total_bytes, Ledger()
        self.op = "-"
        self.tracker = MemoryTracker("cuda")  # stands for the allocator's counters; it is never a mode here
        self.kernels: Counter[str] = Counter()
        self.names: Counter[tuple[str, str]] = Counter()
        self.n_bytes: Counter[tuple[str, str]] = Counter()
        self.waits: Counter[tuple[str, str]] = Counter()

    def clear(self) -> None:
        for counter in (self.kernels, self.names, self.n_bytes, self.waits):
            counter.clear()

    def wait(self, why: str) -> None:
        """Note that the host waits for the card here."""
        self.waits[self.op, why] += 1

    # a call ----------------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args)
        leaves = _leaves([*args, *kwargs.values()])
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        named = any(isinstance(leaf, torch.device) and leaf.type == "cuda" for leaf in leaves)
        if not named and not any(tensor.device.type == "cuda" for tensor in tensors):
            return func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        if name == "_local_scalar_dense":
            self.wait("a number is read")
            return _number(tensors[0].dtype)
        self._look(name, args, kwargs, tensors)
        if name not in NO_KERNEL:
            if self.ledger.cudaGetLastError():
                raise RuntimeError("CUDA error: a refusal was left behind")
            self.kernels[self.op] += 1
            self.names[self.op, name] += 1
        result = self._shape_of(func, args, kwargs, tensors)
        if name not in NO_KERNEL:
            self.n_bytes[self.op, name] += _moved_bytes(func, args, kwargs, result)
        if result is None:
            return None
        self.tracker.watch(one for one in _leaves([result]) if isinstance(one, Tensor))
        if str(func) in OWN:
            return result
        if name.endswith("_") or "out" in kwargs:  # what was written to is handed back as it was, real or not
            return kwargs.get("out", args[0] if args else result)
        return _on_host(result) if isinstance(result, Tensor) else tree_map(_on_host, result)

    def _shape_of(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        """What a call gives, without values."""
        with self.fake:
            if (own := OWN.get(str(func))) is not None:
                return own(*args, **kwargs)
            if any(not isinstance(tensor, FakeTensor) for tensor in tensors):
                args, kwargs = tree_map(_as_shape, args), tree_map(_as_shape, kwargs)
            return func(*args, **kwargs)

    def _look(self, name: str, args: Any, kwargs: Any, tensors: list[Tensor]) -> None:
        if name in SHAPES_FROM_VALUES:
            self.wait(f"{name}: a shape that depends on values")
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            if any(index.dtype in (torch.bool, torch.uint8) for index in args[1] if index is not None):
                self.wait("an index of truths")
            if any(index.device.type == "cpu" for index in args[1] if index is not None):
                self.wait("an index that lies on the host")
        if name == "copy_":
            beside = bool(kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
            self._copy(args[1].device.type, args[0].device.type, args[0], args[1], beside)
        if name == "_to_copy":
            target = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else args[0].device.type
            self._copy(args[0].device.type, target, None, args[0], bool(kwargs.get("non_blocking")))

    def _copy(self, source: str, target: str, written: Tensor | None, read: Tensor, beside: bool) -> None:
        if source == target:
            return
        host = read if source == "cpu" else written
        if beside and host is not None and self.ledger.is_registered(host):
            return
        if host is not None and host.dim() == 0 and source == "cpu":
            return  # a number goes along with the launch
        what = "is not asked to run beside" if not beside else "has pageable memory on the host"
        self.wait(f"a copy {source} -> {target} {what}")


def _leaves(given: list[Any]) -> list[Any]:
    """The arguments, those in lists too; torch's own tree walk takes longer than all else here."""
    return [leaf for one in given for leaf in (_leaves([*one]) if isinstance(one, list | tuple) else (one,))]


def _moved_bytes(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """The bytes that a kernel reads and writes."""
    space, _, name = func._schema.name.partition("::")
    given = args[1:] if name in ("copy_", "zero_", "fill_") else args
    reads = _leaves([*given, *(value for key, value in kwargs.items() if key != "out")])
    writes = [kwargs["out"]] if "out" in kwargs else args[:1] if name.endswith("_") else _leaves([result])
    if space == SPACE and name.endswith("_"):  # ours say themselves what they write to
        writes = [one for one, what in zip(args, func._schema.arguments, strict=False) if what.alias_info]
    return sum(_touched(one) for one in (*reads, *writes) if isinstance(one, Tensor) and one.device.type == "cuda")


def _touched(tensor: Tensor) -> int:
    """The bytes of a tensor's numbers, those that a view repeats once."""
    sides = (size for size, step in zip(tensor.shape, tensor.stride(), strict=True) if step)
    return math.prod(sides) * tensor.element_size()


def _number(dtype: torch.dtype) -> bool | int | float:
    return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1


def _as_shape(given: Any) -> Any:
    """A tensor without values in the place of a real one. (FakeTensorMode's own conversion computes with small ones.)"""
    if isinstance(given, Tensor) and not isinstance(given, FakeTensor):
        return torch.empty_strided(given.shape, given.stride(), dtype=given.dtype, device=given.device)
    return given


def _on_host(found: Any) -> Any:
    """A real tensor in the place of a fake one on the CPU."""
    if isinstance(found, FakeTensor) and found.device.type == "cpu":
        return torch.zeros(found.shape, dtype=found.dtype)
    return found


# what torch's CUDA build has and a CPU build's fake tensors lack --------------------------------------------------------


def _dequantize_4bit(codes: Tensor, absmax: Tensor, blocksize: int, kind: str, shape: Any, dtype: Any, out: Tensor) -> None:
    """bitsandbytes' kernel, and what it asks of its arguments."""
    assert {codes.device, absmax.device, out.device} == {CARD}, "all three lie on the card"
    assert tuple(out.shape) == tuple(shape) and out.dtype == dtype and absmax.dtype == torch.float32
    assert codes.is_contiguous() and absmax.is_contiguous() and out.is_contiguous()
    assert codes.dtype == torch.uint8 and codes.numel() * 2 == out.numel() == absmax.numel() * blocksize


def _dequantize_blockwise(codes: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    assert {codes.device, absmax.device, code.device} == {CARD}, "all three lie on the card"
    assert codes.dtype == torch.uint8 and codes.is_contiguous() and absmax.is_contiguous()
    assert absmax.numel() == math.ceil(codes.numel() / blocksize)
    return torch.empty_like(codes, dtype=dtype)


def _quantize_blockwise(values: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    assert {values.device, code.device} == {CARD} and values.is_contiguous()
    n_blocks = math.ceil(values.numel() / blocksize)
    return torch.empty_like(values, dtype=torch.uint8), torch.empty(n_blocks, device=values.device)


def _added_product(
    sum_: Tensor, a: Tensor, b: Tensor, out_dtype: torch.dtype, *, out: Tensor, alpha: float = 1.0
) -> Tensor:
    """cuBLAS' product in half precision that adds to an fp32 sum, which torch takes as `self` from 2.10 on."""
    assert sum_.dtype == out.dtype == out_dtype == torch.float32 and a.dtype == b.dtype and a.dtype.itemsize == 2
    assert sum_.shape == out.shape == (a.shape[0], b.shape[1]) and a.shape[1] == b.shape[0]
    assert sum_ is out, "else the sum is copied"
    return out


def _wide_product(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
    assert out_dtype == torch.float32 and a.dtype == b.dtype and a.dtype.itemsize == 2 and a.shape[1] == b.shape[0]
    return torch.empty(a.shape[0], b.shape[1], dtype=out_dtype, device=CARD)


def _rms_norm(x: Tensor, width: list[int], weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    assert x.is_contiguous() and x.dtype == weight.dtype and list(weight.shape) == width == [x.shape[-1]]
    return torch.empty_like(x), torch.empty(*x.shape[:-1], 1, device=CARD)


def _rms_norm_backward(g: Tensor, x: Tensor, width: list[int], rstd: Tensor, weight: Tensor, mask: list[bool]) -> Any:
    assert g.shape == x.shape and rstd.numel() * x.shape[-1] == x.numel() and mask == [True, False]
    return torch.empty_like(x), None


OWN = {
    "aten.addmm.dtype_out": _added_product,
    "aten.mm.dtype": _wide_product,
    "aten._fused_rms_norm.default": _rms_norm,
    "aten._fused_rms_norm_backward.default": _rms_norm_backward,
    "bitsandbytes.dequantize_4bit.out": _dequantize_4bit,
    "bitsandbytes.dequantize_blockwise.default": _dequantize_blockwise,
    "bitsandbytes.quantize_blockwise.default": _quantize_blockwise,
}
_library = torch.library.Library("aten", "IMPL")  # one kernel each there; here they would be taken apart
_library.impl("silu_backward", lambda grad, x: torch.empty_like(x), "CUDA")
_library.impl("_fused_rms_norm", _rms_norm, "CUDA")
_library.impl("_fused_rms_norm_backward", _rms_norm_backward, "CUDA")


# what is played ---------------------------------------------------------------------------------------------------------


class _Event:
    card: FakeCard

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def wait(self, stream: Any = None) -> None:
        pass

    def query(self) -> bool:
        return False  # it lags behind its host

    def synchronize(self) -> None:
        if not Inline.at_work:  # a worker's waits hold nobody up
            self.card.wait("an event is waited for")


class _Stream:
    card: FakeCard

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> _Event:
        return torch.cuda.Event()

    def synchronize(self) -> None:
        self.card.wait("a stream is waited for")


def play(card: FakeCard) -> dict[str, Any]:
    """What stands for torch.cuda's functions, by their names."""
    facts = SimpleNamespace(
        name="a card in name", total_memory=card.total_bytes, major=card.capability[0], minor=card.capability[1]
    )
    stream, event = (type(one.__name__[1:], (one,), {"card": card}) for one in (_Stream, _Event))  # annotations name them
    return {
        "_lazy_init": lambda: None, "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
        "get_device_name": lambda device=None: facts.name, "get_device_properties": lambda device=None: facts,
        "get_device_capability": lambda device=None: card.capability,
        "is_bf16_supported": lambda including_emulation=True: including_emulation or card.capability >= (8, 0),
        "mem_get_info": lambda device=None: (card.total_bytes, card.total_bytes),
        "memory_reserved": lambda device=None: 0, "max_memory_reserved": lambda device=None: 0,
        "memory_allocated": lambda device=None: card.tracker.live_bytes,
        "max_memory_allocated": lambda device=None: card.tracker.peak_bytes,
        "reset_peak_memory_stats": lambda device=None: card.tracker.start_peak(), "set_device": lambda device: None,
        "set_per_process_memory_fraction": lambda share, device=None: None,
        "synchronize": lambda device=None: card.wait("the card is waited for"),
        "Stream": stream, "Event": event, "current_stream": lambda device=None: stream(),
        "stream": lambda stream: contextlib.nullcontext(), "device": lambda device: contextlib.nullcontext(),
        "cudart": lambda: card.ledger,
    }  # fmt: skip


class Inline:
    """Workers that work at once: FakeTensorMode is for one thread at a time."""

    at_work = False

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def submit(self, work: Any, *arguments: Any) -> Future[Any]:
        done: Future[Any] = Future()
        Inline.at_work = True
        try:
            done.set_result(work(*arguments))
        except BaseException as error:
            done.set_exception(error)
        finally:
            Inline.at_work = False
        return done

    def shutdown(self, wait: bool = True) -> None:
        pass


@contextlib.contextmanager
def installed(card: FakeCard) -> Iterator[FakeCard]:
    """A context in which torch.cuda is the card's, and its mode is on."""
    played = play(card)
    before = {name: getattr(torch.cuda, name) for name in played}
    generator, workers, start = torch.Generator, moves.ThreadPoolExecutor, moves.Mover._start_workers
    reducing = ranks.ThreadPoolExecutor
    try:
        for name, stand_in in played.items():
            setattr(torch.cuda, name, stand_in)
        torch.Generator = lambda device="cpu": generator()  # the card's needs CUDA's library
        moves.ThreadPoolExecutor, moves.Mover._start_workers = Inline, lambda self: None
        ranks.ThreadPoolExecutor = Inline
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=) would go past the mode
        with card:
            yield card
    finally:
        torch.Generator = lambda device="cpu": generator()  # the card's needs CUDA's library
        moves.ThreadPoolExecutor, moves.Mover._start_workers = Inline, lambda self: None
        torch._C._set_only_lift_cpu_tensors(False)
        torch.Generator, moves.ThreadPoolExecutor, moves.Mover._start_workers = generator, workers, start
        ranks.ThreadPoolExecutor = reducing
        for name, real in before.items():
            setattr(torch.cuda, name, real)
