"""Filling the text-embedding cache: killed anywhere, beside another job, on two ranks, with a real
encoder, by the command.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fastgrpo import __main__ as command_line
from fastgrpo.distributed import collectives
from fastgrpo.policies import text_cache
from fastgrpo.policies.text_cache import TextCache, embed_missing, fingerprint

IDENTITY = {"encoder": "tiny"}
PROMPTS = [f"prompt {i}" for i in range(20)]


def encode(prompt: str) -> dict[str, Tensor]:
    """A tensor whose length and numbers follow from the prompt."""
    number = int(prompt.split()[-1])
    return {"prompt_embeds": torch.full((1 + number % 5, 8), number, dtype=torch.bfloat16)}


def assert_holds(cache: TextCache, prompts: list[str]) -> None:
    assert cache.missing(prompts) == []
    for prompt in prompts:
        assert torch.equal(cache.get(prompt)["prompt_embeds"], encode(prompt)["prompt_embeds"])


# Killed, and beside another job


def killed_at(point: str, folder: Path) -> None:
    """Embed PROMPTS, five per shard, and die by SIGKILL in the second shard's encoding, writing or
    renaming, or after the last one.
    """
    replace, save, calls = os.replace, save_file, {"encode": 0, "save": 0, "replace": 0}

    def count(name: str, at: int) -> None:
        calls[name] += 1
        if name == point and calls[name] == at:
            os.kill(os.getpid(), signal.SIGKILL)

    def encode_one(prompt: str) -> dict[str, Tensor]:
        count("encode", 8)
        return encode(prompt)

    def save_half(tensors: Any, path: Path, header: Any) -> None:
        save(tensors, path, header)
        os.truncate(path, path.stat().st_size // 2)
        count("save", 2)
        save(tensors, path, header)

    def replace_file(old: Path, new: Path) -> None:
        count("replace", 2)
        replace(old, new)

    text_cache.save_file, os.replace, text_cache.SHARD_PROMPTS = save_half, replace_file, 5
    embed_missing(TextCache(folder, IDENTITY), PROMPTS, encode_one)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("point", "left"), [("encode", 15), ("save", 15), ("replace", 15), ("end", 0)]
)
def test_after_a_kill_it_goes_on_where_it_was(tmp_path: Path, point: str, left: int) -> None:
    process = multiprocessing.get_context("fork").Process(target=killed_at, args=(point, tmp_path))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    cache, asked = TextCache(tmp_path, IDENTITY), list[str]()
    hidden = list(cache.folder.glob(".*"))
    assert len(hidden) == (point in ("save", "replace"))
    for path in hidden:  # not removed while its writer might live
        embed_missing(cache, PROMPTS[:1], encode)
        assert path.exists()
        os.utime(path, (time.time() - 7200,) * 2)

    def encode_one(prompt: str) -> dict[str, Tensor]:
        asked.append(prompt)
        return encode(prompt)

    assert embed_missing(cache, PROMPTS, encode_one) == len(asked) == left
    assert_holds(TextCache(tmp_path, IDENTITY), PROMPTS)
    assert not list(cache.folder.glob(".*"))


def embed_with_bits_of_its_own(folder: Path, value: float) -> None:
    text_cache.SHARD_PROMPTS = 3
    for part in range(4):
        prompts = [f"prompt {i}" for i in range(60 * (part + 1))]
        cache = TextCache(folder, IDENTITY)
        embed_missing(cache, prompts, lambda _: {"x": torch.full((64,), value)})


def test_two_jobs_at_once_leave_a_whole_cache(tmp_path: Path) -> None:
    """Both make the same prompts with other bits, as two kinds of GPU would: each embedding is one
    of the two, whole, and stays the one it is.
    """
    fork = multiprocessing.get_context("fork")
    jobs = [fork.Process(target=embed_with_bits_of_its_own, args=(tmp_path, x)) for x in (1.0, 2.0)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert [job.exitcode for job in jobs] == [0, 0]
    cache, again = TextCache(tmp_path, IDENTITY), TextCache(tmp_path, IDENTITY)
    prompts = [f"prompt {i}" for i in range(240)]
    assert cache.missing(prompts) == []
    values = {p: cache.get(p)["x"] for p in prompts}
    for x in values.values():
        assert x.tolist() in ([1.0] * 64, [2.0] * 64)
    embed_missing(again, [*prompts, "prompt 240"], encode)
    assert all(torch.equal(again.get(p)["x"], x) for p, x in values.items())
    assert not list(cache.folder.glob(".*"))


RANKS = """
    import json, torch
    from pathlib import Path
    from fastgrpo.distributed import collectives
    from fastgrpo.config import RuntimeConfig
    from fastgrpo.policies.text_cache import TextCache, embed_missing
    folder, rank = Path({folder!r}), collectives.rank()
    prompts, asked = [f"prompt {{i}}" for i in range(40)], []
    def encode(prompt):
        asked.append(prompt)
        return {{"x": torch.tensor([float(prompt.split()[1]), rank])}}
    alone = TextCache(folder / "alone", {{}})
    embed_missing(alone, prompts, encode)   # before collectives.start: its share
    alone_asked = list(asked)
    collectives.start(RuntimeConfig(device="cpu"))
    cache = TextCache(folder / "together", {{}})
    asked.clear()
    embed_missing(cache, prompts[:30], encode)
    embed_missing(cache, prompts, encode)
    seen = [cache.get(p)["x"].tolist() for p in prompts]
    together_asked = list(asked)
    collectives.gather(None)
    alone.refresh()
    try:
        embed_missing(TextCache(folder / f"own {{rank}}", {{}}), prompts, encode)
        refused = ""
    except ValueError as error:
        refused = str(error)
    try:
        broken = encode if rank else lambda prompt: {{}}
        embed_missing(TextCache(folder / "one fails", {{}}), prompts, broken)
        failed = ""
    except ValueError as error:
        failed = str(error)
    collectives.stop()
    result = [alone_asked, alone.missing(prompts), together_asked, seen, refused, failed]
    print(json.dumps(result))
