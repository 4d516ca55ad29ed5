"""VBench: sample the videos that it judges, and turn its result files into scores, tables and a
figure.

python -m fastgrpo evaluate sample RUN --prompts vbench     (alone, or under torchrun with a
process a GPU) python -m fastgrpo evaluate vbench RESULTS [RESULTS ...]

Between the two VBench's own command line runs, in its own environment: `vbench evaluate
--videos_path OUT/videos --dimension NAME`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import yaml

from fastgrpo.cli.sample import load, read_without_judge
from fastgrpo.config import TrainConfig
from fastgrpo.distributed import collectives
from fastgrpo.errors import fail
from fastgrpo.evaluation.evaluation_videos import (
    BASE,
    claim,
    keep_settings,
    list_videos,
    make_videos,
    settings,
    unmade_batches,
    write_lists,
)
from fastgrpo.evaluation.figures import save_figure
from fastgrpo.evaluation.vbench_scores import (
    SUFFIX,
    Scale,
    Scores,
    read_evaluation_prompts,
    read_results,
    vbench_scores,
)
from fastgrpo.evaluation.vbench_tables import Format, Values, score_figure, score_table, scores_json
from fastgrpo.files import find_file
from fastgrpo.training.checkpoint import load_weights, parts, verify
from fastgrpo.training.loop import compute_dtype


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; exit code 2 with one message for whatever cannot be used."""
    description = (__doc__ or "").split("\n")[0]
    parser = jsonargparse.ArgumentParser(
        prog="python -m fastgrpo evaluate", description=description, exit_on_error=False
    )
    commands = parser.add_subcommands(dest="action")
    sampling = jsonargparse.ArgumentParser(
        exit_on_error=False, description=(sample.__doc__ or "").split("\n")[0]
    )
    sampling.add_argument(
        "run",
        nargs="?",
        type=str,
        metavar="RUN",
        help="a run folder; or else --config names a recipe",
    )
    sampling.add_function_arguments(sample, as_group=False, skip={"run"})
    commands.add_subcommand(
        "sample", sampling, help="videos of every prompt, named and numbered as VBench wants them"
    )
    scoring = jsonargparse.ArgumentParser(
        exit_on_error=False, description=(vbench.__doc__ or "").split("\n")[0]
    )
    scoring.add_argument(
        "results",
        nargs="+",
        type=Path,
        metavar="RESULTS",
        help=f"for each run its *{SUFFIX}, a folder of them, or plain JSON",
    )
    scoring.add_argument(
        "--json",
        action="store_true",
        help="print JSON instead of a table: of one run its object, of several {name: object}",
    )
    scoring.add_argument(
        "--names",
        nargs="+",
        type=str,
        metavar="NAME",
        help="of the runs, in the same order; those of the files by default",
    )
    scoring.add_function_arguments(vbench, as_group=False, skip={"results", "names", "json"})
    commands.add_subcommand(
        "vbench",
        scoring,
        help="quality, semantic and total score from VBench's result files, several runs side by side",
    )
    try:
        arguments = parser.parse_args(argv).as_dict()
        action = arguments["action"]
        text = sample(**arguments[action]) if action == "sample" else vbench(**arguments[action])
    except (jsonargparse.ArgumentError, ValueError, OSError) as error:
        fail(error)
    if collectives.rank() == 0:
        print(text)
    return 0


# --- evaluate vbench
# -----------------------------------------------------------------------------------------------------


