"""TensorRT-LLM's engine against a fake of the signatures that NVIDIA publishes: what it passes, and
what it makes of what comes back.

The fake takes exactly the arguments of the real functions that are named here, and answers from
a table of logits by prompt.
"""

from __future__ import annotations

import math
import re
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from PIL import Image

from fastgrpo.rewards.vlm.answers import NUMBER, expected_answer
from fastgrpo.rewards.vlm.engine import Clip, Decoding
from fastgrpo.rewards.vlm.trtllm import TensorRTLLMEngine, video_input

VOCABULARY = [*"0123456789.", "ten", "<eos>"]


@dataclass(kw_only=True)
class GuidedDecodingParams:
    """tensorrt_llm/sampling_params.py"""

    json: Any = None
    regex: str | None = None
    grammar: str | None = None
    json_object: bool = False
    structural_tag: str | None = None


@dataclass(kw_only=True)
class SamplingParams:
    """tensorrt_llm/sampling_params.py, the fields that are named here."""

    max_tokens: int = 32
    temperature: float | None = None
    seed: int | None = None
    top_k: int | None = None
    top_p: float | None = None
    logprobs: int | None = None
    return_generation_logits: bool = False
    guided_decoding: GuidedDecodingParams | None = None


@dataclass
class VideoData:
    """tensorrt_llm/inputs/multimodal_data.py, also by way of inputs/utils.py"""

    frames: list[Any]
    metadata: dict[str, Any]
    audio: Any = None
    raw_bytes_hash: str | None = None

    def __post_init__(self) -> None:
        assert self.frames
        assert isinstance(self.metadata, dict)


@dataclass
class KvCacheConfig:
    """tensorrt_llm/llmapi/llm_args.py, the fields that are named here."""

    enable_block_reuse: bool = True
    free_gpu_memory_fraction: float | None = 0.9


@dataclass
class CompletionOutput:
    """tensorrt_llm/executor/result.py, the fields that are named here. generation_logits: [tokens,
    vocabulary]
    """

    text: str = ""
    generation_logits: torch.Tensor | None = None
    finish_reason: str | None = None


@dataclass
class RequestOutput:
    """tensorrt_llm/llmapi/llm.py"""

    outputs: list[CompletionOutput] = field(default_factory=list)


