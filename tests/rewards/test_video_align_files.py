"""What VideoAlign publishes: settings, prompt, tokens and weights; and every way in which it can be
wrong.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import errors
from published_video_align import MEAN, PROMPT, STD, Source
from safetensors.torch import save_file
from torch import Tensor

from fastgrpo import hub
from fastgrpo.rewards.models.video_align import VideoAlign
from fastgrpo.rewards.models.video_align_files import (
    Published,
    RequestTokens,
    check_weights,
    checkpoint_of,
    merge,
    read_prompt,
    read_request,
    read_settings,
    read_weights,
)

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


def test_a_request_is_what_one_tokenisation_gives(published: Source) -> None:
    request = read_request(published.checkpoint / "tokenizer", PROMPT)
    assert isinstance(request, RequestTokens)
    told = published.tokenizer.decode(request.ids("a <|MQ_reward|>", 2))
    assert told.startswith(
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|><|video_pad|>"
    )
    assert told.endswith("here: <|TA_reward|>\nEND\n<|im_end|>\n<|im_start|>assistant\n")
    assert [
        request.ids("a <|MQ_reward|>", 2).count(token)
        for token in (request.video, *request.rewards)
    ] == [2, 1, 1, 1]
    assert request.vocabulary == len(published.tokenizer)


def test_a_prompt_as_text(published: Source, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text(PROMPT)
    assert read_prompt(str(tmp_path / "prompt.txt")) == PROMPT == published.judge().prompt


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        (
            "p.txt",
            "no tokens",
            "expected one text with <|VQ_reward|>, <|MQ_reward|>, <|TA_reward|> in this order "
            "and {text_prompt}, each once",
        ),
        (
            "p.txt",
            PROMPT.replace("{text_prompt}", ""),
            "found 0; it is prompt_template.py of github.com/KwaiVGI/VideoAlign",
        ),
        (
            "p.txt",
            PROMPT.replace("VQ", "AA").replace("MQ", "VQ").replace("AA", "MQ"),
            "in this order",
        ),
        ("p.py", f'A = """{PROMPT}"""\nB = A\nC = """{PROMPT}"""', "found 2"),
        ("p.py", "A = (", "expected readable text in"),
    ],
)
def test_a_prompt_that_is_none(tmp_path: Path, name: str, content: str, problem: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (special characters)
        read_prompt(str(tmp_path / name))
    assert problem in str(caught.value)
    assert str(caught.value).startswith("reward.init_args.prompt_file: ")


def test_without_a_prompt(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"prompt_file: expected the file .* prompt_template.py of github.com/KwaiVGI",
    ):
        VideoAlign()
    with pytest.raises(FileNotFoundError, match=r"reward.init_args.prompt_file: expected a file"):
        VideoAlign(prompt_file=str(tmp_path / "none.py"))


def test_settings(published: Source) -> None:
    settings = read_settings(published.folder / "reward")
    assert settings == Published("Qwen/Qwen2-VL-2B-Instruct", 2.0, 200704, 4, 2.0, MEAN, STD)
    assert checkpoint_of(published.folder / "reward").name == "checkpoint-20"


def test_the_last_checkpoint(tmp_path: Path) -> None:
    for number in ("9", "100", "20", "x"):
        (tmp_path / f"checkpoint-{number}").mkdir()
    assert checkpoint_of(tmp_path).name == "checkpoint-100"


def test_names_and_lora(published: Source) -> None:
    """All published names arrive, merged as peft merges them; a name of the new layout is the same
    as one of the old.
    """
    folder = published.checkpoint
    weights = read_weights(folder)
    shapes = {
        name: value.shape
        for name, value in weights.items()
        if "lora_" not in name and "_head" not in name
    }
    check_weights(weights, shapes, 4)
    merged, expected = (
        merge(weights, shapes, 2.0, torch.float32),
        published.tuned.base_model.model.model,
    )
    for name, part in expected.named_modules():
        if hasattr(part, "get_delta_weight"):
            whole = part.base_layer.weight + part.get_delta_weight("default")
            assert torch.allclose(merged[f"{name}.weight"], whole, atol=1e-6)
            assert not torch.equal(merged[f"{name}.weight"], part.base_layer.weight)
    assert torch.equal(merged["visual.merger.ln_q.weight"], expected.visual.merger.ln_q.weight)
    assert (
        merge(weights, ["language_model.norm.weight"], 2.0, torch.bfloat16)[
            "language_model.norm.weight"
        ].dtype
        == torch.bfloat16
    )
    save_file(
        {
            name: value.contiguous()
            for name, value in published.tuned.state_dict().items()
            if "lm_head" not in name
        },
        folder / "model.safetensors",
    )
    new = read_weights(folder)
    (folder / "model.safetensors").unlink()
    assert new.keys() == weights.keys() - {"lm_head.weight"}
    assert all(torch.equal(new[name], weights[name]) for name in new)


def edit(section: str, **changes: Any) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        path = folder / "model_config.json"
        content = json.loads(path.read_text())
        path.write_text(json.dumps(content | {section: content[section] | changes}))

    return spoil


def retensor(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        path = folder / "checkpoint-20" / "model.pth"
        weights = torch.load(path, weights_only=True)
        change(weights)
        torch.save(weights, path)

    return spoil


Q = "base_model.model.model.layers.1.self_attn.q_proj"
HEAD = "base_model.model.rm_head.weight"


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (
            lambda f: (f / "model_config.json").unlink(),
            "a checkpoint of VideoAlign, found no .*model_config.json",
        ),
        (lambda f: (f / "model_config.json").write_text("{}"), "got no 'data_config'"),
        (
            lambda f: (f / "model_config.json").write_text("{"),
            "expected the settings of a VideoAlign",
        ),
        (
            edit("data_config", sample_type="multi_pts"),
            "sample_type: expected 'uniform', got 'multi_pts'",
        ),
        (
            edit("inference_config", MQ_std=0.0),
            "expected positive fps",
        ),
        (
            edit("peft_lora_config", lora_r=0),
            "expected the settings",
        ),
        (
            lambda f: shutil.rmtree(f / "checkpoint-20"),
            "expected a folder checkpoint-N in",
        ),
        (
            lambda f: shutil.rmtree(f / "checkpoint-20" / "tokenizer"),
            "expected a readable tokenizer",
        ),
        (
            lambda f: (f / "checkpoint-20" / "model.pth").unlink(),
            "expected model.pth, or model.safetensors, in",
        ),
        (
            lambda f: (f / "checkpoint-20" / "model.pth").write_bytes(b"no"),
            "expected readable weights in .*model.pth",
        ),
        (
            lambda f: torch.save({"a": Path("b")}, f / "checkpoint-20" / "model.pth"),
            "expected readable weights in",
        ),
        (
            lambda f: torch.save({"a": 1}, f / "checkpoint-20" / "model.pth"),
            "no mapping of names to tensors",
        ),
        (
            retensor(lambda w: w.pop(HEAD)),
            "got 1 problems: no rm_head.weight",
        ),
        (
            retensor(lambda w: w.update({HEAD: torch.zeros(2, 64)})),
            r"weight of \[2, 64\] instead of \[1, 64\]",
        ),
        (
            retensor(lambda w: w.pop(f"{Q}.base_layer.bias")),
            "no language_model.layers.1.self_attn.q_proj.bias",
        ),
        (
            retensor(lambda w: w.pop(f"{Q}.lora_B.default.weight")),
            "1 problems: no .*q_proj.lora_B.weight",
        ),
        (
            edit("peft_lora_config", lora_r=8),
            r"of \[4, 64\] instead of \[8, 64\]",
        ),
        (
            retensor(lambda w: w.update({"extra": torch.zeros(1)})),
            "1 problems: an unknown extra",
        ),
        (
            retensor(
                lambda w: w.update(
                    {"base_model.model.model.embed_tokens.weight": torch.zeros(9, 64)}
                ),
            ),
            r"embed_tokens.weight of \[9, 64\] instead of",
        ),
    ],
)
def test_what_is_wrong_with_a_checkpoint(
    published: Source,
    tmp_path: Path,
    spoil: Callable[[Path], object],
    problem: str,
) -> None:
    folder = Path(shutil.copytree(published.folder / "reward", tmp_path / "reward"))
    spoil(folder)
    judge = published.judge(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=problem) as caught:
        judge.load(CPU)
    assert str(caught.value).startswith("reward.init_args.model: ")


def test_what_is_wrong_with_a_base(
    published: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FileNotFoundError, match=r"reward.init_args.base: expected a model in"):
        published.judge(base=str(tmp_path)).load(CPU)
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ValueError, match=r"args.base: .* expected qwen2_vl, got 'clip'"):
        published.judge(base=str(tmp_path)).load(CPU)
    with pytest.raises(
        ValueError,
        match=r"reward.init_args.attention: expected one that transformers has here, got 'quick'",
    ):
        published.judge(attention="quick").load(CPU)
    with pytest.raises(ValueError, match="dtype: expected one of bf16, fp32, got 'fp8'"):
        published.judge(dtype="fp8")

    def no_network(*args: Any, **keywords: Any) -> str:
        raise errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(hub, "snapshot_download", no_network)
    with pytest.raises(
        FileNotFoundError,
        match=r"^reward.init_args.base: found no folder .* Qwen/Qwen2-VL-2B-Instruct is not in",
    ):
        published.judge(base=None).load(CPU)
    with pytest.raises(
        FileNotFoundError,
        match=r"^reward.init_args.model: found no folder .* KwaiVGI/VideoReward is not in the",
    ):
        published.judge(model="KwaiVGI/VideoReward").load(CPU)


def test_tokenizers_that_do_not_fit(published: Source, qwen_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"expected a tokenizer with <\|VQ_reward\|>, <\|MQ_reward\|>, <\|TA_reward\|>, in",
    ):
        read_request(qwen_folder, PROMPT)
    folder = Path(shutil.copytree(published.checkpoint / "tokenizer", tmp_path / "tokenizer"))
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'][1]['text'] }}")
    with pytest.raises(
        ValueError,
        match=r"expected a chat template in .* that writes <\|video_pad\|>, then the text",
    ):
        read_request(folder, PROMPT)
