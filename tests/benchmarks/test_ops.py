"""ops.py at a tiny size, and the arithmetic of its numbers: bytes, medians, ratios, goals."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fastgrpo_kernels
import pytest
import torch
from torch import Tensor

from benchmarks import ops
from benchmarks.common import cases, rows, timing, verdicts
from benchmarks.peers import dancegrpo, operations
from fastgrpo.algorithm.sde import sigma_schedule

CPU = torch.device("cpu")
TRANSITION = ("latents", "next_latents", "velocity", "velocity_uncond")
READ = {
    "sde_step": ("latents", "velocity", "velocity_uncond"),
    "sde_log_prob": TRANSITION,
    "grpo_loss": TRANSITION,
    "branch_gradient": (),
    "ln_modulate": ("x",),
    "gate_residual": ("x", "y"),
    "gate_residual_ln_modulate": ("x", "y"),
    "qk_norm_rope": ("q", "k", "cos", "sin"),
    "bias_gelu": ("hidden",),
}
"""Large inputs of the forward pass; a backward pass reads these too, and what arrives."""


def on_meta(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("size", ["wan_1.3b_480p", "wan_14b_240p", "hunyuan_240p"])
def test_counted_bytes_are_those_of_the_tensors(size: str) -> None:
    """Each large tensor that goes in, and each that comes out, on tensors without memory."""
    for case in cases.cases(size):
        if case.op not in READ:
            continue
        inputs = case.make(on_meta)
        written = sum(o.nbytes for o in case.fused(inputs, "reference") if o.numel() > 1000)
        read = sum(inputs[name].nbytes for name in READ[case.op] if name in inputs)
        assert case.bytes["forward"] == read + written, case.op
        if case.wrt:
            small = 10 * inputs[next((n for n in ("scale", "bias") if n in inputs), "a")].numel()
            large = {name: inputs[name].nbytes for name in case.wrt if inputs[name].numel() > small}
            if case.op == "gate_residual":  # x's gradient is the arriving one, and x is not read
                read -= large.pop("x")
            assert case.bytes["backward"] == read + written + sum(large.values()), case.op


def test_counted_bytes_are_those_of_the_goals() -> None:
    """docs/performance.md: a step moves 12 bytes per element, the loss 28 forward and backward."""
    found = {case.op: case for case in cases.cases("wan_1.3b_480p")}
    elements = 16 * 14 * 60 * 104
    assert found["sde_step"].bytes == {"forward": 12 * elements}
    assert found["grpo_loss"].bytes["forward+backward"] == 28 * elements
    assert found["ln_modulate"].bytes["forward"] == 4 * 21_840 * 1536
    assert {*READ, "clipped_ratio_loss"} == found.keys() <= {*fastgrpo_kernels.__all__}


@pytest.mark.parametrize("size", ["tiny", "tiny_per_head"])
def test_a_peer_computes_what_the_operation_does(size: str) -> None:
    """Of two that draw noise of their own only the shapes agree; the loss's statistics differ."""
    for case in cases.cases(size):
        inputs = case.make(ops.draw_on(CPU, 0))
        for one, other in zip(case.fused(inputs, "reference"), case.eager(inputs), strict=False):
            assert one.shape == other.shape
            if case.op not in ("sde_step", "branch_gradient", "clipped_ratio_loss"):
                torch.testing.assert_close(one.float(), other.float(), rtol=2e-2, atol=6e-2)
            if case.op == "grpo_loss":
                break


