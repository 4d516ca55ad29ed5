"""A GPU that is not there: tensors on "cuda" are FakeTensors, those of the host are real.

The mode sees every operator that reaches a device. It fails where a GPU would (a tensor on the
wrong device), where the trainer's arithmetic would be another (a wrong dtype) and where nobody
said what an operator returns (no fake); it counts what the host waits for, by place, and the bytes
that live, by phase.
"""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_WAITING = {
    *("nonzero", "masked_select", "repeat_interleave", "bincount"),
    *("unique_dim", "unique_consecutive", "_unique2"),
}
"""Operators whose output's size depends on values, so that the host waits for it."""
_COPIES = {"_to_copy", "copy_"}
_INDEXING = {"index", "index_put", "index_put_", "_unsafe_index"}
"""They take indices on the host, and copy them to the device first."""
_PRODUCTS = {"mm", "addmm", "mv", "addmv", "bmm", "baddbmm", "addbmm", "convolution"}
_ATTENTION = {
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_efficient_attention",
}
_LARGE = 4096
"""Elements up to which fp64 on the GPU is nobody's business: coefficients, seeds, sums."""
_KNOWN = 1 << 16
"""Elements up to which integers on the GPU keep their values, so that they can be read back."""
_PACKAGES = ("fastgrpo", "fastgrpo_kernels", "diffusers", "transformers")


class FakeGPU(TorchDispatchMode):
    """Use as `with FakeGPU(...) as gpu:`.

    Args:
        products: The dtype of all matrix products, convolutions and attention, by phase.
        fp64_in: Functions that compute in fp64 by design; nothing else may, in those phases.
        read: read(dtype, place) is what a value reads as that depends on the network's.

    Attributes:
        live: Bytes of the tensors on the GPU now.
        peaks: The most of them, by phase.
        waits: How often the host waits: "operation @ place" and its count, by phase.
    """

    class Fault(RuntimeError):
        """What a GPU, or the trainer's numerics, would not take."""

    current: ClassVar[FakeGPU]

    def __init__(
        self,
        products: Mapping[str, torch.dtype] = {},
        fp64_in: frozenset[str] = frozenset(),
        read: Callable[[torch.dtype, str], float] = lambda dtype, place: 1,
    ) -> None:
        super().__init__()
        FakeGPU.current = self
        self.products, self.fp64_in, self.value_read = products, fp64_in, read
        self.live = 0
        self.peaks: Counter[str] = Counter()
        self.waits: dict[str, Counter[str]] = defaultdict(Counter)
        self.phase = ""
        self._fakes = FakeTensorMode(allow_non_fake_inputs=True)
        self._sizes: dict[int, int] = {}  # bytes of each storage on the GPU, by its address
        self._lock = threading.RLock()  # the judge's thread frees tensors too

    def __enter__(self) -> FakeGPU:
        self._resize = torch.UntypedStorage.resize_
        torch.UntypedStorage.resize_ = _counted_resize(self, self._resize)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.UntypedStorage.resize_ = self._resize

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Count for `phase` inside the block."""
        before, self.phase = self.phase, phase
        self._note_peak()
        try:
            yield
        finally:
            self.phase = before

    def phased(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, counted for `phase`."""

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with self.during(phase):
                return function(*args, **kwargs)

        return run

    def wait(self, operation: str) -> None:
        """Count a wait of the host."""
        self.waits[self.phase][f"{operation} @ {_place()}"] += 1

    def read(self, tensor: Tensor) -> Any:
        """`tensor.tolist()`: one wait, and the values as far as they are known."""
        if is_on_gpu(tensor):
            self.wait("tolist")
        value = _value_of(tensor)
        return (self._stand_in(tensor) if value is None else value).tolist()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(isinstance(tensor, DTensor) for tensor in tensors):
            return NotImplemented  # it takes its local parts, and comes back
        given = kwargs.get("device")
        to_gpu = given is not None and torch.device(given).type == "cuda"
        if not to_gpu and not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            return func(*args, **kwargs)
        name = func._overloadpacket.__name__
        on_gpu = [tensor for tensor in tensors if is_on_gpu(tensor)]
        on_host = [tensor for tensor in tensors if not is_on_gpu(tensor)]
        if name == "_local_scalar_dense":
            if on_gpu:
                self.wait("item")
            value = _value_of(args[0])
            return (self._stand_in(args[0]) if value is None else value).item()
        if name in _COPIES:
            self._count_copy(name, given, args)
        elif name in _INDEXING and on_gpu:
            self._check_index(*args)
        elif on_gpu and name in _WAITING:
            self.wait(name)
        elif on_gpu and any(tensor.ndim for tensor in on_host):
            raise self.Fault(f"wrong device: {func} of {_described(tensors)} @ {_place()}")
        if name in _PRODUCTS or name in _ATTENTION:
            self._check_product(name, on_gpu)
        values = _values(func, args, kwargs, tensors)
        with self._fakes:
            if name in _WAITING:
                out = _sized_by(values, name, args[0])
            else:
                out = func(*tree_map(_as_fake, args), **tree_map(_as_fake, kwargs))
        for tensor in tree_leaves(out):
            if is_on_gpu(tensor):
                self._track(tensor)
                self._check_fp64(func, tensor)
        return _with_values(out, values)

    def _count_copy(self, name: str, given: Any, args: tuple[Any, ...]) -> None:
        """A copy between host and device: nothing here is pinned, so the host waits for it."""
        from_gpu = is_on_gpu(args[0] if name == "_to_copy" else args[1])
        if name == "copy_":
            to_gpu = is_on_gpu(args[0])
        else:
            to_gpu = from_gpu if given is None else torch.device(given).type == "cuda"
        if from_gpu != to_gpu:
            self.wait("to the GPU" if to_gpu else "to the host")

    def _check_index(self, tensor: Tensor, indices: Any, values: Any = None, *_: Any) -> None:
        """Indices may lie on the host, if the host waits for them; nothing else may."""
        if not is_on_gpu(tensor) or (values is not None and values.ndim and not is_on_gpu(values)):
            given = [tensor, *(t for t in (*indices, values) if t is not None)]
            raise self.Fault(f"wrong device: index of {_described(given)} @ {_place()}")
        for index in indices:
            if index is None:
                continue
            if not is_on_gpu(index) and index.ndim:
                self.wait("to the GPU")
            if index.dtype == torch.bool:
                self.wait("index by mask")

    def _check_product(self, name: str, tensors: list[Tensor]) -> None:
        expected = self.products.get(self.phase)
        operands = tensors[:3] if name in _ATTENTION else tensors
        got = {tensor.dtype for tensor in operands if tensor.is_floating_point()}
        if expected is not None and got != {expected}:
            raise self.Fault(
                f"wrong dtype: expected {name} of {expected} in the {self.phase}, got "
                f"{_described(operands)} @ {_place()}"
            )

    def _check_fp64(self, func: Any, tensor: Tensor) -> None:
        if tensor.dtype != torch.float64 or tensor.numel() <= _LARGE:
            return
        place = _place()
        if self.phase in self.products and place.rpartition(".")[2] not in self.fp64_in:
            made = f"{func} {_described([tensor])} @ {place}"
            raise self.Fault(f"wrong dtype: fp64 on the GPU, {made}")

    def _stand_in(self, tensor: Tensor) -> Tensor:
        number = self.value_read(tensor.dtype, _place())
        return torch.full(tensor.shape, number, dtype=tensor.dtype, device="cpu")

    def _track(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        with self._lock:
            if storage._cdata not in self._sizes:
                weakref.finalize(storage, self._resized, storage._cdata, None).atexit = False
                self._resized(storage._cdata, storage.nbytes())

    def _resized(self, address: int, size: int | None) -> None:
        """A storage has this size now, or is gone. Others than the GPU's are not known."""
        with self._lock:
            before = self._sizes.pop(address, 0)
            if size is not None:
                self._sizes[address] = size
            self.live += (size or 0) - before
            self._note_peak()

    def _note_peak(self) -> None:
        self.peaks[self.phase] = max(self.peaks[self.phase], self.live)


def is_on_gpu(value: Any) -> bool:
    """Whether this is a tensor on the GPU that is not there."""
    return isinstance(value, FakeTensor) and value.fake_device.type == "cuda"


def _counted_resize(gpu: FakeGPU, resize: Callable[..., Any]) -> Callable[..., Any]:
    """UntypedStorage.resize_, by which FSDP2 frees and makes what it gathers."""

    def run(storage: torch.UntypedStorage, size: int) -> Any:
        out = resize(storage, size)
        if storage._cdata in gpu._sizes:
            gpu._resized(storage._cdata, size)
        return out

    return run


def _as_fake(value: Any) -> Any:
    """A real tensor of the host as a fake one: shape, strides and dtype."""
    if not isinstance(value, Tensor) or isinstance(value, FakeTensor):
        return value
    with torch.no_grad():
        return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="cpu")


