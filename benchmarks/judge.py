"""How long the judge takes in process: 16 videos and three questions about each, against
transformers' own `generate` (goal G5).

    python benchmarks/judge.py                            # Qwen2.5-VL-7B's size, random weights
    python benchmarks/judge.py --scale tiny --device cpu  # seconds: whether it runs, not how fast

Videos lie on the device as a rollout leaves them (float in [0, 1]); everything from them to the
texts is timed. Peers: `generate` once for each video and question, and `generate` on the batch
of videos, once for each question; both take the frames that the judge takes. First the tokens
are compared: they may differ where the peers' own logits leave it open which is the larger,
nowhere else; otherwise there is no number. There is no tokenizer: every five
characters are a token, about as many as the real one makes of English. Rows go to
benchmarks/data/<GPU or cpu>_judge.csv. Not yet run on a GPU.
"""

from __future__ import annotations

import argparse
import functools
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python benchmarks/judge.py`

from benchmarks.common import rows, timing
from benchmarks.common.rows import number
from fastgrpo.rewards.media.frames import FrameSettings, make_clip, patches, seconds_per_grid
from fastgrpo.rewards.vlm.engine import Clip, Decoding
from fastgrpo.rewards.vlm.questions import ask_about, read_questions
from fastgrpo.rewards.vlm.qwen import DTYPES, TransformersEngine
from fastgrpo.rewards.vlm.qwen_chat import ChatTokens

TOKENS = 5
"""Of an answer: those of 10.00, or 8.50 and the end."""
CAPTION = (
    "A lone cyclist in a yellow raincoat rides along a wet cobbled street at dusk, past lit shop "
    "windows and parked cars, while the camera follows smoothly at shoulder height; reflections of "
    "neon signs shimmer in the puddles, and a tram crosses in the background."
)
_IDS = {
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "image_token_id": 151655,
    "video_token_id": 151656,
}


def _config(text: dict[str, Any], vision: dict[str, Any], mrope: list[int]) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": mrope}
    text |= {"vocab_size": 152064, "rms_norm_eps": 1e-6, "rope_parameters": rope}
    return {
        "text_config": text,
        "vision_config": vision | {"window_size": 112, "tokens_per_second": 2},
        **_IDS,
    }


CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2.5-vl-7b": _config(  # config.json of Qwen/Qwen2.5-VL-7B-Instruct
        {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "max_position_embeddings": 128000,
            "max_window_layers": 28,
        },
        {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
        [16, 24, 24],
    ),
    "tiny": _config(
        {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "initializer_range": 0.1,
        },
        {
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1],
            "initializer_range": 0.1,
        },
        [2, 3, 3],
    ),
}


@dataclass(frozen=True)
class Scale:
    """Videos of a rollout, and what the judge sees of them."""

    videos: int
    num_frames: int
    height: int
    width: int
    fps: float
    frames: FrameSettings = FrameSettings()  # noqa: RUF009  (frozen)
    batch: int = 16


SCALES = {
    "full": Scale(16, 53, 480, 832, 15.0, FrameSettings(fps=4.0)),  # as the recipes
    "tiny": Scale(3, 9, 60, 80, 4.0, FrameSettings(min_pixels=56 * 56), batch=2),
}


@dataclass(frozen=True, kw_only=True)
class JudgeMeasurement(rows.Measurement):
    """One way of asking. A ratio is that peer's time over this one: above 1 is faster than the
    peer.
    """

    KEY: ClassVar = ("device", "model", "work", "implementation", "dtype")

    model: str
    work: str
    """Such as "16 videos x 3 questions, 480x832x53"."""
    implementation: str
    dtype: str
    seconds: float
    """Median from the videos to the texts."""
    peak_gb: float | None
    """Most memory at a time, weights included; None on a CPU."""
    against_single: float
    against_batched: float
    transformers: str


COLUMNS: list[rows.Column] = [
    ("", "<26", lambda row: row.implementation),
    ("s", ">9", lambda row: number(row.seconds, 3)),
    ("GB", ">8", lambda row: number(row.peak_gb, 1)),
    ("×single", ">9", lambda row: number(row.against_single, 2)),
    ("×batched", ">10", lambda row: number(row.against_batched, 2)),
    ("goals", "", lambda row: row.goals),
]


class Ids:
    """In a tokenizer's place: five characters are a token, and an answer's text is its ids, which
    are what is compared.
    """

    def __call__(self, text: str, **_: object) -> SimpleNamespace:
        parts = re.findall(r".{1,5}", text, re.DOTALL)
        return SimpleNamespace(
            input_ids=[1000 + zlib.crc32(part.encode()) % 150_000 for part in parts]
        )

    def decode(self, ids: Sequence[int], **_: object) -> str:
        return " ".join(map(str, ids))


def stand_in_chat() -> ChatTokens:
    """As long as the real chat, with the real ids of video and digits: 15 tokens before the video,
    one after it, 5 after the question.
    """
    return ChatTokens(
        tokenizer=Ids(),
        before=tuple(range(200, 215)),
        video=_IDS["video_token_id"],
        after=(_IDS["vision_end_token_id"],),
        tail=tuple(range(220, 225)),
        characters=(*range(15, 25), 13),
        stops=frozenset(),
    )


def random_model(name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """A model of that size with random weights, made on the device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            torch.manual_seed(0)
            return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**CONFIGS[name]))
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _as_it_comes(module: Any) -> Iterator[None]:
    """transformers' own attention in the vision tower."""
    config = module.model.visual.config
    ours, config._attn_implementation = config._attn_implementation, "sdpa"
    try:
        yield
    finally:
        config._attn_implementation = ours


@torch.no_grad()
def generate(
    module: Any, chat: ChatTokens, requests: Sequence[tuple[Clip, list[int]]]
) -> tuple[list[list[int]], Tensor]:
    """Plain `generate` on a batch of clips and questions' ids: the answers' ids, and logits [B,
    TOKENS, vocabulary] in float32.
    """
    device = requests[0][0].frames.device
    seen = [patches(clip) for clip, _ in requests]
    prompts = [
        [*chat.before, *[chat.video] * (t * h * w // 4), *chat.after, *question]
        for (_, (t, h, w)), (_, question) in zip(seen, requests, strict=True)
    ]
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in prompts], device=device)
    mask = torch.tensor(
        [[0] * (longest - len(row)) + [1] * len(row) for row in prompts], device=device
    )
    with _as_it_comes(module):
        out = module.generate(
            input_ids=ids,
            attention_mask=mask,
            mm_token_type_ids=(ids == chat.video).int() * 2,
            pixel_values_videos=torch.cat([pixels for pixels, _ in seen]),
            video_grid_thw=torch.tensor([grid for _, grid in seen], device=device),
            second_per_grid_ts=torch.tensor(
                [seconds_per_grid(clip) for clip, _ in requests], device=device
            ),
            max_new_tokens=TOKENS,
            do_sample=False,
            temperature=None,
            repetition_penalty=1.0,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
    return out.sequences[:, longest:].tolist(), torch.stack(out.logits, 1).float()


def differences(
    ours: Sequence[Sequence[int]],
    peer: tuple[list[list[int]], Tensor],
    other: tuple[list[list[int]], Tensor],
) -> str:
    """Where our tokens are not the peer's; "" where they are, ties aside.

    A tie: the peer's logits of the two tokens are no further apart than twice the largest
    distance between its logits and the other peer's, taken where both had written the same.
    After a tie an answer is another one, and is not compared further.
    """
    same = [
        next((k for k in range(TOKENS) if a[k] != b[k]), TOKENS - 1)
        for a, b in zip(peer[0], other[0], strict=True)
    ]
    noise = max(
        float((peer[1][i, : k + 1] - other[1][i, : k + 1]).abs().max()) for i, k in enumerate(same)
    )
    compared, wrong = 0, []
    for i, (mine, theirs) in enumerate(zip(ours, peer[0], strict=True)):
        for place, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            gap = float(peer[1][i, place, b] - peer[1][i, place, a])
            if gap > 2 * noise:
                where = f"answer {i}, token {place}: {a}, not {b}"
                wrong.append(f"{where}; {gap:.3g} below it, with a noise of {noise:.3g}")
            if a != b:
                break
            compared += 1
    if compared < TOKENS * len(ours) / 2:
        wrong.append(
            f"only {compared} of {TOKENS * len(ours)} tokens could be compared: too many ties"
        )
    return "\n".join(wrong)


def goals(
    seconds: float, single: float, batched: float, device: str, model: str, scale: Scale
) -> str:
    """G5 of the performance goals, which is set for an H100 and the 7B model at its full scale."""
    if not rows.has_goals(device) or "7b" not in model.lower() or scale is not SCALES["full"]:
        return ""
    return rows.met(
        [
            ("G5 2.0 s", seconds <= 2.0),
            ("G5 batched 1.9x", batched >= 1.9),
            ("G5 single 6x", single >= 6.0),
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the tokens, measure, print, write; 1 if the tokens are not the same."""
    chosen = _parse(arguments)
    device, scale = torch.device(chosen.device), SCALES[chosen.scale]
    engine = TransformersEngine(chosen.model, dtype=chosen.dtype, batch_size=scale.batch)
    module, chat = random_model(chosen.model, device, DTYPES[chosen.dtype]), stand_in_chat()
    engine.adopt(module, chat, device)
    module.generation_config.eos_token_id = None
    draw = torch.Generator(device).manual_seed(0)
    shape = (scale.num_frames, 3, scale.height, scale.width)
    videos = [torch.rand(shape, generator=draw, device=device) for _ in range(scale.videos)]
    questions = [ask_about(question, CAPTION) for question in read_questions()]
    ids = [chat.question(text) for text in questions]

    def clips() -> list[Clip]:
        return [make_clip(video, scale.fps, scale.frames) for video in videos]

    def shared(decoding: Decoding) -> list[str]:
        return [
            reply.text
            for row in engine.ask(clips(), [questions] * scale.videos, decoding)
            for reply in row
        ]

    def single() -> tuple[list[list[int]], Tensor]:
        answers = [
            generate(module, chat, [(clip, question)]) for clip in clips() for question in ids
        ]
        return [texts[0] for texts, _ in answers], torch.cat([logits for _, logits in answers])

    def batched() -> tuple[list[list[int]], Tensor]:
        seen = clips()
        batches = [seen[i : i + scale.batch] for i in range(0, len(seen), scale.batch)]
        by_question = [
            [generate(module, chat, [(clip, question) for clip in batch]) for batch in batches]
            for question in ids
        ]
        texts = [[row for answer in answers for row in answer[0]] for answers in by_question]
        logits = torch.stack(
            [torch.cat([answer[1] for answer in answers]) for answers in by_question], 1
        )
        return [row[b] for b in range(scale.videos) for row in texts], logits.flatten(0, 1)

    greedy = Decoding(max_tokens=TOKENS)
    ours = [[int(token) for token in text.split()] for text in shared(greedy)]
    found = differences(ours, single(), batched())
    size = f"{scale.height}x{scale.width}x{scale.num_frames}"
    work = f"{scale.videos} videos x {len(questions)} questions, {size}"
    if found:
        print(f"{work}: the tokens are not those of generate: no number\n{found}")
        return 1
    ways: dict[str, Callable[[], object]] = {
        "shared prefix": functools.partial(shared, greedy),
        "shared prefix, expected": functools.partial(
            shared, Decoding(max_tokens=TOKENS, constrained=True, probabilities=True)
        ),
        "generate, batched": batched,
        "generate, single": single,
    }
    timed = {name: timing.median(way, device, chosen.rounds) for name, way in ways.items()}
    about = rows.provenance(device) | {"transformers": transformers.__version__}
    measured = []
    for name, usage in timed.items():
        peers = ("generate, single", "generate, batched")
        single_x, batched_x = (timed[peer].seconds / usage.seconds for peer in peers)
        figures = (usage.seconds, single_x, batched_x)
        measured.append(
            JudgeMeasurement(
                model=chosen.model,
                work=work,
                implementation=name,
                dtype=chosen.dtype,
                seconds=usage.seconds,
                peak_gb=usage.peak / 1e9 if usage.peak else None,
                against_single=single_x,
                against_batched=batched_x,
                goals=""
                if name in peers
                else goals(*figures, about["device"], chosen.model, scale),
                **about,
            )
        )
    print("  ".join(f"{name} {value}" for name, value in about.items()))
    print(f"{chosen.model}, {chosen.dtype}, {work}: same tokens, ties aside")
    print(rows.table(measured, COLUMNS))
    path = rows.csv_path(chosen.csv, device, "judge")
    rows.write_csv(path, measured)
    print(f"\n{path}")
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--device", default=default, help="cuda, cuda:1 or cpu (slow at full scale)"
    )
    parser.add_argument(
        "--scale",
        choices=list(SCALES),
        default="full",
        help="of the videos, and of the model if none is named",
    )
    parser.add_argument("--model", choices=list(CONFIGS), help="default: by scale")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: bf16 on a GPU, else fp32")
    parser.add_argument("--rounds", type=int, default=3, help="of each way, after an uncounted one")
    parser.add_argument(
        "--csv", type=Path, help="folder of the CSV file (default: benchmarks/data)"
    )
    chosen = parser.parse_args(arguments)
    chosen.model = chosen.model or {"full": "qwen2.5-vl-7b", "tiny": "tiny"}[chosen.scale]
    chosen.dtype = chosen.dtype or ("fp32" if chosen.device == "cpu" else "bf16")
    return chosen


if __name__ == "__main__":
    sys.exit(main())
