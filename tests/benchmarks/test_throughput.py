"""The benchmark of the real generators, at tiny size: the DanceGRPO-style loop against the trainer,
what G0 sees, the sums, the command.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import dancegrpo_loop, generators, throughput, throughput_bench, throughput_rows  # noqa: E402
from benchmarks.throughput_bench import Bench, Bits, Spent  # noqa: E402
from benchmarks.throughput_rows import Figure  # noqa: E402
from fastgrpo.algorithm.sde import sde_coefficients, sigma_schedule  # noqa: E402
from fastgrpo.config import RolloutConfig, RuntimeConfig, UpdateConfig  # noqa: E402
from fastgrpo.distributed import collectives  # noqa: E402
from fastgrpo.planning import memory, meta_model  # noqa: E402
from fastgrpo.training.rollout import sample_groups, start_rollout  # noqa: E402
from fastgrpo.training.trajectory import Rollout  # noqa: E402
from fastgrpo.training.update import update  # noqa: E402

CPU = torch.device("cpu")
WHOLE_PEER = frozenset(dancegrpo_loop.HANDICAPS) - {"fa2"}
MakeBench = Callable[..., Bench]


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    collectives.start(RuntimeConfig(device="cpu"))
    yield
    collectives.stop()
    torch.set_num_threads(threads)


@pytest.fixture
def make_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeBench:
    """make_bench(*options, model=...): what the command makes of its options, at tiny size, without
    measuring this machine.
    """
    monkeypatch.setattr(throughput, "matmul_rate", lambda device: 1e10)

    def make(*given: str, model: str = "wan2.1_t2v_1.3b") -> Bench:
        words = [
            "--model",
            model,
            "--random-weights",
            "--scale",
            "tiny",
            "--device",
            "cpu",
            "--csv",
            str(tmp_path / "data"),
            *given,
        ]
        options, overrides = throughput._parse(words)
        return throughput.prepare(options, overrides, tmp_path / model)

    return make


def rollout_of(bench: Bench, policy: Any, videos: int) -> Rollout:
    cfg = dataclasses.replace(bench.config.rollout, num_generations=videos)
    return start_rollout(
        policy, [generators.PROMPT], cfg, seed=0, iteration=1, first_slot=0, device=CPU
    )


# -------- the DanceGRPO-style loop


@pytest.mark.parametrize("model", ["wan2.1_t2v_1.3b", "hunyuanvideo"])
def test_the_peer_samples_and_trains_what_the_trainer_does(
    make_bench: MakeBench, model: str
) -> None:
    """In fp32: with all its handicaps the same videos, log-probabilities and step of the weights,
    up to rounding; its velocities are the product of diffusers' blocks and torch's operations
    alone.
    """
    bench = make_bench(model=model)
    handicaps = dancegrpo_loop.possible(WHOLE_PEER, bench.branches == 2, model == "hunyuanvideo")
    assert ("batched_cfg" in handicaps) == (bench.branches == 2)
    cfg = UpdateConfig(
        gradient_accumulation=2, timestep_fraction=0.5, clip_range=0.9, max_grad_norm=1e9
    )
    found = []
    for theirs in (False, True):
        policy = generators.build(bench.config, CPU, fused=False, masked=theirs)
        rollout = rollout_of(bench, policy, 2)
        if theirs:
            clean = torch.cat(dancegrpo_loop.sample(policy, rollout, handicaps))
        else:
            clean = torch.cat([sample.latents for sample in sample_groups(policy, rollout)])
        before = [p.detach().clone() for p in policy.transformer.parameters()]
        optimizer, advantages = (
            torch.optim.SGD(policy.transformer.parameters(), lr=1.0),
            {0: 0.7, 1: -1.2},
        )
        if theirs:
            dancegrpo_loop.train(policy, optimizer, rollout, [0, 1], advantages, cfg, handicaps)
        else:
            update(policy, optimizer, rollout, [0, 1], advantages, cfg)
        moved = torch.cat(
            [
                (p.detach() - old).flatten()
                for p, old in zip(policy.transformer.parameters(), before, strict=True)
            ]
        )
        found.append((clean, rollout.latents, rollout.log_probs[:, :-1], moved))
    for ours, peer in zip(found[0][:3], found[1][:3], strict=True):
        torch.testing.assert_close(peer, ours, rtol=1e-5, atol=2e-5)
    ours, peer = found[0][3].double(), found[1][3].double()
    assert float(ours.norm()) > 0
    assert float((ours - peer).norm() / ours.norm()) < 1e-4


def test_a_first_step_that_is_shared_is_made_once(make_bench: MakeBench) -> None:
    bench = make_bench()
    policy = generators.build(bench.config, CPU, fused=False)
    latents = []
    for handicaps in (set(), {"no_shared_step"}):
        with throughput_bench.recording(policy) as velocities:
            rollout = rollout_of(bench, policy, 2)
            dancegrpo_loop.sample(policy, rollout, handicaps)
        assert len(velocities) == 2 * (2 * 6 - ("no_shared_step" not in handicaps))
        latents.append(rollout.latents)
    assert torch.equal(*latents)


def test_which_handicaps_go_together() -> None:
    possible, toggled = dancegrpo_loop.possible, dancegrpo_loop.toggled
    assert possible(WHOLE_PEER, True, False) == WHOLE_PEER - {"mask"}
    assert possible(WHOLE_PEER, False, True) == WHOLE_PEER - {"batched_cfg", "joint_backward"}
    assert possible(["batched_cfg"], True, False) == {"batched_cfg", "joint_backward"}
    assert possible(["mask", "fa2"], False, True) == {"fa2"}
    assert toggled(
        frozenset({"batched_cfg", "joint_backward", "mp4"}), "joint_backward", True, False
    ) == {"mp4"}
    assert toggled(frozenset({"mask"}), "fa2", False, True) == {"fa2"}
    assert toggled(frozenset({"eager"}), "eager", True, False) == frozenset()
    with pytest.raises(ValueError, match=r"--handicaps: expected names of fa2, eager, .*got slow"):
        possible(["slow"], True, False)
    assert {name for names in dancegrpo_loop.TOUCHES.values() for name in names} == set(
        dancegrpo_loop.HANDICAPS
    )


def test_frames_come_back_from_an_mp4_almost_as_they_were(tmp_path: Path) -> None:
    pytest.importorskip("av")
    rows, columns = torch.meshgrid(
        torch.linspace(0, 1, 64), torch.linspace(0, 1, 96), indexing="ij"
    )
    frames = torch.stack(
        [torch.stack([rows, columns, torch.full_like(rows, shade)]) for shade in (0.2, 0.5, 0.8)]
    )
    back = dancegrpo_loop.mp4_round_trip(frames, 15, tmp_path / "video.mp4")
    assert back.shape == frames.shape
    assert 0 < float((back - frames).abs().mean()) < 0.03
    with pytest.raises(ValueError, match="even height and width, got \\[63, 96\\]"):
        dancegrpo_loop.mp4_round_trip(frames[:, :, 1:], 15, tmp_path / "odd.mp4")


# -------- G0, and the rest


class Drifting:
    """A tiny policy whose training forward gives velocities that are `off` too large."""

    def __init__(self, policy: Any, off: float) -> None:
        self.policy, self.off = policy, off

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)

    def velocity(self, latents: Tensor, timesteps: Tensor, conditioning: Any) -> Tensor:
        velocity: Tensor = self.policy.velocity(latents, timesteps, conditioning)
        return velocity + self.off if torch.is_grad_enabled() else velocity


def test_g0_measures_a_training_forward_that_differs(tiny_policy: Any) -> None:
    """By hand: what differs by d in both branches differs by d under guidance, and by |b| d / s in
    units of the noise.
    """
    size = RolloutConfig(
        num_prompts=1, num_generations=1, height=2, width=2, num_frames=2, num_inference_steps=6
    )
    cfg = UpdateConfig(timestep_fraction=1.0)

    def bits(off: float) -> Bits:
        policy: Any = Drifting(tiny_policy(), off)
        rollout = start_rollout(policy, ["a"], size, seed=0, iteration=1, first_slot=0, device=CPU)
        return throughput_bench.check_bits(policy, rollout, cfg)

    assert bits(0.0) == Bits(equal=True, drift=0.0, mismatch=0.0, steps=5)
    assert bits(0.0).green
    red = bits(0.01)
    table = sde_coefficients(sigma_schedule(6, 5.0), "dance", 0.5)
    assert red.mismatch == pytest.approx(
        float((table.b / table.std).abs()[:5].max()) * 0.01, rel=1e-3
    )
    assert not red.equal
    assert red.drift > 0
    assert not red.green


def test_likeness_of_frames_by_hand() -> None:
    exact = torch.full((1, 2, 3, 8, 8), 0.5)
    off = exact.clone()
    off[:, :, :, :4] += 0.1
    found = throughput_bench.likeness(off, exact)
    assert found["psnr"] == pytest.approx(23.0103, abs=1e-3)  # -10 log10(0.005)
    assert found["words"] == "greatest error 0.1 of [0, 1]"
    assert throughput_bench.likeness(exact, exact)["psnr"] is None
    assert "ms_ssim" not in found  # too small for five scales


def test_the_median_leaves_out_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that each call moves; and, with CUDA's functions in its place, the peak since the
    call began.
    """
    now, calls, peaks = [0.0], [100.0, 3.0, 1.0, 2.0, 100.0, 7.0], iter([5e9, 4e9, 6e9, 1e9])
    monkeypatch.setattr(throughput_bench.time, "perf_counter", lambda: now[0])

    def call() -> None:
        now[0] += calls.pop(0)

    assert throughput_bench.median(call, CPU, 3) == Spent(
        seconds=2.0, peak=0.0
    )  # a CPU's memory is not measured
    log: list[str] = []
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name: log.append(name))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: next(peaks))
    assert throughput_bench.median(call, torch.device("cuda"), 1) == Spent(seconds=7.0, peak=5e9)
    assert log == ["synchronize", "reset_peak_memory_stats", "synchronize"]
    spent = Spent(seconds=1.0, peak=5e9)
    for seconds in (1.0, 2.0):
        calls.append(seconds)
        with throughput_bench.spending(spent, torch.device("cuda")):
            call()
    assert spent == Spent(seconds=4.0, peak=6e9)