"""


def test_ranks_share_the_work_and_all_see_all_of_it(
    run_ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    results = run_ranks(textwrap.dedent(RANKS).format(folder=str(tmp_path)))
    prompts = [f"prompt {i}" for i in range(40)]
    shares = [set(alone_asked) for alone_asked, *_ in results]
    assert shares[0] | shares[1] == set(prompts)
    assert not shares[0] & shares[1]
    assert min(map(len, shares)) > 10
    for rank, (_, missing, together_asked, seen, refused, failed) in enumerate(results):
        # An encoder that fails on one rank ends the command on all.
        assert failed.startswith("text embeddings: failed on rank 0: " if rank else "the text enco")
        assert missing == []
        # The same shares before and after `collectives.start`, and nothing twice.
        assert sorted(together_asked) == sorted(shares[rank])
        assert seen == [[i, float(p in shares[1])] for i, p in enumerate(prompts)]
        assert "expected a folder on a file system that all nodes share" in refused


# A real encoder, and the command


def test_a_real_text_encoder(wan_folder: Path, tmp_path: Path) -> None:
    """What the cache gives, padded with zeros, is what diffusers' pipeline makes of the prompt, bit
    for bit.
    """
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(wan_folder)
    identity = {
        "encoder": fingerprint(wan_folder / "text_encoder"),
        "tokenizer": fingerprint(wan_folder / "tokenizer"),
    }
    prompts = ["a red square", "", "two dogs run along a very long beach"]

    def encode_one(prompt: str) -> dict[str, Tensor]:
        embeddings, _ = pipe.encode_prompt(
            prompt, do_classifier_free_guidance=False, max_sequence_length=24
        )
        length = int(
            pipe.tokenizer(
                prompt, truncation=True, max_length=24, return_tensors="pt"
            ).attention_mask.sum()
        )
        return {"prompt_embeds": embeddings[0, :length]}

    cache = TextCache(tmp_path, identity)
    with torch.no_grad():
        embed_missing(cache, prompts, encode_one)
        expected = {
            c: pipe.encode_prompt(c, do_classifier_free_guidance=False, max_sequence_length=24)[0][
                0
            ]
            for c in prompts
        }
    cache = TextCache(tmp_path, identity)
    for prompt, whole in expected.items():
        embeddings = cache.get(prompt)["prompt_embeds"]
        assert len(embeddings) == min(
            len(prompt), 24
        )  # this tokenizer makes a token of a byte, and adds none
        assert torch.equal(
            torch.cat([embeddings, embeddings.new_zeros(24 - len(embeddings), 32)]), whole
        )


COMMAND_PARTS = """
    from __future__ import annotations
    from collections.abc import Sequence
    from pathlib import Path
    import torch
    from fastgrpo.shapes.policy import ShapesPolicy
    from fastgrpo.shapes.captions import text_tokens
    from fastgrpo.policies.text_cache import TextCache, embed_missing

    class EmbeddingPolicy(ShapesPolicy):
        def embed(self, prompts: Sequence[str], device: torch.device) -> None:
            cache = TextCache(Path("text"), {"encoder": "tiny"})
            embed_missing(cache, prompts, lambda p: {"text": text_tokens([p])[0]})
"""


def test_the_command_embeds_the_prompts_of_a_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = [
        f"a {color} {shape} moving left"
        for color in ("red", "green", "blue")
        for shape in ("square", "cross", "triangle")
    ]
    (tmp_path / "embedding_parts.py").write_text(textwrap.dedent(COMMAND_PARTS))
    (tmp_path / "train.txt").write_text("\n".join(prompts) + "\n")
    (tmp_path / "validation.jsonl").write_text(
        '{"prompt": "a red cross moving left"}\n{"prompt": "a red cross moving up"}\n'
    )
    (tmp_path / "bad.jsonl").write_text(
        '{"prompt": "a red cross moving left"}\n{"prompt": "a pink cross moving left"}\n'
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def embed(train: str, *more: str) -> str:
        parts = [
            "--policy",
            "embedding_parts.EmbeddingPolicy",
            "--reward",
            "fastgrpo.shapes.judge.ShapesJudge",
        ]
        assert (
            command_line.main(
                ["embed", *parts, "--runtime.device", "cpu", "--prompts.train", train, *more]
            )
            == 0
        )
        assert not collectives.started()
        return capsys.readouterr().out

    said = embed("train.txt", "--prompts.validation", "validation.jsonl")
    cache = TextCache(tmp_path / "text", {"encoder": "tiny"})
    assert cache.missing([*prompts, "a red cross moving up"]) == []
    assert f"0 of 10 prompts are in text/{cache.folder.name}, 10 to make" in said
    assert f"10 prompts ready in text/{cache.folder.name}, 10 of them new" in said
    assert "EmbeddingPolicy has what it needs for 9 training and 2 validation prompts" in said
    assert f"9 prompts ready in text/{cache.folder.name}, 0 of them new" in embed("train.txt")
    with pytest.raises(SystemExit) as stop:
        embed("bad.jsonl")
    refused = capsys.readouterr().err
    assert stop.value.code == 2
    assert refused.startswith("error: prompts.train: ")
    assert "a pink cross moving left" in refused
    assert "bad.jsonl" in refused
    assert refused.count("\n") == 1
