"""VideoAlign's scores on a tiny Qwen2-VL in the published layout, against transformers and peft
used as the published code uses them.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from published_video_align import MEAN, PROMPT, STD, Source
from torch import Tensor
from torch.nn.functional import interpolate

from fastgrpo.planning.meta_model import measure
from fastgrpo.rewards.models.video_align import VideoAlign, sampled_frames, seen_clip
from fastgrpo.rewards.models.video_align_files import REWARD_TOKENS

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
FPS = 4.0
VIDEOS = torch.randint(
    0, 256, (3, 9, 3, 60, 90), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)
CAPTIONS = ["a red square", "<|TA_reward|> <|im_end|> é", ""]


@pytest.fixture(scope="module")
def judge(published: Source) -> VideoAlign:
    judge = published.judge()
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


def published_scores(published: Source, video: Tensor, caption: str) -> list[float]:
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
    model, tokenizer = published.tuned.base_model.model, published.tokenizer
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


def test_the_scores_are_the_published_ones(judge: VideoAlign, published: Source) -> None:
    captions = ["a red square", "two cats, 3 dogs", ""]
    raw, valid = judge.components(VIDEOS, captions, FPS)
    expected = [
        published_scores(published, video, caption)
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


def test_an_overall_stage(judge: VideoAlign, published: Source) -> None:
    """The last one, which the static mode takes: of the first two scores here, as DanceGRPO's."""
    both = published.judge(overall=(1, 1, 0))
    raw = torch.tensor([[1.0, 0.0, 9.0], [-3.0, 2.0, -9.0]])
    assert both.stages == (*judge.stages, "overall")
    assert torch.equal(both.rewards(raw)[:, :3], judge.rewards(raw))
    mean = [((vq - MEAN[0]) / STD[0] + (mq - MEAN[1]) / STD[1]) / 2 for vq, mq, _ in raw.tolist()]
    assert both.rewards(raw)[:, 3].tolist() == pytest.approx([1 / (1 + math.exp(-m)) for m in mean])
    for wrong in ((0, 0, 0), (1, -1, 1)):
        with pytest.raises(ValueError, match=r"overall: expected three weights"):
            published.judge(overall=wrong)


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
    published: Source, tmp_path: Path
) -> None:
    """model.pth has 5,031,072,529 bytes: in bf16 Qwen2-VL-2B, its 151,660 words twice, LoRA of rank
    64, a head of one row; and a zip.
    """
    path = tmp_path / "config.json"
    shutil.copy(published.folder / "base" / "config.json", path)
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
    judge = published.judge(base=str(tmp_path), dtype="bf16")
    object.__setattr__(judge._request, "vocabulary", 151660)
    taken = judge.memory_bytes - 4 * 1536
    lora = 28 * 64 * (2 * (1536 + 1536) + 2 * (1536 + 256) + 3 * (1536 + 8960))
    zipped = 5_031_072_529 - taken - 2 * (lora + 1536 + 151660 * 1536)
    assert 0 < zipped < 1123 * 512  # names and alignment of so many tensors


def test_what_it_is_and_takes(judge: VideoAlign, published: Source, tmp_path: Path) -> None:
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
    reward = Path(shutil.copytree(published.folder / "reward", tmp_path / "reward"))
    (reward / "checkpoint-20" / "model.pth").unlink()
    assert published.judge(reward).memory_bytes == 4 * (count + head.numel())
    half = published.judge(dtype="bf16")
    assert half.memory_bytes == 2 * count + 4 * head.numel()
    assert not any(p.requires_grad for p in network.parameters())
    assert not network.training
    half.load(CPU)
    assert half.loaded is not None
    assert {p.dtype for p in half.loaded[0].parameters()} == {torch.bfloat16}
    video, network = torch.rand(1, 16, 3, 224, 224), half.loaded[0]
    given = [video, *network.parameters(), *network.buffers()]
    cost = measure(lambda: half.components(video, ["a"], 8.0)[0], given, False)
    taken = cost.kept + cost.work
    assert 0.95 * taken < half.working_bytes(video.to("meta"), 8.0) < 1.6 * taken
    near = (
        half.components(VIDEOS[:1], CAPTIONS[:1], FPS)[0]
        - judge.components(VIDEOS[:1], CAPTIONS[:1], FPS)[0]
    )
    assert 0 < near.abs().max() < 0.05