def test_an_optimizers_steps_are_timed() -> None:
    weight = torch.nn.Parameter(torch.zeros(3))
    optimizer, spent = torch.optim.SGD([weight], lr=1.0), Spent()
    weight.grad = torch.ones(3)
    with throughput.timed_steps(optimizer, spent, CPU):
        optimizer.step()
    once = spent.seconds
    assert once > 0
    optimizer.step()
    assert spent.seconds == once


# -------- generators


@pytest.mark.parametrize(
    ("model", "parameters"),
    [("wan2.1_t2v_1.3b", 1.419e9), ("wan2.1_t2v_14b", 14.288e9), ("hunyuanvideo", 12.821e9)],
)
def test_the_models_have_their_true_size(tmp_path: Path, model: str, parameters: float) -> None:
    published = generators.MODELS[model]
    config = generators.recipe(model, published, tmp_path, CPU, [])
    twin, conditioning = meta_model.load_meta(config.policy)
    assert meta_model.network_of(twin.transformer).parameters == pytest.approx(parameters, rel=1e-3)
    assert conditioning["encoder_hidden_states"].shape[-1] == published.text_width
    assert (
        config.rollout.num_prompts,
        config.rollout.num_generations,
        config.runtime.compute_dtype,
    ) == (1, 16, "fp32")


