"""VideoAlign on a tiny Qwen2-VL in the published layout, against transformers and peft used as the
published code uses them.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import errors
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from fastgrpo import hub
from fastgrpo.rewards.models.video_align import VideoAlign, sampled_frames, seen_clip
from fastgrpo.rewards.models.video_align_files import (
    REWARD_TOKENS,
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
from fastgrpo.rewards.queue import ScoringQueue

CPU = torch.device("cpu")
PROMPT = (
    "\nGrade how it looks: <|VQ_reward|>\nmoves: <|MQ_reward|>  \n"
    "and fits - {text_prompt}\nhere: <|TA_reward|>\nEND\n"
)
MEAN, STD = (0.5, -0.25, 1.0), (2.0, 0.5, 1.5)
FPS = 4.0
VIDEOS = torch.randint(
    0, 256, (3, 9, 3, 60, 90), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)
CAPTIONS = ["a red square", "<|TA_reward|> <|im_end|> é", ""]


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def source(qwen_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The reward network with LoRA beside its weights (peft's own), its tokenizer, and the folders
    and the prompt as they are published.
    """
    folder = tmp_path_factory.mktemp("video_align")
    checkpoint = folder / "reward" / "checkpoint-20"
    tokenizer = AutoTokenizer.from_pretrained(qwen_folder)
    tokenizer.add_tokens(list(REWARD_TOKENS), special_tokens=True)
    tokenizer.save_pretrained(checkpoint / "tokenizer")
    # as Qwen/Qwen2-VL-2B-Instruct has it: the language model's settings at the top, a vocabulary
    # beyond the tokenizer's
    flat = {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "vocab_size": 400,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "initializer_range": 0.1,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "bos_token_id": 1,
        "eos_token_id": 2,
        "vision_config": {
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 64,
            "num_heads": 2,
            "mlp_ratio": 2,
            "in_chans": 3,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
            "initializer_range": 0.1,
        },
    }
    (folder / "base").mkdir()
    (folder / "base" / "config.json").write_text(json.dumps(flat))
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig.from_pretrained(folder / "base"))
    model.resize_token_embeddings(len(tokenizer))
    model.rm_head = nn.Linear(64, 1, bias=False)
    targets = [
        name
        for name, part in model.named_modules()
        if isinstance(part, nn.Linear) and "language_model" in name
    ]
    tuned = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, target_modules=targets, lora_dropout=0.05)
    ).eval()
    for name, part in tuned.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(part, std=0.1)
    old = {
        name.replace("model.model.language_model.", "model.model.").replace(
            "model.model.visual.", "model.visual."
        ): value
        for name, value in tuned.state_dict().items()
    }
    torch.save(old, checkpoint / "model.pth")
    settings = {
        "data_config": {
            "fps": 2,
            "max_frame_pixels": 200704,
            "num_frames": None,
            "eval_dim": ["VQ", "MQ", "TA"],
            "sample_type": "uniform",
            "prompt_template_type": "detailed_special",
            "meta_data": "elsewhere.csv",
        },
        "model_config": {
            "model_name_or_path": "Qwen/Qwen2-VL-2B-Instruct",
            "output_dim": 1,
            "use_special_tokens": True,
        },
        "peft_lora_config": {
            "lora_enable": True,
            "lora_r": 4,
            "lora_alpha": 8,
            "use_rslora": False,
        },
        "inference_config": {
            f"{name}_{what}": value[i]
            for i, name in enumerate(("VQ", "MQ", "TA"))
            for what, value in (("mean", MEAN), ("std", STD))
        },
    }
    (folder / "reward" / "model_config.json").write_text(json.dumps(settings))
    (folder / "prompt_template.py").write_text(
        '"""Prompts."""\nimport nothing_that_is\nOTHER = "{text_prompt}"\n'
        f'BEST = """{PROMPT}"""\n'
    )
    return SimpleNamespace(folder=folder, tuned=tuned, tokenizer=tokenizer, names=list(old))


