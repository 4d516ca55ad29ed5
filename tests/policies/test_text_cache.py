"""The text-embedding cache: what goes in comes out, what is missing is made, what is damaged is
named. Kills and ranks: test_embed.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastgrpo.policies import text_cache
from fastgrpo.policies.text_cache import COMMAND, TextCache, embed_missing, fingerprint, prompt_key

IDENTITY = {"encoder": "tiny", "max_sequence_length": "16", "dtype": "bfloat16"}
PROMPTS = [f"prompt {i}" for i in range(20)]


def encode(prompt: str) -> dict[str, Tensor]:
    """Tensors whose length and numbers follow from the prompt."""
    seed = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "little")
    draw = torch.Generator().manual_seed(seed)
    length = 1 + seed % 16
    return {
        "prompt_embeds": torch.randn(length, 8, generator=draw).bfloat16(),
        "pooled": torch.randn(4, generator=draw),
    }


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(got) == list(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype
        assert got[name].shape == tensor.shape
        assert torch.equal(got[name], tensor)


def assert_holds(cache: TextCache, prompts: list[str]) -> None:
    assert cache.missing(prompts) == []
    for prompt in prompts:
        assert_same(cache.get(prompt), encode(prompt))


def shards(cache: TextCache) -> list[Path]:
    return sorted(cache.folder.glob("*.safetensors"))


@pytest.fixture
def cache(tmp_path: Path) -> TextCache:
    return TextCache(tmp_path, IDENTITY)


@pytest.fixture
def filled(cache: TextCache, monkeypatch: pytest.MonkeyPatch) -> TextCache:
    """20 prompts in four shards."""
    monkeypatch.setattr(text_cache, "SHARD_PROMPTS", 5)
    embed_missing(cache, PROMPTS, encode)
    assert len(shards(cache)) == 4
    return cache


# What goes in comes out


def test_every_dtype_and_shape_comes_back_as_it_went_in(cache: TextCache, tmp_path: Path) -> None:
    padded = torch.randn(512, 8)
    tensors = {
        "cut": padded[:3],
        "half": torch.randn(2, 3).bfloat16(),
        "mask": torch.tensor([True, False]),
        "ids": torch.arange(5),
        "number": torch.tensor(0.5),
        "empty": torch.zeros(0, 8),
        "transposed": torch.randn(3, 4).T,
        "with gradient": torch.randn(2, requires_grad=True),
    }
    prompts = ["", "a\nb", "café \U0001f3a5", "x" * 5000, "\ud800"]
    assert embed_missing(cache, prompts, lambda _: tensors) == 5
    for c in (cache, TextCache(tmp_path, IDENTITY)):
        assert (len(c), c.missing(prompts)) == (5, [])
        for prompt in prompts:
            assert_same(c.get(prompt), {name: t.detach() for name, t in tensors.items()})
    (shard,) = shards(cache)
    assert shard.stat().st_size < padded.nbytes + 10_000  # the padding is not stored
    os.umask(umask := os.umask(0))
    assert shard.stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_caller_may_change_what_it_got(filled: TextCache) -> None:
    filled.get(PROMPTS[0])["prompt_embeds"].zero_()
    assert_same(filled.get(PROMPTS[0]), encode(PROMPTS[0]))


def test_any_reader_of_safetensors_finds_a_prompt_by_its_hash(filled: TextCache) -> None:
    assert prompt_key("prompt 3") == hashlib.sha256(b"prompt 3").hexdigest()[:32]
    stored = {}
    for path in shards(filled):
        with safe_open(path, framework="pt") as file:
            stored |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            assert json.loads(file.metadata()["identity"]) == IDENTITY
    assert len(stored) == 2 * len(PROMPTS)
    expected = encode("prompt 3")["prompt_embeds"]
    assert torch.equal(stored[f"{prompt_key('prompt 3')}/prompt_embeds"], expected)
    assert set(filled.folder.iterdir()) == set(shards(filled))


def test_missing_keeps_the_order_and_names_each_once(filled: TextCache) -> None:
    assert filled.missing(["new b", PROMPTS[3], "new a", "new b"]) == ["new b", "new a"]


def test_a_prompt_without_embedding_is_refused_with_the_command_that_makes_it(
    filled: TextCache,
) -> None:
    with pytest.raises(ValueError, match="'a new prompt'") as caught:
        filled.get("a new prompt")
    assert COMMAND in str(caught.value)
    with pytest.raises(ValueError, match="wordy") as caught:
        filled.get("wordy " * 1000)
    assert len(str(caught.value)) < 500


def test_what_another_process_has_made_meanwhile_is_found(
    filled: TextCache, tmp_path: Path
) -> None:
    embed_missing(TextCache(tmp_path, IDENTITY), ["later"], encode)
    assert_same(filled.get("later"), encode("later"))


# What is made


def test_only_what_is_missing_is_made(
    cache: TextCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def encode_one(prompt: str) -> dict[str, Tensor]:
        asked.append(prompt)
        return encode(prompt)

    assert embed_missing(cache, [*PROMPTS[:12], *PROMPTS[:5]], encode_one) == 12
    assert asked == PROMPTS[:12]
    assert f"0 of 12 prompts are in {cache.folder}, 12 to make\n" in capsys.readouterr().out
    again = TextCache(tmp_path, IDENTITY)
    assert embed_missing(again, PROMPTS[:12], encode_one) == 0
    assert (
        capsys.readouterr().out
        == f"text embeddings: 12 prompts ready in {cache.folder}, 0 of them new\n"
    )
    # Another list: what it lacks is made, what it does not name stays.
    assert embed_missing(again, PROMPTS[8:15], encode_one) == 3
    assert "4 of 7 prompts" in capsys.readouterr().out
    assert asked == PROMPTS[:15]
    assert_holds(TextCache(tmp_path, IDENTITY), PROMPTS[:15])


def test_another_identity_is_another_cache(filled: TextCache, tmp_path: Path) -> None:
    other = TextCache(tmp_path, IDENTITY | {"dtype": "float32"})
    assert other.missing(PROMPTS) == PROMPTS
    embed_missing(other, PROMPTS[:2], encode)
    same = TextCache(tmp_path, dict(reversed(IDENTITY.items())))  # the order of keys is irrelevant
    assert_holds(same, PROMPTS)
    assert (len(same), len(other)) == (20, 2)


@pytest.mark.parametrize(
    ("limit", "value", "sizes"),
    [
        ("SHARD_PROMPTS", 2048, [20]),
        ("SHARD_PROMPTS", 8, [8, 8, 4]),
        ("SHARD_BYTES", 1, [1] * 20),
        ("SHARD_SECONDS", 5.5, [6, 6, 6, 2]),
    ],
)
def test_a_shard_ends_by_count_by_size_or_by_time(
    cache: TextCache, monkeypatch: pytest.MonkeyPatch, limit: str, value: float, sizes: list[int]
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(text_cache, limit, value)

    def one_second_each(prompt: str) -> dict[str, Tensor]:
        now[0] += 1
        return encode(prompt)

    embed_missing(cache, PROMPTS, one_second_each)
    headers = [cache._read_header(path) for path in shards(cache)]
    assert [len(header) for header in headers] == sizes
    assert_holds(cache, PROMPTS)


def test_shards_grow_with_the_time_spent(cache: TextCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """200 hours at one prompt per minute come to about 100 shards, not to 12,000."""
    now, written = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(text_cache, "SHARD_PROMPTS", 10**9)
    monkeypatch.setattr(TextCache, "write", lambda self, shard: written.append(len(shard)))

    def one_minute_each(prompt: str) -> dict[str, Tensor]:
        now[0] += 60
        return {"x": torch.zeros(1)}

    embed_missing(cache, [str(i) for i in range(12_000)], one_minute_each)
    assert sum(written) == 12_000
    assert 60 < len(written) < 160
    assert max(written) < 12_000 / 19


@pytest.mark.parametrize(
    ("result", "got"),
    [
        ({}, "no tensor"),
        ({"good": torch.ones(2), "bad": torch.tensor([1.0, float("nan")])}, r"\['bad'\]"),
    ],
)
def test_an_encoder_without_finite_output_is_refused_and_what_was_made_stays(
    cache: TextCache, result: Any, got: str
) -> None:
    with pytest.raises(ValueError, match=f"'prompt 7': expected tensors of finite .* got .*{got}"):
        embed_missing(cache, PROMPTS, lambda p: result if p == PROMPTS[7] else encode(p))
    cache.refresh()
    assert_holds(cache, PROMPTS[:7])
    assert len(cache) == 7


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("a file")
    with pytest.raises(ValueError, match="cannot be written") as caught:
        embed_missing(TextCache(tmp_path / "text", IDENTITY), PROMPTS, encode)
    assert str(tmp_path / "text") in str(caught.value)


# Damage


def test_a_cache_in_which_nothing_may_be_removed_is_read(filled: TextCache) -> None:
    """Such as a read-only copy; here a folder stands for what cannot be removed."""
    left = filled.folder / ".partial-000001.safetensors"
    left.mkdir()
    os.utime(left, (0, 0))
    assert embed_missing(filled, [], lambda _: {}) == 0


def test_a_shard_that_was_deleted_is_made_again(filled: TextCache, tmp_path: Path) -> None:
    shards(filled)[1].unlink()
    again = TextCache(tmp_path, IDENTITY)
    assert again.missing(PROMPTS) == PROMPTS[5:10]
    embed_missing(again, PROMPTS, encode)
    assert_holds(TextCache(tmp_path, IDENTITY), PROMPTS)


@pytest.mark.parametrize("kept_bytes", [0, 5, 700, -1])
def test_a_shard_cut_short_is_named_at_once(
    filled: TextCache, tmp_path: Path, kept_bytes: int
) -> None:
    path = shards(filled)[2]
    path.write_bytes(path.read_bytes()[:kept_bytes])
    with pytest.raises(ValueError, match="cannot be read") as caught:
        TextCache(tmp_path, IDENTITY)
    assert str(path) in str(caught.value)
    assert COMMAND in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content[:-3] + bytes([content[-3] ^ 4]) + content[-2:],
        lambda content: content.replace(b"BF16", b"F16 ", 1),
        lambda content: content.replace(prompt_key(PROMPTS[12]).encode(), b"0" * 32, 1),
    ],
    ids=["tensor", "dtype", "prompt hash"],
)
def test_a_changed_byte_is_noticed_when_it_is_read(
    filled: TextCache, tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    path = shards(filled)[2]
    path.write_bytes(change(path.read_bytes()))
    refusals = []
    for prompt in PROMPTS:
        try:
            assert_same(TextCache(tmp_path, IDENTITY).get(prompt), encode(prompt))
        except ValueError as error:
            refusals.append(str(error))
    assert refusals
    assert all(str(path) in refusal or str(path.parent) in refusal for refusal in refusals)
    path.unlink()  # as the message says
    again = TextCache(tmp_path, IDENTITY)
    embed_missing(again, PROMPTS, encode)
    assert_holds(again, PROMPTS)


def test_embeddings_of_another_encoder_are_refused(filled: TextCache, tmp_path: Path) -> None:
    other = TextCache(tmp_path, IDENTITY | {"dtype": "float32"})
    stray = other.folder / shards(filled)[0].name
    other.folder.mkdir()
    os.link(shards(filled)[0], stray)
    with pytest.raises(ValueError, match=r"expected .*'float32'.* got .*'bfloat16'") as caught:
        other.refresh()
    assert str(stray) in str(caught.value)
    stray.unlink()
    save_file({"a": torch.zeros(1)}, stray)  # a file that is no shard
    with pytest.raises(ValueError, match="cannot be read"):
        other.refresh()


@pytest.mark.parametrize("prompts", ["[1]", "5", '{"key": 5}', '{"key": []}', "[" * 9999, "null"])
def test_an_odd_header_is_one_line(cache: TextCache, prompts: str) -> None:
    cache.folder.mkdir()
    header = {"identity": json.dumps(IDENTITY), "prompts": prompts}
    save_file({"a": torch.zeros(1)}, cache.folder / "000000-0.safetensors", header)
    with pytest.raises(ValueError, match=r"000000-0.safetensors: cannot be read \(.*Delete it"):
        cache.refresh()


def test_a_prompt_that_was_made_twice_keeps_the_embedding_it_had(
    filled: TextCache, tmp_path: Path
) -> None:
    for other in range(8):
        filled.write({PROMPTS[0]: {"x": torch.tensor([other])}})
    assert_holds(TextCache(tmp_path, IDENTITY), PROMPTS)


# The real size


def test_fifty_thousand_prompts(cache: TextCache, tmp_path: Path) -> None:
    prompts = [f"a long prompt number {i}" for i in range(50_000)]
    tensor = torch.zeros(2, 4, dtype=torch.bfloat16)
    made = embed_missing(cache, prompts, lambda p: {"prompt_embeds": tensor + float(p.split()[-1])})
    assert made == 50_000
    start = time.monotonic()
    again = TextCache(tmp_path, IDENTITY)
    assert time.monotonic() - start < 10
    assert (len(again), again.missing(prompts)) == (50_000, [])
    assert len(shards(again)) == -(-50_000 // text_cache.SHARD_PROMPTS)
    for i in range(0, 50_000, 499):
        assert torch.equal(again.get(prompts[i])["prompt_embeds"], tensor + float(i))


def test_a_fingerprint_is_that_of_names_and_bytes(tmp_path: Path) -> None:
    folder = tmp_path / "encoder"
    (folder / "part").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    with open(folder / "part" / "weights", "wb") as weights:
        weights.truncate(40 << 20)
    seen = [fingerprint(folder)]
    assert fingerprint(folder) == seen[0]
    (folder / ".cache").write_text("a tool's own")
    assert fingerprint(folder) == seen[0]
    for change in (
        lambda: (folder / "config.json").write_text('{"a": 1}'),
        lambda: (folder / "config.json").rename(folder / "settings.json"),
        lambda: write_at(folder / "part" / "weights", 0),
        lambda: write_at(folder / "part" / "weights", (40 << 20) - 1),
        lambda: write_at(folder / "part" / "weights", 8 << 20),
        lambda: os.truncate(folder / "part" / "weights", 39 << 20),
    ):
        change()
        seen.append(fingerprint(folder))
    assert len(set(seen)) == len(seen) == 7
    # A single byte between the samples.
    every = fingerprint(folder, whole=True)
    write_at(folder / "part" / "weights", (8 << 20) + (2 << 20))
    assert fingerprint(folder) == seen[-1]
    assert fingerprint(folder, whole=True) != every
    with pytest.raises(FileNotFoundError, match="none"):
        fingerprint(tmp_path / "none")


def write_at(path: Path, place: int) -> None:
    with open(path, "r+b") as file:
        file.seek(place)
        file.write(b"x")
