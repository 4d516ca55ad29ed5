"""The text-embedding cache: what goes in comes out, what is missing is made and said, what is
damaged is named. Kills: test_embed.py.
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
PROMPTS = [f"caption {i}" for i in range(20)]


def encode(prompt: str) -> dict[str, Tensor]:
    """A length, and numbers, that are the prompt's own."""
    seed = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "little")
    draw = torch.Generator().manual_seed(seed)
    length = 1 + seed % 16
    return {
        "prompt_embeds": torch.randn(length, 8, generator=draw).bfloat16(),
        "pooled": torch.randn(4, generator=draw),
    }


class Counting:
    """`encode` that notes what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, prompt: str) -> dict[str, Tensor]:
        self.asked.append(prompt)
        return encode(prompt)


def assert_same(there: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(there) == list(expected)
    for name, tensor in expected.items():
        assert there[name].dtype == tensor.dtype
        assert there[name].shape == tensor.shape
        assert torch.equal(there[name], tensor)


def assert_holds(cache: TextCache, prompts: list[str]) -> None:
    assert cache.missing(prompts) == []
    for prompt in prompts:
        assert_same(cache.get(prompt), encode(prompt))


def shards(cache: TextCache) -> list[Path]:
    return sorted(cache.folder.glob("shard-*.safetensors"))


@pytest.fixture
def cache(tmp_path: Path) -> TextCache:
    return TextCache(tmp_path / "text", IDENTITY)


@pytest.fixture
def filled(cache: TextCache) -> TextCache:
    """20 prompts in four shards."""
    embed_missing(cache, PROMPTS, encode, shard_prompts=5)
    assert len(shards(cache)) == 4
    return cache


# --- what goes in comes out
# -------------------------------------------------------------------------------------------


def test_every_dtype_and_shape_comes_back_as_it_went_in(cache: TextCache, tmp_path: Path) -> None:
    padded = torch.randn(512, 8)
    tensors = {
        "cut": padded[:3],
        "half": torch.randn(2, 3).bfloat16(),
        "mask": torch.tensor([True, False]),
        "ids": torch.arange(5),
        "number": torch.tensor(0.5),
        "nothing": torch.zeros(0, 8),
        "turned": torch.randn(3, 4).T,
        "asks for a gradient": torch.randn(2, requires_grad=True),
    }
    odd = ["", "a\nb", "café \U0001f3a5", "x" * 5000, "\ud800"]
    assert embed_missing(cache, odd, lambda _: tensors) == 5
    for c in (cache, TextCache(tmp_path / "text", IDENTITY)):
        assert (len(c), c.missing(odd)) == (5, [])
        for prompt in odd:
            assert_same(c.get(prompt), {name: t.detach() for name, t in tensors.items()})
    assert (
        cache.nbytes == sum(p.stat().st_size for p in shards(cache)) < padded.nbytes + 10_000
    )  # the padding is not stored
    assert {oct(p.stat().st_mode & 0o777) for p in cache.folder.iterdir()} == {
        oct(0o666 & ~current_umask())
    }


def current_umask() -> int:
    os.umask(umask := os.umask(0))
    return umask


def test_a_caller_may_change_what_it_got(filled: TextCache) -> None:
    filled.get(PROMPTS[0])["prompt_embeds"].zero_()
    assert_same(filled.get(PROMPTS[0]), encode(PROMPTS[0]))


def test_what_is_on_disk(filled: TextCache) -> None:
    """Any reader of safetensors finds a prompt by its hash; the index counts the prompts and says
    whose they are.
    """
    assert prompt_key("caption 3") == hashlib.sha256(b"caption 3").hexdigest()[:32]
    stored = {}
    for path in shards(filled):
        with safe_open(path, framework="pt") as file:
            stored |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            assert json.loads(file.metadata()["identity"]) == IDENTITY
    assert len(stored) == 2 * len(PROMPTS)
    assert torch.equal(
        stored[f"{prompt_key('caption 3')}/prompt_embeds"], encode("caption 3")["prompt_embeds"]
    )
    index = json.loads((filled.folder / "index.json").read_text())
    assert (index["identity"], index["prompt_count"]) == (IDENTITY, 20)
    assert index["shards"].keys() == {p.name for p in shards(filled)}
    assert not list(filled.folder.glob(".*"))


def test_missing_keeps_the_order_and_names_each_once(filled: TextCache) -> None:
    assert filled.missing(["new b", PROMPTS[3], "new a", "new b"]) == ["new b", "new a"]


def test_a_prompt_without_embedding_is_refused_with_the_command_that_makes_it(
    filled: TextCache,
) -> None:
    with pytest.raises(ValueError, match="'a new caption'") as caught:
        filled.get("a new caption")
    assert COMMAND in str(caught.value)
    with pytest.raises(ValueError, match="wordy") as caught:
        filled.get("wordy " * 1000)
    assert len(str(caught.value)) < 500


def test_what_another_process_has_made_meanwhile_is_found(
    filled: TextCache, tmp_path: Path
) -> None:
    embed_missing(TextCache(tmp_path / "text", IDENTITY), ["later"], encode)
    assert_same(filled.get("later"), encode("later"))


# --- what is made, and what is said
# -----------------------------------------------------------------------------------


def test_only_what_is_missing_is_made(
    cache: TextCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = Counting()
    assert embed_missing(cache, [*PROMPTS[:12], *PROMPTS[:5]], encoder) == 12
    assert encoder.asked == PROMPTS[:12]
    assert f"0 of 12 prompts are in {cache.folder}, 12 to make\n" in capsys.readouterr().out
    again = TextCache(tmp_path / "text", IDENTITY)
    assert embed_missing(again, PROMPTS[:12], encoder) == 0
    assert capsys.readouterr().out.startswith(
        f"text embeddings: 12 prompts ready in {cache.folder}, 0 of them new, 0.0"
    )
    assert (
        embed_missing(again, PROMPTS[8:15], encoder) == 3
    )  # another list: what it lacks is made, what it does not name stays
    said = capsys.readouterr().out
    assert "4 of 7 prompts" in said
    assert "3 to make; 8 of prompts that are not in this list stay" in said
    assert encoder.asked == PROMPTS[:15]
    assert_holds(TextCache(tmp_path / "text", IDENTITY), PROMPTS[:15])


def test_another_identity_is_another_cache_and_the_difference_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for identity in (IDENTITY, IDENTITY | {"encoder": "large", "dtype": "float32"}):
        embed_missing(TextCache(tmp_path, identity), PROMPTS, encode)
    capsys.readouterr()
    other = TextCache(tmp_path, IDENTITY | {"dtype": "float32"})
    assert other.missing(PROMPTS) == PROMPTS
    embed_missing(other, PROMPTS[:2], encode)
    first = TextCache(
        tmp_path, dict(reversed(IDENTITY.items()))
    )  # the order of the keys is none of its business
    assert (
        f"note: the embeddings in {first.folder} do not serve: dtype: expected 'float32', found 'bfloat16'\n"
        in capsys.readouterr().out
    )
    assert_holds(first, PROMPTS)
    assert (len(first), len(other)) == (20, 2)


@pytest.mark.parametrize(
    ("limits", "sizes"),
    [
        ({}, [20]),
        ({"shard_prompts": 8}, [4, 8, 8]),
        ({"shard_bytes": 1}, [1] * 20),
        ({"least_seconds": 5.5}, [2, 6, 6, 6]),
    ],
)
def test_a_shard_ends_by_count_by_size_or_by_time(
    cache: TextCache, monkeypatch: pytest.MonkeyPatch, limits: dict[str, Any], sizes: list[int]
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def slowly(prompt: str) -> dict[str, Tensor]:
        now[0] += 1
        return encode(prompt)

    embed_missing(cache, PROMPTS, slowly, **limits)
    index = json.loads((cache.folder / "index.json").read_text())
    assert sorted(len(shard["prompts"]) for shard in index["shards"].values()) == sizes
    assert_holds(cache, PROMPTS)


def test_shards_grow_with_the_time_spent(cache: TextCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow encoder must not leave a shard for every minute: 200 hours at a prompt a minute come
    to about 100.
    """
    now, written = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(TextCache, "write_shard", lambda self, shard: written.append(len(shard)))

    def slowly(prompt: str) -> dict[str, Tensor]:
        now[0] += 60
        return {"x": torch.zeros(1)}

    embed_missing(cache, [str(i) for i in range(12_000)], slowly, shard_prompts=10**9)
    assert sum(written) == 12_000
    assert 60 < len(written) < 160
    assert max(written) < 12_000 / 19