def test_fewer_layers_keep_both_kinds_of_blocks() -> None:
    hunyuan, wan = generators.MODELS["hunyuanvideo"], generators.MODELS["wan2.1_t2v_14b"]
    assert (generators.num_layers(hunyuan), generators.num_layers(wan)) == (60, 40)
    few = generators.with_layers(hunyuan, 20).transformer
    assert (few["num_layers"], few["num_single_layers"]) == (7, 13)
    assert generators.with_layers(hunyuan, 2).transformer["num_single_layers"] == 1
    assert generators.with_layers(hunyuan, 60) == hunyuan
    assert generators.with_layers(wan, 20).transformer["num_layers"] == 20
    with pytest.raises(ValueError, match="--layers: expected 2 to 60, got 61"):
        generators.with_layers(hunyuan, 61)


def test_every_build_has_the_same_weights(make_bench: MakeBench) -> None:
    bench = make_bench()
    one = generators.build(bench.config, CPU, fused=False)
    other = generators.build(bench.config, CPU, fused=True, activations="none", vae_tiling=True)
    assert (one.is_fused, other.is_fused, one.vae.use_tiling, other.vae.use_tiling) == (
        False,
        True,
        False,
        True,
    )
    for name in ("transformer", "vae"):
        weights, others = (
            dict(getattr(policy, name).named_parameters()) for policy in (one, other)
        )
        assert weights.keys() == others.keys()
        assert all(torch.equal(weights[key], others[key]) for key in weights)
    assert one.encode([generators.PROMPT])["encoder_hidden_states"].std() == pytest.approx(
        1.0, abs=0.02
    )


