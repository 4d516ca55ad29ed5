"""Give the policy other weights for a while: the EMA, the reference of the KL, the base model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from fastgrpo.interfaces import Policy

WITHOUT_ADAPTERS: Mapping[str, Tensor] = MappingProxyType({})
"""For `using_weights`: the base model only, with its LoRA switched off."""


def local_part(tensor: Tensor) -> Tensor:
    """The part of a possibly sharded tensor that lies on this rank; it shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def copy_weights(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy parameters by name, sharded as they are."""
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


@torch.no_grad()
def average_weights(
    average: Mapping[str, Tensor], parameters: Mapping[str, Tensor], decay: float
) -> None:
    """One step of the exponential moving average: average = decay average + (1 - decay) weights.

    Args:
        average: From `copy_weights`; changed in place.
        parameters: The same names in the same order.
        decay: In [0, 1).
    """
    torch._foreach_lerp_(
        [local_part(tensor) for tensor in average.values()],
        [local_part(parameter.detach()) for parameter in parameters.values()],
        1 - decay,
    )


@contextmanager
def using_weights(policy: Policy, weights: Mapping[str, Tensor] | None) -> Iterator[None]:
    """Give the policy's network other weights inside a `with` block.

    Tensors are exchanged in place, one after the other, so `weights` holds the network's own
    inside the block. No second network has to fit. Autograd must not hold a graph of this network
    that is still to be back-propagated.

    Args:
        policy: Its transformer may be sharded.
        weights: By parameter name, placed and sharded like the parameter; parameters that are not
            named stay. None changes nothing; WITHOUT_ADAPTERS switches LoRA off.
    """
    network: Any = policy.transformer
    if weights is None:
        yield
    elif weights is WITHOUT_ADAPTERS:
        network.disable_adapters()
        try:
            yield
        finally:
            network.enable_adapters()
    else:
        _exchange(network, weights)
        try:
            yield
        finally:
            _exchange(network, weights)


@torch.no_grad()
def _exchange(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # parameters that are still gathered have the weights from before
    pairs = [
        (local_part(parameter), local_part(weights[name]))
        for name, parameter in network.named_parameters()
        if name in weights
    ]
    exchanged = []
    try:
        for own, other in pairs:
            _swap(own, other)
            exchanged.append((own, other))
    except BaseException:  # no memory, for instance: not half of each
        for own, other in exchanged:
            _swap(own, other)
        raise


def _swap(one: Tensor, other: Tensor) -> None:
    kept = one.clone()
    one.copy_(other)
    other.copy_(kept)