def make(source: Any, reward: Path | None = None, **arguments: Any) -> VideoAlign:
    paths = {
        "prompt_file": str(source.folder / "prompt_template.py"),
        "model": str(reward or source.folder / "reward"),
    }
    return VideoAlign(
        **{**paths, "base": str(source.folder / "base"), "dtype": "fp32", **arguments}
    )


@pytest.fixture(scope="module")
def judge(source: Any) -> VideoAlign:
    judge = make(source)
    judge.load(CPU)
    return judge


def patches_by_hand(frames: Tensor) -> tuple[Tensor, list[int]]:
    """[n, 3, H, W] of 0 to 255: the 2 x 14 x 14 patches, those of a 2 x 2 block next to each other;
    (Qwen2-VL's published order).
    """
    mean, std = (
        np.array([0.48145466, 0.4578275, 0.40821073]),
        np.array([0.26862954, 0.26130258, 0.27577711]),
    )
    pixels = (frames.double().numpy() / 255 - mean[:, None, None]) / std[:, None, None]
    count, rows, columns = len(frames) // 2, frames.shape[2] // 14, frames.shape[3] // 14
    found = [
        pixels[2 * t : 2 * t + 2, :, y * 14 : y * 14 + 14, x * 14 : x * 14 + 14]
        .transpose(1, 0, 2, 3)
        .ravel()
        for t in range(count)
        for top in range(0, rows, 2)
        for left in range(0, columns, 2)
        for y in (top, top + 1)
        for x in (left, left + 1)
    ]
    return torch.tensor(np.stack(found), dtype=torch.float32), [count, rows, columns]


