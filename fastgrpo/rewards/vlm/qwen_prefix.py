"""Questions about videos over shared keys and values: a video is computed once, and its questions
are rows of one batch.

The arithmetic is transformers'. Here is which tokens stand at which positions, and how an answer is
drawn from the logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from fastgrpo.rewards.media.frames import patches, seconds_per_grid
from fastgrpo.rewards.vlm import qwen_windows
from fastgrpo.rewards.vlm.engine import Clip, Decoding, Reply
from fastgrpo.rewards.vlm.qwen_chat import CHARACTERS, NEXT_CHARACTERS, ChatTokens


@dataclass(frozen=True)
class Prefix:
    """What the language model keeps of one video's tokens up to the question.

    Attributes:
        layers: Keys and values [1, heads, tokens, head size] of each layer.
        start: Position of the question's first token.
    """

    layers: tuple[tuple[Tensor, Tensor], ...]
    start: int


def prefix_positions(
    before: int, grid: tuple[int, int, int], interval: float, after: int
) -> tuple[Tensor, int]:
    """Positions of text, a video and text.

    Text after the video begins after the largest position of all, time included, as in Qwen's own
    fine-tuning code (qwen-vl-finetune, `get_rope_index_25`), transformers 4 (4.57) and vLLM (0.32).
    `get_rope_index` of transformers 5 (5.23) begins it after the larger side of a frame: the same
    for clips of fewer half seconds than a frame is tokens wide, and positions that the model never
    saw in training for longer ones. transformers 4.57 and 5.17 also cut the seconds of a time step
    to an integer.

    Args:
        before: Tokens of text before the video.
        grid: (t, h, w) tokens of the video.
        interval: Positions between two time steps of the grid, `tokens_per_second *
            second_per_grid_ts`.
        after: Tokens of text after the video.

    Returns:
        Positions [3, tokens] int64 (time, row, column), and the position of what comes next.
    """
    t, h, w = grid
    time = (torch.arange(t) * interval).long()
    video = torch.stack(torch.meshgrid(time, torch.arange(h), torch.arange(w), indexing="ij"))
    end = before + max(h, w, int(time[-1]) + 1)
    head, tail = torch.arange(before), torch.arange(end, end + after)
    parts = [head.expand(3, -1), video.reshape(3, -1) + before, tail.expand(3, -1)]
    return torch.cat(parts, dim=1), end + after


def draw(logits: Tensor, temperature: float, uniform: Tensor) -> Tensor:
    """Draw a token from each row of logits [R, N]: the largest at temperature 0, else the quantile
    `uniform` [R] in [0, 1).

    Returns:
        Indices [R].
    """
    if temperature == 0:
        return logits.argmax(-1)
    # From the largest down: divided by a tiny temperature, it would be infinite.
    above = logits.double() - logits.amax(-1, keepdim=True)
    # On the CPU: a GPU adds up in any order, and refuses to under runtime.deterministic.
    cumulative = torch.softmax(above / temperature, -1).cpu().cumsum(-1)
    level = uniform[:, None].to(cumulative) * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, level, right=True)
    return drawn[:, 0].clamp_(max=logits.shape[-1] - 1).to(logits.device)


def compute_prefixes(
    module: Any, chat: ChatTokens, clips: list[Clip], device: torch.device
) -> list[Prefix]:
    """Run the vision tower and the language model, each once, over clips of one size."""
    parts = [patches(Clip(clip.frames.to(device), clip.fps)) for clip in clips]
    pixels = torch.cat([pixels for pixels, _ in parts])
    visual, config = module.model.visual, module.config.vision_config
    t, h, w = parts[0][1]
    # Nothing is computed of the grids themselves any more.
    arguments = qwen_windows.tower_arguments(visual.config, (t, h, w), len(clips), device)
    grids = torch.tensor([grid for _, grid in parts])
    tokens = visual(pixels.to(visual.dtype), grid_thw=grids, **arguments).pooler_output
    grid = (t, h // config.spatial_merge_size, w // config.spatial_merge_size)
    intervals = [config.tokens_per_second * seconds_per_grid(clip) for clip in clips]
    placed = [
        prefix_positions(len(chat.before), grid, interval, len(chat.after))
        for interval in intervals
    ]
    embed = module.get_input_embeddings()
    before, after = (
        embed(torch.tensor([part] * len(clips), device=device))
        for part in (chat.before, chat.after)
    )
    video = tokens.view(len(clips), -1, tokens.shape[-1]).to(before.dtype)
    cache = DynamicCache()
    module.model.language_model(
        inputs_embeds=torch.cat([before, video, after], dim=1),
        position_ids=torch.stack([positions for positions, _ in placed], dim=1).to(device),
        past_key_values=cache,
        use_cache=True,
    )
    return [
        Prefix(tuple((x.keys[b : b + 1], x.values[b : b + 1]) for x in cache.layers), start)
        for b, (_, start) in enumerate(placed)
    ]


def answer(
    module: Any,
    chat: ChatTokens,
    prefixes: list[Prefix],
    questions: list[list[int]],
    decoding: Decoding,
    uniform: Tensor,
) -> list[Reply]:
    """Answer R questions, each over its own prefix.

    Args:
        module: Qwen2_5_VLForConditionalGeneration.
        chat: Its tokens.
        prefixes: R prefixes of one length.
        questions: R questions as token ids.
        decoding: How answers are drawn.
        uniform: [R, max_tokens] in [0, 1), on the model's device.

    Returns:
        R replies; a row whose logits are not finite gets an error.
    """
    device = uniform.device
    batch = _side_by_side(prefixes, questions, decoding.max_tokens, device)
    characters = torch.tensor(chat.characters, device=device)
    broken = torch.zeros(len(questions), dtype=torch.bool, device=device)

    def forward(ids: Tensor, positions: Tensor) -> Tensor:
        seen = batch.mask[:, : batch.cache.get_seq_length() + ids.shape[1]]
        hidden = module.model.language_model(
            input_ids=ids,
            position_ids=positions.expand(3, -1, -1),
            attention_mask=seen,
            past_key_values=batch.cache,
            use_cache=True,
        ).last_hidden_state
        logits = module.lm_head(hidden[:, -1]).float()
        broken.logical_or_(~torch.isfinite(logits).all(-1))
        # The largest of NaNs is the first, which would spell 10.00.
        return logits.masked_fill(broken[:, None], 0.0)

    rows = range(len(questions))
    logits, ten = forward(batch.ids, batch.positions), [0.0 for _ in rows]
    if decoding.probabilities:
        one, zero = (characters[CHARACTERS.index(digit)] for digit in "10")
        after_one = forward(one.expand(len(rows), 1), batch.first[:, None])
        ten = after_one.softmax(-1)[:, zero].tolist()
        batch.cache.crop(-1)
    texts: list[str] = ["" for _ in rows]  # of constrained answers
    written: list[list[int]] = [[] for _ in rows]
    digits: list[list[dict[str, float]]] = [[] for _ in rows]
    done = [False for _ in rows]
    for step in range(decoding.max_tokens):
        if decoding.constrained:
            allowed = [
                [done[row] or character in NEXT_CHARACTERS[texts[row]] for character in CHARACTERS]
                for row in rows
            ]
            mask = torch.tensor(allowed, device=device)
            open_logits = logits[:, characters].where(mask, -torch.inf)
            drawn = characters[draw(open_logits, decoding.temperature, uniform[:, step])]
        else:
            drawn = draw(logits, decoding.temperature, uniform[:, step])
        chances = logits.softmax(-1)[:, characters[:10]].tolist() if decoding.probabilities else []
        for row, token in enumerate(drawn.tolist()):
            if done[row] or token in chat.stops:
                done[row] = True
                continue
            written[row].append(token)
            if decoding.probabilities:
                digits[row].append(dict(zip(CHARACTERS[:10], chances[row], strict=True)))
            if decoding.constrained:
                texts[row] += CHARACTERS[chat.characters.index(token)]
                done[row] = not NEXT_CHARACTERS[texts[row]]
        if all(done) or step + 1 == decoding.max_tokens:
            break
        logits = forward(drawn[:, None], (batch.first + step)[:, None])
    return [
        Reply(error="the model's logits are not finite")
        if bad
        else Reply(
            chat.text(written[row]),
            tuple(digits[row]),
            ten[row],
            cut=not done[row],
            tokens=tuple(chat.text([token]) for token in written[row]) if digits[row] else (),
        )
        for row, bad in enumerate(broken.tolist())
    ]


class _Batch(NamedTuple):
    """R questions side by side.

    Attributes:
        cache: Of their prefixes.
        ids: [R, L].
        positions: [R, L].
        mask: [R, prefix + L + answer].
        first: [R], positions of the answers' first tokens.
    """

    cache: DynamicCache
    ids: Tensor
    positions: Tensor
    mask: Tensor
    first: Tensor


def _side_by_side(
    prefixes: list[Prefix], questions: list[list[int]], answer: int, device: torch.device
) -> _Batch:
    """R questions as a batch, with room for `answer` tokens.

    A question shorter than L is padded before it, after the prefix, so that all answers begin at
    one index.
    """
    cache = DynamicCache()
    for index, layers in enumerate(zip(*(prefix.layers for prefix in prefixes), strict=True)):
        keys, values = (torch.cat(tensors) for tensors in zip(*layers, strict=True))
        cache.update(keys, values, index)
    seen, rows, width = cache.get_seq_length(), len(questions), max(map(len, questions))
    ids, positions = torch.zeros(2, rows, width, dtype=torch.long)
    mask = torch.ones(rows, seen + width + answer, dtype=torch.long)
    first = torch.zeros(rows, dtype=torch.long)
    for row, (question, prefix) in enumerate(zip(questions, prefixes, strict=True)):
        gap = width - len(question)
        ids[row, gap:] = torch.tensor(question)
        first[row] = prefix.start + len(question)
        positions[row, gap:] = torch.arange(prefix.start, int(first[row]))
        mask[row, seen : seen + gap] = 0
    return _Batch(cache, *(tensor.to(device) for tensor in (ids, positions, mask, first)))
