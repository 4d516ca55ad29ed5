"""What VideoAlign publishes, on the hub as KwaiVGI/VideoReward, and how it is read: settings,
prompt, tokens and weights.

    model_config.json             settings of training and inference, mean and deviation of the scores
    checkpoint-11352/model.pth    all weights of Qwen2-VL-2B under their names of transformers 4.45, with LoRA beside them, not merged
    checkpoint-11352/tokenizer/   Qwen2-VL's tokenizer with the three reward tokens

The prompt lies in the code only (github.com/KwaiVGI/VideoAlign, prompt_template.py). Nothing
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
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

from fastgrpo.files import find_file

KEY = "reward.init_args"
REWARD_TOKENS = ("<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>")
_CAPTION = "{text_prompt}"
_VIDEO = "<|video_pad|>"


@dataclass(frozen=True)
class Published:
    """Settings of a checkpoint, from its model_config.json.

    base: hub id of the model it was made of. fps, max_pixels: of the sampled frames. lora_rank,
    lora_scale: of W + scale B A. mean, std: of the raw scores VQ, MQ, TA.
    """

    base: str
    fps: float
    max_pixels: int
    lora_rank: int
    lora_scale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def read_settings(folder: Path) -> Published:
    """The settings of a checkpoint's folder.

    Raises:
        FileNotFoundError: there are none. ValueError: unreadable, or of a model of another kind
            (other tokens, other frames).
    """
    path = folder / "model_config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        data, model, lora, scores = (
            content[name]
            for name in ("data_config", "model_config", "peft_lora_config", "inference_config")
        )
        for section, name, wanted in (
            (data, "prompt_template_type", "detailed_special"),
            (data, "sample_type", "uniform"),
            (data, "eval_dim", ["VQ", "MQ", "TA"]),
            (data, "num_frames", None),
            (model, "use_special_tokens", True),
            (lora, "lora_enable", True),
        ):
            if section.get(name) != wanted:
                raise ValueError(f"{name}: expected {wanted!r}, got {section.get(name)!r}")
        rank = lora["lora_r"]
        found = Published(
            base=model["model_name_or_path"],
            fps=float(data["fps"]),
            max_pixels=int(data["max_frame_pixels"]),
            lora_rank=rank,
            lora_scale=lora["lora_alpha"] / (math.sqrt(rank) if lora.get("use_rslora") else rank),
            mean=tuple(float(scores[f"{name}_mean"]) for name in ("VQ", "MQ", "TA")),  # type: ignore[arg-type]
            std=tuple(float(scores[f"{name}_std"]) for name in ("VQ", "MQ", "TA")),  # type: ignore[arg-type]
        )
        if not (
            found.fps > 0
            and found.max_pixels > 0
            and min(found.std) > 0
            and math.isfinite(sum(found.mean + found.std))
        ):
            raise ValueError(f"expected positive fps, max_frame_pixels and deviations, got {found}")
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{KEY}.model: expected a checkpoint of VideoAlign, found no {path}"
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f"{KEY}.model: expected the settings of a VideoAlign with reward tokens in {path}, got {what}"
        ) from error
    return found


def read_prompt(file: str | None) -> str:
    """The prompt: VideoAlign's prompt_template.py, which is parsed and not run, or a text file with
    the prompt alone.

    Raises:
        FileNotFoundError, ValueError: no such file, or no prompt in it; they say where to get
            it.
    """
    where = "it is prompt_template.py of github.com/KwaiVGI/VideoAlign, which the checkpoint does not hold"
    if file is None:
        raise ValueError(
            f"{KEY}.prompt_file: expected the file with the prompt that VideoAlign was trained with; {where}"
        )
    path = find_file(file, f"{KEY}.prompt_file")
    try:
        text = path.read_text(encoding="utf-8")
        texts = [text]
        if path.suffix == ".py":
            values = [node.value for node in ast.parse(text).body if isinstance(node, ast.Assign)]
            texts = [
                node.value
                for node in values
                if isinstance(node, ast.Constant) and isinstance(node.value, str)
            ]
    except (ValueError, SyntaxError) as error:  # of encoding, of Python
        raise ValueError(
            f"{KEY}.prompt_file: expected readable text in {path}, got {error}; {where}"
        ) from error
    found = [
        text for text in texts if all(text.count(mark) == 1 for mark in (*REWARD_TOKENS, _CAPTION))
    ]
    if len(found) != 1 or sorted(REWARD_TOKENS, key=found[0].index) != list(REWARD_TOKENS):
        wanted = f"{', '.join(REWARD_TOKENS)} in this order and {_CAPTION}, each once"
        raise ValueError(
            f"{KEY}.prompt_file: expected one text with {wanted}, in {path}, found {len(found)}; {where}"
        )
    return found[0]


@dataclass(frozen=True)
class RequestTokens:
    """A request as the model's chat template writes it: special tokens (ids), and the texts between
    them.

    video: the token that is repeated for each visual one. rewards: VQ, MQ, TA. vocabulary: rows
    of the embedding.
    """

    tokenizer: Any
    parts: tuple[int | str, ...]
    video: int
    rewards: tuple[int, ...]
    vocabulary: int

    def ids(self, caption: str, visual: int) -> list[int]:
        """Token ids for a video of `visual` tokens. A special token's name in the caption is only
        text.
        """
        ids: list[int] = []
        for part in self.parts:
            if isinstance(part, int):
                ids += [part] * (visual if part == self.video else 1)
            else:
                text = part.replace(_CAPTION, caption)
                ids += self.tokenizer(
                    text, add_special_tokens=False, split_special_tokens=True
                ).input_ids
        return ids


def read_request(folder: Path, prompt: str) -> RequestTokens:
    """The request around a video and a prompt (`read_prompt`), from a folder with the tokenizer and
    its chat template.

    Raises:
        ValueError: no readable tokenizer, no chat template that takes a video before the text,
            or no reward tokens.
    """
    message = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": prompt}]}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        whole = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{KEY}.model: expected a readable tokenizer with a chat template in {folder}, got {error}"
        ) from error
    special = {str(token): number for number, token in tokenizer.added_tokens_decoder.items()}
    missing = [token for token in (_VIDEO, *REWARD_TOKENS) if token not in special]
    if missing:
        raise ValueError(
            f"{KEY}.model: expected a tokenizer with {', '.join(missing)}, in {folder}, got {len(special)} special tokens"
        )
    names = "|".join(re.escape(name) for name in sorted(special, key=len, reverse=True))
    pieces: list[str] = re.split(f"({names})", whole)
    parts = tuple(special.get(piece, piece) for piece in pieces if piece)
    marks = (special[_VIDEO], *(special[token] for token in REWARD_TOKENS))
    if tuple(part for part in parts if part in marks) != marks:
        raise ValueError(
            f"{KEY}.model: expected a chat template in {folder} that writes {_VIDEO}, then the text, got {whole[:200]!r}"
        )
    return RequestTokens(tokenizer, parts, marks[0], marks[1:], len(tokenizer))


def checkpoint_of(folder: Path) -> Path:
    """The folder checkpoint-N with the largest N. FileNotFoundError: there is none."""
    found = [
        path
        for path in folder.glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdigit()
    ]
    if not found:
        raise FileNotFoundError(
            f"{KEY}.model: expected a folder checkpoint-N in {folder}, found none"
        )
    return max(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint-N (model.safetensors, or model.pth as published), on the CPU, by
    their names in Qwen2VLModel.

    `rm_head.weight` is the reward's head; X.lora_A.weight and X.lora_B.weight stand beside
    X.weight.

    Raises:
        FileNotFoundError: neither file. ValueError: unreadable, or something else than tensors
            in it.
    """
    path = next(
        (folder / name for name in ("model.safetensors", "model.pth") if (folder / name).is_file()),
        None,
    )
    if path is None:
        raise FileNotFoundError(
            f"{KEY}.model: expected model.pth, or model.safetensors, in {folder}, found neither"
        )
    try:
        stored = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        )
        if not isinstance(stored, Mapping) or not all(
            isinstance(value, Tensor) for value in stored.values()
        ):
            raise ValueError("no mapping of names to tensors")
    except Exception as error:  # whatever a damaged file brings about in zip, pickle or safetensors
        raise ValueError(
            f"{KEY}.model: expected readable weights in {path}, got {type(error).__name__}: {error}"
        ) from error
    return {_renamed(name): value for name, value in stored.items()}


