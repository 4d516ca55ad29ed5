"""What VideoAlign publishes, on the hub as KwaiVGI/VideoReward, and how it is read: settings,
prompt, tokens and weights.

    model_config.json             settings of training and inference; mean and deviation of scores
    checkpoint-11352/model.pth    all weights of Qwen2-VL-2B under their names of transformers 4.45,
                                  with LoRA beside them, not merged
    checkpoint-11352/tokenizer/   Qwen2-VL's tokenizer with the three reward tokens

The prompt is only in the code (github.com/KwaiVGI/VideoAlign, prompt_template.py). Nothing
published is run: JSON, safetensors or torch.load with weights_only, and the prompt's file is
parsed.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from fastgrpo.errors import UserError, require
from fastgrpo.files import find_file
from fastgrpo.rewards.models.per_video import read_tensors

KEY = "reward.init_args"
REWARD_TOKENS = ("<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>")
_CAPTION = "{text_prompt}"
_VIDEO = "<|video_pad|>"


@dataclass(frozen=True)
class Published:
    """Settings of a checkpoint, from its model_config.json.

    Attributes:
        base: Hub id of the model that it was made of.
        fps, max_pixels: Of the sampled frames.
        lora_rank, lora_scale: Of W + scale B A.
        mean, std: Of the raw scores VQ, MQ, TA.
    """

    base: str
    fps: float
    max_pixels: int
    lora_rank: int
    lora_scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


def read_settings(folder: Path) -> Published:
    """Read the settings of a checkpoint's folder.

    Raises:
        FileNotFoundError: There are none.
        ValueError: Unreadable, or of a model of another kind (other tokens, other frames).
    """
    path = folder / "model_config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{KEY}.model: expected a checkpoint of VideoAlign, found no {path}"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        data, model, lora, scores = (
            content[name]
            for name in ("data_config", "model_config", "peft_lora_config", "inference_config")
        )
        for section, name, expected in (
            (data, "prompt_template_type", "detailed_special"),
            (data, "sample_type", "uniform"),
            (data, "eval_dim", ["VQ", "MQ", "TA"]),
            (data, "num_frames", None),
            (model, "use_special_tokens", True),
            (lora, "lora_enable", True),
        ):
            require(section.get(name) == expected, name, repr(expected), section.get(name))
        rank = lora["lora_r"]
        found = Published(
            base=model["model_name_or_path"],
            fps=float(data["fps"]),
            max_pixels=int(data["max_frame_pixels"]),
            lora_rank=rank,
            lora_scale=lora["lora_alpha"] / (math.sqrt(rank) if lora.get("use_rslora") else rank),
            mean=tuple(float(scores[f"{name}_mean"]) for name in ("VQ", "MQ", "TA")),
            std=tuple(float(scores[f"{name}_std"]) for name in ("VQ", "MQ", "TA")),
        )
        positive = min(found.fps, found.max_pixels, *found.std) > 0
        if not (positive and math.isfinite(sum(found.mean + found.std))):
            raise ValueError(f"expected positive fps, max_frame_pixels and deviations, got {found}")
    except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(
            f"{KEY}.model: expected the settings of a VideoAlign with reward tokens in {path}, "
            f"got {what}"
        ) from error
    return found


def read_prompt(file: str | None) -> str:
    """Read the prompt: VideoAlign's prompt_template.py, which is parsed and not run, or a text file
    that holds only the prompt.

    Raises:
        FileNotFoundError, ValueError: No such file, or no prompt in it; the message says where to
            get it.
    """
    key = f"{KEY}.prompt_file"
    where = (
        "it is prompt_template.py of github.com/KwaiVGI/VideoAlign, which the checkpoint does not "
        "hold"
    )
    if file is None:
        raise UserError(
            f"{key}: expected the file with the prompt that VideoAlign was trained with; {where}"
        )
    path = find_file(file, key)
    try:
        text = path.read_text(encoding="utf-8")
        texts = [text]
        if path.suffix == ".py":
            values = [node.value for node in ast.parse(text).body if isinstance(node, ast.Assign)]
            constants = [value.value for value in values if isinstance(value, ast.Constant)]
            texts = [value for value in constants if isinstance(value, str)]
    except (ValueError, SyntaxError) as error:  # of encoding, of Python
        raise UserError(f"{key}: expected readable text in {path}, got {error}; {where}") from error
    marks = (*REWARD_TOKENS, _CAPTION)
    found = [text for text in texts if all(text.count(mark) == 1 for mark in marks)]
    if len(found) != 1 or sorted(REWARD_TOKENS, key=found[0].index) != list(REWARD_TOKENS):
        expected = f"{', '.join(REWARD_TOKENS)} in this order and {_CAPTION}, each once"
        raise UserError(
            f"{key}: expected one text with {expected}, in {path}, found {len(found)}; {where}"
        )
    return found[0]


@dataclass(frozen=True)
class RequestTokens:
    """A request as the model's chat template writes it.

    Attributes:
        tokenizer: Of transformers.
        parts: Special tokens (ids), and the texts between them.
        video: The token that is repeated for each visual one.
        rewards: The tokens of VQ, MQ, TA.
        vocabulary: Rows of the embedding.
    """

    tokenizer: Any
    parts: tuple[int | str, ...]
    video: int
    rewards: tuple[int, ...]
    vocabulary: int

    def ids(self, prompt: str, visual: int) -> list[int]:
        """Token ids for a video of `visual` tokens. A special token's name in the prompt is only
        text.
        """
        ids: list[int] = []
        for part in self.parts:
            if isinstance(part, int):
                ids += [part] * (visual if part == self.video else 1)
            else:
                text = part.replace(_CAPTION, prompt)
                plain = {"add_special_tokens": False, "split_special_tokens": True}
                ids += self.tokenizer(text, **plain).input_ids
        return ids


def read_request(folder: Path, prompt: str) -> RequestTokens:
    """The request around a video and a prompt (`read_prompt`).

    Args:
        folder: With the tokenizer and its chat template.
        prompt: VideoAlign's.

    Raises:
        ValueError: No readable tokenizer, no chat template that takes a video before the text, or
            no reward tokens.
    """
    key = f"{KEY}.model"
    message = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": prompt}]}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        whole = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{key}: expected a readable tokenizer with a chat template in {folder}, got {error}"
        ) from error
    special = {str(token): number for number, token in tokenizer.added_tokens_decoder.items()}
    missing = [token for token in (_VIDEO, *REWARD_TOKENS) if token not in special]
    if missing:
        raise UserError(
            f"{key}: expected a tokenizer with {', '.join(missing)}, in {folder}, "
            f"got {len(special)} special tokens"
        )
    names = "|".join(re.escape(name) for name in sorted(special, key=len, reverse=True))
    pieces: list[str] = re.split(f"({names})", whole)
    parts = tuple(special.get(piece, piece) for piece in pieces if piece)
    marks = tuple(special[token] for token in (_VIDEO, *REWARD_TOKENS))
    if tuple(part for part in parts if part in marks) != marks:
        raise UserError(
            f"{key}: expected a chat template in {folder} that writes {_VIDEO}, then the text, "
            f"got {whole[:200]!r}"
        )
    return RequestTokens(tokenizer, parts, marks[0], marks[1:], len(tokenizer))


def checkpoint_of(folder: Path) -> Path:
    """The folder checkpoint-N with the largest N.

    Raises:
        FileNotFoundError: There is none.
    """
    paths = {path.name.removeprefix("checkpoint-"): path for path in folder.glob("checkpoint-*")}
    numbers = [number for number in paths if number.isdigit()]
    if not numbers:
        raise FileNotFoundError(
            f"{KEY}.model: expected a folder checkpoint-N in {folder}, found none"
        )
    return paths[max(numbers, key=int)]


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of a checkpoint-N (model.safetensors, or model.pth as published).

    Returns:
        Name in Qwen2VLModel -> tensor on the CPU. `rm_head.weight` is the reward's head;
        X.lora_A.weight and X.lora_B.weight stand beside X.weight.

    Raises:
        FileNotFoundError: Neither file.
        ValueError: Unreadable, or something else than tensors in it.
    """
    for name in ("model.safetensors", "model.pth"):
        if (folder / name).is_file():
            stored = read_tensors(folder / name, f"{KEY}.model", mmap=True)
            return {_renamed(name): value for name, value in stored.items()}
    raise FileNotFoundError(
        f"{KEY}.model: expected model.pth, or model.safetensors, in {folder}, found neither"
    )


