"""The pointwise operations in place of what diffusers' Wan and HunyuanVideo blocks do between their
linear layers: `fastgrpo_kernels.patch(transformer)`.

It changes objects, not classes: blocks get a forward, attentions a processor, the rotary embedding
a table that the operation reads without a detour. Parameters, their names and every module stay, so
that LoRA, FSDP2 (which gives each block a class of its own), gradient checkpointing, compilation
and diffusers' attention backends work as before. diffusers is not imported here: its classes are
known by their names, and its attention dispatch is taken from the module of the processor in place.

The operations compute in fp32 and give their first input's dtype, rounded once. In Wan that is what
diffusers' blocks do as well, with a second rounding between norm and rotation of q and k;
HunyuanVideo's blocks round between LayerNorm, modulation and gate. Under autocast the tokens are
bf16 (outputs of linear layers and of these operations), scales, shifts and gates bf16 or fp32,
weights fp32: what the linear layers and the attention are given is bf16, as it is when autocast
casts what diffusers' blocks leave in fp32. Rollout and update must both have the operations in, or
both not.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import MethodType
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .activation.bias_gelu import bias_gelu
from .attention.few_tokens import few_token_attention
from .dispatch import select_backend
from .norm.gate_residual_ln_modulate import (
    gate_residual,
    gate_residual_ln_modulate,
    ln_modulate,
)
from .norm.qk_norm_rope import qk_norm_rope

_Layer = TypeVar("_Layer", bound=nn.Module)

FEW_TOKENS = 32
"""Queries and keys up to which `few_token_attention` takes no longer than torch's attention on a
CPU in fp32, forward and backward. In 16 bits it is ahead further, and used no further.
"""


def patch(transformer: nn.Module) -> None:
    """Put the operations into every block of a Wan or HunyuanVideo transformer of diffusers, in
    place. Doing it again changes nothing. Call it before sharding and compiling.

    Raises:
        ValueError: another kind of transformer, or one with a part that the operations do not have
            (image conditioning, projections fused by diffusers, other norms). It is left as it was.
    """
    modules = [(module, _kind(module)) for module in transformer.modules()]
    blocks = [(module, kind) for module, kind in modules if kind.endswith("Block")]
    if not blocks:
        raise ValueError(
            "expected a Wan or HunyuanVideo transformer of diffusers, "
            f"got {type(transformer).__name__}"
        )
    attentions: list[tuple[Any, str]] = [
        (child, kind)
        for block, kind in blocks
        for child in block.children()
        if hasattr(child, "processor")
    ]
    for block, kind in blocks:
        if kind == "WanTransformerBlock":
            has_norm = getattr(block.norm2, "weight", None) is not None
            norm = type(block.norm2).__name__
            _require(has_norm, block, "a norm before its cross-attention", norm)
    for attention, kind in attentions:
        _check_attention(attention, kind)

    for module, kind in modules:
        if kind:
            module.forward = MethodType(_FORWARDS[kind], module)
    for attention, kind in attentions:
        processor = attention.processor
        if not isinstance(processor, FusedProcessor):
            fused = FusedWanProcessor if kind.startswith("Wan") else FusedHunyuanProcessor
            attend = sys.modules[type(processor).__module__].dispatch_attention_fn
            attention.set_processor(fused(attend, processor._attention_backend))


def _diffusers_module(module: nn.Module) -> Any:
    """The file of diffusers that has the class of a module; FSDP2 puts its own above it."""
    classes = type(module).__mro__
    return sys.modules[next(c.__module__ for c in classes if c.__module__.startswith("diffusers."))]


def _kind(module: nn.Module) -> str:
    """Name of the diffusers class that has a forward here; FSDP2 puts its own above it. Else ""."""
    known = (
        cls.__name__
        for cls in type(module).__mro__
        if cls.__module__.startswith("diffusers.") and cls.__name__ in _FORWARDS
    )
    return next(known, "")


def _check_attention(attention: Any, kind: str) -> None:
    """ValueError for an attention that the operations cannot serve."""
    is_wan, processor = kind.startswith("Wan"), type(attention.processor).__name__
    own = "WanAttnProcessor" if is_wan else "HunyuanVideoAttnProcessor2_0"
    known = processor == own or isinstance(attention.processor, FusedProcessor)
    _require(known, attention, f"diffusers' {own}", processor)
    fused = getattr(attention, "fused_projections", False)
    _require(not fused, attention, "separate projections", "fused projections")
    has_added = attention.add_k_proj is not None
    _require(not (is_wan and has_added), attention, "attention to text", "attention to an image")
    names = ["norm_q", "norm_k", *["norm_added_q", "norm_added_k"] * has_added]
    for norm in (type(getattr(attention, name)).__name__ for name in names):
        _require(norm == "RMSNorm", attention, "q and k normalised with RMSNorm", norm)


def _require(ok: bool, module: nn.Module, expected: str, got: str) -> None:
    if not ok:
        raise ValueError(f"{type(module).__name__}: expected {expected}, got {got}")


class RotaryTables:
    """cos and sin, [L, D / 2] fp32, contiguous.

    Neither a tuple nor a dataclass: FSDP2 casts tensors that it finds in a module's arguments to
    the dtype of its parameters, and angles in bf16 would blur positions.
    """

    __slots__ = ("cos", "sin")

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        self.cos = cos.contiguous()
        self.sin = sin.contiguous()


def _wan_rope(rope: Any, hidden_states: Tensor) -> RotaryTables:
    """diffusers' tables [1, L, 1, D] hold each angle twice."""

    def tables() -> RotaryTables:
        cos, sin = type(rope).forward(rope, hidden_states)
        return RotaryTables(cos[0, :, 0, 0::2], sin[0, :, 0, 1::2])

    return _kept(rope, hidden_states, tables)