# -------- the figures


def figure(part: str, by: str, whole_s: float | None, **values: Any) -> Figure:
    fields = {f.name: None for f in dataclasses.fields(Figure)} | dict.fromkeys(
        ("peer", "g0", "words", "goals", "size"), ""
    )
    given = {
        "model": "wan2.1_t2v_1.3b",
        "device": "NVIDIA H100 80GB HBM3",
        "recipe_size": True,
        "part": part,
        "by": by,
    }
    return Figure(**(fields | given | {"whole_s": whole_s, "seconds": whole_s} | values))  # type: ignore[arg-type]


def test_goals_are_held_against_a_green_g0_alone() -> None:
    peers = [
        figure("forward", "eager", 0.3),
        figure("forward", "compiled", 0.23),
        figure("forward", "fa2", 0.4),
    ]
    ours = figure("forward", "fused", 0.24, peer="eager", g0="green")

    def goals(*others: Figure, **changes: Any) -> tuple[float | None, str]:
        found = throughput_rows.compared([*others, dataclasses.replace(ours, **changes)])[-1]
        return found.ratio, found.goals

    ratio, words = goals(*peers)
    assert ratio == pytest.approx(1.25)
    assert words == "G1 0.25 s: met; G1 1.25x eager: met; G1 1x compiled: not met; G1 1.5x fa2: met"
    assert goals(*peers, g0="red") == (None, "G1: G0 is red")
    assert goals(*peers, g0="not checked")[1] == "G1: G0 is not checked"
    assert goals(*peers, recipe_size=False)[1] == goals(*peers, device="AMD EPYC")[1] == ""
    assert goals() == (None, "G1 0.25 s: met")

    unit = figure(
        "train", "fused, none", 0.9, g0="green", peak_gb=70.0, words=throughput_rows.WITHOUT_ADAM
    )
    assert throughput_rows.judge(unit, {}) == "G2 0.87 s: not met; G2 75 GB: not met"
    assert "75 GB: met" in throughput_rows.judge(
        dataclasses.replace(unit, words=throughput_rows.WITH_ADAM), {}
    )
    vae = figure("decode", "un-tiled bf16", 0.6, ms_ssim=0.99995)
    assert (
        throughput_rows.judge(vae, {("decode", "tiled bf16"): 1.2})
        == "G4 0.7 s: met; G4 2.2x tiled bf16: not met; G4 MS-SSIM 0.9999: met"
    )


