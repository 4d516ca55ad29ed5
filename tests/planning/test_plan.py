"""The plan of a recipe: counts against formulas by hand and the table of docs/performance.md,
memory under sharding, the command line, refusals.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from planned import recipe
from torch import Tensor
from transformers import Qwen2_5_VLConfig

from benchmarks.judge import CONFIGS
from fastgrpo.cli import plan
from fastgrpo.config import ParallelConfig, TrainConfig, UpdateConfig
from fastgrpo.planning import memory, meta_model
from fastgrpo.planning.plan import Cluster, memory_table, settings_table
from fastgrpo.policies.hunyuan_video import HunyuanVideoPolicy
from fastgrpo.policies.lora import LoRA
from fastgrpo.policies.wan import WanPolicy
from fastgrpo.shapes.policy import ShapesPolicy, new_transformer
from fastgrpo.training.preflight import check_sharding
from fastgrpo.training.recipe_parser import parse_config

META = torch.device("meta")


# The real models, docs/performance.md


@pytest.mark.parametrize(
    ("name", "size", "linear", "attention", "parameters"),
    [
        ("wan_1.3b", (480, 832), 54.8, 90.0, 1.419e9),
        ("wan_14b", (240, 416), 132.7, 26.7, 14.288e9),
        ("hunyuan", (240, 416), 77.8, 24.1, 12.821e9),
    ],
)
def test_a_forward_costs_what_the_table_says(
    models: Path,
    name: str,
    size: tuple[int, int],
    linear: float,
    attention: float,
    parameters: float,
) -> None:
    policy: Any = (HunyuanVideoPolicy if name == "hunyuan" else WanPolicy)(str(models / name))
    twin, conditioning = meta_model.load_meta(policy)
    latents = torch.empty(1, *policy.latent_shape(*size, 53), device=META)
    cost = meta_model.velocity_cost(
        twin, conditioning, latents, torch.bfloat16, activations=None, gathered=True
    )
    assert cost.linear / 1e12 == pytest.approx(linear, abs=0.05)
    assert cost.attention / 1e12 == pytest.approx(attention, abs=0.05)
    assert meta_model.network_of(twin.transformer).parameters == pytest.approx(parameters, rel=1e-3)
    assert not hasattr(policy, "transformer")  # the policy itself stays as it was


def test_one_video_and_one_trained_sample_cost_what_the_table_says(
    wan: tuple[TrainConfig, memory.Counts],
) -> None:
    config, counts = wan
    forward = counts.velocity(None, True)
    assert 16 * 2 * forward.flop / 1e12 == pytest.approx(4632, abs=1)
    assert 9 * 2 * counts.velocity("full", True).flop / 1e12 == pytest.approx(11233, rel=1e-3)
    assert 9 * 2 * counts.velocity("none", True).flop / 1e12 == pytest.approx(8627, rel=1e-3)
    saved = counts.velocity("full", True).flop - counts.velocity("keep_attention", True).flop
    assert saved == pytest.approx(forward.attention)
    assert counts.decode.flop / 1e12 == pytest.approx(180, abs=1)

    off = dataclasses.replace(
        config, rollout=dataclasses.replace(config.rollout, share_first_step=False)
    )
    joint = dataclasses.replace(off, update=UpdateConfig(branchwise=False))
    whole, one_step_less = (memory.work(c, counts, "none", 8) for c in (joint, config))
    assert whole["rollout"].flop / 1e12 == pytest.approx(16 * 4632, rel=1e-3)
    assert whole["update"].flop / 1e12 == pytest.approx(8 * 8627, rel=1e-3)
    assert one_step_less["rollout"].flop == pytest.approx(whole["rollout"].flop * 241 / 256)
    assert one_step_less["update"].flop == pytest.approx(
        whole["update"].flop + 4 * 9 * forward.flop
    )  # the second step of two is off-policy


def test_activations_of_one_branch(wan: tuple[TrainConfig, memory.Counts]) -> None:
    _, counts = wan
    full, keep, none = (counts.velocity(name, True) for name in ("full", "keep_attention", "none"))
    tokens, width = 21840, 1536
    stream = 2 * tokens * width
    outputs = (
        30 * 2 * (stream + 4 * tokens * 12)
    )  # of self- and cross-attention: bf16, and a logarithm a token and head
    assert keep.kept - full.kept == pytest.approx(outputs, rel=0.01)
    assert full.kept == pytest.approx(31 * stream, rel=0.2)  # a block's input
    hidden = 2 * tokens * 8960
    assert none.kept / 30 == pytest.approx(
        2 * hidden + 18 * stream, rel=0.1
    )  # before and after GELU; 18 tensors of a token's width
    assert full.kept + full.work < keep.kept + keep.work < none.kept + none.work


def test_a_vae_in_bf16_takes_half(models: Path) -> None:
    costs = []
    for dtype in ("fp32", "bf16"):
        policy: Any = WanPolicy(str(models / "wan_1.3b"), vae_dtype=dtype)
        twin, _ = meta_model.load_meta(policy)
        costs.append(meta_model.decode_cost(twin, (16, 2, 30, 52)))
    assert costs[1].work < 0.6 * costs[0].work  # the frames are fp32 in the end
    assert costs[1].flop == costs[0].flop
    # Its norms still compute in fp32, and cast there and back.
    assert 0.7 * costs[0].moved < costs[1].moved < 0.8 * costs[0].moved


def test_tiles_cost_what_they_overlap(models: Path) -> None:
    policy: Any = WanPolicy(str(models / "wan_1.3b"), vae_tiling=True)
    twin, _ = meta_model.load_meta(policy)
    every, largest = meta_model.share_of_tiles(twin.vae, (16, 14, 60, 104))
    assert every * 180 == pytest.approx(298, abs=1)  # docs/performance.md
    assert largest == pytest.approx(32 * 32 / (60 * 104))


# Memory, by hand


def test_states_are_divided_by_the_ranks_that_share_them(
    wan: tuple[TrainConfig, memory.Counts],
) -> None:
    config, counts = wan
    n = counts.network.parameters

    def update(world_size: int, **settings: Any) -> dict[str, float]:
        return memory.memory(config, counts, ParallelConfig(**settings), world_size)["update"]

    alone, eight, hybrid = (
        update(1, shard="none"),
        update(8, shard="full"),
        update(16, shard="full", replicas=2),
    )
    assert (alone["fp32 weights"], alone["gradients"], alone["Adam"]) == (4 * n, 4 * n, 8 * n)
    for sharded in (eight, hybrid):
        assert (sharded["fp32 weights"], sharded["gradients"], sharded["Adam"]) == (n / 2, n / 2, n)
    assert alone["gathered weights"] == 0
    assert eight["gathered weights"] == 2 * (counts.network.root + 3 * counts.network.block)
    offloaded = ParallelConfig(shard="full", cpu_offload=True)
    parts = memory.memory(config, counts, offloaded, 8)["update"]
    assert parts["fp32 weights"] == parts["gradients"] == parts["Adam"] == 0
    cfg = dataclasses.replace(config, parallel=offloaded)
    table = memory_table(cfg, counts, offloaded, 8)
    assert f"and {2 * n / 1e9:.2f} GB of the host's memory" in table
    kept = memory.memory(config, counts, ParallelConfig(shard="full", keep_gathered=True), 8)
    arriving = 2 * 2 * counts.network.block
    assert kept["rollout"]["gathered weights"] == 2 * n + arriving
    assert kept["decode"]["gathered weights"] == 2 * n
    assert kept["update"]["gathered weights"] == eight["gathered weights"]
    once = ParallelConfig(shard="full", reduce_every="step")
    late = memory.memory(config, counts, once, 8)
    assert late["update"] == eight | {"gradients": 4 * n}  # whole, in fp32, until the last pass
    assert late["step"]["gradients"] == n / 2
    copies = ParallelConfig(shard="none", reduce_every="step")
    assert memory.memory(config, counts, copies, 1)["update"] == alone
    assert (
        memory.memory(config, counts, ParallelConfig(shard="none"), 2)["step"][
            "gradients' reduction"
        ]
        == 4 * n
    )
    trajectory = 16 * (17 * 4 * 16 * 14 * 60 * 104 + 4 * 16) + 2 * 4 * 512 * 4096
    assert eight["trajectories"] == trajectory

    both = dataclasses.replace(
        config, update=UpdateConfig(branchwise=False, ema_decay=0.9, kl_coef=0.1)
    )
    joint = memory.memory(both, counts, ParallelConfig(shard="full"), 8)["update"]
    assert joint["activations"] == eight["activations"] + counts.velocity("full", True).kept
    assert joint["copies (EMA, KL reference)"] == n


def test_a_lora_trains_its_adapters_alone(models: Path) -> None:
    twin, _ = meta_model.load_meta(WanPolicy(str(models / "wan_1.3b"), lora=LoRA(rank=16)))
    network = meta_model.network_of(twin.transformer)
    width, hidden = 1536, 8960
    assert network.trained == 30 * 16 * (8 * 2 * width + 2 * (width + hidden))
    assert network.parameters == 1_418_996_800 + network.trained


def test_more_recompute_and_more_ranks_never_need_more(
    shapes: tuple[TrainConfig, memory.Counts], wan: tuple[TrainConfig, memory.Counts]
) -> None:
    for config, counts in (shapes, wan):
        for world_size in (1, 2, 4):
            peaks = []
            for name in memory.ACTIVATIONS:
                cfg = ParallelConfig(shard="full", activations=name)
                phases = memory.memory(config, counts, cfg, world_size)
                peaks.append(sum(phases["update"].values()))
                halved = memory.memory(config, counts, cfg, 2 * world_size)
                assert memory.peak(halved)[1] <= memory.peak(phases)[1]
            assert peaks == sorted(peaks, reverse=True)


@pytest.mark.parametrize(
    ("name", "model", "overlay"),
    [
        ("wan2.1_t2v_14b", "wan_14b", "wan2.1_lora_one_gpu"),
        ("hunyuanvideo", "hunyuan", "hunyuanvideo_lora_one_gpu"),
    ],
)
def test_the_lora_overlays_fit_one_gpu(models: Path, name: str, model: str, overlay: str) -> None:
    files = [f"--config=fastgrpo/recipes/{file}.yaml" for file in (name, overlay)]
    judge = ["--reward", "fastgrpo.shapes.judge.ShapesJudge"]
    config, _, _ = parse_config([*files, *judge, f"--policy.init_args.model={models / model}"])
    counts = memory.count(config)
    phases = memory.memory(config, counts, memory.resolve(config.parallel, 1), 1)
    assert memory.peak(phases)[1] + memory.RESERVE < 80e9


# The command line, and refusals


def test_the_embedded_recipe_is_planned_from_the_command_line() -> None:
    command = [
        sys.executable,
        "-m",
        "fastgrpo",
        "plan",
        "--config",
        "fastgrpo/recipes/shapes.yaml",
        "--gpu_memory",
        "8",
        "--world_size",
        "2",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "shapes on 2 GPU(s): 8 frames of 16 x 16, 4 prompts x 16 videos" in lines[0]
    assert any(
        line.startswith("parameters        0.8 M, trained 0.8 M, 3 blocks") for line in lines
    )
    assert [
        line.split()[0]
        for line in lines
        if line.startswith(("  rollout ", "  decode ", "  update ", "  all "))
    ][-1] == "all"
    assert sum(line.endswith("  fits") for line in lines) == 12
    assert any(
        line.startswith("recommended: --parallel.activations none --parallel.shard full")
        for line in lines
    )
    assert "assumed:" in lines


def test_where_nothing_fits_the_plan_says_so(shapes: tuple[TrainConfig, memory.Counts]) -> None:
    config, counts = shapes
    cluster = Cluster(gpu_memory=memory.RESERVE + 1e3, world_size=1, gpus_per_node=8)
    lines = settings_table(config, counts, cluster).splitlines()
    assert lines[-1].startswith("nothing fits")
    assert len(lines) == 2 + 6 + 2
    assert all(line.endswith("  -") for line in lines[2:-2])


@pytest.mark.parametrize(
    "option",
    [
        ["--gpu_memory", "0"],
        ["--world_size", "-1"],
        ["--gpu_memory", "-5"],
        ["--gpus_per_node", "0"],
        ["--parallel.replicas", "3"],
    ],
)
def test_a_wrong_number_is_one_clear_line(
    option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        plan.main(["--config", "fastgrpo/recipes/shapes.yaml", "--world_size", "2", *option])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert option[0] in error or option[0].removeprefix("--") in error
    assert "expected" in error


def test_the_trainer_refuses_what_cannot_fit_and_says_what_would(
    monkeypatch: pytest.MonkeyPatch, wan: tuple[TrainConfig, memory.Counts]
) -> None:
    config, counts = wan
    monkeypatch.setattr(memory, "count", lambda config: counts)
    memory.check_fits(config, 80e9, 8)
    none = dataclasses.replace(config, parallel=ParallelConfig(shard="none", activations="none"))
    settings = "--parallel.activations none --parallel.shard full"
    problem = rf"80.0 GB of a GPU, but the update .* 8 GPU.*{settings}"
    with pytest.raises(ValueError, match=problem):
        memory.check_fits(none, 80e9, 8)
    with pytest.raises(
        ValueError,
        match=r"the decode of this one .*policy.vae_tiling true.*no settings of `parallel`",
    ):
        memory.check_fits(config, 8e9, 64)
    with pytest.raises(
        ValueError, match=r"parallel\.replicas: expected a divisor of the world size 8, got 3"
    ):
        memory.check_fits(dataclasses.replace(config, parallel=ParallelConfig(replicas=3)), 80e9, 8)


def test_a_policy_that_cannot_be_planned_is_not_refused_by_the_trainer(tiny_policy: Any) -> None:
    config = recipe(tiny_policy(), height=2, width=2, num_frames=2)
    memory.check_fits(config, 1.0, 1)
    with pytest.raises(ValueError, match=r"policy: TinyPolicy cannot be planned.*load_meta"):
        memory.count(config)


def test_a_policy_of_another_kind_is_planned_by_its_load_meta(tiny_policy: Any) -> None:
    def load_meta(policy: Any) -> dict[str, Tensor]:
        policy.transformer = policy.transformer.to(META)
        return {"text": torch.empty(1, 2, 4, device=META)}

    planned = type("Planned", (tiny_policy,), {"load_meta": load_meta})
    config = recipe(planned(), height=2, width=2, num_frames=2)
    counts = memory.count(config)
    assert counts.velocity(None, True).linear == 2 * 24 * 24 + 2 * 2 * 4 * 24
    assert counts.network.num_blocks == 1
    with pytest.raises(ValueError, match="no settings of `parallel` are enough"):
        memory.check_fits(config, 1.0, 1)


# Small parts


def test_the_network_in_numbers(shapes: tuple[TrainConfig, memory.Counts]) -> None:
    network = shapes[1].network
    assert isinstance(network, meta_model.Network)
    assert (
        network.parameters
        == network.trained
        == sum(p.numel() for p in new_transformer().parameters())
    )
    assert network.num_blocks == 3
    assert network.parameters == 3 * network.block + network.root


def test_candidates_are_tried_from_the_least_recomputation_on(
    shapes: tuple[TrainConfig, memory.Counts],
) -> None:
    config = shapes[0]
    alone = memory.candidates(config, 1)
    assert [c.activations for c in alone if not c.cpu_offload] == ["none", "keep_attention", "full"]
    assert all(c.shard == "none" for c in alone if not c.cpu_offload)
    many = memory.candidates(config, 16)
    assert (
        many.index(ParallelConfig(shard="full", replicas=2, activations="none", keep_gathered=True))
        == 1
    )  # after one replica, as configured
    assert many[-1].cpu_offload
    late = dataclasses.replace(config, parallel=ParallelConfig(reduce_every="step"))
    kinds = [c.reduce_every for c in memory.candidates(late, 16) if not c.cpu_offload]
    assert kinds[:5] == ["step", "step", "backward", "backward", "step"], "its own first"
    assert {c.reduce_every for c in many} == {"backward"}
    assert "--parallel.reduce_every step" in memory.describe(late.parallel)


@pytest.mark.parametrize(("fused", "swapped"), [("auto", True), (False, False)])
def test_a_plan_leaves_the_policy_as_it_was(models: Path, fused: Any, swapped: bool) -> None:
    """`load_meta` works on a copy: the attention's package need not be installed, and the fused
    operations are those of a GPU.
    """
    policy = WanPolicy(str(models / "wan_1.3b"), attention="flash", fused=fused, vae_dtype="bf16")
    twin, _ = meta_model.load_meta(policy)
    assert (policy.attention, policy.fused) == ("flash", fused)
    assert not hasattr(policy, "transformer")
    assert twin.is_fused == swapped
    assert {(p.device.type, p.dtype) for p in twin.vae.parameters()} == {("meta", torch.bfloat16)}


def test_an_optimizer_that_cannot_step_shards_is_refused() -> None:
    config = dataclasses.replace(
        recipe(ShapesPolicy()),
        update=UpdateConfig(optimizer="apex_fused_adam"),
        parallel=ParallelConfig(shard="full"),
    )
    with pytest.raises(ValueError, match="apex_fused_adam cannot step sharded parameters"):
        check_sharding(config, torch.device("cpu"))
    check_sharding(
        dataclasses.replace(config, parallel=ParallelConfig(shard="none")), torch.device("cpu")
    )


@pytest.mark.parametrize(
    ("name", "model", "gpus"),
    [
        ("wan2.1_t2v_1.3b", "wan_1.3b", 8),
        ("wan2.1_t2v_14b", "wan_14b", 16),
        ("hunyuanvideo", "hunyuan", 16),
    ],
)
def test_the_papers_recipes_fit_the_papers_gpus(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, model: str, gpus: int
) -> None:
    """With their own judges: that of the 1.3B lies on the trainer's GPUs, the others are served
    elsewhere.
    """
    own_judge = []
    if gpus == 8:
        Qwen2_5_VLConfig(**CONFIGS["qwen2.5-vl-7b"]).save_pretrained(tmp_path)
        own_judge = ["--reward.init_args.engine.init_args.model", str(tmp_path)]
    recipe = [
        "--config",
        f"fastgrpo/recipes/{name}.yaml",
        "--policy.init_args.model",
        str(models / model),
    ]
    config, _, _ = parse_config([*recipe, *own_judge])
    assert config.reward.memory_bytes == (2 * 8_292_166_656 if gpus == 8 else 0)
    counts = memory.count(config)
    monkeypatch.setattr(memory, "count", lambda _: counts)
    memory.check_fits(config, 80e9, gpus)
    phases = memory.memory(config, counts, memory.resolve(config.parallel, gpus), gpus)
    frames = 4 * 53 * 3 * config.rollout.height * config.rollout.width
    pending = 4 if gpus == 8 else 16  # for a judge in process, and for a served one
    for phase in ("rollout", "decode"):
        assert phases[phase]["frames that wait for the judge"] == pending * frames
        # 14 frames of the 7B's questions; the served judge takes nothing.
        taken = phases[phase]["judge at work"]
        assert 0.8e9 < taken < 2e9 if gpus == 8 else taken == 0
    assert not phases["update"].keys() & {"frames that wait for the judge", "judge at work"}
    _, needed = memory.peak(phases)
    assert needed <= 80e9 - memory.RESERVE
    with pytest.raises(ValueError, match=r"expected a recipe that fits into the 1\.0 GB of a GPU"):
        memory.check_fits(config, 1e9, gpus)