def _renamed(name: str) -> str:
    """transformers 4.45 had the language model at `model` and the vision tower at `visual`; peft
    wraps both.
    """
    name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    name = name.replace(".default.weight", ".weight")
    if name.startswith(("model.visual.", "model.language_model.")):
        return name.removeprefix("model.")
    return re.sub(r"^model\.", "language_model.", name)


def check_weights(
    weights: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], rank: int
) -> None:
    """Check that all tensors of the model, the head and the LoRA are there and nothing else.

    LoRA of that rank stands beside each linear layer of the language model; a checkpoint in which
    it was merged has none at all.

    Args:
        weights: As `read_weights` gives them.
        shapes: Of the model's own tensors.
        rank: Of the LoRA.

    Raises:
        ValueError: A tensor is missing, has another shape, or is not known.
    """
    needed = dict(shapes)
    if any(".lora_" in name for name in weights):
        for name, shape in shapes.items():
            if name.startswith("language_model.layers.") and len(shape) == 2:
                layer = name.removesuffix(".weight")
                needed[f"{layer}.lora_A.weight"] = torch.Size((rank, shape[1]))
                needed[f"{layer}.lora_B.weight"] = torch.Size((shape[0], rank))
    hidden = shapes["language_model.embed_tokens.weight"][1]
    head, three = weights.get("rm_head.weight"), torch.Size((len(REWARD_TOKENS), hidden))
    is_three = head is not None and head.shape == three
    needed["rm_head.weight"] = three if is_three else torch.Size((1, hidden))
    # The base's own head, for words, is not used.
    unknown = weights.keys() - needed.keys() - {"lm_head.weight"}
    problems = [f"no {name}" for name in sorted(needed.keys() - weights.keys())]
    problems += [f"an unknown {name}" for name in sorted(unknown)]
    for name in sorted(needed.keys() & weights.keys()):
        found = weights[name].shape
        if found != needed[name]:
            problems.append(f"{name} of {list(found)} instead of {list(needed[name])}")
    if problems:
        raise UserError(
            f"{KEY}.model: expected the weights of a VideoAlign, got {len(problems)} problems: "
            f"{', '.join(problems[:3])}"
        )


def merge(
    weights: Mapping[str, Tensor], names: Iterable[str], scale: float, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The named tensors in `dtype`; where LoRA stands beside one, W + scale B A, computed in
    float32 and rounded once.
    """
    merged = {}
    for name in names:
        weight, layer = weights[name], name.removesuffix(".weight")
        a, b = (weights.get(f"{layer}.lora_{which}.weight") for which in "AB")
        if a is not None and b is not None:
            weight = weight.float() + scale * (b.float() @ a.float())
        merged[name] = weight.to(dtype)
    return merged
