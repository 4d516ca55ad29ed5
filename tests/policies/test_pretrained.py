"""What policies of diffusers' models share: sizes, padded texts, and whether there is a LoRA."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel

from fastgrpo.policies.hunyuan_video import HunyuanVideoPolicy
from fastgrpo.policies.lora import LoRA, add_lora, has_lora
from fastgrpo.policies.pretrained import Compression, DiffusersPolicy
from fastgrpo.policies.wan import WanPolicy


def test_compression_of_both_models(wan_folder: Path, hunyuan_folder: Path) -> None:
    """As the papers give it: 4 frames and 8 x 8 pixels per latent, 1 x 2 x 2 latents per token."""
    for policy, channels in (
        (WanPolicy(str(wan_folder)), 16),
        (HunyuanVideoPolicy(str(hunyuan_folder)), 4),
    ):
        got = policy.compression()
        assert isinstance(got, Compression)
        assert got._replace(patch=tuple(got.patch)) == (channels, 4, 8, (1, 2, 2))


@pytest.mark.parametrize(
    ("compression", "size", "shape"),
    [
        (Compression(4, 4, 8, (1, 2, 2)), (32, 48, 9), (4, 3, 4, 6)),
        (Compression(3, 2, 5, (2, 1, 1)), (15, 35, 7), (3, 4, 3, 7)),
    ],
)
def test_the_shape_of_a_latent_follows_from_the_compression(
    compression: Compression, size: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    policy: Any = SimpleNamespace(compression=lambda: compression)
    assert DiffusersPolicy.latent_shape(policy, *size) == shape


def test_texts_are_padded_with_zeros_to_one_length() -> None:
    policy: Any = SimpleNamespace(max_sequence_length=3, _device=torch.device("cpu"))
    rows = [torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16), torch.ones(3, 2)]
    got = DiffusersPolicy.padded(policy, rows)
    assert got.dtype == torch.float32
    assert got.tolist() == [[[1, 2], [0, 0], [0, 0]], [[1, 1]] * 3]


def test_embeddings_belong_to_the_model_and_settings_that_made_them(
    wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other weights under the same path, a longer text, another precision: another cache."""
    for name, size in {"_WHOLE_FILE": 0, "_SAMPLE": 1}.items():  # as if the files were large
        monkeypatch.setattr(f"fastgrpo.policies.text_cache.{name}", size)
    folder = tmp_path / "model"
    shutil.copytree(wan_folder, folder)
    common: Any = {"model": str(folder), "text_cache": str(tmp_path / "text")}

    def place(**settings: Any) -> Path:
        return WanPolicy(**common, **settings).cache.folder

    places = [place(), place(max_sequence_length=256), place(text_dtype="fp32")]
    for file in ("text_encoder/model.safetensors", "tokenizer/tokenizer.json"):
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
        places.append(place())
    assert len(set(places)) == 5
    assert place() == places[-1]


def test_a_policy_says_what_loads_its_weights(wan_folder: Path) -> None:
    for lora, method in ((None, "from_pretrained"), (LoRA(rank=1), "load_lora_weights")):
        policy = WanPolicy(str(wan_folder), lora=lora)
        policy.load(torch.device("cpu"))
        assert policy.loaded_by == method
        assert hasattr(WanPipeline, method)


@pytest.mark.parametrize("key", ["fps", "max_sequence_length"])
def test_a_number_that_cannot_be_is_refused(key: str) -> None:
    settings: dict[str, Any] = {key: 0}
    with pytest.raises(ValueError, match=rf"policy\.{key}: expected at least 1, got 0"):
        WanPolicy("none", **settings)


def test_a_network_has_a_lora_once_it_is_added() -> None:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 8, "num_layers": 1}
    network = WanTransformer3DModel(in_channels=4, out_channels=4, text_dim=8, freq_dim=8, **sizes)
    assert not has_lora(network)
    add_lora(network, LoRA(rank=1), ("to_q",))
    assert has_lora(network)
    assert not has_lora(torch.nn.Linear(1, 1))
