"""The recipes: every value is that of docs/method.md, section 4, and overlays change what they say
and nothing else.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastgrpo.algorithm.self_paced import GroupStatistics, Pacer, check_pacing
from fastgrpo.config import TrainConfig
from fastgrpo.policies.hunyuan_video import HunyuanVideoPolicy
from fastgrpo.policies.wan import WanPolicy
from fastgrpo.rewards.models.video_align import VideoAlign
from fastgrpo.rewards.models.video_align_files import REWARD_TOKENS
from fastgrpo.rewards.vlm.judge import StageJudge
from fastgrpo.rewards.vlm.qwen import TransformersEngine
from fastgrpo.rewards.vlm.served import ServerEngine
from fastgrpo.training.recipe_parser import parse_config

RECIPES = Path(__file__).resolve().parents[1] / "fastgrpo" / "recipes"
JUDGE = [
    "--reward",
    "fastgrpo.shapes.judge.ShapesJudge",
]  # of three stages, as the paper's; nothing is loaded to parse
POLICY = ["--policy", "fastgrpo.shapes.policy.ShapesPolicy"]
REAL = ("wan2.1_t2v_1.3b", "wan2.1_t2v_14b", "hunyuanvideo")
LORA = ("wan2.1_lora_one_gpu", "hunyuanvideo_lora_one_gpu")
ABLATIONS = ("one_stage", "two_stage", "joint", "self_paced")

# docs/method.md, section 4, copied out by hand: what is common to the three, and the table.
COMMON = {
    "rollout.num_generations": 16,
    "rollout.num_frames": 53,
    "rollout.num_inference_steps": 16,
    "rollout.shift": 5.0,
    "rollout.sde": "dance",
    "rollout.eta": 0.5,
    "rollout.sde_window": "all",
    "rollout.same_noise": True,
    "rollout.timestep_rounding": "trunc",
    "rollout.decode": "x0",
    "rollout.micro_batch_size": 1,
    "pacing.mode": "self_paced",
    "pacing.gate": "difference",
    "pacing.saturation": "one_minus_hoyer",
    "pacing.competence": "ema",
    "pacing.momentum": 0.9,
    "pacing.sharpness": 5.0,
    "pacing.gate_temperature": 0.02,
    "pacing.sparsity_weight": 0.5,
    "update.num_best": 4,
    "update.num_worst": 4,
    "update.timestep_fraction": 0.6,
    "update.clip_range": 1e-4,
    "update.adv_clip": 5.0,
    "update.kl_coef": 0.0,
    "update.cfg_grad": "both",
    "update.optimizer_steps": 2,
    "update.optimizer": "adamw",
    "update.lr_scheduler": "constant",
    "update.warmup_iterations": 0,
    "update.weight_decay": 1e-4,
    "update.max_grad_norm": 1.0,
    "update.ema_decay": 0.0,
    "runtime.compute_dtype": "bf16",
    "policy.fps": 15,
    "policy.lora": None,
}
TABLE: dict[str, dict[str, Any]] = {
    "wan2.1_t2v_1.3b": {
        "rollout.height": 480,
        "rollout.width": 832,
        "pacing.thresholds": (0.75, 0.75),
        "update.learning_rate": 5e-6,
        "iterations": 150,
        "rollout.num_prompts": 8,
        "rollout.guidance_scale": 5.0,
        "policy.model": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    },
    "wan2.1_t2v_14b": {
        "rollout.height": 240,
        "rollout.width": 416,
        "pacing.thresholds": (0.75, 0.73),
        "update.learning_rate": 5e-6,
        "iterations": 220,
        "rollout.num_prompts": 16,
        "rollout.guidance_scale": 5.0,
        "policy.model": "Wan-AI/Wan2.1-T2V-14B-Diffusers",
    },
    "hunyuanvideo": {
        "rollout.height": 240,
        "rollout.width": 416,
        "pacing.thresholds": (0.70, 0.68),
        "update.learning_rate": 2e-6,
        "iterations": 100,
        "rollout.num_prompts": 16,
        "rollout.guidance_scale": 1.0,
        "policy.embedded_guidance": 6.0,
        "policy.model": "hunyuanvideo-community/HunyuanVideo",
    },
}

# Not of the method: what `plan` shows to fit into 80 GB (tests/planning).
PARALLEL: dict[str, dict[str, Any]] = {
    "wan2.1_t2v_1.3b": {
        "parallel.activations": "keep_attention",
        "parallel.keep_gathered": True,
        "parallel.reduce_every": "step",
    },
    "wan2.1_t2v_14b": {
        "parallel.activations": "keep_attention",
        "parallel.replicas": 2,
        "parallel.keep_gathered": True,
    },
    "hunyuanvideo": {
        "parallel.activations": "keep_attention",
        "parallel.replicas": 2,
        "parallel.keep_gathered": False,
    },
}


def parse(*names: str, reward: list[str] = JUDGE) -> TrainConfig:
    configs = [word for name in names for word in ("--config", str(RECIPES / f"{name}.yaml"))]
    return parse_config([*configs, *reward])[0]


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every value by its dotted name; of policy and reward their attributes."""
    values: dict[str, Any] = {}
    for key in (
        [field.name for field in dataclasses.fields(config)]
        if dataclasses.is_dataclass(config)
        else vars(config)
    ):
        value = getattr(config, key)
        nested = dataclasses.is_dataclass(value) or key in ("policy", "reward")
        values |= flatten(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return values


def test_defaults_are_the_papers_for_the_smallest_model() -> None:
    """But for a model, the machine's dtype and the gates' width, which recipes set."""
    values = flatten(parse_config([*POLICY, *JUDGE, "--prompts.train", "a"])[0])
    expected = COMMON | TABLE["wan2.1_t2v_1.3b"] | {"pacing.gate_temperature": 0.05}
    expected |= {"runtime.compute_dtype": "auto", "rollout.window_size": 4}
    expected |= {"rollout.window_interval": 25}
    own = {key for key in expected if not key.startswith("policy.")}
    assert {key: values[key] for key in own} == {key: expected[key] for key in own}


@pytest.mark.parametrize("name", REAL)
def test_every_value_is_the_methods(name: str) -> None:
    config = parse(name)
    values, expected = flatten(config), COMMON | TABLE[name] | PARALLEL[name]
    assert {key: values[key] for key in expected} == expected
    assert isinstance(config.policy, HunyuanVideoPolicy if name == "hunyuanvideo" else WanPolicy)
    assert config.name == name
    assert config.prompts.train == "video_prompts.txt"
    check_pacing(config.pacing, 3)


@pytest.mark.parametrize("name", REAL)
def test_every_value_of_a_real_recipe_names_its_source(name: str) -> None:
    """A line with a value under a section says where it is from: the paper, DanceGRPO, or decided
    here.
    """
    text = (RECIPES / f"{name}.yaml").read_text()
    structure = ("#", "class_path", "init_args", "engine:")
    lines = [
        line
        for line in text.splitlines()
        if line.startswith("  ") and not line.strip().startswith(structure)
    ]
    unsourced = [
        line
        for line in lines
        if not any(source in line for source in ("# paper", "# DanceGRPO", "# decided here"))
    ]
    named_by_what_they_are = ("model:", "num_videos:", "guidance_scale: 1.0")
    assert [line for line in unsourced if not line.strip().startswith(named_by_what_they_are)] == []
    # Written out, not left to a default that may change: all that the table and the common recipe
    # have, as far as it differs from nothing.
    written = flatten_mapping(yaml.safe_load(text))
    absent = [key for key in COMMON | TABLE[name] if key not in written and key != "policy.lora"]
    assert absent == []


def flatten_mapping(values: dict[str, Any], prefix: str = "") -> set[str]:
    keys: set[str] = set()
    for key, value in values.items():
        name = prefix if key == "init_args" else f"{prefix}{key}."
        keys |= flatten_mapping(value, name) if isinstance(value, dict) else {name.rstrip(".")}
    return keys


@pytest.mark.parametrize("name", REAL)
def test_the_judge_is_the_papers(name: str) -> None:
    """Qwen2.5-VL at three stages, 7B on the trainer's GPU for the smallest model, 72B in a process
    of its own for the others.
    """
    reward = parse(name, reward=[]).reward
    assert isinstance(reward, StageJudge)
    assert reward.stages == ("visual_quality", "temporal_smoothness", "text_alignment")
    if name.endswith("1.3b"):
        assert isinstance(reward.engine, TransformersEngine)
        assert (reward.engine.model, reward.engine.device) == (
            "Qwen/Qwen2.5-VL-7B-Instruct",
            "shared",
        )
    else:
        assert isinstance(reward.engine, ServerEngine)
        assert reward.describe()["engine"]["model"] == "Qwen/Qwen2.5-VL-72B-Instruct"
        assert reward.describe()["answer"] == "parsed"


def test_all_files_are_covered_here() -> None:
    known = {
        *REAL,
        "shapes",
        "shapes_literal_gate",
        *LORA,
        "dancegrpo",
        *(f"ablation_{mode}" for mode in ABLATIONS),
    }
    assert {path.stem for path in RECIPES.glob("*.yaml")} == known


@pytest.mark.parametrize("mode", ABLATIONS)
@pytest.mark.parametrize("name", [*REAL, "shapes"])
def test_modes_are_overlays_that_change_the_mode_alone(name: str, mode: str) -> None:
    base, overlaid = parse(name), parse(name, f"ablation_{mode}")
    assert overlaid.pacing == dataclasses.replace(base.pacing, mode=mode)  # type: ignore[arg-type]
    assert flatten(overlaid) == flatten(base) | {"pacing.mode": mode}
    check_pacing(overlaid.pacing, 3)


@pytest.mark.parametrize("name", REAL)
def test_the_baseline_is_dancegrpo(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """VideoAlign's visual quality is the reward, and nothing but reward and pacing changes."""
    monkeypatch.chdir(tmp_path)
    Path("prompt_template.py").write_text(
        f"PROMPT = {''.join((*REWARD_TOKENS, '{text_prompt}'))!r}\n"
    )
    config = parse(name, "dancegrpo", reward=[])
    assert isinstance(config.reward, VideoAlign)
    pacer = Pacer(config.pacing, len(config.reward.stages))
    weights = pacer.weights(GroupStatistics((0.5,) * 3, (0.5,) * 3))
    assert dict(zip(config.reward.stages, weights, strict=True)) == {
        "visual_quality": 1.0,
        "motion_quality": 0.0,
        "text_alignment": 0.0,
    }
    base = parse(name)
    assert (
        dataclasses.replace(config, reward=base.reward, pacing=base.pacing, policy=base.policy)
        == base
    )
    assert config.pacing == dataclasses.replace(base.pacing, mode="static", static_stage=1)
    assert vars(config.policy) == vars(base.policy)


def test_without_videoaligns_prompt_the_baseline_says_where_it_is(tmp_path: Path) -> None:
    """As a user of the command line meets it: one line, and no run folder."""
    command = ["--config", str(RECIPES / "wan2.1_t2v_1.3b.yaml")]
    command += ["--config", str(RECIPES / "dancegrpo.yaml")]
    command += ["--prompts.train", "fastgrpo/shapes/train.txt"]
    train = [sys.executable, "-m", "fastgrpo", "train", *command]
    refused = subprocess.run(train, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "prompt_template.py" in refused.stderr.splitlines()[-1]
    assert "Traceback" not in refused.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", REAL)
def test_lora_on_one_gpu(name: str) -> None:
    """The overlay keeps the recipe's model and sizes, and the paper's two optimizer steps an
    iteration; others go on top of it.
    """
    overlay = LORA[0] if name.startswith("wan") else LORA[1]
    base, config = flatten(parse(name)), parse(name, overlay, "ablation_joint")
    values = flatten(config)
    changed = {key for key in base | values if base.get(key) != values.get(key)}
    lora = {key for key in values if key.startswith("policy.lora.")}
    others = {
        "policy.lora",
        "rollout.num_prompts",
        "update.learning_rate",
        "pacing.mode",
        "parallel.replicas",
        "parallel.activations",
    }
    assert values["parallel.replicas"] == 1
    assert changed <= lora | others | ({"policy.vae_dtype"} if overlay == LORA[1] else set())
    assert (values["policy.lora.rank"], values["policy.lora.alpha"]) == (32, 64.0)
    assert config.update.optimizer_steps == 2
