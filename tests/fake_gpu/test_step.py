"""A whole `Trainer.step` on a CUDA device that is not there: nothing lies on the wrong device, in
the wrong dtype or without a fake, the host waits where it says, and `plan` knows the bytes.

Width, tokens and frames are those of the recipes; layers, steps and videos are few.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

FakeGPU = Callable[..., dict[str, Any]]

START = {
    # The text of the prompt and of the unconditional branch, if there is one.
    "to the GPU @ pretrained.DiffusersPolicy.padded": 2,
    # a, b, std and the time steps; the seeds of the first noise and of the SDE's.
    "to the GPU @ rollout.start_rollout.on_device": 4,
    "to the GPU @ rollout.start_rollout.seeds": 2,
}
WITHOUT_GUIDANCE = {"to the GPU @ pretrained.DiffusersPolicy.padded": 1}
BETWEEN = {
    # Three phases, of which each waits for its GPU's work.
    "torch.cuda.synchronize @ metrics.Stopwatch.phase": 3,
    "tolist @ update.update": 1,
    # Of each of two optimizer steps: indices and advantages before its passes, statistics and loss
    # after them.
    "to the GPU @ trajectory.Rollout.index": 2,
    "to the GPU @ update.trained_rows": 2,
    "tolist @ update.accumulate_gradients": 2,
    "item @ update.accumulate_gradients": 2,
}
STEP = {"item @ collectives.clip_gradients": 2}
"""Of each optimizer step: the norm, which decides whether it is made."""
WITHOUT_WAITS = ("rollout", "decode", "update")
"""The sampling loop, the decodes in it, and the passes between two optimizer steps."""

SHORT = {"rollout.num_inference_steps": 2}
KL_AND_EMA = {"update.kl_coef": 0.01, "update.ema_decay": 0.9}
CASES: dict[str, dict[str, Any]] = {
    "wan": {},
    "wan, LoRA, keep_attention, KL, EMA": {
        "options": SHORT
        | KL_AND_EMA
        | {"policy.init_args.lora.rank": 16, "parallel.activations": "keep_attention"}
    },
    "wan, both branches at once, all activations kept, KL, EMA": {
        "options": KL_AND_EMA | {"update.branchwise": False, "parallel.activations": "none"}
    },
    "wan, 8 ranks, keep_gathered, KL, EMA": {
        "world_size": 8,
        "options": SHORT | KL_AND_EMA | {"parallel.keep_gathered": True},
    },
    "hunyuan": {"model": "hunyuanvideo"},
}
SLOW: dict[str, dict[str, Any]] = {
    "wan and its VAE": {"decode": True, "options": SHORT},
    "hunyuan, 8 ranks, guidance, keep_attention": {
        "model": "hunyuanvideo",
        "world_size": 8,
        "options": SHORT
        | {"rollout.guidance_scale": 2.0, "parallel.activations": "keep_attention"},
    },
}


def report_of(fake_gpu: FakeGPU, case: dict[str, Any]) -> dict[str, Any]:
    answer = fake_gpu(**case)
    assert "report" in answer, answer.get("traceback", answer["error"])
    report: dict[str, Any] = answer["report"]
    return report


@pytest.mark.parametrize(
    "case",
    [
        *(pytest.param(case, id=name) for name, case in CASES.items()),
        *(pytest.param(case, id=name, marks=pytest.mark.slow) for name, case in SLOW.items()),
    ],
)
def test_a_step_waits_where_it_says_and_takes_what_plan_says(
    fake_gpu: FakeGPU, case: dict[str, Any]
) -> None:
    report = report_of(fake_gpu, case)
    waits, options = report["waits"], case.get("options", {})
    assert {phase: waits[phase] for phase in WITHOUT_WAITS if phase in waits} == {}
    guided = "hunyuan" not in case.get("model", "") or "rollout.guidance_scale" in options
    of_hunyuan = {"to the GPU @ hunyuan_video.HunyuanVideoPolicy.encode": 1 + guided}
    expected = START | ({} if guided else WITHOUT_GUIDANCE)
    assert waits["start"] == expected | (of_hunyuan if "model" in case else {})
    assert waits[""] == BETWEEN
    assert waits["step"] == STEP
    for phase, planned in report["plan"].items():
        # Of the blocks that are gathered and reduced, `plan` counts the most that can be on their
        # way at a time: more than two layers have.
        on_their_way = 4 * report["block"] if "world_size" in case else 0
        assert report["peaks"][phase] <= 1.02 * planned, phase
        assert report["peaks"][phase] >= 0.98 * planned - on_their_way, phase
    # Two optimizer steps of which none was skipped, on the frames as they were decoded.
    assert report["metrics"]["num_skipped_updates"] == 0
    height, width = (240, 416) if "model" in case else (480, 832)
    assert report["videos"] == [[1, 53, 3, height, width, "torch.float32", "cuda"]] * 2


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ("host_timesteps", "wrong device"),
        ("host_operand", "wrong device"),
        ("fp32_products", "wrong dtype: expected"),
        ("fp32_stream", "between the blocks"),
        ("fp64_latents", "wrong dtype: fp64"),
        ("fp64_gradient", "wrong dtype: fp64"),
        ("fp32_vector_product", "wrong dtype: expected mv"),
        ("no_fake", "without_a_fake"),
    ],
)
def test_a_fault_ends_the_step(fake_gpu: FakeGPU, fault: str, found: str) -> None:
    answer = fake_gpu(faults=[fault], options=SHORT)
    assert found in answer["error"], answer.get("traceback")


def test_a_wait_in_the_sampling_loop_and_a_tensor_kept_alive_show(fake_gpu: FakeGPU) -> None:
    report = report_of(fake_gpu, {"faults": ["item", "kept_frames"], "layers": 1, "options": SHORT})
    # Two steps of two videos, which share the first.
    assert report["waits"]["rollout"] == {"item @ rollout._sample": 3}
    frames = 4 * 53 * 3 * 480 * 832
    peak, planned = report["peaks"]["update"], report["plan"]["update"]
    assert peak - planned == pytest.approx(2 * frames, rel=0.1)
    assert peak > 1.02 * planned
