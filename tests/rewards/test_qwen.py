"""The judge in this process against plain `generate` calls of the same tiny random Qwen2.5-VL, at
the positions that the model was trained with.
"""

from __future__ import annotations

import gc
import itertools
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from qwen_positions import published_positions  # type: ignore[import-not-found]
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from fastgrpo.rewards.media.frames import patches, seconds_per_grid
from fastgrpo.rewards.vlm.answers import NUMBER, expected_answer, probabilities_fault
from fastgrpo.rewards.vlm.engine import Clip, Decoding, Reply
from fastgrpo.rewards.vlm.qwen import DTYPES, TransformersEngine
from fastgrpo.rewards.vlm.qwen_chat import CHARACTERS, read_chat
from fastgrpo.rewards.vlm.qwen_prefix import Prefix

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
QUESTIONS = [
    "Rate the frames of this video.",
    "Rate the motion of this video from 1.00 to 10.00. Answer with one number only.",
    "Does the video show «a red fox, 2 metres away»? 1 to 10.",
]
DIGITS = CHARACTERS[:10]


def clip(seed: int, frames: int = 4, height: int = 84, width: int = 112, fps: float = 2.0) -> Clip:
    draw = torch.Generator().manual_seed(seed)
    small = torch.randint(
        0, 256, (frames, 3, height // 28, width // 28), dtype=torch.uint8, generator=draw
    )
    return Clip(small.repeat_interleave(28, 2).repeat_interleave(28, 3), fps)


MIXED = [
    clip(0),
    clip(1, height=56, width=140),
    clip(2),
    clip(3, frames=6),
    clip(4, height=56, width=140, fps=1.0),
    clip(5),
]


@pytest.fixture(scope="module")
def model(qwen_folder: Path) -> Any:
    """transformers' model at the published positions: transformers 5 itself begins the text after a
    long video too early.
    """
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        qwen_folder, dtype=torch.float32
    ).eval()

    def get_rope_index(
        input_ids: Tensor, *_: Any, video_grid_thw: Tensor, second_per_grid_ts: Tensor, **__: Any
    ) -> tuple[Tensor, Tensor]:
        (ids,), ((t, h, w),) = input_ids.tolist(), video_grid_thw.tolist()
        interval = model.config.vision_config.tokens_per_second * float(second_per_grid_ts)
        positions = published_positions(
            ids, model.config.video_token_id, (t, h // 2, w // 2), interval
        )
        return positions[:, None], positions.max() + 1 - torch.tensor([[len(ids)]])

    model.model.get_rope_index = get_rope_index
    return model


@pytest.fixture(scope="module")
def tokenizer(qwen_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(qwen_folder)


@pytest.fixture
def engine(qwen_folder: Path) -> TransformersEngine:
    return loaded(qwen_folder)


def loaded(folder: Path, **settings: Any) -> TransformersEngine:
    engine = TransformersEngine(str(folder), **({"dtype": "fp32"} | settings))
    engine.load(CPU)
    return engine


def inputs_of(
    model: Any, tokenizer: Any, video: Clip, question: str, answer: str = ""
) -> dict[str, Tensor]:
    """What the official processor gives for one video and one question."""
    pixels, grid = patches(video)
    message = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}
    text = (
        tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        + answer
    )
    pad = "<|video_pad|>"
    ids = tokenizer(
        text.replace(pad, pad * (grid[0] * grid[1] * grid[2] // 4)), return_tensors="pt"
    )
    return {
        **ids,
        "mm_token_type_ids": (ids.input_ids == model.config.video_token_id).int() * 2,
        "pixel_values_videos": pixels,
        "video_grid_thw": torch.tensor([grid]),
        "second_per_grid_ts": torch.tensor([seconds_per_grid(video)]),
    }


@torch.no_grad()
def generate(
    model: Any, tokenizer: Any, video: Clip, question: str, tokens: int = 16
) -> tuple[str, Tensor]:
    """The text of a plain greedy `generate`, and its logits [tokens, vocabulary]."""
    inputs = inputs_of(model, tokenizer, video, question)
    out = model.generate(
        **inputs,
        do_sample=False,
        temperature=None,
        repetition_penalty=1.0,
        max_new_tokens=tokens,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return tokenizer.decode(
        out.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    ), torch.cat(out.logits)


@torch.no_grad()
def next_logits(model: Any, tokenizer: Any, video: Clip, question: str, answer: str) -> Tensor:
    """Logits [vocabulary] after an answer that was begun, all tokens computed anew."""
    return model(**inputs_of(model, tokenizer, video, question, answer)).logits[0, -1]


def texts(replies: list[list[Reply]]) -> list[list[str]]:
    return [[reply.text for reply in row] for row in replies]


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_the_tokens_of_plain_generate(
    qwen_folder: Path, model: Any, tokenizer: Any, batch_size: int
) -> None:
    long = clip(
        6, frames=8, height=56, width=56, fps=0.25
    )  # its positions in time reach beyond its questions'
    replies = loaded(qwen_folder, batch_size=batch_size).ask(
        [*MIXED, long], [QUESTIONS] * 7, Decoding()
    )
    compared = 0
    for video, row in zip([*MIXED, long], replies, strict=True):
        for question, reply in zip(QUESTIONS, row, strict=True):
            text, logits = generate(model, tokenizer, video, question)
            top = logits.topk(2).values
            if (top[:, 0] - top[:, 1]).min() > 1e-4:  # no tie
                assert reply.text == text
                compared += 1
    assert compared >= 18
    assert (
        len({reply.text for row in replies for reply in row}) > 6
    )  # the answers tell the videos and the questions apart


@pytest.mark.parametrize("constrained", [False, True])
def test_a_reply_depends_neither_on_the_batch_nor_on_the_order(
    engine: TransformersEngine, constrained: bool
) -> None:
    decoding = Decoding(constrained=constrained, probabilities=True)
    together = engine.ask(MIXED, [QUESTIONS] * len(MIXED), decoding)
    order = [4, 0, 5, 2, 1, 3]
    shuffled = engine.ask([MIXED[i] for i in order], [QUESTIONS[::-1]] * len(order), decoding)
    alone = [
        [engine.ask([MIXED[i]], [[question]], decoding)[0][0] for question in QUESTIONS]
        for i in order
    ]
    for place, i in enumerate(order):
        for other in (shuffled[place][::-1], alone[place]):
            for a, b in zip(together[i], other, strict=True):
                assert a.text == b.text
                assert a.ten == pytest.approx(b.ten, abs=1e-5)
                for p, q in zip(a.digits, b.digits, strict=True):
                    assert p == pytest.approx(q, abs=1e-5)


def test_rows_of_other_lengths(engine: TransformersEngine) -> None:
    rows = [QUESTIONS, [], QUESTIONS[:1], QUESTIONS[1:], [], QUESTIONS[2:]]
    replies = engine.ask(MIXED, rows, Decoding())
    whole = texts(engine.ask(MIXED, [QUESTIONS] * 6, Decoding()))
    assert texts(replies) == [whole[0], [], whole[2][:1], whole[3][1:], [], whole[5][2:]]
    assert engine.ask([], [], Decoding()) == []


def test_a_clips_rate_reaches_the_answer(engine: TransformersEngine) -> None:
    """Time stands in the positions."""
    rates = [clip(3, frames=6, fps=fps) for fps in (0.5, 2.0, 4.0)]
    decoding = Decoding(max_tokens=1, probabilities=True)
    slow, usual, fast = (row[0].ten for row in engine.ask(rates, [QUESTIONS[:1]] * 3, decoding))
    assert min(abs(slow - usual), abs(usual - fast)) > 1e-6


def tens(engine: TransformersEngine) -> list[float]:
    """`Reply.ten` of all questions about all clips."""
    replies = engine.ask(MIXED, [QUESTIONS] * 6, Decoding(max_tokens=1, probabilities=True))
    return [reply.ten for row in replies for reply in row]


def test_eager_attention_says_the_same(qwen_folder: Path, engine: TransformersEngine) -> None:
    assert tens(engine) == pytest.approx(tens(loaded(qwen_folder, attention="eager")), abs=1e-5)


def test_probabilities_are_the_models(
    engine: TransformersEngine, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each place's, and `ten`, against a forward of all the tokens; the expectation against its
    formula over those.
    """
    (plain,) = engine.ask(MIXED[:1], [QUESTIONS[:1]], Decoding())[0]
    assert (plain.digits, plain.ten) == ((), 0.0)
    replies = engine.ask(MIXED[:4], [QUESTIONS] * 4, Decoding(constrained=True, probabilities=True))
    ids = tokenizer.convert_tokens_to_ids(list(DIGITS))

    def chances(video: Clip, question: str, begun: str) -> list[float]:
        return (
            next_logits(model, tokenizer, video, question, begun).double().softmax(-1)[ids].tolist()
        )

    for video, row in zip(MIXED, replies, strict=False):
        for question, reply in zip(QUESTIONS, row, strict=True):
            recomputed = [
                chances(video, question, reply.text[:place]) for place in range(len(reply.text))
            ]
            assert [list(p.values()) for p in reply.digits] == [
                pytest.approx(p, abs=1e-5) for p in recomputed
            ]
            assert all(list(p) == list(DIGITS) for p in reply.digits)
            ten = chances(video, question, "1")[0]
            assert reply.ten == pytest.approx(ten, abs=1e-5)
            first = recomputed[0][1:]
            share = [p / sum(first) for p in first]
            rest = sum(
                sum(d * p for d, p in enumerate(recomputed[place]))
                / sum(recomputed[place])
                / 10 ** (place - 1)
                for place in range(2, 4)
                if not reply.text.startswith("10")
            )
            wanted = (
                sum(d * p for d, p in enumerate(share, 1))
                + 9 * share[0] * ten
                + (1 - share[0] * ten) * rest
            )
            assert "digits of probability 0.5 to 1 at token 1" in probabilities_fault(reply)
            with monkeypatch.context() as patch:  # random weights find no token likely
                patch.setattr("fastgrpo.rewards.vlm.answers.LEAST_MASS", 0.0)
                assert expected_answer(reply) == pytest.approx(wanted, abs=1e-5)


def test_a_constrained_answer_is_a_number(engine: TransformersEngine) -> None:
    free = engine.ask(MIXED, [QUESTIONS] * 6, Decoding())
    assert not any(re.fullmatch(NUMBER, reply.text) for row in free for reply in row)
    drawn = [
        Decoding(constrained=True, temperature=t, seed=seed)
        for t in (1.0, 5.0)
        for seed in range(3)
    ]
    for decoding in (Decoding(constrained=True, max_tokens=5), *drawn):
        for reply in (
            reply for row in engine.ask(MIXED, [QUESTIONS] * 6, decoding) for reply in row
        ):
            assert re.fullmatch(NUMBER, reply.text)


def test_ten_is_written_where_the_model_would(
    engine: TransformersEngine, qwen_folder: Path
) -> None:
    """With a model that writes 1 first and 0 from then on; without the constraint it does not stop
    there.
    """
    module = Qwen2_5_VLForConditionalGeneration.from_pretrained(qwen_folder, dtype=torch.float32)
    chat = read_chat(qwen_folder)
    engine.adopt(module, chat, CPU)
    for constrained, written in ((True, "10.00"), (False, "10000000")):
        wanted = itertools.chain(chat.characters[1:2], itertools.repeat(chat.characters[0]))
        hook = module.lm_head.register_forward_hook(
            lambda _module, _args, out, wanted=wanted: out.index_fill(
                -1, torch.tensor([next(wanted)]), 1000.0
            )
        )
        decoding = Decoding(max_tokens=8, constrained=constrained)
        assert [reply.text for reply in engine.ask(MIXED[:1], [QUESTIONS], decoding)[0]] == [
            written
        ] * 3
        hook.remove()


@pytest.mark.parametrize("constrained", [False, True])
def test_a_sampled_answer_is_of_its_seed(engine: TransformersEngine, constrained: bool) -> None:
    decodings = [Decoding(constrained=constrained, temperature=1.0, seed=seed) for seed in range(4)]
    asked = [texts(engine.ask(MIXED, [QUESTIONS] * 6, decoding)) for decoding in decodings]
    torch.rand(3)  # the global generator has no part in it
    again = [texts(engine.ask(MIXED, [QUESTIONS] * 6, decoding)) for decoding in decodings]
    assert again == asked
    alone = engine.ask([MIXED[3]], [QUESTIONS[2:]], decodings[1])[0][0].text
    assert alone == asked[1][3][2]
    assert len({asked[seed][0][0] for seed in range(4)}) > 1
    state = torch.get_rng_state()
    engine.ask(MIXED[:1], [QUESTIONS], decodings[0])
    assert torch.equal(torch.get_rng_state(), state)


def watch(
    engine: TransformersEngine,
) -> tuple[list[int], list[tuple[int, int]], list[tuple[int, int]]]:
    """Rows of patches through the vision tower; shapes of the language model's calls on embeddings,
    and on tokens.
    """
    module = engine.loaded[0]  # type: ignore[index]
    patches_seen: list[int] = []
    prefilled: list[tuple[int, int]] = []
    continued: list[tuple[int, int]] = []

    def language(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs.get("inputs_embeds") is not None:
            prefilled.append(tuple(kwargs["inputs_embeds"].shape[:2]))
        else:
            continued.append(tuple(kwargs["input_ids"].shape))

    module.model.visual.patch_embed.register_forward_pre_hook(
        lambda _m, args: patches_seen.append(len(args[0]))
    )
    module.model.language_model.register_forward_pre_hook(language, with_kwargs=True)
    return patches_seen, prefilled, continued


def test_each_video_is_seen_once(qwen_folder: Path, tokenizer: Any) -> None:
    engine = loaded(qwen_folder, batch_size=2)
    patches_seen, prefilled, continued = watch(engine)
    engine.ask(MIXED, [QUESTIONS] * 6, Decoding(constrained=True))
    assert sum(patches_seen) == sum(len(patches(video)[0]) for video in MIXED)
    # Batches of 2: clips 0 and 2, then 5; 1 and 4; 3.
    chat = read_chat(qwen_folder)
    around = len(chat.before) + len(chat.after)
    assert sorted(prefilled) == sorted(
        [(2, around + 24), (1, around + 24), (2, around + 20), (1, around + 36)]
    )
    longest = max(len(chat.question(question)) for question in QUESTIONS)
    assert [shape for shape in continued if shape[1] > 1] == [
        (rows, longest) for rows in (6, 3, 6, 3)
    ]
    assert len(continued) == 4 * (
        1 + 3
    )  # a number is four tokens, of which the question's call gives the first
    assert engine.counters() == {"vision_passes": 6, "prefix_passes": 6, "requests": 18}
    assert engine.counters() == {"vision_passes": 0, "prefix_passes": 0, "requests": 0}


def test_the_prefix_cache_keeps_the_latest_videos(qwen_folder: Path) -> None:
    """One question after the other: the video is computed for the first; a third video drives the
    oldest out.
    """
    engine = loaded(qwen_folder, prefix_cache=2)
    patches_seen, _, _ = watch(engine)
    whole = texts(loaded(qwen_folder).ask(MIXED[:4], [QUESTIONS] * 4, Decoding()))
    assert [
        engine.ask([MIXED[0]], [[question]], Decoding())[0][0].text for question in QUESTIONS
    ] == whole[0]
    assert len(patches_seen) == 1
    copy = Clip(MIXED[0].frames.clone(), 2.0)
    engine.ask([copy, MIXED[1]], [QUESTIONS] * 2, Decoding())
    assert len(patches_seen) == 2
    assert texts(engine.ask([MIXED[2], MIXED[0]], [QUESTIONS] * 2, Decoding())) == [
        whole[2],
        whole[0],
    ]  # one kept, one new
    assert patches_seen[2:] == [96]
    engine.ask([MIXED[1]], [QUESTIONS], Decoding())
    assert len(patches_seen) == 4
    engine.ask(
        [Clip(MIXED[1].frames, 1.0)], [QUESTIONS], Decoding()
    )  # other positions, so another prefix
    assert len(patches_seen) == 5
    engine.ask(MIXED[:4], [QUESTIONS] * 4, Decoding())
    chat = read_chat(qwen_folder)
    tokens = (
        2 * (len(chat.before) + len(chat.after)) + 20 + 36
    )  # of clips 1 and 3, whose sizes come last
    kept = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept_tensors(engine)
    }
    assert (
        sum(kept.values()) == tokens * 3 * 2 * 2 * 16 * 4
    )  # layers, keys and values, heads, head size, bytes; no view of a batch


def kept_tensors(engine: TransformersEngine) -> list[Tensor]:
    prefixes: list[Prefix] = list(engine._kept.values())
    return [tensor for prefix in prefixes for layer in prefix.layers for tensor in layer]


def bytes_alive() -> int:
    """Of every storage that a tensor of this process holds. Other tests may have left fake ones,
    which have none.
    """
    gc.collect()
    tensors = [
        found
        for found in gc.get_objects()
        if issubclass(type(found), Tensor) and not isinstance(found, FakeTensor)
    ]
    return sum(
        {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in tensors
        }.values()
    )


def test_nothing_is_kept_after_an_answer(engine: TransformersEngine) -> None:
    caches: list[weakref.ref[Any]] = []
    engine.loaded[0].model.language_model.register_forward_pre_hook(  # type: ignore[index]
        lambda _module, _args, kwargs: caches.append(weakref.ref(kwargs["past_key_values"])),
        with_kwargs=True,
    )
    engine.ask(MIXED, [QUESTIONS] * 6, Decoding(temperature=1.0))
    before = bytes_alive()
    engine.ask(MIXED, [QUESTIONS] * 6, Decoding(probabilities=True))
    assert bytes_alive() == before
    assert caches
    assert all(cache() is None for cache in caches)
    assert engine.loaded[0].model.rope_deltas is None  # type: ignore[index]


def test_gradients_are_off_and_the_trainers_stay_as_they_are(engine: TransformersEngine) -> None:
    module = engine.loaded[0]  # type: ignore[index]
    assert not module.training
    assert not any(p.requires_grad or p.is_inference() for p in module.parameters())
    graphs: list[bool] = []
    module.lm_head.register_forward_hook(
        lambda _m, _i, out: graphs.append(out.requires_grad or out.is_inference())
    )
    weight = torch.randn(3, 3, requires_grad=True)
    video = clip(0)
    plain = engine.ask([video], [QUESTIONS], Decoding(probabilities=True))
    with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16):
        loss = (weight @ weight).float().square().sum()
        within = engine.ask([video], [QUESTIONS], Decoding(probabilities=True))
        assert torch.is_grad_enabled()
        assert torch.is_autocast_enabled("cpu")
    loss.backward()
    assert within == plain  # bit for bit: the trainer's autocast has no part in it
    assert not any(graphs)
    assert weight.grad is not None
    assert video.frames.dtype == torch.uint8


def test_bfloat16(qwen_folder: Path, engine: TransformersEngine) -> None:
    """The default: weights in bf16, the same bits again, probabilities near those of fp32."""
    half = TransformersEngine(str(qwen_folder))
    half.load(CPU)
    assert half.loaded is not None
    assert (
        {p.dtype for p in half.loaded[0].parameters()} == {torch.bfloat16} == {DTYPES[half.dtype]}
    )
    found = tens(half)
    assert found == tens(half)
    assert found == pytest.approx(tens(engine), rel=0.2)