class Tokenizer:
    """Characters, and the two calls of transformers' tokenizers."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        assert not add_special_tokens
        return [VOCABULARY.index(text)]

    def apply_chat_template(
        self, conversation: Any, *, tokenize: bool = True, add_generation_prompt: bool = False
    ) -> str:
        assert not tokenize
        assert add_generation_prompt
        ((role, parts),) = [tuple(message.values()) for message in conversation]
        assert role == "user"
        assert [part["type"] for part in parts] == ["video", "text"]
        return f"<user><video>{parts[1]['text']}<assistant>"


class LLM:
    """tensorrt_llm/llmapi/llm.py: the constructor's named arguments and those of LlmArgs that are
    passed; generate's own.
    """

    made: LLM
    logits: dict[str, dict[str, float]]
    """By what has been written of an answer: the log-probability of each token that can follow."""

    def __init__(
        self,
        model: str,
        tokenizer: Any = None,
        tokenizer_mode: str = "auto",
        skip_tokenizer_init: bool = False,
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        revision: str | None = None,
        tokenizer_revision: str | None = None,
        *,
        guided_decoding_backend: str | None = None,
        kv_cache_config: KvCacheConfig | None = None,
    ) -> None:
        self.arguments = dict(locals())
        self.tokenizer = Tokenizer()
        self.calls: list[tuple[list[dict[str, Any]], SamplingParams]] = []
        LLM.made = self

    def generate(
        self,
        inputs: Any,
        sampling_params: Any = None,
        use_tqdm: bool = True,
        lora_request: Any = None,
        cache_salt: Any = None,
    ) -> list[RequestOutput]:
        assert isinstance(inputs, list)  # what is no list is one request, and gets one output
        assert inputs
        assert not use_tqdm
        self.calls.append((inputs, sampling_params))
        return [self.answer(one, sampling_params) for one in inputs]

    def answer(self, one: dict[str, Any], params: SamplingParams) -> RequestOutput:
        assert set(one) == {"prompt", "multi_modal_data", "mm_processor_kwargs"}
        written = one["prompt"].partition("<assistant>")[2]
        if not params.return_generation_logits:
            reason = "length" if one["prompt"].endswith("b<assistant>") else "stop"
            return RequestOutput(
                [CompletionOutput(text=f"about {one['prompt']}", finish_reason=reason)]
            )
        assert params.max_tokens == 1
        row = torch.full((1, len(VOCABULARY)), -math.inf)
        for token, value in self.logits[written].items():
            row[0, VOCABULARY.index(token)] = value
        return RequestOutput([CompletionOutput(generation_logits=row)])


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[LLM]]:
    """The fake in the place of TensorRT-LLM."""
    root, api = types.ModuleType("tensorrt_llm"), types.ModuleType("tensorrt_llm.llmapi")
    inputs, utils = (
        types.ModuleType("tensorrt_llm.inputs"),
        types.ModuleType("tensorrt_llm.inputs.utils"),
    )
    root.__dict__.update(LLM=LLM, SamplingParams=SamplingParams, __version__="1.2.0")
    api.__dict__.update(KvCacheConfig=KvCacheConfig, GuidedDecodingParams=GuidedDecodingParams)
    utils.__dict__.update(VideoData=VideoData)
    for module in (root, api, inputs, utils):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(LLM, "logits", {}, raising=False)
    return LLM


@pytest.fixture
def engine(fake: type[LLM]) -> TensorRTLLMEngine:
    made = TensorRTLLMEngine(
        "Qwen/Qwen2.5-VL-72B-Instruct", "abc", tensor_parallel=4, kv_cache_fraction=0.5
    )
    made.load(torch.device("cuda"))
    return made


def clip(seed: int = 0, fps: float = 2.0) -> Clip:
    return Clip(
        torch.randint(
            0, 256, (4, 3, 28, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
        ),
        fps,
    )


def log(**probabilities: float) -> dict[str, float]:
    """Logits of a place: d7=0.5 stands for the digit 7, dot for the point; shifted, as logits may
    be.
    """
    names = {"dot": ".", "eos": "<eos>", "ten": "ten"} | {
        f"d{digit}": str(digit) for digit in range(10)
    }
    return {names[name]: math.log(p) + 3.0 for name, p in probabilities.items()}


def test_the_model_is_loaded_with_reuse_guided_decoding_and_tensor_parallelism(
    engine: TensorRTLLMEngine, fake: type[LLM]
) -> None:
    given = fake.made.arguments
    assert (given["model"], given["revision"], given["tensor_parallel_size"]) == (
        "Qwen/Qwen2.5-VL-72B-Instruct",
        "abc",
        4,
    )
    assert given["guided_decoding_backend"] == "xgrammar"
    assert given["kv_cache_config"] == KvCacheConfig(
        enable_block_reuse=True, free_gpu_memory_fraction=0.5
    )
    assert engine.describe()["tensorrt_llm"] == "1.2.0"
    assert (engine.concurrency, engine.memory_bytes, engine.last_errors()) == (1, 0, {})


def test_a_clip_travels_as_its_own_frames(fake: type[LLM]) -> None:
    given = clip(fps=4.0)
    fields = video_input(given)
    (video,) = fields["multi_modal_data"]["video"]
    for image, frame in zip(video.frames, given.frames, strict=True):
        assert isinstance(image, Image.Image)
        assert image.size == (56, 28)
        assert image.tobytes() == frame.permute(1, 2, 0).contiguous().numpy().tobytes()
    assert video.metadata == {
        "total_num_frames": 4,
        "fps": 4.0,
        "duration": 1.0,
        "frames_indices": [0, 1, 2, 3],
    }
    assert fields["mm_processor_kwargs"] == {"fps": 4.0, "do_sample_frames": False}


@pytest.mark.parametrize("constrained", [False, True])
def test_answers_come_from_one_call_in_the_order_given(
    engine: TensorRTLLMEngine, fake: type[LLM], constrained: bool
) -> None:
    replies = engine.ask(
        [clip(0), clip(1)], [["a", "b"], ["c"]], Decoding(9, constrained, temperature=0.7, seed=5)
    )
    texts = [[f"about <user><video>{q}<assistant>" for q in row] for row in (["a", "b"], ["c"])]
    assert [[reply.text for reply in row] for row in replies] == texts
    assert [[reply.cut for reply in row] for row in replies] == [[False, True], [False]]
    ((inputs, params),) = fake.made.calls
    guided = GuidedDecodingParams(regex=NUMBER) if constrained else None
    assert params == SamplingParams(max_tokens=9, temperature=0.7, seed=5, guided_decoding=guided)
    assert (
        inputs[0]["multi_modal_data"] is inputs[1]["multi_modal_data"]
    )  # a clip's frames are made once
    assert inputs[2]["multi_modal_data"] is not inputs[0]["multi_modal_data"]
    assert engine.counters() == {"requests": 3}
    assert engine.counters() == {"requests": 0}


def test_with_probabilities_a_number_is_written_from_the_model_s_own_logits(
    engine: TensorRTLLMEngine, fake: type[LLM]
) -> None:
    fake.logits = {
        "": log(d7=0.5, d8=0.2, d1=0.1, d0=0.15, ten=0.05),
        "1": log(d0=0.25, dot=0.5, eos=0.25),
        "7.": log(d2=0.6, d9=0.2, eos=0.2),
        "7.2": log(d5=0.3, d0=0.1, eos=0.6),
    }
    ((reply,),) = engine.ask([clip()], [["q"]], Decoding(probabilities=True))
    assert reply.text == "7.25"
    assert reply.ten == pytest.approx(0.25)
    assert reply.digits[0] == pytest.approx(
        {str(d): {7: 0.5, 8: 0.2, 1: 0.1, 0: 0.15}.get(d, 0.0) for d in range(10)}
    )
    assert reply.digits[1] == {}
    assert reply.digits[2]["2"] == pytest.approx(0.6)
    # By hand: p_7, p_8, p_1 = 5/8, 2/8, 1/8; mean 6.5; f = (2 * .6 + 9 * .2) / .8 / 10 + (5 * .3) /
    # .4 / 100 = .375 + .0375; t = 1/32.
    assert expected_answer(reply) == pytest.approx(6.5 + 9 / 32 + (1 - 1 / 32) * 0.4125)
    assert all(
        params == SamplingParams(max_tokens=1, temperature=0.0, return_generation_logits=True)
        for _, params in fake.made.calls
    )
    assert [
        one["prompt"].partition("<assistant>")[2] for inputs, _ in fake.made.calls for one in inputs
    ] == ["", "1", "7.", "7.2"]


@pytest.mark.parametrize(
    ("after_one", "text"),
    [
        (log(d0=0.6, dot=0.4), "10.00"),
        (log(d0=0.4, dot=0.6), "1.33"),
        (log(d0=0.1, d5=0.8, dot=0.1), "10.00"),
    ],
)
def test_a_one_becomes_a_ten_where_a_nought_is_likelier_than_a_point(
    engine: TensorRTLLMEngine, fake: type[LLM], after_one: dict[str, float], text: str
) -> None:
    fake.logits = {"": log(d1=1.0), "1": after_one, "1.": log(d3=1.0), "1.3": log(d3=1.0)}
    ((reply,),) = engine.ask([clip()], [["q"]], Decoding(probabilities=True))
    assert reply.text == text
    assert re.fullmatch(NUMBER, reply.text)
    assert len(reply.digits) == len(text)
    assert reply.ten == pytest.approx(math.exp(after_one["0"] - 3.0))


def test_questions_of_several_clips_are_written_place_by_place_together(
    engine: TensorRTLLMEngine, fake: type[LLM]
) -> None:
    fake.logits = {"": log(d4=0.9, d5=0.1), "4.": log(d4=1.0), "4.4": log(d0=1.0)}
    replies = engine.ask([clip(0), clip(1)], [["a", "b"], ["c"]], Decoding(probabilities=True))
    assert [[reply.text for reply in row] for row in replies] == [["4.40", "4.40"], ["4.40"]]
    assert [len(inputs) for inputs, _ in fake.made.calls] == [
        3,
        3,
        3,
    ]  # a first "1" is impossible: what follows it is not asked for
    assert all(reply.ten == 0.0 for row in replies for reply in row)


def test_above_temperature_0_the_seed_decides(engine: TensorRTLLMEngine, fake: type[LLM]) -> None:
    even = log(**{f"d{d}": 0.1 for d in range(10)})
    fake.logits = {"": even, "1": log(d0=0.5, dot=0.5)} | {f"{d}.": even for d in range(10)}
    fake.logits |= {f"{d}.{e}": even for d in range(10) for e in range(10)}

    def text(seed: int, *others: str) -> str:
        replies = engine.ask(
            [clip()], [[*others, "q"]], Decoding(probabilities=True, temperature=1.0, seed=seed)
        )
        return replies[0][-1].text

    texts = [text(seed) for seed in range(20)]
    assert texts == [text(seed, "another", "and another") for seed in range(20)]
    assert len(set(texts)) > 10
    assert all(re.fullmatch(NUMBER, text) for text in texts)


@pytest.mark.parametrize("probabilities", [False, True])
def test_no_questions_no_calls(
    engine: TensorRTLLMEngine, fake: type[LLM], probabilities: bool
) -> None:
    assert engine.ask([], [], Decoding(probabilities=probabilities)) == []
    assert engine.ask([clip()], [[]], Decoding(probabilities=probabilities)) == [[]]
    assert fake.made.calls == []


def test_what_cannot_be_used_is_refused(fake: type[LLM], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="tensor_parallel: expected at least 1, got 0"):
        TensorRTLLMEngine("m", tensor_parallel=0)
    with pytest.raises(ValueError, match="kv_cache_fraction: expected"):
        TensorRTLLMEngine("m", kv_cache_fraction=1.0)
    with pytest.raises(RuntimeError, match="expected load"):
        TensorRTLLMEngine("m").ask([], [], Decoding())
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text, add_special_tokens: [1, 2])
    with pytest.raises(ValueError, match="one token for '0', got 2"):
        TensorRTLLMEngine("m").load(torch.device("cuda"))


def test_without_the_library_the_error_names_it() -> None:
    if "tensorrt_llm" in sys.modules:
        pytest.skip("TensorRT-LLM is here")
    with pytest.raises(ImportError, match="tensorrt_llm"):
        TensorRTLLMEngine("m").load(torch.device("cuda"))
