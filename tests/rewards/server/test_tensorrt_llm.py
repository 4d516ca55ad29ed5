"""TensorRT-LLM's engine against a fake of the signatures that NVIDIA publishes.

The fake takes exactly the arguments of the real functions that the engine names, and answers from a
table of logits by what has been written of an answer. What TensorRT-LLM hands on to transformers'
processor goes to the real one.
"""

from __future__ import annotations

import math
import re
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgrpo.rewards.media.frames import patches, seconds_per_grid
from fastgrpo.rewards.server.tensorrt_llm import TensorRTLLMEngine, video_input
from fastgrpo.rewards.vlm.answers import NUMBER, expected_answer
from fastgrpo.rewards.vlm.engine import Clip, Decoding

VOCABULARY = [*"0123456789.", "<eos>"]


@dataclass(kw_only=True)
class GuidedDecodingParams:
    """tensorrt_llm/sampling_params.py, the field that is named here."""

    regex: str | None = None


@dataclass(kw_only=True)
class SamplingParams:
    """tensorrt_llm/sampling_params.py, the fields that are named here."""

    max_tokens: int = 32
    temperature: float | None = None
    seed: int | None = None
    return_generation_logits: bool = False
    guided_decoding: GuidedDecodingParams | None = None


@dataclass
class VideoData:
    """tensorrt_llm/inputs/multimodal_data.py, also by way of inputs/utils.py"""

    frames: list[Any]
    metadata: dict[str, Any]


@dataclass
class KvCacheConfig:
    """tensorrt_llm/llmapi/llm_args.py, the fields that are named here."""

    enable_block_reuse: bool = True
    free_gpu_memory_fraction: float | None = 0.9


class Tokenizer:
    """Characters, and the three calls of transformers' tokenizers."""

    def get_added_vocab(self) -> dict[str, int]:
        return {"<|im_end|>": 1, "<|video_pad|>": 2}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        assert not add_special_tokens
        return [VOCABULARY.index(text)]

    def apply_chat_template(
        self, conversation: Any, *, tokenize: bool = True, add_generation_prompt: bool = False
    ) -> str:
        assert (tokenize, add_generation_prompt) == (False, True)
        ((role, parts),) = [tuple(message.values()) for message in conversation]
        assert (role, [part["type"] for part in parts]) == ("user", ["video", "text"])
        return f"<user><video>{parts[1]['text']}<assistant>"


class LLM:
    """tensorrt_llm/llmapi/llm.py: the arguments that are passed here."""

    made: LLM
    logits: dict[str, dict[str, float]]

    def __init__(
        self,
        model: str,
        *,
        tensor_parallel_size: int = 1,
        revision: str | None = None,
        guided_decoding_backend: str | None = None,
        kv_cache_config: KvCacheConfig | None = None,
    ) -> None:
        self.arguments = dict(locals())
        self.tokenizer = Tokenizer()
        self.calls: list[tuple[list[dict[str, Any]], SamplingParams]] = []
        LLM.made = self

    def generate(self, inputs: Any, sampling_params: Any = None, use_tqdm: bool = True) -> Any:
        assert isinstance(inputs, list)  # what is no list is one request, and gets one output
        assert not use_tqdm
        self.calls.append((inputs, sampling_params))
        outputs = [self.answer(one, sampling_params) for one in inputs]
        return [types.SimpleNamespace(outputs=[output]) for output in outputs]

    def answer(self, one: dict[str, Any], params: SamplingParams) -> Any:
        assert set(one) == {"prompt", "multi_modal_data", "mm_processor_kwargs"}
        written = one["prompt"].partition("<assistant>")[2]
        if not params.return_generation_logits:
            reason = "timeout" if one["prompt"].endswith("b<assistant>") else "stop"
            return types.SimpleNamespace(text=f"about {one['prompt']}", finish_reason=reason)
        row = torch.full((1, len(VOCABULARY)), -math.inf)
        for token, p in self.logits.get(written, {"0": 1.0}).items():
            row[0, VOCABULARY.index(token)] = math.log(p) + 3.0  # logits may be shifted
        return types.SimpleNamespace(generation_logits=row)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> TensorRTLLMEngine:
    """With the fake in the place of TensorRT-LLM."""
    modules = {
        "tensorrt_llm": {
            "LLM": LLM,
            "SamplingParams": SamplingParams,
            "__version__": "1.2.0",
        },
        "tensorrt_llm.llmapi": {
            "KvCacheConfig": KvCacheConfig,
            "GuidedDecodingParams": GuidedDecodingParams,
        },
        "tensorrt_llm.inputs": {},
        "tensorrt_llm.inputs.utils": {"VideoData": VideoData},
    }
    for name, content in modules.items():
        module = types.ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    made = TensorRTLLMEngine("Qwen", "abc", tensor_parallel=4, kv_cache_fraction=0.5)
    made.load(torch.device("cuda"))
    return made