def _value_of(tensor: Tensor) -> Tensor | None:
    return getattr(tensor, "known_value", None) if isinstance(tensor, FakeTensor) else tensor


def _values(func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
    """What the operator returns, computed on the host, if all that it takes is known and small
    integers: indices and sizes then have their values on the GPU too.
    """
    known = [_value_of(tensor) for tensor in tensors]
    small = all(v is not None and _is_index(v) for v in known)
    made = not tensors and kwargs.get("dtype") in (None, torch.int64, torch.bool, torch.int32)
    if not small or (not tensors and not made):
        if func._schema.is_mutable and tensors and isinstance(tensors[0], FakeTensor):
            tensors[0].known_value = None
        return None
    if not tensors and func._overloadpacket.__name__ not in ("arange", "full", "zeros", "ones"):
        return None
    host = {key: "cpu" if key == "device" else value for key, value in kwargs.items()}
    taken = tree_map(lambda v: _value_of(v) if isinstance(v, Tensor) else v, (args, host))
    return func(*taken[0], **taken[1])


def _sized_by(values: Any, name: str, given: Tensor) -> Any:
    """The output of an operator whose size depends on values: as large as they are, or, of an
    unknown mask, as can be.
    """
    if values is not None:
        return tree_map(lambda v: torch.empty(v.shape, dtype=v.dtype, device=given.device), values)
    if name != "nonzero":
        raise FakeGPU.Fault(f"values that are not known: {name} of {_described([given])}")
    return torch.empty(given.numel(), given.ndim, dtype=torch.int64, device=given.device)


def _is_index(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex()) and tensor.numel() <= _KNOWN


def _with_values(out: Any, values: Any) -> Any:
    if values is not None:
        for tensor, value in zip(tree_leaves(out), tree_leaves(values), strict=True):
            if isinstance(tensor, FakeTensor) and _is_index(value):
                tensor.known_value = value
    return out


def _place() -> str:
    """The innermost function of the trainer, or of the libraries whose networks it runs."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if any(package in path.parts for package in _PACKAGES):
            return f"{path.stem}.{frame.f_code.co_qualname}".replace(".<locals>", "")
        frame = frame.f_back
    return "autograd"


def _described(tensors: list[Tensor]) -> str:
    return ", ".join(f"{t.dtype} {list(t.shape)} on {t.device}" for t in tensors)
