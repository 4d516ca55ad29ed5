"""torch.cuda of a GPU that is not there: what the trainer, FSDP2 and torch's autocast ask of it.

Everything here stands for a call into CUDA's runtime. Streams and events order nothing: nothing
runs. What makes the host wait is reported to the mode that counts (`fake_gpu.FakeGPU`).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from fake_gpu import FakeGPU, is_on_gpu
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import _disable_current_modes

CUDA = torch.device("cuda", 0)
NUM_DEVICES = 8
MEMORY = int(80e9)
PROPERTIES = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    total_memory=MEMORY,
    multi_processor_count=132,
    major=9,
    minor=0,
    warp_size=32,
)
_real_attention = torch.nn.functional.scaled_dot_product_attention


class Stream:
    """torch.cuda.Stream."""

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        self.device, self.priority = CUDA, priority
        self.cuda_stream = self.stream_id = id(self)

    def wait_event(self, event: Any) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...
    def record_event(self, event: Any = None) -> Any:
        return event or Event()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        FakeGPU.current.wait("stream.synchronize")


class Event:
    """torch.cuda.Event."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def record(self, stream: Any = None) -> None: ...
    def wait(self, stream: Any = None) -> None: ...
    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 0.0

    def synchronize(self) -> None:
        FakeGPU.current.wait("event.synchronize")


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """scaled_dot_product_attention as an H100 serves it: cuDNN's operator in 16 bits without a
    mask, else the memory-efficient one. torch's own choice asks for the GPU.
    """
    given = (query, key, value)
    if not is_on_gpu(query):
        options = {"scale": scale, "enable_gqa": enable_gqa}
        return _real_attention(*given, attn_mask, dropout_p, is_causal, **options)
    if torch.is_autocast_enabled("cuda"):
        given = tuple(x.to(torch.get_autocast_dtype("cuda")) for x in given)
    q, k, v = given
    if len({x.dtype for x in given}) > 1:
        raise FakeGPU.Fault(f"wrong dtype: attention of {[str(x.dtype) for x in given]}")
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    needs_sums = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    ops = torch.ops.aten
    if attn_mask is None and q.dtype != torch.float32:
        options = (None, needs_sums, 0.0, is_causal, False)
        return ops._scaled_dot_product_cudnn_attention(q, k, v, *options, scale=scale)[0]
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.where(attn_mask, 0.0, -torch.inf).to(q.dtype)
    options = (attn_mask, needs_sums, 0.0, is_causal)
    return ops._scaled_dot_product_efficient_attention(q, k, v, *options, scale=scale)[0]


@torch.no_grad()
def apply(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """nn.Module._apply, behind `to`, with new parameters: torch's own changes those there are in
    place, which moves no FakeTensor to another device.
    """
    for part in module.modules() if recurse else [module]:
        for name, parameter in part._parameters.items():
            if parameter is not None and (made := fn(parameter)) is not parameter:
                part._parameters[name] = nn.Parameter(made, parameter.requires_grad)
        part._buffers |= {n: fn(b) for n, b in part._buffers.items() if b is not None}
    return module


def unseen(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, out of the mode's sight."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **kwargs)

    return run


def install() -> None:
    """Put the stand-ins in place, for the life of this process. Before diffusers and transformers
    are imported, which take some of them by name.
    """
    import torch.cuda.amp.common

    current = Stream()
    nothing = contextlib.nullcontext
    for name, stand_in in {
        # The GPU, and whether it is there.
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "device_count": lambda: NUM_DEVICES,
        "get_device_properties": lambda *_: PROPERTIES,
        "get_device_capability": lambda *_: (PROPERTIES.major, PROPERTIES.minor),
        "get_device_name": lambda *_: PROPERTIES.name,
        # Which GPU is current: always the first.
        "current_device": lambda: 0,
        "set_device": lambda _: None,
        "device": lambda _: nothing(),
        "device_of": lambda _: nothing(),
        # Streams.
        "Stream": Stream,
        "Event": Event,
        "current_stream": lambda *_: current,
        "default_stream": lambda *_: current,
        "set_stream": lambda _: None,
        "stream": lambda _: nothing(),
        "synchronize": lambda *_: FakeGPU.current.wait("torch.cuda.synchronize"),
        # Memory: of the tensors that the mode sees.
        "mem_get_info": lambda *_: (MEMORY, MEMORY),
        "memory_allocated": lambda *_: FakeGPU.current.live,
        "max_memory_allocated": lambda *_: max(FakeGPU.current.peaks.values()),
        "reset_peak_memory_stats": lambda *_: None,
        "empty_cache": lambda: None,
    }.items():
        setattr(torch.cuda, name, stand_in)
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.nn.functional.scaled_dot_product_attention = attention
    # A tensor made of Python's numbers: on the host first, then copied, as CUDA does it.
    torch._C._set_only_lift_cpu_tensors(True)
    torch.nn.Module._apply = apply
    # What DTensor tries on tensors of the whole size, to learn shapes, no GPU sees.
    shapes = ShardingPropagator._propagate_tensor_meta_non_cached
    ShardingPropagator._propagate_tensor_meta_non_cached = unseen(shapes)
    FakeTensor.record_stream = lambda self, stream: None
    FakeTensor.tolist = lambda self: FakeGPU.current.read(self)
