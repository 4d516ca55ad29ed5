"""Qwen2.5-VL in this process (transformers): each video is computed once, however many questions
are asked about it.

The vision tower, and the language model's keys and values of a video's tokens, are computed once;
the questions of all videos of one size are a batch over them. Tokens are those of `generate` with
the model's chat, do_sample=False and no repetition penalty.

Run on CPUs only so far, with a tiny model in the published format; neither on a GPU nor with the
published weights.
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from fastgrpo.errors import UserError, require
from fastgrpo.hub import fetch_files, require_weights
from fastgrpo.rewards.published import hub_commit, read_config
from fastgrpo.rewards.vlm import qwen_memory, qwen_windows
from fastgrpo.rewards.vlm.engine import Clip, Decoding, Engine, Reply
from fastgrpo.rewards.vlm.qwen_chat import NUMBERS, ChatTokens, read_chat
from fastgrpo.rewards.vlm.qwen_prefix import Prefix, answer, compute_prefixes

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_KEY = "reward.engine"
_CONFIG_FILES = ("*.json", "*.txt", "*.jinja")
_WEIGHT_FILES = (*_CONFIG_FILES, "*.safetensors")
_LONGEST = max(map(len, NUMBERS))


class TransformersEngine(Engine):
    """Qwen2.5-VL of transformers as a judge's engine.

    A greedy reply depends on the other clips only by the rounding of another batch size, which in
    bf16 can turn a near tie. A sampled reply is decided by the seed, the clip and the question.

    Args:
        model: A folder in transformers' format, or a hub id such as Qwen/Qwen2.5-VL-7B-Instruct.
        revision: Branch, tag or commit, for a hub id.
        device: Where it runs: "shared" for the trainer's own, else "cuda:1", "cpu" and the like.
        dtype: Of weights and arithmetic.
        batch_size: Videos of one size that are computed together; each question of a batch takes a
            copy of its video's keys and values.
        prefix_cache: Videos whose keys and values are kept after `ask`, the latest used ones, for
            questions that come one after the other.
        attention: Of transformers: sdpa, eager, flash_attention_2 and so on.
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
        require(dtype in DTYPES, f"{_KEY}.dtype", f"one of {', '.join(DTYPES)}", dtype)
        require(_is_device(device), f"{_KEY}.device", "shared or a device of torch", device)
        require(batch_size >= 1, f"{_KEY}.batch_size", "at least 1", batch_size)
        require(prefix_cache >= 0, f"{_KEY}.prefix_cache", "at least 0", prefix_cache)
        self.model, self.revision, self.device, self.attention = model, revision, device, attention
        self.dtype, self.batch_size, self.prefix_cache = dtype, batch_size, prefix_cache
        self.loaded: tuple[Any, ChatTokens, torch.device] | None = None
        self._kept: OrderedDict[bytes, Prefix] = OrderedDict()
        self._counts: Counter[str] = Counter()

    def load(self, device: torch.device) -> None:
        """Load the model; `device` is the trainer's. What is wrong is said before a weight is read.

        Raises:
            FileNotFoundError: The model, or files of it, are missing.
            ValueError: Refused by the hub, another model, or unreadable.
        """
        config, chat = self._config, read_chat(self._folder)
        known, found = config.text_config.vocab_size, config.video_token_id
        self._expect(found == chat.video, f"video_token_id {chat.video}, the tokenizer's", found)
        expected = f"a vocabulary with the tokenizer's digits {chat.characters}"
        self._expect(max(chat.characters) < known, expected, known)
        own = device if self.device == "shared" else torch.device(self.device)
        gpus = torch.cuda.device_count()
        present = own.type != "cuda" or (own.index or 0) < gpus
        require(present, f"{_KEY}.device", f"one of {gpus} GPUs", self.device)
        folder = fetch_files(self.model, self.revision, _WEIGHT_FILES, _KEY, "transformers")
        require_weights(folder, _KEY)
        try:
            module, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
                folder,
                dtype=DTYPES[self.dtype],
                attn_implementation=self.attention,
                output_loading_info=True,
                local_files_only=True,
                use_safetensors=True,  # never a pickle beside them
                # Straight there: eight ranks' copies in the host's memory would be 130 GB.
                device_map={"": own},
            )
        except torch.OutOfMemoryError:
            raise
        except (OSError, RuntimeError, ValueError, ImportError, SafetensorError) as error:
            raise UserError(
                f"{_KEY}.model: expected a readable Qwen2.5-VL in {folder}, got {error}"
            ) from error
        for key in ("missing", "unexpected", "mismatched"):
            names = sorted(map(str, info[f"{key}_keys"]))
            self._expect(not names, "the tensors of its configuration", f"{key} {names[:3]}")
        self.adopt(module, chat, own)

    def adopt(self, module: Any, chat: ChatTokens, device: torch.device) -> None:
        """Take a model that was made elsewhere, such as a benchmark's with random weights."""
        if self.attention == "sdpa":
            module.model.visual.config._attn_implementation = qwen_windows.NAME
        self.loaded = (module.to(device).eval().requires_grad_(False), chat, device)
        self._kept.clear()

    def close(self) -> None:
        """Let go of the model and of what is kept of videos."""
        self.loaded = None
        self._kept.clear()

    @cached_property
    def memory_bytes(self) -> int:  # type: ignore[override]  # an attribute of the base
        """Bytes of the weights if they share the trainer's GPU, else 0; from config.json alone."""
        if self.device != "shared":
            return 0
        with torch.device("meta"):
            module = Qwen2_5_VLForConditionalGeneration(self._config)
        return sum(p.numel() for p in module.parameters()) * DTYPES[self.dtype].itemsize

    def working_bytes(self, clips: Sequence[Clip], num_questions: int) -> float:
        """As `Engine.working_bytes`, with the keys and values that `prefix_cache` keeps."""
        if self.device != "shared":
            return 0
        patches = clips[0].frames[:, 0].numel() // (2 * 14 * 14)
        batch = min(len(clips), self.batch_size)
        sizes = self._config, DTYPES[self.dtype].itemsize
        kept = self.prefix_cache * qwen_memory.prefix_bytes(*sizes, patches)
        return kept + qwen_memory.judge_bytes(*sizes, batch, patches, num_questions)

    @cached_property
    def _folder(self) -> Path:
        return fetch_files(self.model, self.revision, _CONFIG_FILES, _KEY, "transformers")

    @cached_property
    def _config(self) -> Any:
        return read_config(self._folder, (Qwen2_5_VLConfig,), f"{_KEY}.model")

    def _expect(self, ok: bool, expected: str, got: object) -> None:
        require(ok, f"{_KEY}.model", f"{expected}, in {self._folder}", got)

    def describe(self) -> dict[str, Any]:
        """Model, revision, the hub's commit if it came from there, hash of config.json, precision,
        attention, transformers' version.
        """
        config = (self._folder / "config.json").read_bytes()
        return {
            "engine": "transformers",
            "model": self.model,
            "revision": self.revision,
            "commit": hub_commit(self.model, self._folder),
            "config_sha256": hashlib.sha256(config).hexdigest(),
            "dtype": self.dtype,
            "attention": self.attention,
            "transformers": transformers.__version__,
        }

    def counters(self) -> dict[str, int]:
        """Since the last call: videos through the vision tower, videos through the language model,
        questions answered.
        """
        counts, self._counts = self._counts, Counter()
        return {name: counts[name] for name in ("vision_passes", "prefix_passes", "requests")}

    @torch.no_grad()
    def ask(
        self, clips: Sequence[Clip], questions: Sequence[Sequence[str]], decoding: Decoding
    ) -> list[list[Reply]]:
        """Ask each clip's own questions about it; a request that is too long for the model gets an
        error instead of an answer.

        Raises:
            ValueError: max_tokens is too small for a number.
        """
        assert self.loaded is not None, "load() comes before ask()"
        least = _LONGEST if decoding.constrained else 1
        expected = f"at least {_LONGEST} for a number, 1 for other answers"
        require(decoding.max_tokens >= least, "max_tokens", expected, decoding.max_tokens)
        sizes: dict[tuple[int, ...], list[int]] = {}
        for index, (clip, row) in enumerate(zip(clips, questions, strict=True)):
            if row:
                sizes.setdefault(tuple(clip.frames.shape), []).append(index)
        replies: list[list[Reply]] = [[] for _ in clips]
        # Without the trainer's autocast, which would change the arithmetic.
        with torch.autocast(self.loaded[2].type, enabled=False):
            for same in sizes.values():
                for start in range(0, len(same), self.batch_size):
                    batch = same[start : start + self.batch_size]
                    answers = self._ask_batch(
                        [clips[i] for i in batch], [questions[i] for i in batch], decoding
                    )
                    for index, answered in zip(batch, answers, strict=True):
                        replies[index] = answered
        return replies

    def _ask_batch(
        self, clips: list[Clip], questions: list[Sequence[str]], decoding: Decoding
    ) -> list[list[Reply]]:
        """The same, of clips of one size."""
        assert self.loaded is not None
        module, chat, device = self.loaded
        digests = [b""] * len(clips)
        if self.prefix_cache or decoding.temperature:
            digests = [_digest(clip) for clip in clips]
        ids = [[chat.question(text) for text in row] for row in questions]
        visual = clips[0].frames[:, 0].numel() // (2 * 28 * 28)
        taken = len(chat.before) + visual + len(chat.after) + decoding.max_tokens
        room = module.config.text_config.max_position_embeddings - taken
        expected = f"expected at most {room} tokens of a question after {visual} of a video"
        replies = [[Reply(error=f"{expected}, got {len(q)}") for q in row] for row in ids]
        short = [(b, k) for b, row in enumerate(ids) for k, q in enumerate(row) if len(q) <= room]
        if not short:
            return replies
        prefixes = self._prefixes(clips, digests)
        uniform = [_uniform(decoding, digests[b], questions[b][k]) for b, k in short]
        answers = answer(
            module,
            chat,
            [prefixes[b] for b, _ in short],
            [ids[b][k] for b, k in short],
            decoding,
            torch.stack(uniform).to(device),
        )
        for (b, k), reply in zip(short, answers, strict=True):
            replies[b][k] = reply
        self._counts["requests"] += len(short)
        return replies

    def _prefixes(self, clips: list[Clip], digests: list[bytes]) -> list[Prefix]:
        """Prefixes of clips of one size; those that are kept are not computed again."""
        assert self.loaded is not None
        module, chat, device = self.loaded
        found = {i: self._kept[digest] for i, digest in enumerate(digests) if digest in self._kept}
        new = [i for i in range(len(clips)) if i not in found]
        if new:
            computed = compute_prefixes(module, chat, [clips[i] for i in new], device)
            found |= dict(zip(new, computed, strict=True))
            self._counts.update(vision_passes=len(new), prefix_passes=len(new))
        if self.prefix_cache:
            for i in new:  # clones: a view of one video would keep its whole batch
                layers = tuple((keys.clone(), values.clone()) for keys, values in found[i].layers)
                self._kept[digests[i]] = replace(found[i], layers=layers)
            for digest in digests:
                self._kept.move_to_end(digest)
            while len(self._kept) > self.prefix_cache:
                self._kept.popitem(last=False)
        return [found[i] for i in range(len(clips))]


def _is_device(name: str) -> bool:
    try:
        return name == "shared" or bool(torch.device(name))
    except RuntimeError:
        return False


def _uniform(decoding: Decoding, digest: bytes, question: str) -> Tensor:
    """[max_tokens] float64 in [0, 1), decided by the seed, the clip and the question alone."""
    text, seed = digest + question.encode(), str(decoding.seed).encode()
    key = hashlib.blake2b(text, key=seed, digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key, "big") >> 1)
    return torch.rand(decoding.max_tokens, dtype=torch.float64, generator=generator)


def _digest(clip: Clip) -> bytes:
    """Of a clip's pixels, size and rate."""
    pixels = clip.frames.cpu().contiguous().numpy()
    content = pixels.tobytes() + repr((pixels.shape, clip.fps)).encode()
    return hashlib.blake2b(content, digest_size=16).digest()
