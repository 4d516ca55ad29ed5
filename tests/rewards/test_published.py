"""What is read of a published model before its weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import CLIPConfig, CLIPVisionConfig, CLIPVisionModelWithProjection

from fastgrpo.rewards.published import hub_commit, read_config, weight_shapes


def test_the_configuration_of_a_folder(tmp_path: Path) -> None:
    CLIPVisionConfig(hidden_size=24, num_attention_heads=3).save_pretrained(tmp_path)
    config = read_config(tmp_path, (CLIPConfig, CLIPVisionConfig), "key")
    assert type(config) is CLIPVisionConfig
    assert (config.hidden_size, config.num_attention_heads) == (24, 3)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (json.dumps({"model_type": "clip"}), "model_type: expected clip_vision_model, got 'clip'"),
        (json.dumps({}), "model_type: expected clip_vision_model, got None"),
        ("{", "expected a configuration in"),
        (json.dumps({"model_type": "clip_vision_model", "hidden_size": "a"}), "hidden_size"),
    ],
)
def test_another_configuration(tmp_path: Path, content: str, problem: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=f"(?s)^key: .*{problem}"):
        read_config(tmp_path, (CLIPVisionConfig,), "key")


def test_a_folder_without_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"key: .* found no .*config\.json"):
        read_config(tmp_path, (CLIPVisionConfig,), "key")


def test_shapes_are_those_of_the_network() -> None:
    sizes = {"intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPVisionConfig(hidden_size=16, image_size=28, patch_size=14, **sizes)
    shapes = weight_shapes(CLIPVisionModelWithProjection, config)
    network = CLIPVisionModelWithProjection(config)
    assert shapes == {name: tensor.shape for name, tensor in network.state_dict().items()}
    assert shapes["visual_projection.weight"] == (config.projection_dim, 16)


def test_shapes_allocate_nothing() -> None:
    config = CLIPVisionConfig(hidden_size=2**20, num_attention_heads=8, num_hidden_layers=1)
    shapes = weight_shapes(CLIPVisionModelWithProjection, config)  # 4 TB and more, if allocated
    assert sum(shape.numel() for shape in shapes.values()) > 1e12
    assert torch.get_default_device() == torch.device("cpu")


def test_the_commit_of_the_hub(tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / "0123abc"
    assert hub_commit("owner/name", snapshot) == "0123abc"
    assert hub_commit(str(tmp_path), tmp_path) is None
