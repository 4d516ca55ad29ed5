"""LoRA: a low-rank addition to some linear layers is trained (with peft), the model's own weights
stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastgrpo.errors import UserError, require


@dataclass(frozen=True)
class LoRA:
    """Train a LoRA instead of all weights."""

    rank: int = 32
    """Rank of the addition B A."""
    alpha: float = 32.0
    """The addition is scaled by alpha / rank."""
    dropout: float = 0.0
    """Must be 0: rollout and update compute the same bits, so the network is always in eval mode,
    where dropout does nothing.
    """
    target_modules: tuple[str, ...] | None = None
    """Names, or ends of names, of the linear layers. None: those of attention and feed-forward in
    the transformer's blocks.
    """
    seed: int = 0
    """Seed of A. B starts at zero, so that training starts from the model itself."""

    def __post_init__(self) -> None:
        require(self.rank >= 1, "policy.lora.rank", "at least 1", self.rank)
        require(self.alpha > 0, "policy.lora.alpha", "a number above 0", self.alpha)
        require(
            self.dropout == 0,
            "policy.lora.dropout",
            "0, since the network is always in eval mode",
            self.dropout,
        )
        targets = self.target_modules
        require(targets != (), "policy.lora.target_modules", "a name, or none", targets)


def add_lora(transformer: Any, lora: LoRA, default_targets: Sequence[str]) -> None:
    """Add a seeded, trainable LoRA adapter named `default`.

    Args:
        transformer: A model of diffusers; changed in place.
        lora: The settings.
        default_targets: Ends of names of the linear layers in its blocks that are taken if `lora`
            names none.

    Raises:
        UserError: peft is missing, or no layer has such a name.
    """
    try:
        from peft import LoraConfig
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError as error:
        raise UserError(f"policy.lora: needs peft ({error}): pip install peft") from error
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=list(lora.target_modules or block_linears(transformer, default_targets)),
        init_lora_weights=True,
    )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(lora.seed)
            transformer.add_adapter(config)
    except ValueError as error:
        raise UserError(f"policy.lora.target_modules: {error}") from error
    for module in transformer.modules():
        if isinstance(module, BaseTunerLayer):
            # peft would copy every bf16 input to the adapter's fp32, which autocast casts back.
            module.cast_input_dtype_enabled = False
    transformer.eval()


def has_lora(transformer: nn.Module) -> bool:
    """True if `add_lora` has been called."""
    return bool(getattr(transformer, "peft_config", None))


def block_linears(transformer: nn.Module, ends: Sequence[str]) -> list[str]:
    """Names of the linear layers in the repeated blocks whose names end in one of `ends`."""
    modules = dict(transformer.named_modules())
    blocks = tuple(
        f"{name}."
        for name, module in modules.items()
        if type(module).__name__.endswith("TransformerBlock")
    )
    return [
        name
        for name, module in modules.items()
        if isinstance(module, nn.Linear)
        and name.endswith(tuple(f".{end}" for end in ends))
        and name.startswith(blocks)
    ]
