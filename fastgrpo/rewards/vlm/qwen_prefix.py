"""Questions about videos over shared keys and values: a video is computed once, and its questions
are rows of one batch.

The arithmetic is transformers'; what is here is which tokens stand at which positions, and how
an answer is drawn from the logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from fastgrpo.rewards.media.frames import patches, seconds_per_grid
from fastgrpo.rewards.vlm.engine import Clip, Decoding, Reply
from fastgrpo.rewards.vlm.qwen_chat import CHARACTERS, ChatTokens, next_characters


@dataclass(frozen=True)
class Prefix:
    """What the language model keeps of the tokens up to the question, for one video.

    layers: keys and values [1, heads, tokens, head size] of each layer. start: position of the
    question's first token.
    """

    layers: tuple[tuple[Tensor, Tensor], ...]
    start: int


def prefix_positions(
    before: int, grid: tuple[int, int, int], interval: float, after: int
) -> tuple[Tensor, int]:
    """Positions [3, tokens] int64 (time, row, column) of text, a video of `grid` (t, h, w) tokens,
    and text; and that of what comes next.

    interval: positions between two of the grid's time steps, `tokens_per_second *
    second_per_grid_ts`. As `get_rope_index` of transformers 5.23 has it. That of 5.17 cuts the
    seconds to an integer, which puts all of a clip above 2 frames a second at one time. vLLM
    begins the text after the last time step where that comes later, which only tells in clips of
    more seconds than half their width in tokens.
    """
    t, h, w = grid
    text = torch.arange(before).expand(3, -1)
    time = (torch.arange(t) * interval).long()
    video = (
        torch.stack(torch.meshgrid(time, torch.arange(h), torch.arange(w), indexing="ij")).reshape(
            3, -1
        )
        + before
    )
    end = before + max(h, w)
    return torch.cat(
        [text, video, torch.arange(end, end + after).expand(3, -1)], dim=1
    ), end + after


def choose(logits: Tensor, temperature: float, uniform: Tensor) -> Tensor:
    """The index [R] of the token drawn from logits [R, N]: the largest at temperature 0, else the
    quantile `uniform` [R] in [0, 1).
    """
    if temperature == 0:
        return logits.argmax(-1)
    cumulative = torch.softmax(logits.double() / temperature, -1).cumsum(-1)
    drawn = torch.searchsorted(
        cumulative, uniform[:, None].to(cumulative) * cumulative[:, -1:], right=True
    )
    return drawn[:, 0].clamp_(max=logits.shape[-1] - 1)


def see(module: Any, chat: ChatTokens, clips: list[Clip], device: torch.device) -> list[Prefix]:
    """The prefixes of clips of one size: vision tower and language model, each once."""
    parts = [patches(Clip(clip.frames.to(device), clip.fps)) for clip in clips]
    grids = torch.tensor([grid for _, grid in parts], device=device)
    visual = module.model.visual
    tokens = visual(
        torch.cat([pixels for pixels, _ in parts]).to(visual.dtype), grid_thw=grids
    ).pooler_output
    t, h, w = parts[0][1]
    config = module.config.vision_config
    grid = (t, h // config.spatial_merge_size, w // config.spatial_merge_size)
    placed = [
        prefix_positions(
            len(chat.before),
            grid,
            config.tokens_per_second * seconds_per_grid(clip),
            len(chat.after),
        )
        for clip in clips
    ]
    embed = module.get_input_embeddings()
    before, after = (
        embed(torch.tensor([part] * len(clips), device=device))
        for part in (chat.before, chat.after)
    )
    cache = DynamicCache()
    module.model.language_model(
        inputs_embeds=torch.cat(
            [before, tokens.view(len(clips), -1, tokens.shape[-1]).to(before.dtype), after], dim=1
        ),
        position_ids=torch.stack([positions for positions, _ in placed], dim=1).to(device),
        past_key_values=cache,
        use_cache=True,
    )
    return [
        Prefix(
            tuple((layer.keys[b : b + 1], layer.values[b : b + 1]) for layer in cache.layers), start
        )
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
    """The replies to R questions, each over its own prefix, all prefixes of one length; uniform:
    [R, max_tokens] in [0, 1).

    A row whose logits are not finite gets an error.
    """
    cache, ids, positions, mask, first = _side_by_side(
        prefixes, questions, decoding.max_tokens, uniform.device
    )
    characters = torch.tensor(chat.characters, device=uniform.device)
    broken = torch.zeros(len(questions), dtype=torch.bool, device=uniform.device)

    def forward(ids: Tensor, positions: Tensor) -> Tensor:
        seen = mask[:, : cache.get_seq_length() + ids.shape[1]]
        hidden = module.model.language_model(
            input_ids=ids,
            position_ids=positions.expand(3, -1, -1),
            attention_mask=seen,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        logits = module.lm_head(hidden[:, -1]).float()
        broken.logical_or_(~torch.isfinite(logits).all(-1))
        return logits.masked_fill(
            broken[:, None], 0.0
        )  # the largest of NaNs is the first, which would spell 10.00

    rows = range(len(questions))
    logits, ten = forward(ids, positions), [0.0 for _ in rows]
    if decoding.probabilities:
        one = characters[CHARACTERS.index("1")].expand(len(rows), 1)
        ten = (
            forward(one, first[:, None]).softmax(-1)[:, characters[CHARACTERS.index("0")]].tolist()
        )
        cache.crop(-1)
    texts: list[str] = ["" for _ in rows]  # of constrained answers
    written: list[list[int]] = [[] for _ in rows]
    digits: list[list[dict[str, float]]] = [[] for _ in rows]
    done = [False for _ in rows]
    for step in range(decoding.max_tokens):
        if decoding.constrained:
            allowed = [
                [done[row] or character in next_characters(texts[row]) for character in CHARACTERS]
                for row in rows
            ]
            open_logits = logits[:, characters].where(
                torch.tensor(allowed, device=logits.device), -torch.inf
            )
            drawn = characters[choose(open_logits, decoding.temperature, uniform[:, step])]
        else:
            drawn = choose(logits, decoding.temperature, uniform[:, step])
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
                done[row] = not next_characters(texts[row])
        if all(done) or step + 1 == decoding.max_tokens:
            break
        logits = forward(drawn[:, None], (first + step)[:, None])
    return [
        Reply(error="the model's logits are not finite")
        if bad
        else Reply(
            text=chat.text(written[row]), digits=tuple(digits[row]), ten=ten[row], cut=not done[row]
        )
        for row, bad in enumerate(broken.tolist())
    ]


def _side_by_side(
    prefixes: list[Prefix], questions: list[list[int]], answer: int, device: torch.device
) -> tuple[DynamicCache, Tensor, Tensor, Tensor, Tensor]:
    """R questions as a batch: the cache of their prefixes, ids and positions [R, L], mask [R,
    prefix + L + answer], answers' positions [R].

    A question shorter than L is padded before it, after the prefix, so that all answers begin at
    one place.
    """
    cache = DynamicCache()
    for index in range(len(prefixes[0].layers)):
        keys, values = (
            torch.cat([prefix.layers[index][which] for prefix in prefixes]) for which in (0, 1)
        )
        cache.update(keys, values, index)
    seen, width = cache.get_seq_length(), max(map(len, questions))
    ids, positions = (
        torch.zeros(len(questions), width, dtype=torch.long),
        torch.zeros(len(questions), width, dtype=torch.long),
    )
    mask = torch.ones(len(questions), seen + width + answer, dtype=torch.long)
    for row, (question, prefix) in enumerate(zip(questions, prefixes, strict=True)):
        gap = width - len(question)
        ids[row, gap:] = torch.tensor(question)
        positions[row, gap:] = torch.arange(prefix.start, prefix.start + len(question))
        mask[row, seen : seen + gap] = 0
    first = torch.tensor(
        [prefix.start + len(question) for prefix, question in zip(prefixes, questions, strict=True)]
    )
    return cache, ids.to(device), positions.to(device), mask.to(device), first.to(device)
