"""The options of the commands that evaluate, apart from what carries them out: `--help` and a wrong
value need neither torch nor diffusers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastgrpo.config import RolloutConfig, TrainConfig
from fastgrpo.errors import UserError, require
from fastgrpo.evaluation.score_rows import MEAN
from fastgrpo.interfaces import RewardModel
from fastgrpo.rewards.media.limits import Decoder, Limits

Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class SamplingOptions:
    """What a command samples. Whatever is None is as the run or recipe has it."""

    run: str
    checkpoint: str = "latest"
    prompts: str | None = None
    num_videos: int | None = None
    num_inference_steps: int | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    sde: Literal["dance", "flow", "linear", "cps", "ode"] = "ode"
    seed: int | None = None
    output: str | None = None
    trust: bool = False

    def __post_init__(self) -> None:
        wanted = self.num_videos is None or self.num_videos >= 1
        require(wanted, "num_videos", "at least 1", self.num_videos)

    def rollout(self, config: TrainConfig) -> RolloutConfig:
        """How to sample one video per prompt, checked against the policy."""
        keys = ("num_inference_steps", "height", "width", "num_frames")
        given = {key: getattr(self, key) for key in keys if getattr(self, key) is not None}
        cfg = dataclasses.replace(
            config.rollout, sde=self.sde, sde_window="all", num_generations=1, **given
        )
        config.policy.latent_shape(cfg.height, cfg.width, cfg.num_frames)
        return cfg


@dataclass(frozen=True)
class ComparisonOptions(SamplingOptions):
    """What `compare_weights` samples.

    Attributes:
        run: A run folder.
        checkpoint: Name of one of its checkpoints, such as iteration_000050, or the path of one;
            its average of the weights is sampled if it has one.
        prompts: Text file, one prompt per line; by default the run's validation prompts.
        num_videos: Only the first so many prompts.
        num_inference_steps: Steps of the sampler; by default the run's.
        height: In pixels; by default the run's.
        width: In pixels; by default the run's.
        num_frames: By default the run's.
        sde: Sampler on the training schedule.
        seed: Of the noise; by default the run's.
        output: Folder for the videos, which replace those that an earlier call made with the same
            settings; by default <run>/samples/<checkpoint>_<sampler>, and what else differs from
            the run's own settings.
        trust: As `trust.OPTION` says.
        scheduler: training: the schedule of training. pipeline: the scheduler that the model's own
            diffusers pipeline has; in one process.
        no_scores: Do not let the run's judge score the videos. A judge that cannot be loaded leaves
            them without scores too, with a note.
    """

    scheduler: Literal["training", "pipeline"] = "training"
    no_scores: bool = False


@dataclass(frozen=True)
class EvaluationOptions(SamplingOptions):
    """What `sample_evaluation` samples.

    Attributes:
        run: A run folder.
        checkpoint: Name of one of the run's checkpoints, or the path of one; its average of the
            weights is sampled if it has one. Or `base`, the weights that training starts from.
        prompts: VBench's VBench_full_info.json; or prompts of your own (text, .jsonl, .parquet). A
            name that no file can have is changed: slashes to underscores, cut, and a hash added.
        num_videos: Videos of each prompt; by default 5, and 25 of the prompts of
            temporal_flickering, as VBench asks.
        num_inference_steps: Steps of the sampler; by default the recipe's.
        height: In pixels; by default the recipe's.
        width: In pixels; by default the recipe's.
        num_frames: By default the recipe's. VBench is for videos shorter than 5 seconds.
        sde: Sampler on the training schedule.
        seed: All videos' seeds follow from it; by default the recipe's.
        output: Folder to write to; by default <run>/evaluation/<checkpoint>_<prompts>.
        trust: As `trust.OPTION` says.
    """

    prompts: str = "VBench_full_info.json"


@dataclass(frozen=True)
class ScoreOptions:
    """What `score` scores, and how.

    Attributes:
        videos: A folder (its video files, sorted by name, without those in its folders), a .txt
            file with one path per line, or one video.
        prompts: A text, .jsonl or .parquet file (or hub data set) with one prompt per video, in
            the same order; or by the videos' names: a .json or .jsonl file of {"video": name,
            "prompt": text}, a .json file of {name: text}, or the samples.json of saved samples.
        output: The file of rows. Rows that are there are kept, and not scored again, unless the
            video has other bytes now.
        reward: The judge: a class by its dotted path, such as
            fastgrpo.rewards.vlm.judge.StageJudge, and its arguments.
        device: Where the judge runs and the frames lie; auto takes a GPU if there is one.
        decoder: auto decodes with DALI if it is installed and takes the file, else with PyAV.
        batch_size: Videos that the judge gets at a time.
        readers: Threads that decode ahead of the judge, up to two batches.
        retry_failed: Score the videos again whose rows have an error.
        limits: The most that a file may have.
    """

    videos: str
    prompts: str
    output: str
    reward: RewardModel
    device: Device = "auto"
    decoder: Decoder = "auto"
    batch_size: int = 8
    readers: int = 2
    retry_failed: bool = False
    limits: Limits = Limits()  # noqa: RUF009  (frozen)


@dataclass(frozen=True)
class BiasOptions:
    """What `measure_bias` measures.

    Attributes:
        scores: A file of scores for each judge.
        names: Names of the judges, in the same order; by default those of the files.
        score: A stage, a component, or `mean` of all stages; one for all judges, or one for each.
            The score of a row {"score": x} is the stage `score`.
        embeddings: Of the prompts, .npy: a row for each row of the first file of scores.
        text_encoder: Folder or hub id of a UMT5 encoder (a model of transformers, or a pipeline of
            diffusers, such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers); it embeds the prompts whose
            embeddings OUTPUT does not have yet.
        revision: Of the hub id.
        clusters: Numbers of clusters, first:last, or one number.
        seed: Of k-means for the tables and clusters, and of the shuffles.
        num_seeds: Seeds, from `seed` on, over which the range of κ is shown.
        batch_size: Prompts that the encoder gets at a time.
        device: Where the encoder runs; auto takes a GPU if there is one.
        output: Folder to write to; by default `bias` beside the first file of scores.
    """

    scores: Sequence[Path]
    names: Sequence[str] | None = None
    score: Sequence[str] = (MEAN,)
    embeddings: Path | None = None
    text_encoder: str | None = None
    revision: str | None = None
    clusters: str = "10:20"
    seed: int = 0
    num_seeds: int = 5
    batch_size: int = 8
    device: Device = "auto"
    output: Path | None = None

    def __post_init__(self) -> None:
        for key in ("num_seeds", "batch_size"):
            require(getattr(self, key) >= 1, key, "at least 1", getattr(self, key))
        in_range = 0 <= self.seed <= 2**32 - self.num_seeds
        require(in_range, "seed", "an integer in [0, 2^32 - num_seeds]", self.seed)
        alone = self.revision is not None and self.text_encoder is None
        require(not alone, "revision", "none without a text_encoder", self.revision)
        if self.embeddings is not None and self.text_encoder is not None:
            raise UserError("embeddings: expected those or a text_encoder, got both")
        expected = f"one for all or one for each of {len(self.scores)} files of scores"
        require(len(self.score) in (1, len(self.scores)), "score", expected, len(self.score))

    @property
    def folder(self) -> Path:
        return self.output or self.scores[0].parent / "bias"


@dataclass(frozen=True)
class CalibrateOptions:
    """Calibration of the thresholds."""

    iterations: int = 50
    """Iterations on each stage alone."""
    fraction: float = 0.7
    """Share of a stage's gain at which the next stage opens."""
    smoothing_window: int = 10
    """Iterations of the moving average."""

    def __post_init__(self) -> None:
        require(self.iterations >= 1, "options.iterations", "at least 1", self.iterations)
        require(0 < self.fraction <= 1, "options.fraction", "a number in (0, 1]", self.fraction)
        window = self.smoothing_window
        require(window >= 1, "options.smoothing_window", "at least 1", window)
