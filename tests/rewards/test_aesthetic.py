"""LAION's aesthetic predictor on a tiny CLIP in the published layout, against the official
processor and the formula written out.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from fastgrpo.planning.meta_model import measure
from fastgrpo.rewards.media.frames import quantise
from fastgrpo.rewards.models.aesthetic import Aesthetic, clip_pixels, read_head
from fastgrpo.rewards.models.per_video import PerVideoReward, resize, spread

CPU = torch.device("cpu")
SIZE, WIDTH = 28, 24
VIDEOS = torch.randint(
    0, 256, (3, 5, 3, 45, 80), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)
CAPTIONS = ["one", "two", "three"]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / shape[-1] ** 0.5


def published_head() -> dict[str, torch.Tensor]:
    """Names and order of sac+logos+ava1-l14-linearMSE.pth, whose widths are 768, 1024, 128, 64, 16,
    1.
    """
    widths, places = (WIDTH, 32, 12, 8, 4, 1), (0, 2, 4, 6, 7)
    shapes = list(zip(places, widths, widths[1:], strict=False))
    weights = {f"layers.{n}.weight": draw(out, into, seed=n) for n, into, out in shapes}
    biases = {f"layers.{n}.bias": draw(out, seed=10 + n) for n, _, out in shapes}
    return weights | biases | {"layers.7.bias": torch.tensor([5.0])}


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both towers, as the hub has them."""
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": SIZE,
        "patch_size": 14,
    }
    text = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 50,
    }
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(
        CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH)
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def head(tmp_path: Path) -> Path:
    torch.save(published_head(), tmp_path / "head.pth")
    return tmp_path / "head.pth"


@pytest.fixture
def judge(clip_folder: Path, head: Path) -> Aesthetic:
    judge = Aesthetic(str(head), str(clip_folder))
    judge.load(CPU)
    return judge


def official(frames: torch.Tensor, size: int = SIZE) -> torch.Tensor:
    """The pixels that transformers' own processor makes, with Pillow."""
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    images = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in frames]
    return torch.from_numpy(np.stack(processor(images)["pixel_values"]))