def test_the_table_and_the_file_keep_earlier_runs(tmp_path: Path) -> None:
    one, other = (
        figure("forward", "eager", 0.3, planned_gb=19.9),
        figure("g0", "fused", None, drift=1e-9, words="3 steps", g0="red"),
    )
    path = tmp_path / "new" / "h100_throughput.csv"
    throughput_rows.write(path, "", [one])
    before = path.read_text()
    throughput_rows.write(path, before, [one, other])
    throughput_rows.write(path, before, [other])  # what this run has, once
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["by"], row["whole_s"], row["planned_gb"]) for row in rows] == [
        ("eager", "0.3", "19.9"),
        ("fused", "", ""),
    ]
    with pytest.raises(ValueError, match=r"expected the columns model, .*, got op, us"):
        throughput_rows.write(path, "op,us\n1,2\n", [one])
    lines = throughput_rows.table([one, other]).splitlines()
    assert len(lines) == 3
    assert "0.3000" in lines[1]
    assert "19.9" in lines[1]
    assert lines[2].endswith("3 steps")
    assert [throughput_rows.number(value, 2) for value in (None, 0.0, 1.234, 0.00123)] == [
        "–",
        "0.00",
        "1.23",
        "1.2e-03",
    ]


def test_a_scaled_iteration_is_extrapolated_by_counts(
    make_bench: MakeBench, capsys: pytest.CaptureFixture[str]
) -> None:
    """16 videos of 6 steps, 8 of them trained on int(0.6 x 5) = 3 steps in 2 optimizer steps; here
    2 videos, one step of each.
    """
    bench = make_bench("--policy.init_args.fused", "true")
    counts = {
        "rollout": (96 - 15, 12 - 1),
        "decode": (16, 2),
        "update": (24, 2),
        "optimizer": (2, 2),
    }
    assert throughput.scales(bench, shared=True) == counts
    assert throughput.scales(bench, shared=False)["rollout"] == (96, 12)
    few = throughput.scaled_update(bench)
    assert (few.gradient_accumulation, int(few.timestep_fraction * 5)) == (
        1,
        1,
    )  # one step on-policy, one not, as 4 + 4 are
    phases = {
        "rollout": Spent(11.0),
        "decode": Spent(2.0, peak=3e9),
        "update": Spent(3.0),
        "optimizer": Spent(1.0),
    }
    throughput.add_iteration(bench, "ours", phases, shared=True, activations="full", g0="green")
    found = {f.part: f for f in bench.figures}
    assert found["iteration: rollout"].whole_s == pytest.approx(81.0)
    assert found["iteration: decode"].whole_s == pytest.approx(16.0)
    assert found["iteration: update"].whole_s == pytest.approx((3.0 - 1.0) * 12 + 1.0)
    assert found["iteration"].whole_s == pytest.approx(81 + 16 + 25)
    assert (found["iteration"].seconds, found["iteration"].peak_gb) == (16.0, 3.0)
    assert found["iteration"].words.startswith(
        f"{16 / 122:.3g} videos/s a GPU; rollout 81 s, decode 16 s, update 25 s"
    )
    forward = bench.counts.velocity(None, False).flop / 1e12
    unit = bench.counts.velocity("none", False).flop / 1e12
    assert found["iteration: rollout"].tflop == pytest.approx(2 * 81 * forward)
    assert found["iteration: update"].tflop == pytest.approx(2 * 24 * unit)
    assert found["iteration: update"].mfu_percent == pytest.approx(
        100 * 48 * unit * 1e12 / 25 / 1e10
    )
    plans = [
        throughput_bench.planned(bench, phase, "full") / 1e9
        for phase in ("rollout", "decode", "update")
    ]
    assert [f.planned_gb for f in bench.figures] == [*plans, max(plans)]
    assert "iteration: rollout" in capsys.readouterr().out

    hunyuan = make_bench(model="hunyuanvideo")
    assert throughput.scales(hunyuan, shared=True)["update"] == (
        24,
        4,
    )  # one branch: 4 train units are 4 transitions


