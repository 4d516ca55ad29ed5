"""Qwen2.5-VL on TensorRT-LLM's LLM API (PyTorch backend), as an engine for `serve_judge`.

NOT RUN: TensorRT-LLM needs a GPU and pins its own torch. Every name is as in NVIDIA's sources and
examples of 1.0 to 1.3, whose support matrix lists Qwen2.5-VL with video and KV-cache reuse. The
tests call a fake of those signatures; what it hands to transformers' processor, they hand to the
real one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from fastgrpo.errors import require
from fastgrpo.rewards.vlm.answers import NUMBER
from fastgrpo.rewards.vlm.engine import Clip, Decoding, Engine, Reply
from fastgrpo.rewards.vlm.questions import without_special_tokens

DIGITS = "0123456789"
CHARACTERS = f"{DIGITS}."


@dataclass(eq=False)
class TensorRTLLMEngine(Engine):
    """Qwen2.5-VL on TensorRT-LLM (`engine.Engine`).

    Questions about one clip share its keys and values by KV-cache block reuse. A constrained
    answer comes from guided decoding. With probabilities the number is written here instead, one
    place per call and the likeliest one whatever the temperature, from the model's logits before
    any constraint: guided decoding may change the logits that TensorRT-LLM gives back. Every such
    call finds the clip in the cache.

    Args:
        model: A folder in transformers' format, or a hub id.
        revision: Branch, tag or commit, for a hub id.
        tensor_parallel: GPUs that share the model; 4 of 80 GB for 72B.
        kv_cache_fraction: Share of the GPU memory that the weights leave, for keys and values.
    """

    model: str
    revision: str | None = None
    tensor_parallel: int = 1
    kv_cache_fraction: float = 0.6

    def load(self, device: torch.device) -> None:
        """Load the model onto the first `tensor_parallel` visible GPUs; `device` is not used.

        Raises:
            ImportError: No TensorRT-LLM.
            UserError: A tokenizer in which a digit is more than one token.
        """
        from tensorrt_llm import LLM
        from tensorrt_llm.llmapi import KvCacheConfig

        self._llm: Any = LLM(
            model=self.model,
            revision=self.revision,
            tensor_parallel_size=self.tensor_parallel,
            guided_decoding_backend="xgrammar",
            kv_cache_config=KvCacheConfig(
                enable_block_reuse=True, free_gpu_memory_fraction=self.kv_cache_fraction
            ),
        )
        encode = self._llm.tokenizer.encode
        self._ids = [encode(character, add_special_tokens=False) for character in CHARACTERS]
        single = all(len(ids) == 1 for ids in self._ids)
        require(single, "model", f"one token for each of {CHARACTERS}", self._ids)

    def ask(
        self, clips: Sequence[Clip], questions: Sequence[Sequence[str]], decoding: Decoding
    ) -> list[list[Reply]]:
        """A reply to each question about each clip, in the order given; at least one question."""
        asked = []
        for video, row in zip(map(video_input, clips), questions, strict=True):
            for question in row:
                # The rendered chat is tokenized together with its special tokens. What spells none
                # of them is asked word for word, as other engines do.
                names = self._llm.tokenizer.get_added_vocab()
                spelt = any(name in question for name in names)
                text = without_special_tokens(question) if spelt else question
                parts = [{"type": "video"}, {"type": "text", "text": text}]
                chat = [{"role": "user", "content": parts}]
                prompt = self._llm.tokenizer.apply_chat_template(
                    chat, tokenize=False, add_generation_prompt=True
                )
                asked.append({"prompt": prompt} | video)
        written = self._write(asked) if decoding.probabilities else self._generate(asked, decoding)
        replies = iter(written)
        return [[next(replies) for _ in row] for row in questions]

    def describe(self) -> dict[str, Any]:
        """TensorRT-LLM's version, model, revision."""
        import tensorrt_llm

        version = tensorrt_llm.__version__
        return {"tensorrt_llm": version, "model": self.model, "revision": self.revision}

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
        made = self._llm.generate(asked, sampling_params=params, use_tqdm=False)
        outputs = [one.outputs[0] for one in made]
        return [Reply(output.text, cut=output.finish_reason != "stop") for output in outputs]

    def _write(self, asked: list[dict[str, Any]]) -> list[Reply]:
        """The likeliest numbers, with the probabilities of the digits in their places."""

        first = self._places(asked, [""] * len(asked))
        after_one = self._places(asked, ["1"] * len(asked))
        digits: list[list[dict[str, float]]] = [[place] for place in first]
        texts = []
        for i, place in enumerate(first):
            digit = max(DIGITS[1:], key=place.__getitem__)
            # Only "." can follow another digit than 1.
            digits[i].append(after_one[i] if digit == "1" else {})
            ten = digit == "1" and after_one[i]["0"] >= after_one[i]["."]
            texts.append("10.00" if ten else f"{digit}.")
        for _ in range(2):
            for i, place in enumerate(self._places(asked, texts)):
                ten = texts[i] == "10.00"
                texts[i] += "" if ten else max(DIGITS, key=place.__getitem__)
                digits[i].append({} if ten else place)
        replies = []
        for text, places, one in zip(texts, digits, after_one, strict=True):
            only_digits = [{c: p for c, p in place.items() if c != "."} for place in places]
            only_digits += [{}] * (len(text) - len(places))
            replies.append(Reply(text, tuple(only_digits), one["0"]))
        return replies

    def _places(self, asked: list[dict[str, Any]], begun: list[str]) -> list[dict[str, float]]:
        """Probabilities of the digits and "." as the next token of answers that began so."""
        from tensorrt_llm import SamplingParams

        inputs = [
            one | {"prompt": one["prompt"] + text} for one, text in zip(asked, begun, strict=True)
        ]
        params = SamplingParams(max_tokens=1, temperature=0.0, return_generation_logits=True)
        outputs = self._llm.generate(inputs, sampling_params=params, use_tqdm=False)
        # generation_logits: [tokens, vocabulary]
        chances = [one.outputs[0].generation_logits[0].double().softmax(-1) for one in outputs]
        return [
            {c: float(one[ids[0]]) for c, ids in zip(CHARACTERS, self._ids, strict=True)}
            for one in chances
        ]


def video_input(clip: Clip) -> dict[str, Any]:
    """The fields of a request's input that carry a clip, whose frames are taken as they are.

    TensorRT-LLM hands the frames and `mm_processor_kwargs`, and nothing else, to transformers'
    processor. transformers 5 reads the rate from `video_metadata`, 4 from `fps`.
    """
    from tensorrt_llm.inputs.utils import VideoData

    count, fps = len(clip.frames), clip.fps
    frames = [Image.fromarray(f.numpy()) for f in clip.frames.permute(0, 2, 3, 1).contiguous()]
    metadata: dict[str, Any] = {"total_num_frames": count, "frames_indices": list(range(count))}
    metadata |= {"fps": fps, "duration": count / fps}
    return {
        "multi_modal_data": {"video": [VideoData(frames=frames, metadata=metadata)]},
        "mm_processor_kwargs": {
            "fps": fps,
            "do_sample_frames": False,
            "video_metadata": [metadata],
        },
    }