def published_scores(source: Any, video: Tensor, caption: str) -> list[float]:
    """As the published code does it, in fp32: LoRA not merged, no positions given, one tokenisation
    of the whole text.
    """
    frames = (
        video[[0, 3, 5, 8]].float()
    )  # round(9 frames / 4 fps * 2 fps / 2) * 2 = 4, by linspace over 0 ... 8: 0, 2.67, 5.33, 8
    frames = (
        interpolate(frames, (280, 392), mode="bicubic", antialias=True).clamp(0, 255).round()
    )  # of 60 x 90, at least 100,352 pixels
    pixels, grid = patches_by_hand(frames)
    model, tokenizer = source.tuned.base_model.model, source.tokenizer
    text = {"type": "text", "text": PROMPT.format(text_prompt=caption)}
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": [{"type": "video"}, text]}],
        tokenize=False,
        add_generation_prompt=True,
    )
    whole = whole.replace("<|video_pad|>", "<|video_pad|>" * (math.prod(grid) // 4))
    ids = torch.tensor(tokenizer(whole).input_ids)
    with torch.no_grad():
        visual = model.model.visual(pixels, grid_thw=torch.tensor([grid])).pooler_output
        words = model.get_input_embeddings()(ids)
        words[ids == tokenizer.convert_tokens_to_ids("<|video_pad|>")] = visual
        hidden = model.model.language_model(inputs_embeds=words[None]).last_hidden_state
        logits = model.rm_head(hidden)[0, :, 0]
    places = [ids.tolist().index(tokenizer.convert_tokens_to_ids(token)) for token in REWARD_TOKENS]
    return logits[places].tolist()


def test_the_scores_are_the_published_ones(judge: VideoAlign, source: Any) -> None:
    captions = ["a red square", "two cats, 3 dogs", ""]
    raw, valid = judge.components(VIDEOS, captions, FPS)
    expected = [
        published_scores(source, video, caption)
        for video, caption in zip(VIDEOS, captions, strict=True)
    ]
    assert torch.allclose(raw, torch.tensor(expected).double(), atol=2e-5)
    assert valid.all()
    assert raw.std(dim=0).min() > 1e-3  # videos are told apart
    scores, _ = judge.score(VIDEOS, captions, FPS)
    for b in range(3):
        for k in range(3):
            assert scores[b, k].item() == pytest.approx(
                1 / (1 + math.exp(-(raw[b, k].item() - MEAN[k]) / STD[k])), abs=1e-12
            )


def test_an_overall_stage(judge: VideoAlign, source: Any) -> None:
    """The last one, which the static mode takes: of the first two scores here, as DanceGRPO's."""
    both = make(source, overall=(1, 1, 0))
    raw = torch.tensor([[1.0, 0.0, 9.0], [-3.0, 2.0, -9.0]])
    assert both.stages == (*judge.stages, "overall")
    assert torch.equal(both.rewards(raw)[:, :3], judge.rewards(raw))
    mean = [((vq - MEAN[0]) / STD[0] + (mq - MEAN[1]) / STD[1]) / 2 for vq, mq, _ in raw.tolist()]
    assert both.rewards(raw)[:, 3].tolist() == pytest.approx([1 / (1 + math.exp(-m)) for m in mean])
    for wrong in ((0, 0, 0), (1, -1, 1)):
        with pytest.raises(ValueError, match=r"overall: expected three weights"):
            make(source, overall=wrong)


def test_a_score_is_the_videos_own(judge: VideoAlign) -> None:
    """Not of the others, of the dtype, or of the order; a broken video is left out; a caption with
    a token's name in it is only text.
    """
    scores, _ = judge.score(VIDEOS, CAPTIONS, FPS)
    assert torch.equal(
        scores,
        torch.cat([judge.score(VIDEOS[i : i + 1], CAPTIONS[i : i + 1], FPS)[0] for i in range(3)]),
    )
    floats = VIDEOS.float() / 255
    assert torch.equal(judge.score(floats, CAPTIONS, FPS)[0], scores)
    floats[1, 8, 2, 0, 0] = torch.inf
    broken, valid = judge.score(floats, CAPTIONS, FPS)
    assert valid.tolist() == [True, False, True]
    assert torch.equal(broken[valid], scores[valid])
    assert judge.score(VIDEOS[:0], [], FPS)[0].shape == (0, 3)


def test_only_what_comes_before_a_token_counts(judge: VideoAlign) -> None:
    """The caption stands after the tokens of VQ and MQ in the prompt, before that of TA; the
    network is causal.
    """
    one, other = (
        judge.components(VIDEOS[:1], [caption], FPS)[0][0] for caption in ("a cat", "a dog")
    )
    assert torch.equal(one[:2], other[:2])
    assert one[2] != other[2]


@pytest.mark.parametrize(
    ("num_frames", "fps", "expected"),
    [
        (53, 15, [0, 7, 15, 22, 30, 37, 45, 52]),  # 7.07 of them, to the nearest even number
        (9, 4, [0, 3, 5, 8]),
        (8, 8, [0, 2, 5, 7]),  # at least four
        (3, 8, [0, 2]),  # where there are as many
        (2, 30, [0, 1]),
        (2000, 1, [round(1999 * i / 767) for i in range(768)]),
    ],
)
def test_which_frames_are_looked_at(num_frames: int, fps: float, expected: list[int]) -> None:
    assert sampled_frames(num_frames, fps, 2.0) == expected
    with pytest.raises(ValueError, match="at least 2 frames and a positive rate"):
        sampled_frames(1, fps, 2.0)
    with pytest.raises(ValueError, match="got 9 frames at 0"):
        sampled_frames(9, 0, 2.0)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((480, 832), (336, 588)),
        ((240, 416), (252, 420)),
        ((16, 16), (336, 336)),
        ((28, 5000), (28, 5012)),
    ],
)
def test_how_large_the_frames_are(size: tuple[int, int], expected: tuple[int, int]) -> None:
    """By hand from the published rule: the nearest multiples of 28, or where they leave 100,352 to
    200,704 pixels the next inside.
    """
    clip = seen_clip(torch.zeros(4, 3, *size), 8.0, 2.0, 200704)
    assert clip.frames.shape == (4, 3, *expected)
    assert clip.frames.dtype == torch.uint8


