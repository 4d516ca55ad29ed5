"""iteration.py at tiny size: the DanceGRPO-style loop against the trainer, what G0 sees, and the
arithmetic of its numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import iteration
from benchmarks.common import dancegrpo, random_models, scaled_iteration, session
from benchmarks.common.session import Bench, Bits, ModelMeasurement
from benchmarks.common.timing import Usage
from fastgrpo.algorithm.sde import sde_coefficients, sigma_schedule
from fastgrpo.config import RolloutConfig, RuntimeConfig, UpdateConfig
from fastgrpo.distributed import collectives
from fastgrpo.planning import meta_model
from fastgrpo.training.rollout import sample_videos, start_rollout
from fastgrpo.training.update import update

CPU = torch.device("cpu")
TINY = ("--random-weights", "--scale", "tiny", "--device", "cpu", "--model")
MakeBench = Callable[..., Bench]


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    collectives.start(RuntimeConfig(device="cpu"))
    yield
    collectives.stop()


@pytest.fixture
def make_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeBench:
    """make_bench(model, *options): what the command makes of its options, at tiny size."""
    monkeypatch.setattr(iteration, "matmul_rate", lambda device: 1e10)

    def make(model: str, *given: str) -> Bench:
        options, overrides = iteration._parse([*TINY, model, "--csv", str(tmp_path), *given])
        return iteration.prepare(options, overrides, tmp_path / model)

    return make


@pytest.mark.parametrize("model", ["wan2.1_t2v_1.3b", "hunyuanvideo"])
def test_the_peer_samples_and_trains_what_the_trainer_does(
    make_bench: MakeBench, model: str
) -> None:
    """In fp32, with all its handicaps: the same videos, log-probabilities and step of the weights,
    up to rounding.
    """
    bench = make_bench(model)
    handicaps = scaled_iteration.variants(bench)["peer"]
    assert ("batched_cfg" in handicaps) == (bench.branches == 2)
    cfg = UpdateConfig(
        num_best=2, num_worst=0, timestep_fraction=0.5, clip_range=0.9, max_grad_norm=1e9
    )
    found = []
    for is_peer in (False, True):
        policy = random_models.build(bench.config, CPU, fused=False, masked=is_peer)
        rollout = session.start(bench, policy, 2)
        if is_peer:
            clean = torch.cat(dancegrpo.sample(policy, rollout, handicaps))
        else:
            clean = torch.cat([sample.latents for sample in sample_videos(policy, rollout)])
        before = [p.detach().clone() for p in policy.transformer.parameters()]
        optimizer = torch.optim.SGD(policy.transformer.parameters(), lr=1.0)
        given = (policy, optimizer, rollout, [0, 1], {0: 0.7, 1: -1.2}, cfg)
        if is_peer:
            dancegrpo.train(*given, handicaps)
        else:
            update(*given)
        after = policy.transformer.parameters()
        moved = [(p.detach() - old).flatten() for p, old in zip(after, before, strict=True)]
        found.append((clean, rollout.latents, rollout.log_probs[:, :-1], torch.cat(moved)))
    for ours, peer in zip(found[0][:3], found[1][:3], strict=True):
        torch.testing.assert_close(peer, ours, rtol=1e-5, atol=2e-5)
    ours, peer = found[0][3].double(), found[1][3].double()
    assert 0 < float((ours - peer).norm()) < 1e-4 * float(ours.norm())


def test_g0_measures_a_training_forward_that_differs(
    tiny_policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand: what differs by d in both branches differs by d under guidance, and by |b| d / s in
    units of the noise.
    """
    size = RolloutConfig(
        num_prompts=1, num_generations=1, height=2, width=2, num_frames=2, num_inference_steps=6
    )
    right = tiny_policy.velocity

    def bits(off: float) -> Bits:
        monkeypatch.setattr(
            tiny_policy,
            "velocity",
            lambda *given: right(*given) + (off if torch.is_grad_enabled() else 0.0),
        )
        policy = tiny_policy()
        rollout = start_rollout(policy, ["a"], size, seed=0, iteration=1, first_slot=0, device=CPU)
        return session.check_bits(policy, rollout, UpdateConfig(timestep_fraction=1.0))

    assert bits(0.0) == Bits(equal=True, drift=0.0, mismatch=0.0, steps=5)
    red, table = bits(0.01), sde_coefficients(sigma_schedule(6, 5.0), "dance", 0.5)
    assert red.mismatch == pytest.approx(
        float((table.b / table.std).abs()[:5].max()) * 0.01, rel=1e-3
    )
    assert red.drift > 0
    assert not red.green


@pytest.mark.parametrize(
    ("model", "parameters"),
    [("wan2.1_t2v_1.3b", 1.419e9), ("wan2.1_t2v_14b", 14.288e9), ("hunyuanvideo", 12.821e9)],
)
def test_the_models_have_their_true_size(tmp_path: Path, model: str, parameters: float) -> None:
    config = random_models.recipe(model, random_models.MODELS[model], tmp_path, CPU, [])
    twin, _ = meta_model.load_meta(config.policy)
    assert meta_model.network_of(twin.transformer).parameters == pytest.approx(parameters, rel=1e-3)


def test_similarity_of_frames_by_hand() -> None:
    exact = torch.full((1, 2, 3, 8, 8), 0.5)
    off = exact.clone()
    off[:, :, :, :4] += 0.1
    assert session.similarity(off, exact)["psnr"] == pytest.approx(23.0103, abs=1e-3)
    assert session.similarity(exact, exact)["psnr"] is None


