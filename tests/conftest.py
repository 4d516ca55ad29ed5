"""What the tests share: a generator and a judge of a few lines, and one process or two.

Test files do not import each other; they take these as fixtures. A script for another process says `from conftest import TinyPolicy`.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it once, when it is imported

ROOT = Path(__file__).resolve().parent.parent


class TinyNetwork(nn.Module):
    """v = f(x A + 0.001 t B + sum over tokens of (text C)) over P elements and text [B, 2, 4], f(h) = h / (1 + |h|).

    f is made of operations that IEEE 754 rounds, so that an element's bits do not depend on its place in a vector register.
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


class TinyPolicy:
    """interfaces.Policy: latents [3, T, H, W], a caption's text from its hash, videos by a logistic function."""

    fps = 2

    def __init__(self, seed: int = 0, shape: tuple[int, int, int] = (2, 2, 2)) -> None:
        self.shape = shape
        self.transformer: nn.Module = TinyNetwork(3 * shape[0] * shape[1] * shape[2], seed)
        self.batch_sizes: list[int] = []

    def latent_shape(self, height: int, width: int, num_frames: int) -> tuple[int, ...]:
        if (num_frames, height, width) != self.shape:
            raise ValueError(f"expected num_frames, height, width {self.shape}, got {(num_frames, height, width)}")
        return (3, num_frames, height, width)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        pass

    def embed(self, prompts: Sequence[str], device: torch.device) -> None:
        pass

    def load(self, device: torch.device) -> None:
        self.transformer.to(device)

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        words = [[b / 128 - 1 for b in hashlib.sha256(p.encode()).digest()[:8]] if p else [0.0] * 8 for p in prompts]
        return {"text": torch.tensor(words).view(-1, 2, 4)}

    def velocity(self, latents: Tensor, timesteps: Tensor, conditioning: Any) -> Tensor:
        self.batch_sizes.append(len(latents))
        return self.transformer(latents, timesteps, conditioning["text"])

    def decode(self, latents: Tensor) -> Tensor:
        return torch.stack([torch.sigmoid(video) for video in latents]).transpose(1, 2)

    def save_pretrained(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        folder.mkdir(parents=True)
        torch.save(dict(weights), folder / "weights.pt")


class TinyJudge:
    """interfaces.RewardModel: the mean of the red, green and blue channel; a caption with "unseen" in it gets no score."""

    stages = ("red", "green", "blue")

    def load(self, device: torch.device) -> None:
        pass

    def score(self, videos: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        return videos.double().mean(dim=(1, 3, 4)), torch.tensor(["unseen" not in p for p in prompts])


@pytest.fixture
def tiny_policy() -> type[TinyPolicy]:
    return TinyPolicy


@pytest.fixture
def tiny_judge() -> type[TinyJudge]:
    return TinyJudge


@pytest.fixture(scope="session")
def wan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny WanPipeline with random weights, saved as diffusers saves the real ones: latents of 16 channels, text of 32."""
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    tokens = ["<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[], unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    text = UMT5Config(vocab_size=len(tokens), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    shape = {"num_attention_heads": 4, "attention_head_dim": 24, "ffn_dim": 128, "num_layers": 2}
    pipe = WanPipeline(
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"),
        text_encoder=UMT5EncoderModel(text).eval(),
        vae=AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 1, 2, 2], num_res_blocks=1).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        transformer=WanTransformer3DModel(in_channels=16, out_channels=16, text_dim=32, freq_dim=32, **shape).eval(),
    )
    folder = tmp_path_factory.mktemp("models") / "wan"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def hunyuan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny HunyuanVideoPipeline with random weights, saved as diffusers saves the real one: latents of 4 channels, text of 32 and 24.

    Its tokenizer knows the words of the pipeline's template, of which the pipeline cuts off 95 tokens; bytes would leave no prompt.
    """
    from diffusers import AutoencoderKLHunyuanVideo, FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline, HunyuanVideoTransformer3DModel
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel, PreTrainedTokenizerFast

    def tokenizer(corpus: list[str]) -> Any:
        special, words = ["<pad>", "<s>", "</s>"], Tokenizer(models.BPE())
        words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        words.train_from_iterator(corpus, trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet, show_progress=False))
        words.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
        return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>")

    torch.manual_seed(0)
    llama_words, clip_words = tokenizer([DEFAULT_PROMPT_TEMPLATE["template"]] * 2), tokenizer([])
    llama = LlamaConfig(vocab_size=len(llama_words), hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4)
    clip = CLIPTextConfig(
        vocab_size=len(clip_words), hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    vae = AutoencoderKLHunyuanVideo(latent_channels=4, block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4)
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=24, num_layers=2, num_single_layers=2,
        num_refiner_layers=1, text_embed_dim=32, pooled_projection_dim=24, rope_axes_dim=(8, 8, 8),
    )  # fmt: skip
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


@pytest.fixture
def one_rank() -> Iterator[torch.device]:
    """This process as a world of one, as `fastgrpo.parallel.start` makes it."""
    from fastgrpo import parallel
    from fastgrpo.config import RuntimeConfig

    yield parallel.start(RuntimeConfig(device="cpu"))
    parallel.stop()


@pytest.fixture(scope="session")
def run_ranks() -> Callable[..., list[Any]]:
    """run_ranks(script, world_size=2): run a script in that many processes; what each printed as JSON in its last line, by rank."""

    def run(script: str, world_size: int = 2) -> list[Any]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        paths = [str(ROOT / "tests"), str(ROOT), str(ROOT / "kernels")]
        shared = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        shared |= {"PYTHONPATH": os.pathsep.join(paths), "OMP_WAIT_POLICY": "PASSIVE"}
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", script], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(world_size)
        ]  # fmt: skip
        try:
            outputs = [process.communicate(timeout=120) for process in processes]
        finally:
            for process in processes:
                process.kill()
        failures = [err for process, (_, err) in zip(processes, outputs, strict=True) if process.returncode]
        assert not failures, "\n\n".join(failures)
        return [json.loads(out.splitlines()[-1]) for out, _ in outputs]

    return run
