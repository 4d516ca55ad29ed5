"""The configuration: frozen dataclasses, one per section.

The defaults are the paper's common recipe (docs/method.md, section 4); a recipe names only what
differs. Each section checks its values when it is built, so a wrong value is one clear line before
any work starts. `fastgrpo.training.recipe_parser` reads recipes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fastgrpo.errors import require
from fastgrpo.interfaces import Policy, RewardModel


def _require_at_least(minimum: int, section: object, prefix: str, *keys: str) -> None:
    for key in keys:
        value = getattr(section, key)
        require(value >= minimum, prefix + key, f"at least {minimum}", value)


def _require_positive(section: object, prefix: str, *keys: str) -> None:
    for key in keys:
        value = getattr(section, key)
        require(0 < value < math.inf, prefix + key, "a positive number", value)


@dataclass(frozen=True)
class PromptsConfig:
    """Where prompts come from: text (one prompt per line), .jsonl, .parquet, or a hub data set,
    hub:OWNER/NAME[/CONFIGURATION][:SPLIT].
    """

    train: str
    """Prompts to train on. A relative path is looked for in the working directory, then beside the
    installed package.
    """
    validation: str | None = None
    """Prompts of the evaluation; none: the first `evaluation.num_videos` training prompts."""
    shuffle: bool = True
    """Draw every epoch in a new order (seeded) instead of the file's."""


@dataclass(frozen=True)
class RolloutConfig:
    """How groups of videos are sampled (docs/method.md, sections 1, 2 and 4)."""

    num_prompts: int = 8
    """Prompts of one iteration, over all ranks; the paper takes one per GPU."""
    num_generations: int = 16
    """G, the videos of one group."""
    height: int = 480
    """Pixels."""
    width: int = 832
    """Pixels."""
    num_frames: int = 53
    """Frames of one video."""
    num_inference_steps: int = 16
    """N, the steps from noise to video."""
    shift: float = 5.0
    """Shift of the schedule sigma = shift t / (1 + (shift - 1) t)."""
    sde: Literal["dance", "flow", "linear", "cps", "ode"] = "dance"
    """Sampler; `ode` has no log-probability and serves evaluation only."""
    eta: float = 0.5
    """Noise level of the SDE, for dance, flow and cps; `linear` takes its own from the schedule,
    `ode` has none.
    """
    sde_window: Literal["all", "sliding", "single"] = "all"
    """Which steps are stochastic and trained: all (the paper), a window that slides (MixGRPO), one
    step a prompt (Flash-GRPO).
    """
    window_size: int = 4
    """Steps in the sliding window."""
    window_interval: int = 25
    """Iterations after which the sliding window moves by one step."""
    window_order: Literal["progressive", "random"] = "progressive"
    """Whether the sliding window walks from the first step on, or is drawn anew each interval."""
    guidance_scale: float = 5.0
    """Classifier-free guidance w in v = v_uncond + w (v_cond - v_uncond); 1 runs no unconditional
    branch.
    """
    same_noise: bool = True
    """Start all videos of a group from one noise."""
    share_first_step: bool = True
    """Run the first step once for the micro-batches whose videos all start from one noise and
    prompt. Not a bit changes.
    """
    timestep_rounding: Literal["trunc", "none"] = "trunc"
    """Whether the model sees 1000 sigma truncated to an integer (DanceGRPO) or as it is."""
    decode: Literal["x0", "final"] = "x0"
    """Which latent becomes the video: the last step's x0 prediction, or the SDE's last state."""
    micro_batch_size: int = 1
    """Videos that one forward pass holds, in rollout and update alike: another size is another
    kernel, and other bits.
    """

    def __post_init__(self) -> None:
        _require_at_least(
            1,
            self,
            "rollout.",
            "num_prompts",
            "num_generations",
            "height",
            "width",
            "num_frames",
            "micro_batch_size",
            "window_interval",
        )
        _require_at_least(2, self, "rollout.", "num_inference_steps")
        _require_positive(self, "rollout.", "shift", "eta")
        require(self.shift <= 1e6, "rollout.shift", "at most 1e6", self.shift)
        require(self.sde != "cps" or self.eta <= 1, "rollout.eta", "at most 1 for cps", self.eta)
        scale = self.guidance_scale
        require(math.isfinite(scale), "rollout.guidance_scale", "a finite number", scale)
        # The last transition is never trained, so it cannot be part of a window.
        require(
            self.sde_window != "sliding" or 1 <= self.window_size < self.num_inference_steps,
            "rollout.window_size",
            f"1 to {self.num_inference_steps - 1} (num_inference_steps - 1)",
            self.window_size,
        )