@pytest.mark.parametrize(
    ("result", "words"),
    [
        ({}, "no tensor"),
        ({"good": torch.ones(2), "bad": torch.tensor([1.0, float("nan")])}, "not finite in 'bad'"),
    ],
)
def test_an_encoder_that_gives_nonsense_is_refused_and_what_was_made_stays(
    cache: TextCache, result: Any, words: str
) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        embed_missing(cache, PROMPTS, lambda p: result if p == PROMPTS[7] else encode(p))
    assert repr(PROMPTS[7]) in str(caught.value)
    cache.refresh()
    assert_holds(cache, PROMPTS[:7])
    assert len(cache) == 7


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("a file")
    with pytest.raises(ValueError, match="cannot be written") as caught:
        embed_missing(TextCache(tmp_path / "text", IDENTITY), PROMPTS, encode)
    assert str(tmp_path / "text") in str(caught.value)


# --- index and damage
# -------------------------------------------------------------------------------------------------


def forget_a_shard(index: Path) -> None:
    content = json.loads(index.read_text())
    content["shards"].pop(next(iter(content["shards"])))
    index.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (Path.unlink, ""),
        (forget_a_shard, ""),
        (lambda index: index.write_text('{"identity": {"encoder"'), "unreadable"),
        (lambda index: index.write_text("[1, 2]"), "unreadable"),
        (
            lambda index: index.write_text(
                json.dumps({"identity": IDENTITY, "shards": {"shard-0": {"bytes": 3}}})
            ),
            "unreadable",
        ),
    ],
    ids=["gone", "lacks a shard", "cut short", "no object", "incomplete"],
)
def test_the_index_is_made_again_from_the_shards(
    filled: TextCache,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Path], object],
    said: str,
) -> None:
    index = filled.folder / "index.json"
    before = json.loads(index.read_text())
    spoil(index)
    capsys.readouterr()
    again = TextCache(tmp_path / "text", IDENTITY)
    assert_holds(again, PROMPTS)
    assert said in capsys.readouterr().out
    embed_missing(again, PROMPTS, Counting())
    after = json.loads(index.read_text())
    assert after["shards"] == before["shards"]
    assert after["prompt_count"] == 20