def _hunyuan_rope(rope: Any, hidden_states: Tensor) -> RotaryTables:
    """diffusers' tables [L, D] hold each angle twice."""

    def tables() -> RotaryTables:
        cos, sin = type(rope).forward(rope, hidden_states)
        return RotaryTables(cos[:, 0::2], sin[:, 1::2])

    return _kept(rope, hidden_states, tables)


def _kept(rope: Any, x: Tensor, make: Callable[[], RotaryTables]) -> RotaryTables:
    """The tables for the sizes and the device of x, made at the first call with them.

    They depend on nothing else. Fake tensors and traced ones are not kept.
    """
    if type(x) is not Tensor or torch.compiler.is_compiling():
        return make()
    key = x.shape[2:], x.device
    kept: tuple[Any, RotaryTables] | None = getattr(rope, "kept", None)
    if kept is None or kept[0] != key:
        with torch.inference_mode(False), torch.no_grad():
            kept = rope.kept = key, make()
    return kept[1]


def _heads(x: Tensor, count: int) -> Tensor:
    """[B, L, C] -> [B, L, H, C / H]; `unflatten` is three calls, one of them Python's."""
    batch, length, channels = x.shape
    return x.view(batch, length, count, channels // count)


class FusedProcessor:
    """An attention processor of diffusers with `qk_norm_rope`."""

    def __init__(self, attend: Callable[..., Tensor], backend: Any) -> None:
        self.attend = attend
        """diffusers' dispatch_attention_fn."""
        self._attention_backend = backend  # the name that diffusers' set_attention_backend sets

    def project(self, x: Tensor, attn: Any, layers: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """q, k and v [B, L, H, D] of tokens [B, L, C]."""
        return tuple(_heads(layer(x), attn.heads) for layer in layers)

    def normed(
        self, q: Tensor, k: Tensor, norm_q: Any, norm_k: Any, tables: RotaryTables | None
    ) -> tuple[Tensor, Tensor]:
        """q and k after their norms and the rotation."""
        cos, sin = (None, None) if tables is None else (tables.cos, tables.sin)
        return qk_norm_rope(q, k, norm_q.weight, norm_k.weight, cos, sin, eps=norm_q.eps)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """[B, L, H, D] each -> [B, L, H D].

        On a CPU few tokens without a mask have an operation of their own, if diffusers' backend is
        torch's attention: sizes decide, so that rollout and update choose alike.
        """
        few = mask is None and max(q.shape[1], k.shape[1]) <= FEW_TOKENS and self._is_native()
        if few and select_backend("few_token_attention", q) == "cpp":
            return few_token_attention(q, k, v).flatten(2)
        return self.attend(q, k, v, attn_mask=mask, backend=self._attention_backend).flatten(2)

    def _is_native(self) -> bool:
        """True if diffusers' backend is torch's scaled_dot_product_attention."""
        backend = self._attention_backend
        if backend is None:  # diffusers' own choice
            backend = self.attend.__globals__["_AttentionBackendRegistry"].get_active_backend()[0]
        return str(getattr(backend, "value", backend)) == "native"


class FusedWanProcessor(FusedProcessor):
    """WanAttnProcessor without image conditioning: self-attention with, cross-attention without
    rotation.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: RotaryTables | None = None,
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        (q,) = self.project(hidden_states, attn, (attn.to_q,))
        k, v = self.project(context, attn, (attn.to_k, attn.to_v))
        q, k = self.normed(q, k, attn.norm_q, attn.norm_k, rotary_emb)
        out: Tensor = attn.to_out[0](self.attention(q, k, v, attention_mask))
        return attn.to_out[1](out)


class FusedHunyuanProcessor(FusedProcessor):
    """HunyuanVideoAttnProcessor2_0: of a dual-stream block (video and text apart), or of a
    single-stream one (the text after the video).

    Returns the video's and the text's output; of a single-stream block, whose output has no
    projection here, the joint sequence.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: RotaryTables | None = None,
    ) -> Any:
        q, k, v = self.project(hidden_states, attn, (attn.to_q, attn.to_k, attn.to_v))
        q, k = self.normed(q, k, attn.norm_q, attn.norm_k, image_rotary_emb)
        if encoder_hidden_states is None:
            return self.attention(q, k, v, attention_mask)
        layers = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        text_q, text_k, text_v = self.project(encoder_hidden_states, attn, layers)
        text_q, text_k = self.normed(text_q, text_k, attn.norm_added_q, attn.norm_added_k, None)
        q, k, v = (torch.cat(pair, dim=1) for pair in ((q, text_q), (k, text_k), (v, text_v)))
        out, length = self.attention(q, k, v, attention_mask), hidden_states.shape[1]
        video, text = out[:, :length], out[:, length:]
        return attn.to_out[1](attn.to_out[0](video)), attn.to_add_out(text)


def _wan_transformer(
    model: Any,
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    encoder_hidden_states_image: Tensor | None = None,
    return_dict: bool = True,
    attention_kwargs: dict[str, Any] | None = None,
) -> Any:
    """WanTransformer3DModel.forward: latents [B, C, T, H, W], timesteps [B], text [B, L, D].

    Timesteps per token [B, T] (Wan 2.2 ti2v) and what else diffusers' own takes go through that,
    over the same blocks.
    """
    others = encoder_hidden_states_image, attention_kwargs
    if timestep.dim() != 1 or any(value is not None for value in others):
        given = hidden_states, timestep, encoder_hidden_states, encoder_hidden_states_image
        return type(model).forward(model, *given, return_dict, attention_kwargs)
    sizes = [n // p for n, p in zip(hidden_states.shape[2:], model.config.patch_size, strict=True)]
    rope, conv = model.rope(hidden_states), model.patch_embedding
    if _is_plain(conv, nn.Conv3d) and set(conv.kernel_size) == {1}:  # each pixel a token
        x = F.linear(hidden_states.flatten(2).transpose(1, 2), conv.weight.flatten(1), conv.bias)
    else:
        x = conv(hidden_states).flatten(2).transpose(1, 2).contiguous()
    temb, projected, text, _ = model.condition_embedder(timestep, encoder_hidden_states, None)
    projected = projected.unflatten(1, (6, -1))
    checkpointed = torch.is_grad_enabled() and model.gradient_checkpointing
    for block in model.blocks:
        if checkpointed:
            x = model._gradient_checkpointing_func(block, x, text, projected, rope)
        else:
            x = block(x, text, projected, rope)
    shift, scale = (model.scale_shift_table + temb.unsqueeze(1)).chunk(2, dim=1)
    x = model.proj_out(ln_modulate(x, scale, shift, eps=model.norm_out.eps))
    x = x.reshape(len(x), *sizes, *model.config.patch_size, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
    x = x.flatten(6, 7).flatten(4, 5).flatten(2, 3)
    if not return_dict:
        return (x,)
    return _diffusers_module(model).Transformer2DModelOutput(sample=x)


def _wan_block(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    rotary_emb: RotaryTables,
) -> Tensor:
    """WanTransformerBlock.forward: video [B, L, C], text [B, T, C], temb [B, 6, C], or [B, L, 6, C]
    with one timestep per token.
    """
    rows = (block.scale_shift_table + temb.float()).chunk(6, dim=-2)
    if temb.dim() == 4:
        rows = tuple(row.squeeze(2) for row in rows)
    shift, scale, gate, ff_shift, ff_scale, ff_gate = rows
    x, norm2 = hidden_states, block.norm2

    y = block.attn1(ln_modulate(x, scale, shift, eps=block.norm1.eps), None, None, rotary_emb)
    x, normed = gate_residual_ln_modulate(
        x, y, gate, norm2.weight.float() - 1, norm2.bias, eps=norm2.eps
    )
    y = block.attn2(normed, encoder_hidden_states, None, None)
    x, normed = gate_residual_ln_modulate(x, y, None, ff_scale, ff_shift, eps=block.norm3.eps)
    return gate_residual(x, block.ffn(normed), ff_gate)


def _hunyuan_block(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None,
    freqs_cis: RotaryTables,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    """HunyuanVideoTransformerBlock.forward: video [B, L, C] and text [B, T, C], each with its own
    weights, temb [B, C].
    """
    x, text, own, its = hidden_states, encoder_hidden_states, block.norm1, block.norm1_context
    shift, scale, gate, ff_shift, ff_scale, ff_gate = own.linear(own.silu(temb)).chunk(6, dim=1)
    text_shift, text_scale, text_gate, text_ff_shift, text_ff_scale, text_ff_gate = its.linear(
        its.silu(temb)
    ).chunk(6, dim=1)

    y, text_y = block.attn(
        hidden_states=ln_modulate(x, scale, shift, eps=own.norm.eps),
        encoder_hidden_states=ln_modulate(text, text_scale, text_shift, eps=its.norm.eps),
        attention_mask=attention_mask,
        image_rotary_emb=freqs_cis,
    )
    x, normed = gate_residual_ln_modulate(x, y, gate, ff_scale, ff_shift, eps=block.norm2.eps)
    text, text_normed = gate_residual_ln_modulate(
        text, text_y, text_gate, text_ff_scale, text_ff_shift, eps=block.norm2_context.eps
    )
    return gate_residual(x, block.ff(normed), ff_gate), gate_residual(
        text, block.ff_context(text_normed), text_ff_gate
    )


def _hunyuan_single_block(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None,
    image_rotary_emb: RotaryTables,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    """HunyuanVideoSingleTransformerBlock.forward: video [B, L, C], then text [B, T, C], as one
    sequence; temb [B, C].
    """
    x, length = torch.cat([hidden_states, encoder_hidden_states], dim=1), hidden_states.shape[1]
    shift, scale, gate = block.norm.linear(block.norm.silu(temb)).chunk(3, dim=1)

    normed = ln_modulate(x, scale, shift, eps=block.norm.norm.eps)
    mlp = _linear_gelu(block.proj_mlp, normed, block.act_mlp)
    y = block.attn(
        hidden_states=normed, attention_mask=attention_mask, image_rotary_emb=image_rotary_emb
    )
    x = gate_residual(x, block.proj_out(torch.cat([y, mlp], dim=2)), gate)
    return x[:, :length], x[:, length:]


def _gelu(module: Any, hidden_states: Tensor) -> Tensor:
    """GELU.forward: what a feed-forward layer begins with."""
    if module.approximate != "tanh":
        return type(module).forward(module, hidden_states)
    return _linear_gelu(module.proj, hidden_states, module.gelu)


def _linear_gelu(linear: nn.Module, x: Tensor, gelu: Callable[[Tensor], Tensor]) -> Tensor:
    """GELU of a linear layer's output; on a GPU its bias is added on the way to the activation.

    Where plain PyTorch would serve, the layer adds its bias itself: apart it would be one pass
    more. So it does on a CPU, where that is the faster by 1 % of a small network's forward, and so
    does a layer with an adapter (LoRA), which adds to its output.
    """
    backend = select_backend("bias_gelu", x)
    if backend == "reference":
        return gelu(linear(x))
    if backend != "cpp" and _is_plain(linear, nn.Linear):
        return bias_gelu(F.linear(x, linear.weight), linear.bias)
    return bias_gelu(linear(x), None)


def _is_plain(layer: nn.Module, kind: type[_Layer]) -> TypeGuard[_Layer]:
    """Whether a layer does what its class does, without hooks (of offloading) or an adapter."""
    hooked = layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)
    return type(layer) is kind and not hooked


_FORWARDS: dict[str, Callable[..., Any]] = {
    "WanTransformer3DModel": _wan_transformer,
    "WanTransformerBlock": _wan_block,
    "HunyuanVideoTransformerBlock": _hunyuan_block,
    "HunyuanVideoSingleTransformerBlock": _hunyuan_single_block,
    "WanRotaryPosEmbed": _wan_rope,
    "HunyuanVideoRotaryPosEmbed": _hunyuan_rope,
    "GELU": _gelu,
}
"""Classes of diffusers, and what takes the place of their forward."""