@dataclass(frozen=True)
class PacingConfig:
    """The co-evolving reward (Eqs. 4-9; docs/method.md, section 3)."""

    mode: Literal["self_paced", "one_stage", "two_stage", "joint", "static"] = "self_paced"
    """self_paced: Eqs. 4-9. one_stage: stage I. two_stage: self-paced over I and II. joint: equal
    weights. static: one stage.
    """
    static_stage: int = 0
    """The stage that `static` trains on, counted from 1; 0 is the last."""
    thresholds: tuple[float, ...] = (0.75, 0.75)
    """Competence that opens the next stage: K - 1 of them, or K with the literal gate. `calibrate`
    measures them.
    """
    gate: Literal["difference", "literal"] = "difference"
    """Reading of Eq. 9."""
    saturation: Literal["one_minus_hoyer", "hoyer", "off"] = "one_minus_hoyer"
    """What the sparsity term takes for saturation: 1 - Hoyer (the text's meaning), Eq. 8 as
    printed, or nothing.
    """
    competence: Literal["ema", "batch", "group"] = "ema"
    """The mean that the gates see: running over iterations, of the iteration, or of the group
    itself (Eq. 7 to the letter).
    """
    momentum: float = 0.9
    """Momentum of the running mean."""
    sharpness: float = 5.0
    """The paper's alpha: sharpness of the softmax over gates (Eq. 6)."""
    gate_temperature: float = 0.05
    """T: width of the sigmoid in units of reward."""
    sparsity_weight: float = 0.5
    """The paper's beta: weight of the saturation term (Eq. 9)."""


@dataclass(frozen=True)
class UpdateConfig:
    """The clipped policy-gradient update (Eq. 11; docs/method.md, sections 2 and 4)."""

    num_best: int = 4
    """Videos of highest advantage that are trained, per group."""
    num_worst: int = 4
    """Videos of lowest advantage that are trained, per group."""
    timestep_fraction: float = 0.6
    """Share of the transitions (the last one dropped) that each sample trains, drawn at random."""
    clip_range: float = 1e-4
    """Epsilon of the clipped ratio."""
    adv_clip: float = 5.0
    """Advantages are clamped to [-adv_clip, adv_clip]."""
    kl_coef: float = 0.0
    """Weight of the exact KL to the base weights; 0 keeps no copy of them."""
    cfg_grad: Literal["both", "cond_only"] = "both"
    """Branches that the gradient of a guided velocity reaches."""
    branchwise: bool = True
    """With guidance, back-propagate one branch after the other, so that one branch's activations
    live at a time. Before any weight has moved it costs nothing (the gradient follows from the
    noise, where the ratio is 1), after that or with a KL one more forward.
    """
    optimizer_steps: int = 2
    """Optimizer steps of an iteration, which share its chosen videos evenly: with 2, half of each
    group's are trained before the weights move for the first time, half after. With a divisor of
    num_best + num_worst each process has an equal part in every step; with others some wait.
    """
    optimizer: Literal["adamw", "apex_fused_adam"] = "adamw"
    """torch's fused AdamW, or NVIDIA apex's FusedAdam."""
    learning_rate: float = 5e-6
    """Peak learning rate."""
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant"
    """Schedule of the learning rate over the run's iterations (diffusers' get_scheduler)."""
    warmup_iterations: int = 0
    """Iterations of linear warm-up, for the schedules that have one."""
    weight_decay: float = 1e-4
    """Decoupled weight decay."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this 2-norm."""
    ema_decay: float = 0.0
    """Decay of an exponential average of the weights (EMA); 0 keeps none. Evaluation, `sample` and
    the export at the end of a run use the average; rollouts use the raw weights. `export` takes it
    with --ema.
    """
    max_skipped_updates: int = 5
    """Updates in a row that could not be made (a loss or gradient not finite, no video with a
    score) before the run stops, checkpointed.
    """

    def __post_init__(self) -> None:
        best, worst = self.num_best, self.num_worst
        require(
            best >= 0 and worst >= 0,
            "update.num_best/num_worst",
            "no negative number",
            (best, worst),
        )
        require(best + worst >= 1, "update.num_best + num_worst", "at least 1", 0)
        share = self.timestep_fraction
        require(0 < share <= 1, "update.timestep_fraction", "a number in (0, 1]", share)
        require(0 < self.clip_range < 1, "update.clip_range", "a number in (0, 1)", self.clip_range)
        for key in ("adv_clip", "max_grad_norm"):  # infinity switches either off
            limit = getattr(self, key)
            require(limit > 0, f"update.{key}", "a positive number", limit)
        for key in ("kl_coef", "weight_decay"):
            weight = getattr(self, key)
            require(0 <= weight < math.inf, f"update.{key}", "a number of at least 0", weight)
        _require_at_least(1, self, "update.", "optimizer_steps", "max_skipped_updates")
        _require_at_least(0, self, "update.", "warmup_iterations")
        _require_positive(self, "update.", "learning_rate")
        require(
            self.warmup_iterations == 0 or self.lr_scheduler != "constant",
            "update.warmup_iterations",
            "0 with lr_scheduler constant (or constant_with_warmup)",
            self.warmup_iterations,
        )
        betas = self.betas
        require(all(0 <= b < 1 for b in betas), "update.betas", "two numbers in [0, 1)", betas)
        require(0 <= self.ema_decay < 1, "update.ema_decay", "a number in [0, 1)", self.ema_decay)


