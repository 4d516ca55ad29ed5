"""fastgrpo_kernels' pointwise operations in place of what diffusers' Wan and HunyuanVideo blocks do
between their linear layers.

`fuse(transformer)` changes objects, not classes: blocks get a forward, attentions a processor,
the rotary embedding a table that the operation reads without a detour. Parameters, their names
and every module stay, so that LoRA, FSDP2 (which gives each block a class of its own), gradient
checkpointing, compilation and diffusers' attention backends work as before.

The operations compute in fp32 and give their first input's dtype, rounded once. In Wan that is
what diffusers' blocks do as well, with a second rounding between norm and rotation of q and k;
HunyuanVideo's blocks round between LayerNorm, modulation and gate. Under autocast the tokens are
bf16 (outputs of linear layers and of these operations), scales, shifts and gates bf16 or fp32,
weights fp32: what the linear layers and the attention are given is bf16, as it is when autocast
casts what diffusers' blocks leave in fp32. Rollout and update must both have the operations in,
or both not.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.transformer_hunyuan_video import (
    HunyuanVideoAttnProcessor2_0,
    HunyuanVideoRotaryPosEmbed,
    HunyuanVideoSingleTransformerBlock,
    HunyuanVideoTransformerBlock,
)
from diffusers.models.transformers.transformer_wan import (
    WanAttention,
    WanAttnProcessor,
    WanRotaryPosEmbed,
    WanTransformerBlock,
)
from torch import Tensor, nn

from . import gate_residual, gate_residual_ln_modulate, ln_modulate, qk_norm_rope


class RotaryTables:
    """cos and sin, [L, D / 2] fp32, contiguous, made once a forward.

    Neither a tuple nor a dataclass: FSDP2 casts tensors that it finds in a module's arguments to
    the dtype of its parameters, and angles in bf16 would blur positions.
    """

    __slots__ = ("cos", "sin")

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        self.cos = cos.contiguous()
        self.sin = sin.contiguous()


def fuse(transformer: nn.Module) -> None:
    """Swap the operations into every block of a Wan or HunyuanVideo transformer, in place. Doing it
    again changes nothing.

    Call it before sharding and compiling. ValueError: a transformer of another kind, or one with
    a part that the operations do not have (image conditioning, projections fused by diffusers,
    other norms).
    """
    blocks = [module for module in transformer.modules() if isinstance(module, tuple(_FORWARDS))]
    if not blocks:
        raise ValueError(
            f"policy.fused: expected a Wan or HunyuanVideo transformer, got {type(transformer).__name__}; set it to false"
        )
    attentions: list[Any] = [
        module for block in blocks for module in block.children() if hasattr(module, "processor")
    ]
    for module in [*blocks, *attentions]:
        if problem := _cannot_serve(module):
            raise ValueError(f"policy.fused: {type(module).__name__} {problem}; set it to false")
    for module in transformer.modules():
        for kind, forward in (_FORWARDS | _ROPES).items():
            if isinstance(module, kind):
                module.forward = MethodType(forward, module)
    for attn in attentions:
        processor = (
            FusedWanProcessor() if isinstance(attn, WanAttention) else FusedHunyuanProcessor()
        )
        processor._attention_backend = attn.processor._attention_backend
        attn.set_processor(processor)


def _cannot_serve(module: Any) -> str:
    """What the operations do not have of a block or an attention; nothing if they serve it."""
    if isinstance(module, WanTransformerBlock):
        return (
            ""
            if getattr(module.norm2, "weight", None) is not None
            else "has no norm before its cross-attention"
        )
    if isinstance(module, tuple(_FORWARDS)):
        return ""
    if not isinstance(
        module.processor,
        WanAttnProcessor | HunyuanVideoAttnProcessor2_0 | FusedWanProcessor | FusedHunyuanProcessor,
    ):
        return f"has an attention processor of its own, {type(module.processor).__name__}"
    if getattr(module, "fused_projections", False):
        return "has fused projections"
    if isinstance(module, WanAttention) and module.add_k_proj is not None:
        return "attends to an image"
    norms = [
        getattr(module, name, None) for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
    ]
    wanted = norms[:2] if isinstance(module, WanAttention) or module.add_q_proj is None else norms
    others = [type(norm).__name__ for norm in wanted if not isinstance(norm, nn.RMSNorm | RMSNorm)]
    return f"normalises q and k with {others[0]}" if others else ""


# -------- rotary tables


def _wan_rope(rope: nn.Module, hidden_states: Tensor) -> RotaryTables:
    """diffusers' tables [1, L, 1, D] hold each angle twice."""
    cos, sin = WanRotaryPosEmbed.forward(rope, hidden_states)
    return RotaryTables(cos[0, :, 0, 0::2], sin[0, :, 0, 1::2])