def test_a_shard_that_was_deleted_is_made_again(
    filled: TextCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = shards(filled)[1]
    gone.unlink()
    again, encoder = TextCache(tmp_path / "text", IDENTITY), Counting()
    assert gone.name in capsys.readouterr().out
    assert embed_missing(again, PROMPTS, encoder) == len(encoder.asked) == 5
    assert_holds(again, PROMPTS)
    assert gone.exists()  # the same content, so the same name
    capsys.readouterr()
    assert_holds(TextCache(tmp_path / "text", IDENTITY), PROMPTS)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("kept", [0, 5, 700, -1])
def test_a_shard_cut_short_is_named_at_once(
    filled: TextCache, tmp_path: Path, kept: int, indexed: bool
) -> None:
    path = shards(filled)[2]
    path.write_bytes(path.read_bytes()[:kept])
    if not indexed:
        (filled.folder / "index.json").unlink()
    with pytest.raises(ValueError, match="cannot be read") as caught:
        TextCache(tmp_path / "text", IDENTITY)
    assert str(path) in str(caught.value)
    assert COMMAND in str(caught.value)


@pytest.mark.parametrize("place", ["tensors", "header"])
def test_a_changed_byte_is_noticed_when_it_is_read(
    filled: TextCache, tmp_path: Path, place: str
) -> None:
    path = shards(filled)[2]
    content = bytearray(path.read_bytes())
    content[-3 if place == "tensors" else 20] ^= 4
    path.write_bytes(content)
    again, refusals = TextCache(tmp_path / "text", IDENTITY), []
    for prompt in PROMPTS:
        try:
            assert_same(again.get(prompt), encode(prompt))
        except ValueError as error:
            refusals.append(str(error))
    assert 1 <= len(refusals) <= 5
    assert all(str(path) in refusal for refusal in refusals)
    path.unlink()  # as the message says
    embed_missing(again, PROMPTS, encode)
    assert_holds(again, PROMPTS)


def test_embeddings_of_another_encoder_are_not_taken_for_ones_own(
    filled: TextCache, tmp_path: Path
) -> None:
    other = TextCache(tmp_path / "text", IDENTITY | {"dtype": "float32"})
    stray = other.folder / shards(filled)[0].name
    other.folder.mkdir()
    os.link(shards(filled)[0], stray)
    with pytest.raises(ValueError, match="dtype: expected 'float32', found 'bfloat16'") as caught:
        other.refresh()
    assert str(stray) in str(caught.value)
    stray.unlink()
    os.link(filled.folder / "index.json", other.folder / "index.json")
    with pytest.raises(ValueError, match="dtype: expected 'float32', found 'bfloat16'"):
        other.refresh()
    save_file({"a": torch.zeros(1)}, stray)  # somebody else's file
    (other.folder / "index.json").unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        other.refresh()


def test_a_prompt_that_was_made_twice_keeps_the_embedding_it_had(
    filled: TextCache, tmp_path: Path
) -> None:
    for other in range(
        8
    ):  # names from content: some of these come before the first one's, some after
        filled.write_shard({PROMPTS[0]: {"x": torch.tensor([other])}})
    for _ in range(2):
        again = TextCache(tmp_path / "text", IDENTITY)
        assert_holds(again, PROMPTS)
        again.write_index()


# --- the real size
# ----------------------------------------------------------------------------------------------------


def test_fifty_thousand_prompts(cache: TextCache, tmp_path: Path) -> None:
    prompts = [f"a long caption number {i}" for i in range(50_000)]
    tensor = torch.zeros(2, 4, dtype=torch.bfloat16)
    assert (
        embed_missing(cache, prompts, lambda p: {"prompt_embeds": tensor + float(p.split()[-1])})
        == 50_000
    )
    again = TextCache(tmp_path / "text", IDENTITY)
    assert (len(again), again.missing(prompts)) == (50_000, [])
    assert len(shards(again)) == -(-50_000 // text_cache.SHARD_PROMPTS)
    assert (again.folder / "index.json").stat().st_size < 4_000_000
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
        lambda: os.truncate(folder / "part" / "weights", 39 << 20),
    ):
        change()
        seen.append(fingerprint(folder))
    assert len(set(seen)) == len(seen) == 6
    with pytest.raises(FileNotFoundError, match="none"):
        fingerprint(tmp_path / "none")


def write_at(path: Path, place: int) -> None:
    with open(path, "r+b") as file:
        file.seek(place)
        file.write(b"x")