def _renamed(name: str) -> str:
    """transformers 4.45 had the language model at `model` and the vision tower at `visual`; peft
    wraps both.
    """
    name = (
        name.removeprefix("base_model.model.")
        .replace(".base_layer.", ".")
        .replace(".default.weight", ".weight")
    )
    name = (
        name.removeprefix("model.")
        if name.startswith(("model.visual.", "model.language_model."))
        else name
    )
    return f"language_model.{name.removeprefix('model.')}" if name.startswith("model.") else name


def check_weights(
    weights: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], rank: int
) -> None:
    """ValueError: a tensor named in `shapes`, the head, or part of the LoRA is missing or has
    another shape; or a tensor is not known.

    LoRA of that rank stands beside each linear layer of the language model; a checkpoint in
    which it was merged has none at all.
    """
    needed = dict(shapes)
    if any(".lora_" in name for name in weights):
        for name, shape in shapes.items():
            if name.startswith("language_model.layers.") and len(shape) == 2:
                layer = name.removesuffix(".weight")
                needed |= {
                    f"{layer}.lora_A.weight": torch.Size((rank, shape[1])),
                    f"{layer}.lora_B.weight": torch.Size((shape[0], rank)),
                }
    hidden = shapes["language_model.embed_tokens.weight"][1]
    head, three = weights.get("rm_head.weight"), torch.Size((len(REWARD_TOKENS), hidden))
    needed["rm_head.weight"] = (
        three if head is not None and head.shape == three else torch.Size((1, hidden))
    )
    unknown = (
        weights.keys() - needed.keys() - {"lm_head.weight"}
    )  # the base's own head, for words, is not used
    problems = [f"no {name}" for name in sorted(needed.keys() - weights.keys())] + [
        f"an unknown {name}" for name in sorted(unknown)
    ]
    for name in sorted(needed.keys() & weights.keys()):
        if weights[name].shape != needed[name]:
            problems.append(
                f"{name} of {list(weights[name].shape)} instead of {list(needed[name])}"
            )
    if problems:
        raise ValueError(
            f"{KEY}.model: expected the weights of a VideoAlign, got {len(problems)} problems: {', '.join(problems[:3])}"
        )


def merge(
    weights: Mapping[str, Tensor], names: Iterable[str], scale: float, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The named tensors in dtype; where LoRA stands beside one, W + scale B A, computed in float32
    and rounded once.
    """

    def merged(name: str) -> Tensor:
        a, b = (
            weights.get(f"{name.removesuffix('.weight')}.lora_{which}.weight") for which in "AB"
        )
        if a is None or b is None:
            return weights[name].to(dtype)
        return (weights[name].float() + scale * (b.float() @ a.float())).to(dtype)

    return {name: merged(name) for name in names}
