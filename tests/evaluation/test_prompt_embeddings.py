"""Prompts' vectors: a mean over tokens against one by hand, padding and batches, the file that
keeps them, and refusals.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import UMT5EncoderModel

from fastgrpo.evaluation import prompt_embeddings
from fastgrpo.evaluation.prompt_embeddings import (
    Encoder,
    embed_prompts,
    mean_embeddings,
    read_kept,
    read_matrix,
)

CPU = torch.device("cpu")
PROMPTS = ["a cat", "a very long prompt about a dog in the rain", "b", "two horses", "snow"]


@pytest.fixture(scope="module")
def encoder(wan_folder: Path) -> tuple[Any, Any]:
    return encoder_in(wan_folder).load()


def encoder_in(folder: Path) -> Encoder:
    return Encoder(str(folder), None, CPU)


def test_the_mean_is_over_tokens_that_are_not_padding(
    encoder: tuple[Any, Any], wan_folder: Path
) -> None:
    """Each prompt alone, without padding or mask, through a model loaded otherwise; the tokens are
    bytes, so counted by hand.
    """
    found = mean_embeddings(*encoder, PROMPTS, batch_size=5)
    other = UMT5EncoderModel.from_pretrained(wan_folder, subfolder="text_encoder").eval()
    for prompt, vector in zip(PROMPTS, found, strict=True):
        ids = encoder[1](prompt).input_ids
        assert len(ids) == len(prompt)
        with torch.no_grad():
            tokens = other(input_ids=torch.tensor([ids])).last_hidden_state[0].double()
        np.testing.assert_allclose(vector, (tokens.sum(0) / len(prompt)).numpy(), rtol=0, atol=2e-6)
    assert found.dtype == np.float32
    assert np.ptp(found, axis=0).max() > 0.1  # prompts differ


def test_batches_and_order_do_not_matter(encoder: tuple[Any, Any]) -> None:
    together = mean_embeddings(*encoder, PROMPTS, batch_size=5)
    for size in (1, 2, 100):
        np.testing.assert_allclose(
            mean_embeddings(*encoder, PROMPTS[::-1], batch_size=size)[::-1],
            together,
            rtol=0,
            atol=2e-6,
        )


def test_long_prompts_are_cut_with_a_warning(
    encoder: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_embeddings, "MAX_TOKENS", 6)
    with pytest.warns(
        UserWarning, match="2 of 5 prompts have 6 tokens or more; the rest of them is cut off"
    ):
        found = mean_embeddings(*encoder, PROMPTS, batch_size=2)
    with pytest.warns(UserWarning, match="1 of 1"):
        np.testing.assert_allclose(
            found[1], mean_embeddings(*encoder, [PROMPTS[1][:6]], 1)[0], rtol=0, atol=2e-6
        )


def test_made_once_and_added_to(
    wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, encoder = tmp_path / "kept" / "e.safetensors", encoder_in(wan_folder)
    first = embed_prompts(PROMPTS[:3], path, encoder, 2)
    made: list[str] = []
    real = mean_embeddings

    def count(encoder: Any, tokenizer: Any, prompts: list[str], size: int) -> Any:
        made.extend(prompts)
        return real(encoder, tokenizer, prompts, size)

    monkeypatch.setattr(prompt_embeddings, "mean_embeddings", count)
    both = embed_prompts([*PROMPTS, "b"], path, encoder, 2)
    assert made == PROMPTS[3:]
    np.testing.assert_array_equal(both[:3], first)
    np.testing.assert_array_equal(both[5], both[2])
    _, table = read_kept(path)
    assert list(table) == PROMPTS
    np.testing.assert_array_equal(table[PROMPTS[4]], both[4])
    # Whatever made them, they serve without an encoder, as long as no prompt is new.
    np.testing.assert_array_equal(embed_prompts(PROMPTS, path, None, 2), both[:5])
    with pytest.raises(ValueError, match=r"text_encoder: expected it, or embeddings, .* 1 of 1"):
        embed_prompts(["new"], path, None, 2)
    other = tmp_path / "other"
    shutil.copytree(wan_folder, other)
    config = other / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dropout_rate": 0.2}))
    made.clear()
    # Nothing of another encoder's is taken or kept.
    embed_prompts(PROMPTS[:2], path, encoder_in(other), 2)
    assert made == PROMPTS[:2]
    assert list(read_kept(path)[1]) == PROMPTS[:2]
    path.write_bytes(b"x")
    with pytest.raises(ValueError, match=r"embeddings: cannot read .*e.safetensors"):
        embed_prompts(PROMPTS, path, None, 2)


def test_matrices(tmp_path: Path) -> None:
    x = np.arange(6, dtype=np.float64).reshape(3, 2)
    np.save(tmp_path / "x.npy", x)
    found = read_matrix(tmp_path / "x.npy")
    np.testing.assert_array_equal(found, x)
    assert found.dtype == np.float32
    with pytest.raises(FileNotFoundError, match="embeddings: expected a file"):
        read_matrix(tmp_path / "none.npy")
    np.save(tmp_path / "flat.npy", np.zeros(3))
    np.save(tmp_path / "text.npy", np.array([["a"]]))
    np.save(tmp_path / "object.npy", np.array([[{}]]), allow_pickle=True)
    (tmp_path / "cut.npy").write_bytes(b"x")
    for name in ("flat.npy", "text.npy", "object.npy", "cut.npy"):
        with pytest.raises(ValueError, match=f"embeddings: cannot read .*{name} as .npy"):
            read_matrix(tmp_path / name)


def test_both_kinds_of_folders(wan_folder: Path, encoder: tuple[Any, Any], tmp_path: Path) -> None:
    """A pipeline of diffusers, and a whole UMT5 (with a decoder) of transformers with its tokenizer
    beside it.
    """
    assert encoder_in(wan_folder).folders() == (
        wan_folder / "text_encoder",
        wan_folder / "tokenizer",
    )
    from transformers import UMT5ForConditionalGeneration

    whole = UMT5ForConditionalGeneration(encoder[0].config)
    whole.encoder.load_state_dict(encoder[0].encoder.state_dict())
    whole.save_pretrained(tmp_path)
    encoder[1].save_pretrained(tmp_path)
    assert encoder_in(tmp_path).folders() == (tmp_path, tmp_path)
    found = mean_embeddings(*encoder_in(tmp_path).load(), PROMPTS, 5)
    np.testing.assert_allclose(found, mean_embeddings(*encoder, PROMPTS, 5), rtol=0, atol=2e-6)


def test_a_hub_id_fetches_no_more_than_the_encoder(
    wan_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def download(model: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((model, revision, *allow_patterns))
        return str(wan_folder)

    monkeypatch.setattr("fastgrpo.hub.snapshot_download", download)
    assert Encoder("Wan-AI/Wan", "abc", CPU).folders()[0] == wan_folder / "text_encoder"
    assert asked == [
        ("Wan-AI/Wan", "abc", "config.json", "model_index.json"),
        ("Wan-AI/Wan", "abc", "text_encoder/*", "tokenizer/*"),
    ]


def test_folders_without_an_encoder(wan_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"text_encoder: expected a UMT5 .* expected safetensors"):
        encoder_in(tmp_path).load()
    shutil.copytree(wan_folder, tmp_path / "wan")
    text = tmp_path / "wan" / "text_encoder"
    config = json.loads((text / "config.json").read_text())
    for change in ({"num_layers": 3}, {"d_ff": 65}):
        (text / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match="text_encoder: expected a UMT5 encoder with its"):
            encoder_in(tmp_path / "wan").load()