def test_times_are_medians_per_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that only the calls move."""
    now, durations = [0.0], iter([0.002] * 9 + [0.5] + [0.002] * 100)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def call() -> None:
        now[0] += next(durations)

    taken = timing.measure(lambda: [call] * 2, CPU, seconds=0.03)
    assert (taken.us, taken.host_us) == (pytest.approx(2000.0), taken.us)
    durations = iter([100.0, 3.0, 1.0, 2.0])  # the first is not counted
    assert timing.median(call, CPU, 3) == timing.Usage(seconds=2.0, peak=0.0)
    two_us = timing.Timing(2.0, 2.0, "wall")
    monkeypatch.setattr(timing, "measure", lambda prepare, device, seconds: two_us)
    assert timing.copy_bandwidth(CPU, numel=1000) == pytest.approx(2 * 4000 / 2e-6 / 1e9)


def test_implementations_are_timed_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that is ten times slower for the third of five turns."""
    turns: list[float] = []

    def measure(case: Any, compute: Any, *_: Any) -> timing.Timing:
        is_eager = compute is case.eager
        turns.append(2.0 if is_eager else 1.0)
        us = turns[-1] * (10 if turns.count(turns[-1]) == 3 else 1)
        return timing.Timing(us, us, "wall")

    monkeypatch.setattr(ops, "time_direction", measure)
    (case,) = (case for case in cases.cases("tiny") if case.op == "branch_gradient")
    monkeypatch.setattr(ops, "BACKENDS", {"cpu": ("reference",)})
    ((_, name, timings, _), _) = ops.measure_case(case, CPU, (), False, 0.1)
    assert turns == [1.0, 2.0] * 5
    assert name == "reference"
    assert {name: taken.us for name, taken in timings.items()} == {"reference": 1.0, "eager": 2.0}


def a_row(**changes: Any) -> ops.OpMeasurement:
    given = {f.name: 1.0 for f in dataclasses.fields(ops.OpMeasurement)} | {
        "op": "sde_step",
        "size": "wan_1.3b_480p",
        "direction": "forward",
        "implementation": "triton",
        "dtype": "bfloat16",
        "device": "NVIDIA H100 80GB HBM3",
        "goals": "",
        "us": 7.0,
        "speedup_eager": 14.0,
        "log_prob_error": 5e-8,
        "peers": "",
    }
    return ops.OpMeasurement(**given | changes)  # type: ignore[arg-type]


def test_goals_are_for_their_device_only() -> None:
    assert ops.goals(a_row()) == "G8 9 us: met; G8 eager 12x: met; G8 error 1e-6: met"
    slow = a_row(us=9.5, speedup_eager=11.0, log_prob_error=2e-6)
    assert ops.goals(slow) == "G8 9 us: not met; G8 eager 12x: not met; G8 error 1e-6: not met"
    pointwise = a_row(op="ln_modulate", copy_percent=85.0, speedup_eager=4.9, log_prob_error=None)
    assert ops.goals(pointwise) == "G7 copy 85 %: met; G7 eager 5x: not met; G7 compile 0.97x: met"
    assert ops.goals(a_row(device="AMD EPYC")) == ops.goals(a_row(implementation="eager")) == ""
    others = a_row(op="ln_modulate", log_prob_error=None, copy_percent=90.0, peers="sglang 0.99")
    assert ops.goals(others).startswith("G7 sglang 1x: not met; G7 copy 85 %: met")
    cpu = a_row(implementation="cpp", device="AMD EPYC", peers="unirl 2.00, dancegrpo 1.99")
    found = "C3 unirl 2x: met; C3 dancegrpo 2x: not met; C3 compile 1x: met"
    assert ops.goals(cpu) == found
    assert ops.goals(dataclasses.replace(cpu, speedup_compile=None)) == found.rpartition(";")[0]


def test_newer_rows_replace_older_ones(tmp_path: Path, read: Callable[..., Any]) -> None:
    path = tmp_path / "new" / "ops.csv"
    rows.write_csv(path, [a_row(), a_row(implementation="eager", speedup_eager=None)])
    rows.write_csv(path, [a_row(us=6.25)])
    found = [
        (row["implementation"], row["us"], row["speedup_eager"]) for row in read("new/ops.csv")
    ]
    assert found == [("eager", "7", ""), ("triton", "6.25", "14")]
    path.write_text("op,us\n")
    with pytest.raises(ValueError, match=r"expected the columns .*op.*, got op, us"):
        rows.write_csv(path, [a_row()])
    assert path.read_text() == "op,us\n"
    assert [rows.number(value, 2) for value in (None, 0.0, 1.234, 0.00123)] == [
        *("–", "0.00", "1.23", "1.2e-03")
    ]


