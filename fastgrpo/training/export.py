"""The trained weights of a run for diffusers: a transformer's folder or a LoRA file, with a model
card.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard, ModelCardData

from fastgrpo.config import TrainConfig
from fastgrpo.errors import require
from fastgrpo.files import atomic_folder
from fastgrpo.policies.lora import has_lora
from fastgrpo.policies.model_files import fetch
from fastgrpo.training import checkpoint
from fastgrpo.training.checkpoint_names import iteration_of
from fastgrpo.training.sampling import open_run
from fastgrpo.training.tracking import Row, read_metrics, stage_names
from fastgrpo.training.trust import check_links

PAPER = "https://arxiv.org/abs/2511.19356"


def export(
    run: str,
    checkpoint_name: str = "latest",
    ema: bool = False,
    output: str | None = None,
    trust: bool = False,
) -> Path:
    """Write the weights of a checkpoint of any number of processes, in one process on the CPU.

    Args:
        run: A run folder; the run may be finished, stopped or still going.
        checkpoint_name: Such as iteration_000050.
        ema: Write the exponential average of the weights instead of the weights.
        output: A new folder; None takes <run>/export/<checkpoint>, or <checkpoint>_ema.
        trust: As `trust.OPTION` says.

    Returns:
        The folder.

    Raises:
        ValueError, OSError: There is no such run or checkpoint, or it is damaged; it has no
            average; the folder is not new, or cannot be written.
    """
    config, path = open_run(run, checkpoint_name, trust)
    iteration = iteration_of(path)
    folder = Path(output or Path(run) / "export" / f"{path.name}{'_ema' * ema}")
    if not trust and not output:
        check_links(Path(run), "export")
    require(not folder.exists(), "output", "a folder that is new", str(folder))
    has_average = "ema" in checkpoint.parts(path)
    expected = "a run that kept an average of the weights"
    require(has_average or not ema, "ema", expected, "update.ema_decay 0")
    policy = config.policy
    policy.attention = "native"  # nothing is computed: the run's own need not be installed
    policy.load(torch.device("cpu"))
    checkpoint.load_weights(path, policy.transformer, ema)
    metrics = Path(run) / "metrics.jsonl"
    rows = read_metrics(metrics) if metrics.is_file() else []
    rows = [row for row in rows if row["iteration"] <= iteration]
    # No name ever points to half an export.
    with atomic_folder(folder) as partial:
        policy.save_pretrained(partial, policy.transformer.state_dict())
        model_card(config, rows, iteration, ema).save(partial / "README.md")
    return folder


def model_card(config: TrainConfig, rows: Sequence[Row], iteration: int, ema: bool) -> ModelCard:
    """The README.md beside the weights: base model, method, how to load it, recipe, measurements.

    Args:
        config: The recipe; its policy is loaded.
        rows: Of metrics.jsonl, up to `iteration`.
        iteration: The checkpoint's.
        ema: Whether the weights are the average.
    """
    policy = config.policy
    lora, base = has_lora(policy.transformer), policy.model
    is_local = base is not None and Path(base).expanduser().is_dir()
    shown = Path(base).name if base and is_local else base  # no place on this machine
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-video",
        base_model=None if is_local else base,
        base_model_relation=None if is_local or not base else "adapter" if lora else "finetune",
        tags=["fastgrpo", "self-paced-grpo", *["lora"] * lora],
    )
    weights = "a LoRA" if lora else "all weights of the transformer"
    average = f", averaged with decay {config.update.ema_decay}" if ema else ""
    text = [
        f"---\n{data.to_yaml()}\n---",
        f"# {config.name}",
        f"{shown or type(policy).__name__}, aligned with [Self-Paced GRPO]({PAPER}) by fastgrpo: "
        f"{weights}, after {iteration} iterations{average}.",
        "## How to load it",
        f"```python\n{_loading_code(policy, shown, lora)}\n```",
        "## Recipe",
        table(_recipe_summary(config)),
        "## What the run measured",
        table(measured(rows)) if rows else "Nothing yet.",
    ]
    if config.update.ema_decay and not ema:
        text.append(
            "The validation scores are those of the average of the weights, which "
            "`fastgrpo export --ema` writes."
        )
    return ModelCard("\n\n".join(text) + "\n")


def _loading_code(policy: Any, base: str | None, lora: bool) -> str:
    """Python that loads the exported weights into the pipeline that they belong to."""
    if base is None:
        kind = type(policy.transformer).__name__
        return (
            f'from diffusers import {kind}\n\ntransformer = {kind}.from_pretrained("THIS_FOLDER")'
        )
    folder = fetch(policy.model, policy.revision, ("model_index.json",))
    index = DiffusionPipeline.load_config(folder)
    pipeline, network = index["_class_name"], index["transformer"][1]
    if lora:
        return (
            f"import torch\nfrom diffusers import {pipeline}\n\n"
            f'pipe = {pipeline}.from_pretrained("{base}", torch_dtype=torch.bfloat16)\n'
            'pipe.load_lora_weights("THIS_FOLDER")'
        )
    return (
        f"import torch\nfrom diffusers import {pipeline}, {network}\n\n"
        f'transformer = {network}.from_pretrained("THIS_FOLDER", torch_dtype=torch.bfloat16)\n'
        f"pipe = {pipeline}.from_pretrained(\n"
        f'    "{base}", transformer=transformer, torch_dtype=torch.bfloat16\n)'
    )


def _recipe_summary(config: TrainConfig) -> dict[str, object]:
    """What a reader wants to know first of a recipe; the run's config.yaml has all of it."""
    roll, pacing, update = config.rollout, config.pacing, config.update
    return {
        "videos": f"{roll.height} x {roll.width} x {roll.num_frames}, "
        f"{config.policy.fps} frames per second",
        "prompts x videos per iteration": f"{roll.num_prompts} x {roll.num_generations}",
        "sampler": f"{roll.sde}, eta {roll.eta}, {roll.num_inference_steps} steps, "
        f"shift {roll.shift}, guidance {roll.guidance_scale}",
        "reward": f"{pacing.mode}, thresholds {', '.join(map(str, pacing.thresholds))}",
        "update": f"{update.num_best} best and {update.num_worst} worst, "
        f"clip {update.clip_range}, KL {update.kl_coef}",
        "optimizer": f"{update.optimizer}, learning rate {update.learning_rate}, "
        f"weight decay {update.weight_decay}",
        "seed": config.seed,
    }


def measured(rows: Sequence[Row]) -> dict[str, object]:
    """First and last mean score of each stage, in validation and in training, and the largest ratio
    drift.
    """
    values: dict[str, object] = {}
    for stage in stage_names(rows):
        for prefix, where in (("eval/", "validation"), ("", "in training")):
            key = f"{prefix}rewards/{stage}/mean"
            ends = [
                f"{row[key]:.3f} (iteration {row['iteration']})"
                for row in rows
                if row.get(key) is not None
            ]
            if ends:
                first_and_last = dict.fromkeys((ends[0], ends[-1]))
                values[f"{stage.replace('_', ' ')}, {where}"] = " → ".join(first_and_last)
    drifts = [row["ratio_drift"] for row in rows if row.get("ratio_drift") is not None]
    if drifts:
        values["largest distance of a first ratio from 1"] = f"{max(drifts):.2g}"
    return values


def table(values: Mapping[str, object]) -> str:
    """A Markdown table of two columns without heads."""
    rows = [f"| {key} | {value} |" for key, value in values.items()]
    return "\n".join(["| | |", "|---|---|", *rows])
