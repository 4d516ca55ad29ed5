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
from safetensors.numpy import save_file
from transformers import UMT5EncoderModel

from fastgrpo.evaluation import prompt_embeddings
from fastgrpo.evaluation.prompt_embeddings import (
    Embeddings,
    Encoder,
    embed_prompts,
    embeddings_in_order,
    mean_embeddings,
    read_embeddings,
    write_embeddings,
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
    found = read_embeddings(path)
    assert found.prompts == PROMPTS
    np.testing.assert_array_equal(found.vectors[4], both[4])
    other = tmp_path / "other"
    shutil.copytree(wan_folder, other)
    config = other / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dropout_rate": 0.2}))
    made.clear()
    # Nothing of another encoder's is taken or kept.
    embed_prompts(PROMPTS[:2], path, encoder_in(other), 2)
    assert made == PROMPTS[:2]
    assert read_embeddings(path).prompts == PROMPTS[:2]


def test_files_of_embeddings(tmp_path: Path) -> None:
    x = np.arange(6, dtype=np.float64).reshape(3, 2)
    np.save(tmp_path / "x.npy", x)
    save_file({"any": x.astype(np.float16)}, tmp_path / "x.safetensors")
    write_embeddings(
        tmp_path / "own.safetensors",
        Embeddings(x.astype(np.float32), ["a", "b", "c"], {"text_encoder": "t"}),
    )
    for name in ("x.npy", "x.safetensors", "own.safetensors"):
        found = read_embeddings(tmp_path / name)
        np.testing.assert_array_equal(found.vectors, x)
        assert found.vectors.dtype == np.float32
    assert (found.prompts, found.encoder) == (["a", "b", "c"], {"text_encoder": "t"})
    np.testing.assert_array_equal(embeddings_in_order(found, [9, 9], ["c", "a"], 5), x[[2, 0]])
    with pytest.raises(
        ValueError, match="embeddings: expected one for each of 3 prompts, got none for 2: 'd'"
    ):
        embeddings_in_order(found, [0, 1, 2], ["d", "a", "e"], 3)
    plain = read_embeddings(tmp_path / "x.npy")
    np.testing.assert_array_equal(embeddings_in_order(plain, [2, 0], ["", ""], 3), x[[2, 0]])
    with pytest.raises(
        ValueError,
        match=r"embeddings: expected a row for each of the 4 rows of .*, got 3",
    ):
        embeddings_in_order(plain, [2, 0], ["", ""], 4)


def test_unreadable_embeddings(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="embeddings: expected a file"):
        read_embeddings(tmp_path / "none.npy")
    np.save(tmp_path / "flat.npy", np.zeros(3))
    np.save(tmp_path / "text.npy", np.array([["a"]]))
    np.save(tmp_path / "object.npy", np.array([[{}]]), allow_pickle=True)
    save_file({"a": np.zeros((1, 2)), "b": np.zeros((1, 2))}, tmp_path / "two.safetensors")
    for name in ("cut.npy", "cut.safetensors", "x.txt"):
        (tmp_path / name).write_bytes(b"x")
    for name, message in (
        ("flat.npy", "expected a matrix of numbers"),
        ("text.npy", "expected a matrix of numbers"),
        ("object.npy", "allow_pickle"),
        ("two.safetensors", "expected one tensor, got 2"),
        ("x.txt", "expected .npy or .safetensors"),
        ("cut.npy", ""),
        ("cut.safetensors", ""),
    ):
        with pytest.raises(ValueError, match=f"embeddings: cannot read .*{name}: .*{message}"):
            read_embeddings(tmp_path / name)


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
    with pytest.raises(FileNotFoundError, match=r"text_encoder.model: expected safetensors in"):
        encoder_in(tmp_path).load()
    shutil.copytree(wan_folder, tmp_path / "wan")
    text = tmp_path / "wan" / "text_encoder"
    config = json.loads((text / "config.json").read_text())
    refused = (
        r"text_encoder: expected a readable UMT5 encoder with its tokenizer in .*text_encoder, got "
    )
    for change, message in (
        ({"model_type": "t5"}, "model_type t5"),
        ({"num_layers": 3}, "one without"),
        ({"d_ff": 65}, ""),
    ):
        (text / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=refused + message):
            encoder_in(tmp_path / "wan").load()
    (text / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=refused):
        encoder_in(tmp_path / "wan").load()