@dataclass(frozen=True)
class ScoringConfig:
    """The queue in front of the judge, and what becomes of videos without a score."""

    max_pending: int = 4
    """Micro-batches of decoded videos of a rank that may be without scores while the next ones are
    sampled; at least as many as the judge takes at a time, such as `concurrency` of
    ServerEngine.
    """
    max_invalid_share: float = 0.5
    """Share of an iteration's videos, over all ranks, that may go without a score; beyond it the
    run stops, checkpointed.
    """

    def __post_init__(self) -> None:
        _require_at_least(1, self, "scoring.", "max_pending")
        share = self.max_invalid_share
        require(0 <= share <= 1, "scoring.max_invalid_share", "a share in [0, 1]", share)


@dataclass(frozen=True)
class EvaluationConfig:
    """Validation prompts, sampled with fixed noise and scored by the same judge."""

    interval: int = 50
    """Iterations between evaluations; the first and the last state are evaluated too. 0: only those
    two.
    """
    num_generations: int = 1
    """Videos per validation prompt."""
    num_videos: int = 8
    """Videos that are saved as mp4 and stills, the first of each of the first prompts."""
    sde: Literal["dance", "flow", "linear", "cps", "ode"] = "ode"
    """Sampler of the evaluation; schedule, guidance and size are the rollout's."""

    def __post_init__(self) -> None:
        _require_at_least(0, self, "evaluation.", "interval", "num_videos")
        _require_at_least(1, self, "evaluation.", "num_generations")


@dataclass(frozen=True)
class CheckpointConfig:
    """When the state is written; a stop by a signal or by failures writes it too."""

    interval: int = 50
    """Iterations between checkpoints; the last iteration always has one."""
    keep: int = 3
    """Checkpoints kept, the newest."""

    def __post_init__(self) -> None:
        _require_at_least(1, self, "checkpoint.", "interval", "keep")


@dataclass(frozen=True)
class TrackingConfig:
    """Where metrics go besides metrics.jsonl."""

    trackers: tuple[str, ...] = ("tensorboard",)
    """Names that accelerate.tracking knows: tensorboard, wandb, mlflow, aim, comet_ml, ..."""
    project: str = "fastgrpo"
    """Project name for the trackers that have one."""


@dataclass(frozen=True)
class ParallelConfig:
    """How the trained network lies on the GPUs, and what its backward keeps.

    Apart from `compile` none of it changes what is computed, but for the order of sums over
    ranks, and that sharded bf16 compute also rounds what autocast leaves in fp32: norms' weights
    and modulation tables (the master weights stay fp32).
    """

    shard: Literal["auto", "none", "full"] = "auto"
    """full: parameters, gradients and optimizer state in equal parts on all ranks (FSDP2, block by
    block). none: a whole copy on every rank, gradients averaged. auto: full where there are
    several ranks with GPUs.
    """
    replicas: int = 1
    """Copies of the sharded model (HSDP): each group of world size / replicas ranks, best a node,
    holds one. 1 shards over all ranks.
    """
    cpu_offload: bool = False
    """Keep the shards, the gradients and the optimizer's state in the host's memory, and step
    there. Needs sharding.
    """
    keep_gathered: bool = False
    """Keep the parameters of all blocks gathered during a rollout, one all-gather for all its
    steps; freed before the update.
    """
    activations: Literal["full", "keep_attention", "none"] = "full"
    """What backward computes again of each block: all of it, all but attention's outputs (some GB),
    or nothing (most memory).
    """
    reduce_every: Literal["backward", "step"] = "backward"
    """When sharded gradients are reduced over the ranks: in every backward pass, or only in the
    last ones of an optimizer step, which leaves whole gradients in fp32 on each GPU until then and
    changes the order of sums. Copies (shard none) are always reduced once a step.
    """
    compile: bool = False
    """torch.compile of each kind of block. A compiled block's training forward may round otherwise
    than its rollout forward, which the clip then takes for a change of policy: look at
    ratio_drift, which must stay far below update.clip_range.
    """

    def __post_init__(self) -> None:
        _require_at_least(1, self, "parallel.", "replicas")
        if self.shard == "none":
            expected = "1 with shard none, where all are copies"
            require(self.replicas == 1, "parallel.replicas", expected, self.replicas)
            require(not self.cpu_offload, "parallel.cpu_offload", "false with shard none", True)