def _hunyuan_rope(rope: nn.Module, hidden_states: Tensor) -> RotaryTables:
    """diffusers' tables [L, D] hold each angle twice."""
    cos, sin = HunyuanVideoRotaryPosEmbed.forward(rope, hidden_states)
    return RotaryTables(cos[:, 0::2], sin[:, 1::2])


# -------- attention


def _heads(x: Tensor, attn: Any) -> Tensor:
    return x.unflatten(2, (attn.heads, -1))


def _normed(
    q: Tensor, k: Tensor, norm_q: Any, norm_k: Any, tables: RotaryTables | None
) -> tuple[Tensor, Tensor]:
    cos, sin = (None, None) if tables is None else (tables.cos, tables.sin)
    return qk_norm_rope(q, k, norm_q.weight, norm_k.weight, cos, sin, eps=norm_q.eps)


class FusedWanProcessor:
    """WanAttnProcessor without image conditioning: self-attention with, cross-attention without
    rotation.
    """

    _attention_backend: Any = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: RotaryTables | None = None,
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            _heads(attn.to_q(hidden_states), attn),
            _heads(attn.to_k(context), attn),
            _heads(attn.to_v(context), attn),
        )
        q, k = _normed(q, k, attn.norm_q, attn.norm_k, rotary_emb)
        out = dispatch_attention_fn(
            q, k, v, attn_mask=attention_mask, backend=self._attention_backend
        )
        return attn.to_out[1](attn.to_out[0](out.flatten(2)))


class FusedHunyuanProcessor:
    """HunyuanVideoAttnProcessor2_0: of a dual-stream block (video and text apart), or of a
    single-stream one (the text after the video).

    Returns the video's and the text's output; of a single-stream block, whose output has no
    projection here, the joint sequence.
    """

    _attention_backend: Any = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: RotaryTables | None = None,
    ) -> Any:
        q, k, v = (
            _heads(project(hidden_states), attn) for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        q, k = _normed(q, k, attn.norm_q, attn.norm_k, image_rotary_emb)
        if encoder_hidden_states is None:
            return dispatch_attention_fn(
                q, k, v, attn_mask=attention_mask, backend=self._attention_backend
            ).flatten(2)
        projects = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        text_q, text_k, text_v = (
            _heads(project(encoder_hidden_states), attn) for project in projects
        )
        text_q, text_k = _normed(text_q, text_k, attn.norm_added_q, attn.norm_added_k, None)
        q, k, v = (torch.cat(pair, dim=1) for pair in ((q, text_q), (k, text_k), (v, text_v)))
        out = dispatch_attention_fn(
            q, k, v, attn_mask=attention_mask, backend=self._attention_backend
        ).flatten(2)
        video, text = out[:, : hidden_states.shape[1]], out[:, hidden_states.shape[1] :]
        return attn.to_out[1](attn.to_out[0](video)), attn.to_add_out(text)


# -------- blocks


def _wan_block(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    rotary_emb: RotaryTables,
) -> Tensor:
    """WanTransformerBlock.forward: video [B, L, C], text [B, T, C], temb [B, 6, C]."""
    shift, scale, gate, ff_shift, ff_scale, ff_gate = (
        block.scale_shift_table + temb.float()
    ).chunk(6, dim=1)
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
    mlp = block.act_mlp(block.proj_mlp(normed))
    y = block.attn(
        hidden_states=normed, attention_mask=attention_mask, image_rotary_emb=image_rotary_emb
    )
    x = gate_residual(x, block.proj_out(torch.cat([y, mlp], dim=2)), gate)
    return x[:, :length], x[:, length:]


_FORWARDS: dict[type, Any] = {
    WanTransformerBlock: _wan_block,
    HunyuanVideoTransformerBlock: _hunyuan_block,
    HunyuanVideoSingleTransformerBlock: _hunyuan_single_block,
}
_ROPES: dict[type, Any] = {WanRotaryPosEmbed: _wan_rope, HunyuanVideoRotaryPosEmbed: _hunyuan_rope}