def test_the_published_file_has_room_for_these_tensors_and_no_others(
    source: Any, tmp_path: Path
) -> None:
    """model.pth has 5,031,072,529 bytes: in bf16 Qwen2-VL-2B, its 151,660 words twice, LoRA of rank
    64, a head of one row; and a zip.
    """
    path = tmp_path / "config.json"
    shutil.copy(source.folder / "base" / "config.json", path)
    vision = {
        "depth": 32,
        "embed_dim": 1280,
        "hidden_size": 1536,
        "num_heads": 16,
        "mlp_ratio": 4,
        "in_chans": 3,
    }
    path.write_text(
        json.dumps(
            json.loads(path.read_text())
            | {
                "hidden_size": 1536,
                "intermediate_size": 8960,
                "num_hidden_layers": 28,
                "num_attention_heads": 12,
                "num_key_value_heads": 2,
                "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
                "vocab_size": 151936,
                "vision_config": vision,
            }
        )
    )
    judge = make(source, base=str(tmp_path), dtype="bf16")
    object.__setattr__(judge._request, "vocabulary", 151660)
    taken = judge.memory_bytes - 4 * 1536
    lora = 28 * 64 * (2 * (1536 + 1536) + 2 * (1536 + 256) + 3 * (1536 + 8960))
    zipped = 5_031_072_529 - taken - 2 * (lora + 1536 + 151660 * 1536)
    assert 0 < zipped < 1123 * 512  # names and alignment of so many tensors


def test_a_request_is_what_one_tokenisation_gives(source: Any) -> None:
    request = read_request(source.folder / "reward" / "checkpoint-20" / "tokenizer", PROMPT)
    assert isinstance(request, RequestTokens)
    told = source.tokenizer.decode(request.ids("a <|MQ_reward|>", 2))
    assert told.startswith(
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|><|video_pad|>"
    )
    assert told.endswith("here: <|TA_reward|>\nEND\n<|im_end|>\n<|im_start|>assistant\n")
    assert [
        request.ids("a <|MQ_reward|>", 2).count(token)
        for token in (request.video, *request.rewards)
    ] == [2, 1, 1, 1]
    assert request.vocabulary == len(source.tokenizer)


def test_a_prompt_as_text(source: Any, judge: VideoAlign, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text(PROMPT)
    assert read_prompt(str(tmp_path / "prompt.txt")) == PROMPT == judge.prompt


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
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the text is full of special characters)
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


def test_settings(source: Any) -> None:
    settings = read_settings(source.folder / "reward")
    assert settings == Published("Qwen/Qwen2-VL-2B-Instruct", 2.0, 200704, 4, 2.0, MEAN, STD)
    assert checkpoint_of(source.folder / "reward").name == "checkpoint-20"


def test_the_last_checkpoint(tmp_path: Path) -> None:
    for number in ("9", "100", "20", "x"):
        (tmp_path / f"checkpoint-{number}").mkdir()
    assert checkpoint_of(tmp_path).name == "checkpoint-100"


def test_names_and_lora(source: Any) -> None:
    """All published names arrive, merged as peft merges them; a name of the new layout is the same
    as one of the old.
    """
    folder = source.folder / "reward" / "checkpoint-20"
    weights = read_weights(folder)
    shapes = {
        name: value.shape
        for name, value in weights.items()
        if "lora_" not in name and "_head" not in name
    }
    check_weights(weights, shapes, 4)
    merged, expected = (
        merge(weights, shapes, 2.0, torch.float32),
        source.tuned.base_model.model.model,
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
            for name, value in source.tuned.state_dict().items()
            if "lm_head" not in name
        },
        folder / "model.safetensors",
    )
    new = read_weights(folder)
    (folder / "model.safetensors").unlink()
    assert new.keys() == weights.keys() - {"lm_head.weight"}
    assert all(torch.equal(new[name], weights[name]) for name in new)


def test_through_the_queue(judge: VideoAlign) -> None:
    queue = ScoringQueue(judge)
    queue.submit(VIDEOS, CAPTIONS, FPS)
    scores, valid = queue.collect(3)
    queue.close()
    assert scores == [judge.score(VIDEOS, CAPTIONS, FPS)[0].tolist()]
    assert valid == [[True] * 3]


