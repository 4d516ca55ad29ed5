"""Qwen2.5-VL in this process (transformers): each video is seen once, however many questions are
asked about it.

The vision tower and the language model's keys and values of a video's tokens are computed once;
the questions of all videos of one size are a batch over them. Tokens are those of `generate`
with the model's chat, do_sample=False and no repetition penalty.

Run on CPUs only so far, with a tiny model in the published format; neither on a GPU nor with the
published weights.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from fastgrpo.hub import fetch_files, require_weights
from fastgrpo.rewards.vlm import qwen_windows
from fastgrpo.rewards.vlm.engine import Clip, Decoding, Reply
from fastgrpo.rewards.vlm.qwen_prefix import Prefix, answer, see
from fastgrpo.rewards.vlm.qwen_chat import NUMBERS, ChatTokens, read_chat

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_CONFIG_FILES = ("*.json", "*.txt", "*.jinja")
_WEIGHT_FILES = (*_CONFIG_FILES, "*.safetensors")
_LONGEST = max(map(len, NUMBERS))


class TransformersEngine:
    """Qwen2.5-VL of transformers as a judge's engine (`engine.Engine`).

    A greedy reply does not depend on the other clips but by the rounding of another batch size,
    which in bf16 can turn a near tie. A sampled one is decided by the seed, the clip and the
    question.

    Args:
        model: a folder in transformers' format, or a hub id such as Qwen/Qwen2.5-VL-7B-Instruct.
            revision: branch, tag or commit, for a hub id. device: where it runs: "shared" for
            the trainer's own, else "cuda:1", "cpu" and the like. dtype: of weights and
            arithmetic. batch_size: videos of one size that are computed together; each question
            of a batch takes a copy of its video's keys and values. prefix_cache: videos whose
            keys and values are kept after `ask`, the latest used ones, for questions that come
            one after the other. attention: of transformers: sdpa, eager, flash_attention_2 and
            so on.
    """

    def __init__(
        self,
        model: str,
        revision: str | None = None,
        device: str = "shared",
        dtype: Literal["bf16", "fp32"] = "bf16",
        batch_size: int = 16,
        prefix_cache: int = 0,
        attention: str = "sdpa",
    ) -> None:
        for key, ok, expected, got in (
            ("dtype", dtype in DTYPES, f"one of {', '.join(DTYPES)}", dtype),
            (
                "device",
                device == "shared" or _is_device(device),
                "shared or a device of torch",
                device,
            ),
            ("batch_size", batch_size >= 1, "at least 1", batch_size),
            ("prefix_cache", prefix_cache >= 0, "at least 0", prefix_cache),
        ):
            if not ok:
                raise ValueError(f"reward.engine.{key}: expected {expected}, got {got!r}")
        self.model, self.revision, self.device, self.attention = model, revision, device, attention
        self.dtype, self.batch_size, self.prefix_cache = dtype, batch_size, prefix_cache
        self.loaded: tuple[Any, ChatTokens, torch.device] | None = None
        self._kept: OrderedDict[bytes, Prefix] = OrderedDict()
        self._counts: Counter[str] = Counter()

    # -------- the model

    def load(self, device: torch.device) -> None:
        """Load the model; `device` is the trainer's. What is not right is said before a weight is
        read.

        Raises:
            FileNotFoundError: no such model, or files of it are missing. ValueError: refused by
                the hub, another model, unreadable.
        """
        config = self._config
        chat = read_chat(self._folder)
        known = config.text_config.vocab_size
        self._expect(
            config.video_token_id == chat.video,
            f"video_token_id {chat.video}, the tokenizer's",
            config.video_token_id,
        )
        self._expect(
            max(chat.characters) < known,
            f"a vocabulary with the tokenizer's digits {chat.characters}",
            known,
        )
        own = device if self.device == "shared" else torch.device(self.device)
        if own.type == "cuda" and (own.index or 0) >= torch.cuda.device_count():
            raise ValueError(
                f"reward.engine.device: expected one of {torch.cuda.device_count()} GPUs, got {self.device!r}"
            )
        folder = fetch_files(
            self.model, self.revision, _WEIGHT_FILES, "reward.engine", "transformers"
        )
        require_weights(folder, "reward.engine")
        try:
            module, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
                folder,
                dtype=DTYPES[self.dtype],
                attn_implementation=self.attention,
                output_loading_info=True,
                local_files_only=True,
                device_map={
                    "": own
                },  # straight there: eight ranks' copies in the host's memory would be 130 GB
            )
        except torch.OutOfMemoryError:
            raise
        except (OSError, RuntimeError, ValueError, ImportError, SafetensorError) as error:
            raise ValueError(
                f"reward.engine.model: expected a readable Qwen2.5-VL in {folder}, got {error}"
            ) from error
        for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            self._expect(
                not info[key],
                "the tensors of its configuration",
                f"{key.split('_')[0]} {sorted(map(str, info[key]))[:3]}",
            )
        self.adopt(module, chat, own)

    def adopt(self, module: Any, chat: ChatTokens, device: torch.device) -> None:
        """Take a model that was made elsewhere (a benchmark's, with random weights), as `load`
        takes the one of the files.
        """
        if self.attention == "sdpa":
            module.model.visual.config._attn_implementation = qwen_windows.NAME
        self.loaded = (module.to(device).eval().requires_grad_(False), chat, device)
        self._kept.clear()

    def close(self) -> None:
        """Let go of the model and of what is kept of videos."""
        self.loaded = None
        self._kept.clear()

    @property
    def memory_bytes(self) -> int:
        """Bytes of the weights where they share the trainer's GPU, else 0; from config.json alone."""
        return self._weight_bytes if self.device == "shared" else 0

    @cached_property
    def _weight_bytes(self) -> int:
        with torch.device("meta"):
            module = Qwen2_5_VLForConditionalGeneration(self._config)
        return sum(p.numel() for p in module.parameters()) * DTYPES[self.dtype].itemsize

    @cached_property
    def _folder(self) -> Path:
        return fetch_files(
            self.model, self.revision, _CONFIG_FILES, "reward.engine", "transformers"
        )

    @cached_property
    def _config(self) -> Any:
        """Of config.json. FileNotFoundError: there is none. ValueError: unreadable, or of another
        model.
        """
        path = self._folder / "config.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"reward.engine.model: expected a model in transformers' format, found no {path}"
            ) from error
        except ValueError as error:
            raise ValueError(
                f"reward.engine.model: expected JSON in {path}, got {error}"
            ) from error
        kind = content.get("model_type") if isinstance(content, dict) else type(content).__name__
        self._expect(
            kind == Qwen2_5_VLConfig.model_type, f"model_type {Qwen2_5_VLConfig.model_type}", kind
        )
        try:
            return Qwen2_5_VLConfig.from_dict(content)
        except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
            raise ValueError(
                f"reward.engine.model: expected a configuration of Qwen2.5-VL, in {path}, got {error}"
            ) from error

    def _expect(self, ok: bool, wanted: str, got: object) -> None:
        if not ok:
            raise ValueError(
                f"reward.engine.model: expected {wanted}, in {self._folder}, got {got}"
            )

    def describe(self) -> dict[str, Any]:
        """Model, revision, the hub's commit where it got from there, hash of config.json,
        precision, attention, transformers' version.
        """
        config = (self._folder / "config.json").read_bytes()
        return {
            "engine": "transformers",
            "model": self.model,
            "revision": self.revision,
            "commit": None if Path(self.model).expanduser().is_dir() else self._folder.name,
            "config_sha256": hashlib.sha256(config).hexdigest(),
            "dtype": self.dtype,
            "attention": self.attention,
            "transformers": transformers.__version__,
        }

    @property
    def concurrency(self) -> int:
        """One call at a time: the model fills its device."""
        return 1

    def counters(self) -> dict[str, int]:
        """Since the last call: videos through the vision tower, videos through the language model,
        questions answered.
        """
        counts, self._counts = self._counts, Counter()
        return {name: counts[name] for name in ("vision_passes", "prefix_passes", "requests")}

    def last_errors(self) -> dict[str, str]:
        """None: what goes wrong in this process is raised."""
        return {}

    # -------- answers

    @torch.no_grad()
    def ask(
        self, clips: Sequence[Clip], questions: Sequence[Sequence[str]], decoding: Decoding
    ) -> list[list[Reply]]:
        """A reply to each question about each clip, in the order given; a request that is too long
        for the model gets an error instead.

        Raises:
            RuntimeError: not loaded. ValueError: other numbers of clips and rows of questions;
                max_tokens too few for a number.
        """
        if self.loaded is None:
            raise RuntimeError("expected load() before ask()")
        if len(clips) != len(questions):
            raise ValueError(
                f"expected a row of questions a clip, got {len(questions)} rows for {len(clips)} clips"
            )
        if decoding.max_tokens < (_LONGEST if decoding.constrained else 1):
            raise ValueError(
                f"max_tokens: expected at least {_LONGEST} for a number, 1 for other answers, got {decoding.max_tokens}"
            )
        sizes: dict[tuple[int, ...], list[int]] = {}
        for index, clip in enumerate(clips):
            if questions[index]:
                sizes.setdefault(tuple(clip.frames.shape), []).append(index)
        replies: list[list[Reply]] = [[] for _ in clips]
        with torch.autocast(
            self.loaded[2].type, enabled=False
        ):  # the trainer's, which would change the arithmetic
            for same in sizes.values():
                for batch in (
                    same[i : i + self.batch_size] for i in range(0, len(same), self.batch_size)
                ):
                    answers = self._ask_batch(
                        [clips[i] for i in batch], [questions[i] for i in batch], decoding
                    )
                    for index, row in zip(batch, answers, strict=True):
                        replies[index] = row
        return replies

    def _ask_batch(
        self, clips: list[Clip], questions: list[Sequence[str]], decoding: Decoding
    ) -> list[list[Reply]]:
        """The same, of clips of one size."""
        assert self.loaded is not None
        module, chat, device = self.loaded
        digests = (
            [_digest(clip) for clip in clips]
            if self.prefix_cache or decoding.temperature
            else [b""] * len(clips)
        )
        ids = [[chat.question(text) for text in row] for row in questions]
        visual = clips[0].frames[:, 0].numel() // (2 * 28 * 28)
        room = (
            module.config.text_config.max_position_embeddings
            - len(chat.before)
            - visual
            - len(chat.after)
            - decoding.max_tokens
        )
        short = [
            (b, k)
            for b, row in enumerate(ids)
            for k, question in enumerate(row)
            if len(question) <= room
        ]
        replies = [
            [
                Reply(
                    error=f"expected at most {room} tokens of a question after {visual} of a video, got {len(q)}"
                )
                for q in row
            ]
            for row in ids
        ]
        if not short:
            return replies
        prefixes = self._prefixes(clips, digests)
        uniform = torch.stack(
            [_uniform(decoding, digests[b], questions[b][k]) for b, k in short]
        ).to(device)
        answers = answer(
            module,
            chat,
            [prefixes[b] for b, _ in short],
            [ids[b][k] for b, k in short],
            decoding,
            uniform,
        )
        for (b, k), reply in zip(short, answers, strict=True):
            replies[b][k] = reply
        self._counts["requests"] += len(short)
        return replies

    def _prefixes(self, clips: list[Clip], digests: list[bytes]) -> list[Prefix]:
        """Of clips of one size; those that are kept are not computed again."""
        assert self.loaded is not None
        module, chat, device = self.loaded
        new = [i for i in range(len(clips)) if not (self.prefix_cache and digests[i] in self._kept)]
        found = {i: self._kept[digests[i]] for i in range(len(clips)) if i not in new}
        if new:
            seen = see(module, chat, [clips[i] for i in new], device)
            found |= dict(zip(new, seen, strict=True))
            self._counts.update(vision_passes=len(new), prefix_passes=len(new))
            for i in (
                new if self.prefix_cache else ()
            ):  # clones: a view of one video would keep its whole batch
                layers = tuple((keys.clone(), values.clone()) for keys, values in found[i].layers)
                self._kept[digests[i]] = replace(found[i], layers=layers)
        for digest in digests if self.prefix_cache else ():
            self._kept.move_to_end(digest)
        while len(self._kept) > self.prefix_cache:
            self._kept.popitem(last=False)
        return [found[i] for i in range(len(clips))]


def _is_device(name: str) -> bool:
    try:
        torch.device(name)
    except RuntimeError:
        return False
    return True


def _uniform(decoding: Decoding, digest: bytes, question: str) -> Tensor:
    """[max_tokens] float64 in [0, 1): of the seed, the clip and the question, and of nothing else."""
    key = hashlib.blake2b(
        digest + question.encode(), key=str(decoding.seed).encode(), digest_size=8
    ).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key, "big") >> 1)
    return torch.rand(decoding.max_tokens, dtype=torch.float64, generator=generator)


def _digest(clip: Clip) -> bytes:
    """Of a clip's pixels, size and rate."""
    pixels = clip.frames.cpu().contiguous().numpy()
    return hashlib.blake2b(
        pixels.tobytes() + repr((pixels.shape, clip.fps)).encode(), digest_size=16
    ).digest()