def vbench(
    results: Sequence[Path],
    names: Sequence[str] | None = None,
    json: bool = False,
    values: Values = "normalized",
    format: Format = "text",
    scale: Scale = "auto",
    figure: Path | None = None,
) -> str:
    """VBench's sixteen dimensions, and its quality, semantic and total score, from its result
    files; several runs beside the first.

    Args:
        results: for each run a file or a folder, as
            `fastgrpo.evaluation.vbench_scores.read_results` takes them. names: of the runs;
            those of the files and folders if not given. json: give JSON instead of a table.
            values: of the dimensions: normalized, as they enter the totals, or raw, as papers
            print them. format: of the table. scale: of plain files {dimension: score}; auto:
            told by the scores, and refused where that cannot be told. figure: also draw bars, to
            this path with .png and .svg.

    Returns:
        The table, with a line for each run on what it lacks; or the JSON text.

    Raises:
        ValueError, OSError: files that cannot be read, or not as many names.
    """
    runs = {}
    for name, path in zip(run_names(results, names), results, strict=True):
        runs[name] = vbench_scores(read_results(path, scale))
    if figure is not None:
        figure.parent.mkdir(parents=True, exist_ok=True)
        save_figure(
            score_figure(runs, values),
            figure.with_suffix("") if figure.suffix in (".png", ".svg") else figure,
        )
    if json:
        return json_text(runs, values)
    comment = {"text": "", "markdown": "", "latex": "% "}[format]
    return "\n".join(
        [score_table(runs, values, format), *(f"{comment}{line}" for line in missing_lines(runs))]
    )


def run_names(results: Sequence[Path], names: Sequence[str] | None) -> list[str]:
    """A name for each run: the given ones, or those of the files without their endings; the whole
    paths where two are alike.
    """
    found = list(
        names
        or (path.name.removesuffix(SUFFIX).removesuffix(".json") or str(path) for path in results)
    )
    if len(found) != len(results):
        raise ValueError(
            f"names: expected one for each of {len(results)} results, got {len(found)}"
        )
    found = found if names or len(set(found)) == len(found) else [str(path) for path in results]
    if len(set(found)) < len(found):
        raise ValueError(
            f"{'names' if names else 'results'}: expected all different, got {', '.join(found)}"
        )
    return found


def json_text(runs: Mapping[str, Scores], values: Values) -> str:
    """Of one run its object, of several an object by name."""
    objects = {name: scores_json(run, values) for name, run in runs.items()}
    return json.dumps(
        objects if len(objects) > 1 else next(iter(objects.values())),
        indent=1,
        ensure_ascii=False,
        allow_nan=False,
    )


def missing_lines(runs: Mapping[str, Scores]) -> list[str]:
    """For each run that lacks dimensions, which, and which totals are withheld for it."""
    lines = []
    for name, run in runs.items():
        withheld = [
            total for total in ("quality", "semantic", "total") if getattr(run, total) is None
        ]
        if run.missing:
            lines.append(f"{name} lacks {', '.join(run.missing)}: no {' or '.join(withheld)} score")
    return lines


# --- evaluate sample
# -----------------------------------------------------------------------------------------------------