def test_goals_need_a_green_g0() -> None:
    def row(name: str, whole_s: float, **values: Any) -> ModelMeasurement:
        given = {f.name: None for f in dataclasses.fields(ModelMeasurement)}
        given |= {"model": "wan2.1_t2v_1.3b", "device": "NVIDIA H100", "recipe_size": True}
        given |= {"part": "forward", "implementation": name, "whole_s": whole_s, "g0": "green"}
        return ModelMeasurement(**given | values)  # type: ignore[arg-type]

    peers = [row("eager", 0.3), row("compiled", 0.23), row("fa2", 0.4)]

    def goals(**changes: Any) -> tuple[float | None, str]:
        ours = row("fused", 0.24, peer="eager", **changes)
        found = session.compared([*peers, ours])[-1]
        return found.ratio, found.goals

    assert goals() == (
        pytest.approx(1.25),
        "G1 0.25 s: met; G1 1.25x eager: met; G1 1x compiled: not met; G1 1.5x fa2: met",
    )
    assert goals(g0="red") == (None, "G1: G0 is red")
    assert goals(g0="not checked")[1] == "G1: G0 is not checked"
    assert goals(recipe_size=False)[1] == goals(device="AMD EPYC")[1] == ""


def test_a_scaled_iteration_is_extrapolated_by_counts(make_bench: MakeBench) -> None:
    """16 videos of 6 steps, 8 of them trained on int(0.6 x 5) = 3 steps in 2 optimizer steps; here
    2 videos, one step of each.
    """
    bench = make_bench("wan2.1_t2v_1.3b", "--policy.init_args.fused", "true")
    rollout, decode = (96 - 15, 12 - 1), (16, 2)
    counts = {"rollout": rollout, "decode": decode, "update": (24, 2), "optimizer": (2, 2)}
    assert scaled_iteration.scales(bench, shared=True) == counts
    assert scaled_iteration.scales(bench, shared=False)["rollout"] == (96, 12)
    phases = {
        "rollout": Usage(11.0),
        "decode": Usage(2.0, peak=3e9),
        "update": Usage(3.0),
        "optimizer": Usage(1.0),
    }
    scaled_iteration.add_iteration(bench, "ours", phases, True, activations="full", g0="green")
    found = {row.part: row for row in bench.rows}
    assert found["iteration: rollout"].whole_s == pytest.approx(81.0)
    assert found["iteration: decode"].whole_s == pytest.approx(16.0)
    assert found["iteration: update"].whole_s == pytest.approx((3.0 - 1.0) * 12 + 1.0)
    assert found["iteration"].whole_s == pytest.approx(81 + 16 + 25)
    assert (found["iteration"].seconds, found["iteration"].peak_gb) == (16.0, 3.0)
    assert found["iteration"].note.startswith(f"{16 / 122:.3g} videos/s per GPU; rollout 81 s, ")
    unit = bench.counts.velocity("none", False).flop
    update_row = found["iteration: update"]
    assert update_row.tflop == pytest.approx(2 * 24 * unit / 1e12)
    assert update_row.mfu_percent == pytest.approx(100 * 48 * unit / 25 / 1e10)


def test_the_whole_command_at_tiny_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], read: Any
) -> None:
    """Every part, the peer whole and with single handicaps; the sums and ratios of the file."""
    options = "--handicaps eager mp4 tiling --repeats 1 --num-inference-steps 4 --csv"
    assert iteration.main([*TINY, "wan2.1_t2v_1.3b", *options.split(), str(tmp_path)]) == 0
    rows = {(row["part"], row["implementation"]): row for row in read("cpu_iteration.csv")}
    assert [rows["g0", name]["g0"] for name in ("eager", "fused")] == ["green", "green"]
    names: dict[str, set[str]] = {}
    for part, name in rows:
        names.setdefault(part, set()).add(name)
    kept = ("full", "none", "keep_attention")
    assert names["train"] == {"eager, full", *(f"fused, {what}" for what in kept)}
    assert names["decode"] == {f"{h} {d}" for h in ("un-tiled", "tiled") for d in ("fp32", "bf16")}
    assert {"ours", "peer", "peer without mp4", "peer with fa2"} < names["iteration"]
    ours, peer = (float(rows["iteration", name]["whole_s"]) for name in ("ours", "peer"))
    assert float(rows["iteration", "ours"]["ratio"]) == pytest.approx(peer / ours, rel=1e-4)
    parts = [f"iteration: {phase}" for phase in ("rollout", "decode", "update")]
    assert sum(float(rows[p, "peer"]["whole_s"]) for p in parts) == pytest.approx(peer, rel=1e-4)
    assert "ratio exactly 1 on 1 of 1" in rows["iteration", "ours"]["note"]
    formula = "rollout x 49/7 + decode x 16/2 + update x 8/2 + optimizer x 2/2"
    assert f"whole iteration = {formula}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--videos 3", "--videos: expected a multiple of 2, got 3"),
        ("--units 6", "--units: expected a multiple of 4 up to 12, got 6"),
        ("--handicaps slow", "--handicaps: expected names of"),
        ("--rollout.micro_batch_size 2", "--rollout.micro_batch_size: expected 1, as the recipes"),
    ],
)
def test_a_wrong_number_is_one_clear_line(
    option: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*TINY, "wan2.1_t2v_1.3b", "--csv", str(tmp_path), *option.split()]
    assert iteration.main(words) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
