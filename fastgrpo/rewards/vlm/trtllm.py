"""Qwen2.5-VL on TensorRT-LLM's LLM API (PyTorch backend), as an engine for `serve-judge`.

NOT RUN: TensorRT-LLM needs a GPU and pins a torch of its own, and was not to be had where this
was written. Every name is as in NVIDIA's sources, examples and tests of 1.0 to 1.3 (LLM,
SamplingParams, GuidedDecodingParams, KvCacheConfig, inputs.utils.VideoData; the support matrix
of 1.3 lists Qwen2.5-VL with video and KV-cache reuse), and the tests here call a fake of those
signatures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fastgrpo.rewards.vlm.answers import NUMBER
from fastgrpo.rewards.vlm.engine import Clip, Decoding, Reply

_DIGITS = "0123456789"
_LEAST = 1e-6  # of a first "1", below which what would follow it is not asked for


class TensorRTLLMEngine:
    """Qwen2.5-VL on TensorRT-LLM (engine.Engine).

    Questions about one clip share its keys and values by KV-cache block reuse. A constrained
    answer comes from guided decoding. With probabilities the number is written here instead, one
    place a call, from the model's logits before any constraint (guided decoding may change those
    that TensorRT-LLM gives back); every such call finds the clip in the cache.

    Args:
        model: a folder in transformers' format, or a hub id. revision: branch, tag or commit,
            for a hub id. tensor_parallel: GPUs that share the model; 4 of 80 GB for 72B.
            kv_cache_fraction: share of the GPU memory that the weights leave, for keys and
            values.
    """

    def __init__(
        self,
        model: str,
        revision: str | None = None,
        tensor_parallel: int = 1,
        kv_cache_fraction: float = 0.6,
    ) -> None:
        if tensor_parallel < 1:
            raise ValueError(f"tensor_parallel: expected at least 1, got {tensor_parallel}")
        if not 0 < kv_cache_fraction < 1:
            raise ValueError(
                f"kv_cache_fraction: expected a number in (0, 1), got {kv_cache_fraction}"
            )
        self.model, self.revision = model, revision
        self.tensor_parallel, self.kv_cache_fraction = tensor_parallel, kv_cache_fraction
        self._llm: Any = None
        self._characters: dict[str, int] = {}
        self._requests = 0

    def load(self, device: torch.device) -> None:
        """Load the model onto the first `tensor_parallel` visible GPUs; `device` is not used.

        Raises:
            ImportError: no TensorRT-LLM. ValueError: a tokenizer in which a digit is more than
                one token.
        """
        from tensorrt_llm import LLM
        from tensorrt_llm.llmapi import KvCacheConfig

        self._llm = LLM(
            model=self.model,
            revision=self.revision,
            tensor_parallel_size=self.tensor_parallel,
            guided_decoding_backend="xgrammar",
            kv_cache_config=KvCacheConfig(
                enable_block_reuse=True, free_gpu_memory_fraction=self.kv_cache_fraction
            ),
        )
        for character in f"{_DIGITS}.":
            ids = self._llm.tokenizer.encode(character, add_special_tokens=False)
            if len(ids) != 1:
                raise ValueError(
                    f"model: expected a tokenizer with one token for {character!r}, got {len(ids)}"
                )
            self._characters[character] = ids[0]

    def ask(
        self, clips: Sequence[Clip], questions: Sequence[Sequence[str]], decoding: Decoding
    ) -> list[list[Reply]]:
        """A reply to each question about each clip, in the order given.

        Raises:
            RuntimeError: not loaded. ValueError: other numbers of clips and rows of questions.
        """
        if self._llm is None:
            raise RuntimeError("expected load() before ask()")
        videos = [video_input(clip) for clip in clips]
        asked = [
            self._prompt(question) | video
            for video, row in zip(videos, questions, strict=True)
            for question in row
        ]
        self._requests += len(asked)
        write = self._write if decoding.probabilities else self._generate
        replies = iter(write(asked, decoding) if asked else [])
        return [[next(replies) for _ in row] for row in questions]

    def close(self) -> None:
        """End TensorRT-LLM's workers."""
        llm, self._llm = self._llm, None
        if llm is not None:
            llm.shutdown()

    def describe(self) -> dict[str, Any]:
        """Model, revision, precision, TensorRT-LLM's version."""
        import tensorrt_llm

        return {
            "engine": "tensorrt_llm",
            "model": self.model,
            "revision": self.revision,
            "tensor_parallel": self.tensor_parallel,
            "tensorrt_llm": tensorrt_llm.__version__,
        }

    @property
    def concurrency(self) -> int:
        """One call at a time; TensorRT-LLM batches the questions of a call."""
        return 1

    @property
    def memory_bytes(self) -> int:
        """0: it never shares the trainer's GPU."""
        return 0

    def counters(self) -> dict[str, int]:
        """Questions since the last call."""
        requests, self._requests = self._requests, 0
        return {"requests": requests}

    def last_errors(self) -> dict[str, str]:
        """None: what goes wrong in this process is raised."""
        return {}

    def _prompt(self, question: str) -> dict[str, Any]:
        parts = [{"type": "video"}, {"type": "text", "text": question}]
        messages = [{"role": "user", "content": parts}]
        return {
            "prompt": self._llm.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        }

    def _generate(self, asked: list[dict[str, Any]], decoding: Decoding) -> list[Reply]:
        """Answers as the model writes them, or within guided decoding."""
        from tensorrt_llm import SamplingParams
        from tensorrt_llm.llmapi import GuidedDecodingParams

        params = SamplingParams(
            max_tokens=decoding.max_tokens,
            temperature=decoding.temperature,  # 0 is greedy
            seed=decoding.seed,
            guided_decoding=GuidedDecodingParams(regex=NUMBER) if decoding.constrained else None,
        )
        outputs = self._llm.generate(asked, sampling_params=params, use_tqdm=False)
        return [
            Reply(text=output.outputs[0].text, cut=output.outputs[0].finish_reason == "length")
            for output in outputs
        ]

    def _write(self, asked: list[dict[str, Any]], decoding: Decoding) -> list[Reply]:
        """Numbers, greedily or by the seed, with the probabilities of the digits; a place that only
        "." or "0" can take has none.
        """
        draws = [
            torch.Generator().manual_seed(decoding.seed) for _ in asked
        ]  # of its own, so that the others do not matter

        def choose(i: int, place: dict[str, float], allowed: str) -> str:
            chances = torch.tensor([place[character] for character in allowed], dtype=torch.float64)
            if decoding.temperature == 0 or not chances.sum() > 0:
                return allowed[int(chances.argmax())]
            return allowed[
                int(torch.multinomial(chances ** (1 / decoding.temperature), 1, generator=draws[i]))
            ]

        first = self._places(asked, [""] * len(asked))
        texts = [choose(i, place, _DIGITS[1:]) for i, place in enumerate(first)]
        ones = [i for i, place in enumerate(first) if texts[i] == "1" or place["1"] >= _LEAST]
        after_one = dict(
            zip(ones, self._places([asked[i] for i in ones], ["1"] * len(ones)), strict=True)
        )
        digits: list[list[dict[str, float]]] = [[place] for place in first]
        for i, text in enumerate(texts):
            ten = text == "1" and choose(i, after_one[i], "0.") == "0"
            digits[i] += [after_one[i] if text == "1" else {}, *([{}, {}, {}] if ten else [])]
            texts[i] = "10.00" if ten else f"{text}."
        for _ in range(2):
            going = [i for i, text in enumerate(texts) if text != "10.00"]
            for i, place in zip(
                going,
                self._places([asked[i] for i in going], [texts[i] for i in going]),
                strict=True,
            ):
                texts[i] += choose(i, place, _DIGITS)
                digits[i].append(place)
        only_digits = [
            tuple({c: p for c, p in place.items() if c in _DIGITS} for place in places)
            for places in digits
        ]
        tens = [after_one[i]["0"] if i in after_one else 0.0 for i in range(len(asked))]
        return [
            Reply(text, places, ten)
            for text, places, ten in zip(texts, only_digits, tens, strict=True)
        ]

    def _places(self, asked: list[dict[str, Any]], begun: list[str]) -> list[dict[str, float]]:
        """The probabilities of the digits and of "." as next token of answers that have begun so."""
        from tensorrt_llm import SamplingParams

        if not asked:  # generate looks at the first
            return []
        inputs = [
            one | {"prompt": one["prompt"] + text} for one, text in zip(asked, begun, strict=True)
        ]
        params = SamplingParams(max_tokens=1, temperature=0.0, return_generation_logits=True)
        outputs = self._llm.generate(inputs, sampling_params=params, use_tqdm=False)
        logits: list[Tensor] = [
            output.outputs[0].generation_logits[0] for output in outputs
        ]  # of [tokens, vocabulary]
        chances = [one.double().softmax(-1) for one in logits]
        return [
            {character: float(one[number]) for character, number in self._characters.items()}
            for one in chances
        ]


def video_input(clip: Clip) -> dict[str, Any]:
    """The fields of a request's input that carry a clip, whose frames are taken as they are."""
    from tensorrt_llm.inputs.utils import VideoData

    count = len(clip.frames)
    frames = [
        Image.fromarray(frame.numpy())
        for frame in clip.frames.permute(0, 2, 3, 1).contiguous().cpu()
    ]
    metadata = {
        "total_num_frames": count,
        "fps": clip.fps,
        "duration": count / clip.fps,
        "frames_indices": list(range(count)),
    }
    return {
        "multi_modal_data": {"video": [VideoData(frames=frames, metadata=metadata)]},
        "mm_processor_kwargs": {"fps": clip.fps, "do_sample_frames": False},
    }