def sample(
    run: str | None = None,
    config: str | None = None,
    checkpoint: str = "latest",
    prompts: str = "vbench",
    num_videos: int | None = None,
    num_inference_steps: int | None = None,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    sde: Literal["dance", "flow", "linear", "cps", "ode"] = "ode",
    seed: int | None = None,
    out: str | None = None,
) -> str:
    """Sample the videos that VBench judges, or those of other prompts, with one model; what is
    there already is kept.

    Writes OUT/videos/{prompt}-{index}.mp4 and nothing else in that folder, OUT/seeds.jsonl
    ({"video", "prompt", "seed"}), OUT/prompts.json ({name: caption}, for VBench's --prompt_file)
    and OUT/sampling.json (with what they were made).

    Args:
        run: a run folder. config: a recipe instead. checkpoint: the name of one of the run's
            checkpoints, or the path of one (its average of the weights, where it has one); or
            `base`, the weights that training starts from. prompts: vbench: the list of the
            installed package vbench; or the path of its VBench_full_info.json; or captions of
            your own (text, .jsonl, .parquet). A name that no file can have is changed: slashes
            to underscores, cut, and a hash added. num_videos: videos of each prompt; if not
            given 5, and 25 of the prompts of temporal_flickering, as VBench asks.
            num_inference_steps: steps of the sampler; the recipe's if not given. height: pixels;
            the recipe's if not given. width: pixels; the recipe's if not given. num_frames:
            frames; the recipe's if not given. VBench is for videos shorter than 5 seconds. sde:
            sampler on the training schedule. seed: what all videos' seeds follow from; the
            recipe's if not given. out: folder to write to;
            <run>/evaluation/<checkpoint>_<prompts> if not given.

    Raises:
        ValueError, OSError: no such run, recipe, checkpoint or prompts, a folder that holds
            other videos, or one in use.
    """
    if num_videos is not None and num_videos < 1:
        raise ValueError(f"num_videos: expected at least 1, got {num_videos}")
    recipe, folder, values = open_config(run, config)
    weights = find_checkpoint(checkpoint, folder)
    wanted = [
        dataclasses.replace(p, num_videos=num_videos or p.num_videos)
        for p in read_evaluation_prompts(prompts)
    ]
    recipe.policy.check_prompts([p.text for p in wanted])
    size = {
        "num_inference_steps": num_inference_steps,
        "height": height,
        "width": width,
        "num_frames": num_frames,
    }
    given: dict[str, Any] = {key: value for key, value in size.items() if value is not None}
    rollout = dataclasses.replace(
        recipe.rollout, sde=sde, sde_window="all", num_generations=1, **given
    )
    recipe.policy.latent_shape(rollout.height, rollout.width, rollout.num_frames)
    seed = recipe.seed if seed is None else seed
    videos = list_videos(wanted, seed)
    name = BASE if weights is None else weights.name
    output = (
        Path(out)
        if out
        else folder
        / "evaluation"
        / f"{name}_{'vbench' if prompts == 'vbench' else Path(prompts).stem}"
    )
    own_group = not collectives.started()
    device = collectives.start(recipe.runtime)
    dtype = compute_dtype(recipe.runtime, device)
    lock = claim(output)
    keep_settings(output, settings(values["policy"], rollout, weights, dtype, seed))
    if collectives.rank() == 0:
        write_lists(output, videos)
    there = {path.name for path in (output / "videos").iterdir()}
    unmade = unmade_batches(videos, rollout.micro_batch_size, output)
    if unmade:
        load(recipe, list(dict.fromkeys(video.prompt for video in videos)), device)
        if weights is not None:
            load_weights(weights, recipe.policy.transformer, ema="ema" in parts(weights))
        make_videos(recipe.policy, unmade, rollout, output, device, dtype)
    if lock is not None:
        lock.close()
    # not after an error: the other ranks may wait in a collective, and leaving would wait for them
    if own_group:
        collectives.stop()
    return f"{len(videos)} videos, {sum(video.name not in there for video in videos)} of them new: {output / 'videos'}"


def open_config(run: str | None, config: str | None) -> tuple[TrainConfig, Path, dict[str, Any]]:
    """The configuration without its judge; the folder of its run, which need not be there; its YAML
    as it stands. ValueError, OSError.
    """
    if (run is None) == (config is None):
        raise ValueError(
            f"evaluate sample: expected a run folder or --config, got {'both' if run else 'neither'}"
        )
    path = (
        find_file(config, "config")
        if config and not Path(config).is_dir()
        else Path(run or config or "") / "config.yaml"
    )
    if not path.is_file():
        raise FileNotFoundError(
            f"run: expected a run folder with config.yaml, found none at {path.parent}"
        )
    recipe = read_without_judge(path)
    is_run = path.name == "config.yaml" and (path.parent / "checkpoints").is_dir()
    return (
        recipe,
        path.parent if is_run else recipe.run_folder,
        yaml.safe_load(path.read_text(encoding="utf-8")),
    )


def find_checkpoint(name: str, folder: Path) -> Path | None:
    """The folder of a checkpoint of this name or path, verified; None for `base`. ValueError,
    FileNotFoundError.
    """
    if name == BASE:
        return None
    places = dict.fromkeys([folder / "checkpoints" / name, Path(name)])
    path = next((place.resolve() for place in places if place.is_dir()), None)
    if path is None:
        raise FileNotFoundError(
            f"checkpoint: expected {BASE} or a checkpoint, found none at {' or '.join(map(str, places))}"
        )
    verify(path)
    return path