def test_what_it_is_and_takes(judge: VideoAlign, source: Any, tmp_path: Path) -> None:
    told = json.loads(json.dumps(judge.describe()))
    assert (told["checkpoint"], told["mean"], told["std"], told["dtype"]) == (
        "checkpoint-20",
        list(MEAN),
        list(STD),
        "fp32",
    )
    assert told["overall"] is None
    assert judge.loaded is not None
    network, head, _ = judge.loaded
    count = sum(p.numel() for p in network.parameters())
    reward = Path(shutil.copytree(source.folder / "reward", tmp_path / "reward"))
    (reward / "checkpoint-20" / "model.pth").unlink()
    assert make(source, reward).memory_bytes == 4 * (count + head.numel())
    half = make(source, dtype="bf16")
    assert half.memory_bytes == 2 * count + 4 * head.numel()
    assert not any(p.requires_grad for p in network.parameters())
    assert not network.training
    half.load(CPU)
    assert half.loaded is not None
    assert {p.dtype for p in half.loaded[0].parameters()} == {torch.bfloat16}
    near = (
        half.components(VIDEOS[:1], CAPTIONS[:1], FPS)[0]
        - judge.components(VIDEOS[:1], CAPTIONS[:1], FPS)[0]
    )
    assert 0 < near.abs().max() < 0.05


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
            retensor(lambda w: w.update({f"{Q}.lora_A.default.weight": torch.zeros(4, 9)})),
            r"q_proj.lora_A.weight of \[4, 9\] instead of \[4, 64\]",
        ),
        (
            retensor(lambda w: [w.pop(f"{Q}.lora_{which}.default.weight") for which in "AB"]),
            "2 problems: no .*q_proj.lora_A.weight, no .*q_proj.lora_B.weight",
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
    source: Any,
    tmp_path: Path,
    spoil: Callable[[Path], object],
    problem: str,
) -> None:
    folder = Path(shutil.copytree(source.folder / "reward", tmp_path / "reward"))
    spoil(folder)
    judge = make(source, folder)
    with pytest.raises((ValueError, FileNotFoundError), match=problem) as caught:
        judge.load(CPU)
    assert str(caught.value).startswith("reward.init_args.model: ")


def test_what_is_wrong_with_a_base(
    source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        ValueError, match=r"reward.init_args.base: expected the configuration of a Qwen2-VL"
    ):
        make(source, base=str(tmp_path)).load(CPU)
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(
        ValueError, match=r"reward.init_args.base: expected model_type qwen2_vl .* got clip"
    ):
        make(source, base=str(tmp_path)).load(CPU)
    with pytest.raises(
        ValueError,
        match=r"reward.init_args.attention: expected one that transformers has here, got 'quick'",
    ):
        make(source, attention="quick").load(CPU)
    with pytest.raises(ValueError, match="dtype: expected one of bf16, fp32, got 'fp8'"):
        make(source, dtype="fp8")

    def no_network(*args: Any, **keywords: Any) -> str:
        raise errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(hub, "snapshot_download", no_network)
    with pytest.raises(
        FileNotFoundError,
        match=r"^reward.init_args.base: found no folder .* Qwen/Qwen2-VL-2B-Instruct is not in",
    ):
        make(source, base=None).load(CPU)
    with pytest.raises(
        FileNotFoundError,
        match=r"^reward.init_args.model: found no folder .* KwaiVGI/VideoReward is not in the",
    ):
        make(source, model="KwaiVGI/VideoReward").load(CPU)


def test_tokenizers_that_do_not_fit(source: Any, qwen_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"expected a tokenizer with <\|VQ_reward\|>, <\|MQ_reward\|>, <\|TA_reward\|>, in",
    ):
        read_request(qwen_folder, PROMPT)
    folder = Path(
        shutil.copytree(
            source.folder / "reward" / "checkpoint-20" / "tokenizer", tmp_path / "tokenizer"
        )
    )
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'][1]['text'] }}")
    with pytest.raises(
        ValueError,
        match=r"expected a chat template in .* that writes <\|video_pad\|>, then the text",
    ):
        read_request(folder, PROMPT)
