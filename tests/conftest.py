"""What the tests share: a generator and a judge of a few lines, and one process or two.

Test files do not import each other; they take these as fixtures, or import from tests/modules. A
script for another process says `from conftest import TinyPolicy`.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastgrpo.distributed.console import log_to_console
from fastgrpo.interfaces import Policy, RewardModel

log_to_console()
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it once, when it is imported

# The key that signs run folders; not the user's own.
os.environ["XDG_STATE_HOME"] = f"{tempfile.gettempdir()}/fastgrpo-tests-{os.getuid()}"

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "modules"))


LONGEST = ("ops/test_ahead_of_time.py", "shapes/test_pretrain.py", "fake_gpu/test_step.py")
"""Files with a test of minutes, which would otherwise be the last to end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first: at the end both workers have short ones to share."""
    items.sort(key=lambda item: not item.path.as_posix().endswith(LONGEST))


class TinyNetwork(nn.Module):
    """v = f(x A + 0.001 t B + sum over tokens of (text C)) over P elements and text [B, 2, 4], f(h)
    = h / (1 + |h|).

    f is made of operations that IEEE 754 rounds, so that an element's bits do not depend on its
    place in a vector register.
    """

    def __init__(self, elements: int, seed: int = 0) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.A = nn.Parameter(torch.randn(elements, elements, generator=draw) / elements**0.5)
        self.B = nn.Parameter(torch.randn(elements, generator=draw))
        self.C = nn.Parameter(torch.randn(4, elements, generator=draw))

    def forward(self, latents: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        x = latents.flatten(1)
        h = x @ self.A + timesteps[:, None] * (0.001 * self.B) + (text @ self.C).sum(1)
        return (h / (1 + h.abs())).view_as(latents)


class TinyPolicy(Policy):
    """Latents [3, T, H, W], a prompt's text from its hash, videos by a logistic function."""

    fps = 2

    def __init__(self, seed: int = 0, shape: tuple[int, int, int] = (2, 2, 2)) -> None:
        self.shape = shape
        self.transformer: nn.Module = TinyNetwork(3 * shape[0] * shape[1] * shape[2], seed)
        self.batch_sizes: list[int] = []

    def latent_shape(self, height: int, width: int, num_frames: int) -> tuple[int, ...]:
        if (num_frames, height, width) != self.shape:
            size = (num_frames, height, width)
            raise ValueError(f"expected num_frames, height, width {self.shape}, got {size}")
        return (3, num_frames, height, width)

    def load(self, device: torch.device) -> None:
        self.transformer.to(device)

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        words = [
            [b / 128 - 1 for b in hashlib.sha256(p.encode()).digest()[:8]] if p else [0.0] * 8
            for p in prompts
        ]
        return {"text": torch.tensor(words).view(-1, 2, 4)}

    def velocity(self, latents: Tensor, timesteps: Tensor, conditioning: Any) -> Tensor:
        self.batch_sizes.append(len(latents))
        return self.transformer(latents, timesteps, conditioning["text"])

    def decode(self, latents: Tensor) -> Tensor:
        return torch.stack([torch.sigmoid(video) for video in latents]).transpose(1, 2)

    def save_pretrained(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        folder.mkdir(parents=True)
        torch.save(dict(weights), folder / "weights.pt")


class TinyJudge(RewardModel):
    """The mean of the red, green and blue channel; a prompt with "unseen" in it gets no score."""

    stages = ("red", "green", "blue")

    def load(self, device: torch.device) -> None:
        pass

    def score(self, videos: Tensor, prompts: Sequence[str], fps: float) -> tuple[Tensor, Tensor]:
        return videos.double().mean(dim=(1, 3, 4)), torch.tensor(
            ["unseen" not in p for p in prompts]
        )


@pytest.fixture
def tiny_policy() -> type[TinyPolicy]:
    return TinyPolicy


@pytest.fixture
def tiny_judge() -> type[TinyJudge]:
    return TinyJudge


@pytest.fixture(scope="session")
def wan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny WanPipeline with random weights, saved as diffusers saves the real ones: latents of 16
    channels, text of 32.
    """
    from diffusers import (
        AutoencoderKLWan,
        FlowMatchEulerDiscreteScheduler,
        WanPipeline,
        WanTransformer3DModel,
    )
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    tokens = ["<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words = Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[], unk_token="<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    text = UMT5Config(
        vocab_size=len(tokens), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4
    )
    shape = {"num_attention_heads": 4, "attention_head_dim": 24, "ffn_dim": 128, "num_layers": 2}
    pipe = WanPipeline(
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
        ),
        text_encoder=UMT5EncoderModel(text).eval(),
        vae=AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 1, 2, 2], num_res_blocks=1).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        transformer=WanTransformer3DModel(
            in_channels=16, out_channels=16, text_dim=32, freq_dim=32, **shape
        ).eval(),
    )
    folder = tmp_path_factory.mktemp("models") / "wan"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def hunyuan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny HunyuanVideoPipeline with random weights, saved as diffusers saves the real one:
    latents of 4 channels, text of 32 and 24.

    Its tokenizer knows the words of the pipeline's template, of which the pipeline cuts off 95
    tokens; bytes would leave no prompt.
    """
    from diffusers import (
        AutoencoderKLHunyuanVideo,
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideoPipeline,
        HunyuanVideoTransformer3DModel,
    )
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        LlamaConfig,
        LlamaModel,
        PreTrainedTokenizerFast,
    )

    def tokenizer(corpus: list[str]) -> Any:
        special, words = ["<pad>", "<s>", "</s>"], Tokenizer(models.BPE())
        words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        words.train_from_iterator(
            corpus,
            trainers.BpeTrainer(
                special_tokens=special, initial_alphabet=alphabet, show_progress=False
            ),
        )
        words.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
        )

    torch.manual_seed(0)
    llama_words, clip_words = tokenizer([DEFAULT_PROMPT_TEMPLATE["template"]] * 2), tokenizer([])
    llama = LlamaConfig(
        vocab_size=len(llama_words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
    )
    clip = CLIPTextConfig(
        vocab_size=len(clip_words),
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=1,
        eos_token_id=2,
    )
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4
    )
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=24,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=32,
        pooled_projection_dim=24,
        rope_axes_dim=(8, 8, 8),
    )
    pipe = HunyuanVideoPipeline(
        text_encoder=LlamaModel(llama).eval(),
        tokenizer=llama_words,
        transformer=transformer.eval(),
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=CLIPTextModel(clip).eval(),
        tokenizer_2=clip_words,
    )
    folder = tmp_path_factory.mktemp("models") / "hunyuan_video"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def qwen_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2.5-VL (0.2 M random weights) saved as the published ones are: mrope, window
    attention, every digit a token of its own.

    Greedy, it writes no numbers. The chat template restates the public format;
    generation_config.json has the real one's penalty.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    from transformers import (
        GenerationConfig,
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2Tokenizer,
    )
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    splits = [
        pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.Sequence(splits)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    text = [
        "You are a helpful assistant. system user assistant",
        "Rate this video from 1.00 to 10.00. Answer with one number only. ",
    ]
    words.train_from_iterator(
        text * 2,
        trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False),
    )
    bpe = json.loads(words.to_str())["model"]
    special = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|object_ref_start|>",
        "<|object_ref_end|>",
        "<|box_start|>",
        "<|box_end|>",
    ]
    special += [
        "<|quad_start|>",
        "<|quad_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|vision_pad|>",
        "<|image_pad|>",
        "<|video_pad|>",
    ]
    tokenizer = Qwen2Tokenizer(
        vocab=bpe["vocab"]
        | {name: len(bpe["vocab"]) + place for place, name in enumerate(special)},
        merges=[tuple(pair) for pair in bpe["merges"]],
        eos_token="<|im_end|>",
        extra_special_tokens=special[1:],
    )
    tokenizer.chat_template = (
        "{% if messages[0]['role'] != 'system' %}"
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{% if message['content'] is string %}{{ message['content'] }}"
        "{% else %}{% for part in message['content'] %}"
        "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}"
        "<|vision_start|>{{ '<|video_pad|>' if part['type'] == 'video' else '<|image_pad|>' }}"
        "<|vision_end|>"
        "{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    number = tokenizer.convert_tokens_to_ids
    language = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.1,
        "bos_token_id": number("<|endoftext|>"),
        "eos_token_id": number("<|im_end|>"),
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
        "rms_norm_eps": 1e-6,
    }
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": 64,
        "window_size": 56,
        "fullatt_block_indexes": [1],
        "tokens_per_second": 2,
        "initializer_range": 0.1,
    }
    tokens = {f"{name}_token_id": number(f"<|{name}|>") for name in ("vision_start", "vision_end")}
    tokens |= {f"{name}_token_id": number(f"<|{name}_pad|>") for name in ("image", "video")}
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=language, vision_config=vision, **tokens)
    ).eval()
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1e-6,
        repetition_penalty=1.05,
        bos_token_id=number("<|endoftext|>"),
        pad_token_id=number("<|endoftext|>"),
        eos_token_id=[number("<|im_end|>"), number("<|endoftext|>")],
    )
    folder = tmp_path_factory.mktemp("models") / "qwen"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    clip = {
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    clip |= {
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
    }
    for name, kind in (
        ("preprocessor_config.json", "image"),
        ("video_preprocessor_config.json", "video"),
    ):
        content = clip | {
            "processor_class": "Qwen2_5_VLProcessor",
            f"{kind}_processor_type": f"Qwen2VL{kind.capitalize()}Processor",
        }
        (folder / name).write_text(json.dumps(content))
    return folder


@pytest.fixture
def fault() -> type:
    """What a fake endpoint does instead of an answer (modules/fake_endpoint.py)."""
    from fake_endpoint import Fault

    return Fault


@pytest.fixture
def fake_endpoint() -> Iterator[Callable[..., Any]]:
    """fake_endpoint(**fields of FakeEndpoint): a server that listens on a free port of this machine
    until the test ends.
    """
    from fake_endpoint import FakeEndpoint

    made: list[FakeEndpoint] = []

    def make(**fields: Any) -> FakeEndpoint:
        made.append(FakeEndpoint(**fields))
        return made[-1]

    yield make
    for endpoint in made:
        endpoint.kill()


@pytest.fixture
def one_rank() -> Iterator[torch.device]:
    """This process as a world of one, as `fastgrpo.distributed.collectives.start` makes it."""
    from fastgrpo.config import RuntimeConfig
    from fastgrpo.distributed import collectives

    yield collectives.start(RuntimeConfig(device="cpu"))
    collectives.stop()


@pytest.fixture(scope="session")
def run_ranks() -> Callable[..., list[Any]]:
    """run_ranks(script, world_size=2): what each rank printed as JSON in its last line."""
    import ranks

    return ranks.run_ranks
