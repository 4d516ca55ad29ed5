"""Write the trained weights of a run for diffusers: a transformer's folder or a LoRA file, with a
model card.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonargparse
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard, ModelCardData

from fastgrpo.config import TrainConfig
from fastgrpo.errors import fail
from fastgrpo.policies import pretrained
from fastgrpo.training import checkpoint
from fastgrpo.training.sampling import open_run
from fastgrpo.training.tracking import Row, read_metrics, stage_names

PAPER = "https://arxiv.org/abs/2511.19356"


def main(argv: list[str] | None = None) -> int:
    """The command line; exit code 2 with one message for a run or a checkpoint that cannot be
    exported.
    """
    parser = jsonargparse.ArgumentParser(prog="python -m fastgrpo export", description=__doc__)
    parser.add_function_arguments(export, as_group=False, as_positional=True)
    arguments = parser.parse_args(argv)
    try:
        print(f"weights and model card: {export(**arguments.as_dict())}")
    except (ValueError, FileNotFoundError) as error:
        fail(error)
    return 0


def export(
    run: str, checkpoint_name: str = "latest", ema: bool = False, output: str | None = None
) -> Path:
    """Write the weights of a checkpoint, of whatever number of processes, in one process on the
    CPU; returns the folder.

    Args:
        run: a run folder, of a run that is finished, stopped or still going. checkpoint_name:
            name of a checkpoint in it, such as iteration_000050. ema: the exponential average of
            the weights instead of the weights themselves. output: a folder that is new;
            <run>/export/<checkpoint>, with _ema behind it for the average, if not given.

    Raises:
        ValueError, FileNotFoundError: no such run or checkpoint, or a damaged one; no average in
            it; a folder that is not new.
    """
    config, path = open_run(run, checkpoint_name)
    out = Path(output) if output else Path(run) / "export" / (path.name + ("_ema" if ema else ""))
    if out.exists():
        raise ValueError(f"output: expected a folder that is new, {out} is there already")
    if ema and "ema" not in checkpoint.parts(path):
        raise ValueError(
            f"ema: {path} has no average of the weights; the run was trained with update.ema_decay 0"
        )
    policy: Any = config.policy
    if hasattr(policy, "attention"):
        policy.attention = "native"  # nothing is computed here: the run's own need not be installed
    policy.load(torch.device("cpu"))
    checkpoint.load_weights(path, policy.transformer, ema)
    partial = out.with_name(f".partial-{out.name}")  # no name ever points to half an export
    shutil.rmtree(partial, ignore_errors=True)
    policy.save_pretrained(partial, policy.transformer.state_dict())
    metrics = Path(run) / "metrics.jsonl"
    iteration = int(path.name.rpartition("_")[2])
    rows = (
        [row for row in read_metrics(metrics) if row["iteration"] <= iteration]
        if metrics.is_file()
        else []
    )
    model_card(config, rows, iteration, ema).save(partial / "README.md")
    os.replace(partial, out)
    return out


def model_card(config: TrainConfig, rows: Sequence[Row], iteration: int, ema: bool) -> ModelCard:
    """Base model, method, how to load it, recipe and what the run measured; for the README.md
    beside the weights.
    """
    policy: Any = config.policy
    base, lora = getattr(policy, "model", None), getattr(policy, "lora", None) is not None
    local = base is not None and Path(base).expanduser().is_dir()
    shown = (
        Path(base).name if base is not None and local else base
    )  # a place on this machine is nothing to publish
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-video",
        base_model=None if local else base,
        base_model_relation=None if local or base is None else "adapter" if lora else "finetune",
        tags=["fastgrpo", "self-paced-grpo", *(["lora"] if lora else [])],
    )
    weights = "a LoRA" if lora else "all weights of the transformer"
    text = [
        f"# {config.name}",
        f"{shown or type(policy).__name__}, aligned with [Self-Paced GRPO]({PAPER}) by fastgrpo: {weights}, after {iteration} iterations"
        + (f", averaged with decay {config.update.ema_decay}." if ema else "."),
        "## How to load it",
        f"```python\n{loading_code(policy, shown, lora)}\n```",
        "## Recipe",
        table(recipe_summary(config)),
        "## What the run measured",
        table(measured(rows)) if rows else "Nothing yet.",
    ]
    if config.update.ema_decay and not ema:
        text.append(
            "The validation scores are those of the average of the weights, which `fastgrpo export --ema true` writes."
        )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(text) + "\n")


def loading_code(policy: Any, base: str | None, lora: bool) -> str:
    """Python that loads the exported weights into the pipeline that they belong to."""
    if base is None:
        kind = next(
            kind
            for kind in type(policy.transformer).__mro__
            if kind.__module__.startswith("diffusers.")
        )
        return f'from diffusers import {kind.__name__}\n\ntransformer = {kind.__name__}.from_pretrained("THIS_FOLDER")'
    index = DiffusionPipeline.load_config(
        pretrained.fetch(policy.model, policy.revision, ("model_index.json",))
    )
    pipeline, network = index["_class_name"], index["transformer"][1]
    if lora:
        return (
            f"import torch\nfrom diffusers import {pipeline}\n\n"
            f'pipe = {pipeline}.from_pretrained("{base}", torch_dtype=torch.bfloat16)\npipe.load_lora_weights("THIS_FOLDER")'
        )
    return (
        f"import torch\nfrom diffusers import {pipeline}, {network}\n\n"
        f'transformer = {network}.from_pretrained("THIS_FOLDER", torch_dtype=torch.bfloat16)\n'
        f'pipe = {pipeline}.from_pretrained("{base}", transformer=transformer, torch_dtype=torch.bfloat16)'
    )


def recipe_summary(config: TrainConfig) -> dict[str, object]:
    """What a reader wants to know first of a recipe; config.yaml of the run has all of it."""
    cfg, pacing, update = config.rollout, config.pacing, config.update
    return {
        "videos": f"{cfg.height} x {cfg.width} x {cfg.num_frames}, {config.policy.fps} frames a second",
        "prompts x videos an iteration": f"{cfg.num_prompts} x {cfg.num_generations}",
        "sampler": f"{cfg.sde}, eta {cfg.eta}, {cfg.num_inference_steps} steps, shift {cfg.shift}, guidance {cfg.guidance_scale}",
        "reward": f"{pacing.mode}, thresholds {', '.join(map(str, pacing.thresholds))}",
        "update": f"{update.num_best} best and {update.num_worst} worst, clip {update.clip_range}, KL {update.kl_coef}",
        "optimizer": f"{update.optimizer}, learning rate {update.learning_rate}, weight decay {update.weight_decay}",
        "seed": config.seed,
    }


def measured(rows: Sequence[Row]) -> dict[str, object]:
    """First and last mean score of each stage, validation and in training, and the largest ratio
    drift.
    """
    values: dict[str, object] = {}
    for stage in stage_names(rows):
        for key, where in (
            (f"eval/rewards/{stage}/mean", "validation"),
            (f"rewards/{stage}/mean", "in training"),
        ):
            seen = [(row["iteration"], row[key]) for row in rows if row.get(key) is not None]
            if seen:
                ends = [
                    f"{value:.3f} (iteration {number})" for number, value in (seen[0], seen[-1])
                ]
                values[f"{stage.replace('_', ' ')}, {where}"] = " → ".join(dict.fromkeys(ends))
    drifts = [row["ratio_drift"] for row in rows if row.get("ratio_drift") is not None]
    return values | (
        {"largest distance of a first ratio from 1": f"{max(drifts):.2g}"} if drifts else {}
    )


def table(values: Mapping[str, object]) -> str:
    """A Markdown table of two columns without heads."""
    return "\n".join(
        ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in values.items())]
    )