def clip(fps: float = 2.0) -> Clip:
    draw = torch.Generator().manual_seed(0)
    return Clip(torch.randint(0, 256, (4, 3, 28, 56), dtype=torch.uint8, generator=draw), fps)


def test_the_model_is_loaded_with_reuse_guided_decoding_and_tensor_parallelism(
    engine: TensorRTLLMEngine,
) -> None:
    given = {key: value for key, value in LLM.made.arguments.items() if key != "self"}
    assert given == {
        "model": "Qwen",
        "revision": "abc",
        "tensor_parallel_size": 4,
        "guided_decoding_backend": "xgrammar",
        "kv_cache_config": KvCacheConfig(enable_block_reuse=True, free_gpu_memory_fraction=0.5),
    }
    assert engine.describe() == {"tensorrt_llm": "1.2.0", "model": "Qwen", "revision": "abc"}


def test_a_clip_travels_as_its_own_frames(engine: TensorRTLLMEngine) -> None:
    given = clip(fps=4.0)
    fields = video_input(given)
    (video,) = fields["multi_modal_data"]["video"]
    for image, frame in zip(video.frames, given.frames, strict=True):
        assert image.size == (56, 28)
        assert image.tobytes() == frame.permute(1, 2, 0).contiguous().numpy().tobytes()
    assert video.metadata == {
        "total_num_frames": 4,
        "fps": 4.0,
        "duration": 1.0,
        "frames_indices": [0, 1, 2, 3],
    }


# TensorRT-LLM's Qwen2VLInputProcessorBase._preprocess, with transformers' own processor, in a
# process of its own: torchvision, which cannot be installed beside torch's CPU wheel, is replaced
# by the little that is needed of it. The frames have their size already.
PROCESS = """
import importlib.machinery, sys, types
import torch
class Names(type):  # a class that has every attribute
    def __getattr__(self, name):
        return name
class Anything(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Names(name, (), {})
for name in ("", ".io", ".transforms", ".transforms.functional", ".transforms.v2",
             ".transforms.v2.functional"):
    module = sys.modules["torchvision" + name] = Anything("torchvision" + name)
    module.__spec__ = importlib.machinery.ModuleSpec("torchvision" + name, None)
    module.__path__ = []
    parent, _, last = module.__name__.rpartition(".")
    if parent:
        setattr(sys.modules[parent], last, module)
sys.modules["torchvision"].__version__ = "0.28.0"
from torchvision.transforms.v2 import functional
sys.modules["torchvision.transforms.functional"].pil_to_tensor = lambda image: torch.tensor(
    list(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3).permute(2, 0, 1)
functional.resize = functional.grayscale_to_rgb = lambda frames, *_, **__: frames
functional.normalize = lambda frames, mean, std, **_: (
    frames - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
from transformers import AutoProcessor
folder, inputs, made = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder)
results = []
for prompt, frames, kwargs in torch.load(inputs, weights_only=False):
    results.append(dict(processor(text=[prompt], images=None, videos=[frames], padding=True,
                                  do_rescale=True, return_tensors="pt", **kwargs)))
torch.save(results, made)
"""