def test_fewer_layers_are_scaled_up_by_their_flop(make_bench: MakeBench) -> None:
    bench = make_bench(
        "--layers", "1", "--parts", "forward", "--backends", "eager", "--repeats", "1"
    )
    throughput.run(bench)
    (found,) = bench.figures
    two, one = bench.whole.velocity(None, False).flop, bench.counts.velocity(None, False).flop
    assert 1.5 < two / one < 2.1
    assert found.whole_s == pytest.approx(found.seconds * two / one)
    assert found.size == "tiny 32x32x5, 6 steps, 1 of 2 layers"
    assert (found.tflop, found.peak_gb, found.recipe_size) == (
        pytest.approx(two / 1e12),
        None,
        False,
    )
    assert (
        found.words
        == "native (_scaled_dot_product_flash_attention_for_cpu); whole s scaled up to all layers"
    )
    assert found.g0 == "not checked"


def test_what_plan_says_of_a_phase(make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = make_bench()
    parameters = bench.counts.network.trained
    with_adam, without = (
        throughput_bench.planned(bench, "update", "full", optimizer) for optimizer in (True, False)
    )
    assert with_adam - without == 8 * parameters
    assert throughput_bench.best_activations(bench, True) == "none"  # a CPU: all is taken to fit
    card = argparse.Namespace(total_memory=with_adam + memory.RESERVE - 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    bench.device = torch.device("cuda")
    assert [throughput_bench.fits(bench, "full", optimizer) for optimizer in (True, False)] == [
        False,
        True,
    ]
    monkeypatch.setattr(
        throughput_bench, "fits", lambda bench, name, optimizer: name == "full" or not optimizer
    )
    assert [throughput_bench.best_activations(bench, optimizer) for optimizer in (True, False)] == [
        "full",
        "none",
    ]
    bench.options.activations = "keep_attention"
    assert throughput_bench.best_activations(bench, True) == "keep_attention"


# -------- the command


def test_the_whole_command_at_tiny_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every part; the peer whole and with single handicaps; the figures' sums and ratios; the file."""
    options = [
        "--handicaps",
        "eager",
        "mp4",
        "tiling",
        "--repeats",
        "1",
        "--csv",
        str(tmp_path),
        "--device",
        "cpu",
    ]
    options += ["--num-inference-steps", "4"]
    assert (
        throughput.main(
            ["--model", "wan2.1_t2v_1.3b", "--random-weights", "--scale", "tiny", *options]
        )
        == 0
    )
    with open(tmp_path / "cpu_throughput.csv", newline="", encoding="utf-8") as file:
        rows = {(row["part"], row["by"]): row for row in csv.DictReader(file)}
    assert [rows["g0", name]["g0"] for name in ("eager", "fused")] == ["green", "green"]
    assert [float(rows["g0", "fused"][key]) for key in ("drift", "mismatch")] == [0.0, 0.0]
    assert {by for part, by in rows if part == "train"} == {
        "eager, full",
        "eager, none",
        "eager, keep_attention",
    }
    assert {by for part, by in rows if part == "decode"} == {
        f"{how} {dtype}" for how in ("un-tiled", "tiled") for dtype in ("fp32", "bf16")
    }
    assert float(rows["decode", "un-tiled bf16"]["psnr"]) > 30
    iterations = {by for part, by in rows if part == "iteration"}
    assert {
        "ours",
        "peer",
        "peer without mp4",
        "peer with batched_cfg and joint_backward",
        "peer with fa2",
    } < iterations
    ours, peer = (float(rows["iteration", by]["whole_s"]) for by in ("ours", "peer"))
    assert float(rows["iteration", "ours"]["ratio"]) == pytest.approx(peer / ours, rel=1e-4)
    phases = [
        float(rows[f"iteration: {name}", "peer"]["whole_s"])
        for name in ("rollout", "decode", "update")
    ]
    assert sum(phases) == pytest.approx(peer, rel=1e-4)
    assert "ratio exactly 1 on 1 of 1" in rows["iteration", "ours"]["words"]
    assert {
        row["device"] != "" and row["diffusers"] != "" and row["commit"] != ""
        for row in rows.values()
    } == {True}
    out = capsys.readouterr().out
    assert (
        "whole iteration = rollout x 49/7 + decode x 16/2 + update x 8/2 + optimizer x 2/2" in out
    )


def test_what_fails_or_has_no_time_is_named(
    make_bench: MakeBench, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(error: Exception) -> None:
        raise error

    bench = make_bench()
    throughput_bench.attempt(
        bench, "large", lambda: fail(torch.OutOfMemoryError("CUDA out of memory\nmore"))
    )
    assert not bench.trouble
    throughput_bench.attempt(bench, "wrong", lambda: fail(RuntimeError("no such kernel")))
    assert bench.trouble
    bench.options.budget = -1.0
    throughput_bench.attempt(bench, "late", lambda: fail(AssertionError("must not be called")))
    out = capsys.readouterr().out
    assert "large: no number, out of memory: CUDA out of memory\n" in out
    assert "wrong: FAILED, no number: RuntimeError: no such kernel" in out
    assert "late: left out, the budget of -1 s is spent" in out


def test_a_red_g0_of_the_trainers_own_forward_is_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        throughput,
        "check_bits",
        lambda policy, rollout, cfg: Bits(equal=False, drift=0.25, mismatch=0.5, steps=3),
    )
    options = [
        "--scale",
        "tiny",
        "--parts",
        "g0",
        "--backends",
        "eager",
        "--device",
        "cpu",
        "--csv",
        str(tmp_path),
    ]
    assert throughput.main(["--model", "wan2.1_t2v_14b", "--random-weights", *options]) == 1
    assert (
        "3 steps, velocities not bit-equal, |ratio - 1| 0.250000000, mismatch 0.500000 s"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--videos", "3"], "--videos: expected a multiple of 2, got 3"),
        (["--units", "6"], "--units: expected a multiple of 4 up to 12, got 6"),
        (["--handicaps", "slow"], "--handicaps: expected names of"),
        (["--layers", "9"], "--layers: expected 1 to 2, got 9"),
        (
            ["--rollout.micro_batch_size", "2"],
            "--rollout.micro_batch_size: expected 1, as the recipes have it, got 2",
        ),
        (["--rollout.sde_window", "single"], "--rollout.sde_window: expected all"),
    ],
)
def test_a_wrong_number_is_one_clear_line(
    option: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "--model",
        "wan2.1_t2v_1.3b",
        "--random-weights",
        "--scale",
        "tiny",
        "--device",
        "cpu",
        "--csv",
        str(tmp_path),
    ]
    assert throughput.main([*words, *option]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_a_file_of_other_columns_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cpu_throughput.csv").write_text("op,us\n")
    words = [
        "--model",
        "wan2.1_t2v_1.3b",
        "--random-weights",
        "--scale",
        "tiny",
        "--device",
        "cpu",
        "--csv",
        str(tmp_path),
    ]
    assert throughput.main(words) == 2
    assert "expected the columns model, " in capsys.readouterr().err
    assert (tmp_path / "cpu_throughput.csv").read_text() == "op,us\n"


def test_options_of_the_recipe_go_through() -> None:
    given = [
        "--model",
        "hunyuanvideo",
        "--random-weights",
        "--height",
        "64",
        "--parallel.shard",
        "full",
    ]
    options, overrides = throughput._parse(given)
    assert isinstance(options, argparse.Namespace)
    assert overrides == ["--rollout.height", "64", "--parallel.shard", "full"]
    assert not options.recipe_size
    assert throughput._parse(given[:3])[0].recipe_size
    with pytest.raises(SystemExit):
        throughput._parse(["--model", "hunyuanvideo"])  # there are no other weights
