"""What a Qwen vision-language model computes with, in bytes: the activations that live at the worst
moment, and the keys and values. An estimate for `plan`, from the configuration alone.

Counted by hand on transformers' modules without gradients, where attention keeps no scores.
"""

from __future__ import annotations

from typing import Any

_PIXELS = 3 * 2 * 14 * 14  # of a patch
_TEXT = 640
"""Tokens of a chat's fixed parts and of a question with its caption: ours have some 400 with a
caption of 100.
"""


def vision_bytes(config: Any, num_patches: int, itemsize: int) -> float:
    """Bytes of the vision tower at work.

    Args:
        config: `vision_config` of Qwen2-VL or Qwen2.5-VL.
        num_patches: Of all videos together.
        itemsize: Bytes of an element of the weights.
    """
    is_first = config.model_type.startswith("qwen2_vl")
    width = config.embed_dim if is_first else config.hidden_size
    hidden = int(width * config.mlp_ratio) if is_first else config.intermediate_size
    # The patches in fp32, those of each video and all of them, and once more as the weights are.
    pixels = _PIXELS * (4 + 4 + itemsize)
    # Stream, norm, and q, k, v; their rotation takes six tensors in fp32.
    attention = width * (5 * itemsize + 6 * 4)
    mlp = itemsize * (2 * width + 3 * hidden)
    return num_patches * (pixels + max(attention, mlp))


def language_bytes(config: Any, num_tokens: int, itemsize: int) -> float:
    """Bytes of the language model's activations, without keys and values of earlier layers.

    Args:
        config: `text_config`.
        num_tokens: Of all rows together.
        itemsize: As above.
    """
    # Inputs, stream, norm, and gate, up and their product; norms and rotations take less than 10
    # tensors of the stream's width.
    width, hidden = config.hidden_size, config.intermediate_size
    return num_tokens * itemsize * (2 * width + max(2 * width + 3 * hidden, 10 * width))


def cache_bytes(config: Any, num_tokens: int, itemsize: int) -> float:
    """Bytes of the keys and values of all layers; `config` is `text_config`."""
    size = config.hidden_size // config.num_attention_heads
    return 2 * num_tokens * config.num_hidden_layers * config.num_key_value_heads * size * itemsize


def prefix_bytes(config: Any, itemsize: int, num_patches: int) -> float:
    """Bytes of the keys and values of one video of `num_patches`."""
    merged = num_patches // config.vision_config.spatial_merge_size**2
    return cache_bytes(config.text_config, merged + _TEXT, itemsize)


def judge_bytes(
    config: Any, itemsize: int, num_videos: int, num_patches: int, num_questions: int
) -> float:
    """Bytes at the worst moment of answering questions over shared keys and values
    (`qwen_prefix`).

    Args:
        config: Of Qwen2-VL or Qwen2.5-VL.
        itemsize: Bytes of an element of the weights.
        num_videos: In a batch.
        num_patches: Of one of them.
        num_questions: About each.
    """
    vision, text = config.vision_config, config.text_config
    merged = num_patches // vision.spatial_merge_size**2
    rows = num_videos * num_questions
    pixels = 2 * 4 * _PIXELS * num_videos * num_patches
    prefixes = num_videos * prefix_bytes(config, itemsize, num_patches)
    prefill = language_bytes(text, num_videos * (merged + _TEXT), itemsize)
    # Each row has a copy of its video's keys and values, one layer of them at a time twice. Then
    # attention expands that layer's to all heads, or the MLP works.
    row = merged + 2 * _TEXT
    copies = cache_bytes(text, rows * row, itemsize) * (1 + 1 / text.num_hidden_layers)
    expanded = 2 * rows * row * text.hidden_size * itemsize
    logits = rows * text.vocab_size * (itemsize + 3 * 4)
    answers = copies + max(expanded, language_bytes(text, rows * _TEXT, itemsize)) + logits
    return max(
        vision_bytes(vision, num_videos * num_patches, itemsize),
        prefixes + max(pixels + prefill, answers),
    )