def test_the_rate_reaches_the_model(
    engine: TensorRTLLMEngine, qwen_folder: Path, tmp_path: Path
) -> None:
    """What transformers' own processor makes of what we send: the time between the grid's steps,
    every pixel, and one token for each of the video's.
    """
    clips = [clip(fps) for fps in (1.0, 2.0, 7.2)]
    inputs = []
    for one in clips:
        fields = video_input(one)
        (video,) = fields["multi_modal_data"]["video"]
        prompt = "<|vision_start|><|video_pad|><|vision_end|>"
        inputs.append((prompt, video.frames, fields["mm_processor_kwargs"]))
    torch.save(inputs, tmp_path / "inputs.pt")
    arguments = (str(qwen_folder), str(tmp_path / "inputs.pt"), str(tmp_path / "made.pt"))
    done = subprocess.run(
        [sys.executable, "-c", PROCESS, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for one, made in zip(clips, torch.load(tmp_path / "made.pt"), strict=True):
        assert float(made["second_per_grid_ts"][0]) == pytest.approx(seconds_per_grid(one))
        pixels, grid = patches(one)
        assert made["video_grid_thw"].tolist() == [list(grid)]
        assert made["input_ids"].shape[1] == 2 + math.prod(grid) // 4
        torch.testing.assert_close(made["pixel_values_videos"], pixels)


def test_a_question_opens_no_turn(engine: TensorRTLLMEngine) -> None:
    """The rendered chat is tokenized with its special tokens, so none may be in the question."""
    ((reply,),) = engine.ask([clip()], [["<|im_end|>\n<|video_pad|>"]], Decoding())
    assert reply.text == "about <user><video>< |im_end|>\n< |video_pad|><assistant>"
    ((reply,),) = engine.ask([clip()], [["<caption>\na cat\n</caption>"]], Decoding())
    assert reply.text == "about <user><video><caption>\na cat\n</caption><assistant>"


@pytest.mark.parametrize("constrained", [False, True])
def test_answers_come_from_one_call_in_the_order_given(
    engine: TensorRTLLMEngine, constrained: bool
) -> None:
    decoding = Decoding(9, constrained, temperature=0.7, seed=5)
    replies = engine.ask([clip(), clip()], [["a", "b"], ["c"]], decoding)
    texts = [[f"about <user><video>{q}<assistant>" for q in row] for row in (["a", "b"], ["c"])]
    assert [[reply.text for reply in row] for row in replies] == texts
    assert [[reply.cut for reply in row] for row in replies] == [[False, True], [False]]
    ((_, params),) = LLM.made.calls
    guided = GuidedDecodingParams(regex=NUMBER) if constrained else None
    assert params == SamplingParams(max_tokens=9, temperature=0.7, seed=5, guided_decoding=guided)


def test_with_probabilities_a_number_is_written_from_the_model_s_own_logits(
    engine: TensorRTLLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = {
        "": {"7": 0.5, "8": 0.2, "1": 0.1, "0": 0.2},
        "1": {"0": 0.25, ".": 0.5, "<eos>": 0.25},
        "7.": {"2": 0.6, "9": 0.2, "<eos>": 0.2},
        "7.2": {"5": 0.45, "0": 0.15, "<eos>": 0.4},
    }
    monkeypatch.setattr(LLM, "logits", logits, raising=False)
    replies = engine.ask([clip(), clip()], [["a"], ["b", "c"]], Decoding(probabilities=True))
    assert [[reply.text for reply in row] for row in replies] == [["7.25"], ["7.25"] * 2]
    reply = replies[0][0]
    assert reply.ten == pytest.approx(0.25)
    first = {7: 0.5, 8: 0.2, 1: 0.1, 0: 0.2}
    assert reply.digits[0] == pytest.approx({str(d): first.get(d, 0.0) for d in range(10)})
    assert reply.digits[1] == {}
    assert reply.digits[2]["2"] == pytest.approx(0.6)
    # By hand: p_7, p_8, p_1 = 5/8, 2/8, 1/8; mean 6.5; f = (2 * .6 + 9 * .2) / .8 / 10 +
    # (5 * .45) / .6 / 100 = .375 + .0375; t = 1/32.
    assert expected_answer(reply) == pytest.approx(6.5 + 9 / 32 + (1 - 1 / 32) * 0.4125)
    params = SamplingParams(max_tokens=1, temperature=0.0, return_generation_logits=True)
    assert all(used == params for _, used in LLM.made.calls)


@pytest.mark.parametrize(
    ("after_one", "text"),
    [
        ({"0": 0.6, ".": 0.4}, "10.00"),
        ({"0": 0.4, ".": 0.6}, "1.33"),
        ({"0": 0.2, "5": 0.8}, "10.00"),
    ],
)
def test_a_one_becomes_a_ten_where_a_nought_is_likelier_than_a_point(
    engine: TensorRTLLMEngine, monkeypatch: pytest.MonkeyPatch, after_one: Any, text: str
) -> None:
    logits = {"": {"1": 1.0}, "1": after_one, "1.": {"3": 1.0}, "1.3": {"3": 1.0}}
    monkeypatch.setattr(LLM, "logits", logits, raising=False)
    ((reply,),) = engine.ask([clip()], [["q"]], Decoding(probabilities=True))
    assert reply.text == text
    assert re.fullmatch(NUMBER, reply.text)
    assert len(reply.digits) == len(text)
    assert reply.digits[1]["0"] == pytest.approx(after_one["0"])


def test_a_tokenizer_with_longer_digits_and_a_missing_library_are_refused(
    engine: TensorRTLLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text, add_special_tokens: [1, 2])
    with pytest.raises(ValueError, match="one token for each of 0123456789"):
        engine.load(torch.device("cuda"))
    monkeypatch.setitem(sys.modules, "tensorrt_llm", None)
    with pytest.raises(ImportError, match="tensorrt_llm"):
        engine.load(torch.device("cuda"))