GREEN = """
import pytest
@pytest.mark.parametrize("backend", ["reference", "cpp", "cuda-float32", "cuda-bfloat16"])
def test_it(backend):
    if "cuda" in backend:
        pytest.skip("no GPU")
"""
RED = "def test_it():\n    assert 1 == 2, 'the reason'\n"


def test_a_verdict_names_the_backends_that_were_tested(tmp_path: Path) -> None:
    (tmp_path / "test_green.py").write_text(GREEN)
    found = verdicts.verdict(tmp_path / "test_green.py")
    assert (found.green, found.note) == (True, "2 passed, 2 skipped")
    assert found.backends == ("cpp", "reference")
    assert verdicts.verdict(tmp_path / "test_missing.py").note == "no file test_missing.py"


def test_other_peers_get_a_number_if_they_compute_the_operation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, read: Any
) -> None:
    """One that is right, one that has only a forward, one that is wrong and one that fails."""
    (case,) = (case for case in cases.cases("tiny") if case.op == "gate_residual")
    both = ("forward", "backward")

    def peer(name: str, compute: Any, directions: tuple[str, ...] = both) -> Any:
        return operations.PeerOperation(name, case.op, compute, directions)

    found = [
        peer("right", case.eager),
        peer("ahead", case.eager, ("forward",)),
        peer("wrong", lambda inputs: (case.eager(inputs)[0] + 1,)),
        peer("fails", lambda inputs: (1 / 0,)),
        operations.PeerOperation("elsewhere", "ln_modulate", case.eager, both),
    ]
    monkeypatch.setattr(ops, "_other_peers", lambda chosen, device: found)
    monkeypatch.setattr(timing, "copy_bandwidth", lambda device: 40.0)
    (tmp_path / "test_gate_residual_ln_modulate.py").write_text(GREEN)
    options = "--device cpu --sizes tiny --seconds 0.001 --ops gate_residual --csv"
    assert ops.main([*options.split(), str(tmp_path)], tmp_path) == 0
    out = capsys.readouterr().out
    assert "gate_residual tiny: wrong: no number: AssertionError" in out
    assert "gate_residual tiny: fails: no number: ZeroDivisionError" in out
    rows_of = {(row["direction"], row["implementation"]): row for row in read("cpu_ops.csv")}
    assert {name for _, name in rows_of} == {"cpp", "reference", "eager", "right", "ahead"}
    assert ("backward", "ahead") not in rows_of
    ours = rows_of["forward", "reference"]
    expected = float(rows_of["forward", "right"]["us"]) / float(ours["us"])
    first, second = ours["peers"].split(", ")
    assert float(first.removeprefix("right ")) == pytest.approx(expected, abs=6e-3)
    assert second.startswith("ahead ")
    assert rows_of["forward", "right"]["peers"] == ""