@dataclass(frozen=True)
class RuntimeConfig:
    """The machine."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one."""
    compute_dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """dtype of the forward pass over fp32 master weights; auto: bf16 on a GPU, fp32 on the CPU."""
    num_threads: int = 0
    """CPU threads of each process; 0 leaves torch's choice. Another number is another summation
    order, and other bits.
    """
    deterministic: bool = False
    """On a GPU: only algorithms that give the same bits at every run, so that a run that was killed
    and resumed gives those of one that was not. cuDNN's attention has no such backward in torch;
    FlashAttention-2 takes its place, in rollout and update, and is slower: with it `attention: fa3`
    or `fa4` where installed. A CPU always is deterministic.
    """
    timeout_minutes: float = 30.0
    """A rank that waits longer than this for the others fails."""

    def __post_init__(self) -> None:
        _require_at_least(0, self, "runtime.", "num_threads")
        _require_positive(self, "runtime.", "timeout_minutes")


@dataclass(frozen=True)
class TrainConfig:
    """Align a video diffusion model with Self-Paced GRPO."""

    policy: Policy
    """The generator: a class by its dotted path, and its arguments."""
    reward: RewardModel
    """The judge: a class by its dotted path, and its arguments."""
    prompts: PromptsConfig
    """The prompts."""
    name: str = "run"
    """Name of the run; its folder is <output_dir>/<name>."""
    output_dir: str = "runs"
    """Folder that holds the runs; nothing is written outside it but a policy's text embeddings,
    which runs share.
    """
    iterations: int = 150
    """Rollout iterations in all, those before a resume included."""
    seed: int = 0
    """Seed of every random choice. Noise is counter-based: there is no other random state."""
    resume: Literal["never", "auto"] = "never"
    """auto: go on from the newest checkpoint that verifies; never: refuse a run folder that has
    been used.
    """
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """Sampling of groups."""
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    """How videos reach the judge."""
    pacing: PacingConfig = field(default_factory=PacingConfig)
    """The self-paced reward."""
    update: UpdateConfig = field(default_factory=UpdateConfig)
    """The policy-gradient update."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Evaluation on validation prompts."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Sharding, and the memory of backward."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Trackers."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    """Device, precision, processes."""

    def __post_init__(self) -> None:
        is_folder_name = self.name not in ("", ".", "..") and "/" not in self.name
        require(is_folder_name, "name", "a folder's name", self.name)
        _require_at_least(0, self, "", "iterations")
        require(0 <= self.seed < 2**63, "seed", "an integer in [0, 2^63)", self.seed)
        rollout, update = self.rollout, self.update
        require(
            rollout.sde != "ode",
            "rollout.sde",
            "a sampler with a log-probability to train on",
            rollout.sde,
        )
        require(
            self.evaluation.sde != "cps" or rollout.eta <= 1,
            "rollout.eta",
            "at most 1 for evaluation.sde cps",
            rollout.eta,
        )
        require(
            not (self.runtime.deterministic and self.parallel.compile),
            "parallel.compile",
            "false with runtime.deterministic (the compiler chooses kernels by their time)",
            True,
        )
        size, trained = rollout.num_generations, update.num_best + update.num_worst
        require(size >= 2, "rollout.num_generations", "at least 2, a group", size)
        require(
            size >= trained,
            "rollout.num_generations",
            f"at least update.num_best + update.num_worst = {trained}",
            size,
        )
        kept = rollout.num_prompts * trained
        require(
            update.optimizer_steps <= kept,
            "update.optimizer_steps",
            f"at most {kept}, the videos kept (rollout.num_prompts x (num_best + num_worst))",
            update.optimizer_steps,
        )

    @property
    def run_folder(self) -> Path:
        return Path(self.output_dir) / self.name