@pytest.mark.parametrize("shape", [(45, 80), (80, 45), (28, 28), (19, 61), (480, 832)])
def test_the_pixels_are_those_of_the_official_processor(shape: tuple[int, int]) -> None:
    frames = torch.randint(
        0, 256, (2, 3, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    size = 224 if shape[0] > 100 else SIZE
    ours, theirs = clip_pixels(frames, size), official(frames, size)
    assert ours.shape == theirs.shape
    steps = (ours - theirs).abs() * 255 * 0.2613  # of 255, by the least deviation
    assert steps.max() < 1.1
    assert (steps > 0.1).float().mean() < 0.01


def test_the_score_is_the_published_formula(judge: Aesthetic, clip_folder: Path) -> None:
    raw, valid = judge.components(VIDEOS, CAPTIONS, 8.0)
    model, head = (
        CLIPModel.from_pretrained(clip_folder).eval(),
        {name: part.double() for name, part in published_head().items()},
    )
    for video, score in zip(VIDEOS, raw[:, 0], strict=True):
        with torch.no_grad():
            features = model.visual_projection(
                model.vision_model(clip_pixels(video, SIZE)).pooler_output
            ).double()
        hidden = features / (features**2).sum(-1, keepdim=True).sqrt()
        for place in (0, 2, 4, 6, 7):
            hidden = hidden @ head[f"layers.{place}.weight"].T + head[f"layers.{place}.bias"]
        assert score.item() == pytest.approx(hidden.mean().item(), abs=1e-5)
    assert valid.all()
    scores, _ = judge.score(VIDEOS, CAPTIONS, 8.0)
    assert torch.equal(scores, raw / 10)
    assert judge.rewards(torch.tensor([[-1.0], [4.0], [11.0]])).tolist() == [[0.0], [0.4], [1.0]]


def test_one_linear_layer(clip_folder: Path, judge: Aesthetic, tmp_path: Path) -> None:
    """Of the linear layers without activations the product is the same predictor, in the layout of
    sa_0_4_vit_l_14_linear.pth.
    """
    weight, bias = torch.eye(WIDTH), torch.zeros(WIDTH)
    for place in (0, 2, 4, 6, 7):
        layer = published_head()[f"layers.{place}.weight"]
        weight, bias = layer @ weight, layer @ bias + published_head()[f"layers.{place}.bias"]
    save_file({"weight": weight, "bias": bias}, tmp_path / "linear.safetensors")
    linear = Aesthetic(str(tmp_path / "linear.safetensors"), str(clip_folder))
    linear.load(CPU)
    assert torch.allclose(
        linear.components(VIDEOS, CAPTIONS, 8.0)[0],
        judge.components(VIDEOS, CAPTIONS, 8.0)[0],
        atol=1e-5,
    )
    assert [
        len(read_head(str(tmp_path / name))) for name in ("linear.safetensors", "head.pth")
    ] == [1, 5]


def test_a_score_is_the_videos_own(judge: Aesthetic) -> None:
    """Not of the others, of the dtype, or of the order; a broken video is left out; what is looked
    at is spread over the video.
    """
    scores, _ = judge.score(VIDEOS, CAPTIONS, 8.0)
    alone = torch.cat([judge.score(VIDEOS[i : i + 1], ["x"], 2.0)[0] for i in (2, 1, 0)])
    assert torch.equal(scores, alone.flip(0))
    floats = VIDEOS.float() / 255
    assert torch.equal(judge.score(floats, CAPTIONS, 8.0)[0], scores)
    floats[1, 3, 0, 0, 0] = torch.nan
    broken, valid = judge.score(floats, CAPTIONS, 8.0)
    assert valid.tolist() == [True, False, True]
    assert torch.equal(broken[valid], scores[valid])
    assert judge.score(VIDEOS[:0], [], 8.0)[0].shape == (0, 1)
    judge.frames = 3
    assert torch.equal(
        judge.score(VIDEOS, CAPTIONS, 8.0)[0], judge.score(VIDEOS[:, [0, 2, 4]], CAPTIONS, 8.0)[0]
    )


def test_shared_parts() -> None:
    assert spread(7, 4) == [0, 2, 4, 6]
    assert spread(8, 3) == [0, 4, 7]  # 3.5 to the even one
    assert quantise(torch.tensor([0.0, 0.4999, 1.0]).view(1, 3, 1, 1), [0, 0])[
        1
    ].flatten().tolist() == [0, 127, 255]
    frames = torch.full((1, 3, 4, 4), 77, dtype=torch.uint8)
    assert resize(frames, (9, 6)).unique().tolist() == [77]


class Echo(PerVideoReward):
    """The prompt as a number, times the mean of the video."""

    stages, component_names, loaded = ("echo",), ("echo",), (None, None, CPU)

    def load(self, device: torch.device) -> None: ...

    def score_one(self, video: torch.Tensor, prompt: str, fps: float) -> torch.Tensor:
        return torch.tensor([float(prompt)]) * video.mean()


def test_a_score_that_is_not_finite_is_invalid() -> None:
    raw, valid = Echo().components(torch.ones(2, 1, 3, 2, 2), ["2", "inf"], 8.0)
    assert (raw.tolist(), valid.tolist()) == ([[2.0], [0.0]], [True, False])


def test_what_it_is_and_takes(
    judge: Aesthetic, clip_folder: Path, head: Path, tmp_path: Path
) -> None:
    told = json.loads(json.dumps(judge.describe()))
    assert (told["model"], told["layers"], told["frames"]) == (str(clip_folder), 5, 8)
    torch.save(published_head() | {"layers.7.bias": torch.tensor([6.0])}, tmp_path / "other.pth")
    assert (
        Aesthetic(str(tmp_path / "other.pth"), str(clip_folder)).describe()["head_sha256"]
        != told["head_sha256"]
    )
    assert judge.loaded is not None
    network, layers, _ = judge.loaded
    count = sum(p.numel() for p in network.parameters()) + sum(
        part.numel() for layer in layers for part in layer
    )
    shutil.copy(clip_folder / "config.json", tmp_path)
    assert Aesthetic(str(head), str(tmp_path)).memory_bytes == 4 * count
    videos = torch.rand(2, 9, 3, 60, 80)
    given = [videos, *network.parameters(), *network.buffers()]
    cost = measure(lambda: judge.components(videos, ["", ""], 8.0)[0], given, False)
    taken = cost.kept + cost.work
    assert 0.95 * taken < judge.working_bytes(videos.to("meta"), 8.0) < 1.5 * taken
    assert not any(p.requires_grad for p in network.parameters())
    assert not network.training


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("spoil", "kind", "problem"),
    [
        (
            lambda f: (f / "config.json").unlink(),
            FileNotFoundError,
            "reward.init_args.model: .* found no .*config.json",
        ),
        (lambda f: (f / "config.json").write_text("{"), ValueError, "expected a configuration in"),
        (
            lambda f: edit(f / "config.json", model_type="vit"),
            ValueError,
            "model_type: expected clip or clip_vision_model, got 'vit'",
        ),
        (
            lambda f: edit(f / "config.json", projection_dim=16),
            ValueError,
            "expected embeddings of 24, which the head takes, .* got 16",
        ),
        (
            lambda f: (f / "model.safetensors").unlink(),
            FileNotFoundError,
            "expected safetensors in",
        ),
        (
            lambda f: (f / "model.safetensors").write_bytes(b"no"),
            ValueError,
            "expected readable safetensors",
        ),
        (
            lambda f: save_file({"a": torch.zeros(1)}, f / "model.safetensors", {"format": "pt"}),
            ValueError,
            "the tensors of its configuration, .* missing or of another shape",
        ),
    ],
)
def test_what_is_wrong_with_a_folder(
    clip_folder: Path,
    head: Path,
    tmp_path: Path,
    spoil: Callable[[Path], object],
    kind: type[Exception],
    problem: str,
) -> None:
    folder = Path(shutil.copytree(clip_folder, tmp_path / "clip"))
    spoil(folder)
    judge = Aesthetic(str(head), str(folder))
    with pytest.raises(kind, match=problem):
        judge.load(CPU)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (
            {"layers.0.weight": torch.zeros(2, 2)},
            r"expected the layers \(0, 2, 4, 6, 7\) .* got layers.0.weight \[2, 2\]",
        ),
        (
            published_head() | {"layers.9.weight": torch.zeros(1)},
            "expected the layers",
        ),  # of reluMSE, whose layers stand elsewhere
        (published_head() | {"layers.2.weight": torch.zeros(12, 31)}, "expected the layers"),
        ({"weight": torch.zeros(2, 24), "bias": torch.zeros(2)}, "expected the layers"),
        ({"weight": torch.zeros(24), "bias": torch.zeros(1)}, "expected the layers"),
        ([1], "expected readable weights in .* no mapping of names to tensors"),
        ({"weight": 1.0, "bias": 2.0}, "no mapping of names to tensors"),
        (Path("a"), "expected readable weights"),  # an object: not loaded
    ],
)
def test_what_is_wrong_with_a_head(tmp_path: Path, content: Any, problem: str) -> None:
    torch.save(content, tmp_path / "head.pth")
    with pytest.raises(ValueError, match=problem):
        read_head(str(tmp_path / "head.pth"))


def test_without_a_head(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"reward.init_args.head: expected the file .*linearMSE.pth of github.com"
    ):
        Aesthetic()
    with pytest.raises(FileNotFoundError, match=r"reward.init_args.head: expected a file"):
        Aesthetic(str(tmp_path / "none.pth"))
    (tmp_path / "head.pth").write_bytes(b"no")
    with pytest.raises(ValueError, match="expected readable weights"):
        Aesthetic(str(tmp_path / "head.pth"))
    torch.save(published_head(), tmp_path / "head.pth")
    with pytest.raises(ValueError, match="frames: expected at least 0, got -1"):
        Aesthetic(str(tmp_path / "head.pth"), frames=-1)
