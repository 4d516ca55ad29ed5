"""What attention is asked for with gradients and without: the same, so that one kernel serves.

torch decides this in C++ (`should_compute_logsumexp` of aten/src/ATen/native/transformers). Its
rule is written out in `on_an_h100`, which serves meta tensors with the operators of a GPU.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from fastgrpo.policies.attention import _as_in_training, _ask_alike

BACKENDS = ("native", "_native_cudnn", "_native_efficient", "_native_flash")


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    """diffusers' registry holds for the whole process."""
    functions = attention_dispatch._AttentionBackendRegistry._backends
    before = dict(functions)
    yield
    functions.update(before)


def on_an_h100(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
    """scaled_dot_product_attention as torch serves it on an H100."""
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    enabled, aten = torch.backends.cuda, torch.ops.aten
    if enabled.cudnn_sdp_enabled():
        return aten._scaled_dot_product_cudnn_attention(query, key, value, None, wanted)[0]
    if enabled.flash_sdp_enabled():
        return aten._scaled_dot_product_flash_attention(query, key, value)[0]
    return aten._scaled_dot_product_efficient_attention(query, key, value, None, wanted)[0]


class Requests(TorchDispatchMode):
    """The attention operators that run under it, with what is no tensor of their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if "attention" in name:
            plain = tuple(x for x in args if not isinstance(x, Tensor))
            self.made.append((name, (*plain, *(kwargs or {}).items())))
        return func(*args, **(kwargs or {}))


def requests(backend: str) -> list[list[tuple[str, tuple[Any, ...]]]]:
    """What a backend asks for in a rollout, in training and in an evaluation of a frozen part."""
    made = []
    for grad, needs in ((False, False), (True, True), (False, True)):
        q, k, v = (
            torch.empty(1, 16, 2, 128, dtype=torch.bfloat16, device="meta", requires_grad=needs)
            for _ in range(3)
        )
        with torch.set_grad_enabled(grad), Requests() as seen:
            out = dispatch_attention_fn(q, k, v, backend=AttentionBackendName(backend))
        assert out.requires_grad is grad, "a rollout keeps no graph"
        made.append(seen.made)
    return made


@pytest.mark.parametrize("backend", BACKENDS)
def test_rollout_and_training_ask_for_the_same(
    monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", on_an_h100)
    _ask_alike(AttentionBackendName(backend), alike=True)
    rollout, training, frozen = requests(backend)
    assert rollout == training == frozen
    assert len(rollout) == 1
    if "flash" not in backend:  # FlashAttention's operator always gives the log-sum-exp
        assert rollout[0][1][1] is True, "compute_log_sumexp"

    # The switch to measure it: torch's own requests, which differ.
    _ask_alike(AttentionBackendName(backend), alike=False)
    rollout, training, _ = requests(backend)
    assert (rollout == training) is ("flash" in backend)


def test_it_is_undone_and_never_nested() -> None:
    functions = attention_dispatch._AttentionBackendRegistry._backends
    native = AttentionBackendName.NATIVE
    plain = inspect.unwrap(functions[native])
    for alike in (True, True, False, True):
        _ask_alike(native, alike)
        assert getattr(functions[native], "__wrapped__", None) is (plain if alike else None)
    _ask_alike(native, False)
    assert functions[native] is plain


def test_a_wrapper_of_the_user_stays() -> None:
    """Whatever wrote `__wrapped__` into it: only what _ask_alike has put around it goes."""
    functions = attention_dispatch._AttentionBackendRegistry._backends
    native, calls = AttentionBackendName.NATIVE, []
    theirs = functions[native]

    @functools.wraps(theirs)
    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return theirs(*args, **kwargs)

    functions[native] = counted
    q = torch.randn(1, 8, 2, 16)
    for alike in (True, False):
        _ask_alike(native, alike)
        dispatch_attention_fn(q, q, q, backend=native)
    assert len(calls) == 2
    assert functions[native] is counted


def test_without_gradients_nothing_is_kept() -> None:
    _ask_alike(AttentionBackendName.NATIVE, alike=True)
    q, k, v = (torch.randn(1, 8, 2, 16) for _ in range(3))
    kept: list[Tensor] = []
    with torch.no_grad(), saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = dispatch_attention_fn(q, k, v, backend=AttentionBackendName.NATIVE)
    assert kept == []
    assert not out.requires_grad
    assert out.grad_fn is None


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float = 1.0) -> Tensor:
    """Softmax attention that says in its last element whether it saw a gradient wanted."""
    wanted = torch.is_grad_enabled() and query.requires_grad
    return torch.softmax(query @ key.mT * scale, -1) @ value + float(wanted)


def test_values_and_gradients_are_those_of_the_attention() -> None:
    same: Callable[..., Tensor] = _as_in_training(attend)
    q, k, v = (torch.randn(1, 2, 5, 4, requires_grad=True) for _ in range(3))
    trained = same(q, k, v, scale=0.5)
    assert torch.equal(trained, attend(q, k, v, scale=0.5))
    with torch.no_grad():
        assert torch.equal(same(q, k, v, scale=0.5), trained)
        assert not torch.equal(attend(q.detach(), k, v, scale=0.5), trained), "the fault it mends"
    gradients = torch.autograd.grad(trained.sum(), [q, k, v])
    expected = torch.autograd.grad(attend(q, k, v, scale=0.5).sum(), [q, k, v])
    assert all(map(torch.equal, gradients, expected))