def test_a_trainers_step_and_loss_are_those_of_its_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DanceGRPO's sampler and loss, written out by the test: noise at the step's deviation, and the
    loss at a ratio of one. The schedule, which the trainer makes once a rollout, is not made in
    every step that is timed.
    """
    made: list[int] = []
    monkeypatch.setattr(
        operations, "sigma_schedule", lambda n, s: made.append(n) or sigma_schedule(n, s)
    )
    script = tmp_path / "fastvideo" / "train_grpo_wan_2_1.py"
    script.parent.mkdir()
    names = [name for name in dancegrpo.NAMES if name != "flux_step"]
    script.write_text(
        "def flux_step(v, x, eta, sigmas, i, following, grpo, sde_solver):\n"
        "    dt = sigmas[i + 1] - sigmas[i]\n"
        "    mean, std = x + v * dt, eta * (-dt) ** 0.5\n"
        "    following = mean + std * torch.randn_like(mean) if following is None else following\n"
        "    return following, mean, -((following.detach() - mean) ** 2).flatten(1).mean(1)\n"
        + "".join(f"def {name}():\n    pass\n" for name in names)
    )
    step, loss = operations.of_checkouts({"dancegrpo": tmp_path, "unirl": None})
    assert (step.op, loss.op, step.name) == ("sde_step", "grpo_loss", "dancegrpo")
    (case,) = (case for case in cases.cases("shapes_16") if case.op == "grpo_loss")
    inputs = case.make(ops.draw_on(CPU, 0))
    following, log_prob = step.compute(inputs)
    # sigma_i = 3 t / (1 + 2 t) at t = 8/16 and 7/16: 0.75 and 0.7.
    noise = following - (inputs["latents"] + inputs["velocity"] * (0.7 - 0.75))
    assert float(noise.std()) == pytest.approx(0.3 * 0.05**0.5, rel=2e-2)
    inputs |= {"next_latents": following, "old_log_probs": log_prob}
    value, again = loss.compute(inputs)
    torch.testing.assert_close(again, log_prob)
    assert float(value) == pytest.approx(-float(inputs["advantages"].mean()), abs=1e-6)
    assert len(made) <= 1


def test_libraries_that_are_not_installed_are_no_peers() -> None:
    assert operations.of_libraries() == []


def test_ops_on_the_cpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, read: Any
) -> None:
    """Rows for the backends that green tests have shown; red tests or a failure cost no other."""
    monkeypatch.setattr(timing, "copy_bandwidth", lambda device: 40.0)
    (tmp_path / "test_grpo_loss.py").write_text(GREEN.replace("cpp", "triton"))
    (tmp_path / "test_sde_log_prob.py").write_text(GREEN)
    (tmp_path / "test_branch_gradient.py").write_text(RED)
    whole = cases.cases("tiny")
    broken = [
        dataclasses.replace(case, eager=lambda inputs: 1 / 0) if "log_prob" in case.op else case
        for case in whole
    ]
    monkeypatch.setattr(ops, "cases", lambda name: broken)
    options = (
        "--device cpu --sizes tiny --seconds 0.001 --ops grpo_loss sde_log_prob branch_gradient"
    )
    assert ops.main([*options.split(), "--csv", str(tmp_path)], tmp_path) == 1
    out = capsys.readouterr().out
    assert "branch_gradient: tests red: no number (test_branch_gradient.py: 1 failed)" in out
    assert "the reason" in out
    assert "sde_log_prob tiny: FAILED, no number: ZeroDivisionError" in out
    assert "grpo_loss tiny: no test of the backend cpp ran: no number" in out
    found = {(row["direction"], row["implementation"]): row for row in read("cpu_ops.csv")}
    directions = ("forward", "backward", "forward+backward")
    assert found.keys() == {(d, i) for d in directions for i in ("reference", "eager")}
    for (direction, _), row in found.items():
        rate = float(row["bytes"]) / float(row["us"]) / 1e3
        assert float(row["gb_per_s"]) == pytest.approx(rate, rel=1e-3)
        assert float(row["copy_percent"]) == pytest.approx(100 * rate / 40.0, rel=1e-3)
        peer, mine = found[direction, "eager"], found[direction, "reference"]
        ratio = float(peer["us"]) / float(mine["us"])
        assert float(mine["speedup_eager"]) == pytest.approx(ratio, rel=1e-3)
    assert 0.0 <= float(found["forward", "reference"]["log_prob_error"]) < 1e-6
    with pytest.raises(SystemExit):
        ops.main(["--ops", "softmax"])
