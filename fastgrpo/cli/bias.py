"""Measure how much judges' scores hang on what videos show: the coefficient of variation over
clusters of captions (Eq. 3).

Each judge's scores are a .jsonl file with an object a line: those of `python -m fastgrpo score`,
or of any other judge (VisionReward, VideoScore) {"video": "0001.mp4", "prompt": "a cat",
"score": 3.2}. Videos are matched by file name, or, where rows have no video, by prompt. Captions
are embedded and clustered by k-means for each k; κ = 100 · std / mean is taken over the cluster
means and inside clusters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import jsonargparse
import numpy as np
import torch

from fastgrpo.cli.score import named_prompts
from fastgrpo.errors import fail
from fastgrpo.evaluation.bias import (
    N_INIT,
    Floats,
    Labels,
    Vectors,
    cluster_all,
    directions,
    measure,
    typical,
)
from fastgrpo.evaluation.bias_tables import (
    JudgeBias,
    bias_json,
    bias_rows,
    bias_table,
    cluster_figure,
    cluster_table,
    kappa_figure,
    warnings_about,
)
from fastgrpo.evaluation.caption_embeddings import (
    embed_captions,
    embeddings_in_order,
    read_embeddings,
)
from fastgrpo.evaluation.tables import write_csv, write_json
from fastgrpo.evaluation.score_rows import (
    MEAN,
    ScoredRow,
    ScoreFile,
    left_out_lines,
    match_rows,
    name_files,
    pick,
    read_scores,
)
from fastgrpo.training.figures import save_figure
from fastgrpo.training.prompts import read_prompts

EMBEDDINGS = "embeddings.safetensors"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; exit code 2 with one message for whatever cannot be used."""
    parser = jsonargparse.ArgumentParser(
        prog="python -m fastgrpo bias", description=__doc__, exit_on_error=False
    )
    parser.add_argument(
        "--scores",
        nargs="+",
        type=Path,
        required=True,
        metavar="FILE",
        help="a file of scores for each judge",
    )
    parser.add_argument(
        "--names",
        nargs="+",
        type=str,
        metavar="NAME",
        help="of the judges, in the same order; those of the files by default",
    )
    parser.add_argument(
        "--score",
        nargs="+",
        type=str,
        default=[MEAN],
        metavar="STAGE",
        help="which score: a stage, a component (VideoAlign's raw VQ), or mean of all stages; one for all judges, or one for each",
    )
    parser.add_function_arguments(bias, as_group=False, skip={"scores", "names", "score"})
    try:
        print(bias(**parser.parse_args(argv).as_dict()))
    except (jsonargparse.ArgumentError, ValueError, OSError) as error:
        fail(error)
    return 0


def bias(
    scores: Sequence[Path],
    names: Sequence[str] | None = None,
    score: Sequence[str] = (MEAN,),
    captions: str | None = None,
    embeddings: Path | None = None,
    text_encoder: str | None = None,
    revision: str | None = None,
    clusters: str = "10:20",
    seed: int = 0,
    num_seeds: int = 5,
    batch_size: int = 8,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    out: Path | None = None,
) -> str:
    """The bias of each judge, as text; the same as JSON, CSV and figures in a folder.

    Writes OUT/bias.json, kappa.csv, clusters.csv, kappa.png and .svg (κ over k), clusters.png
    and .svg (scores by cluster, greatest k), and embeddings.safetensors, from which a second
    call takes the captions' embeddings without an encoder.

    Args:
        scores: a file of scores for each judge. names: of the judges; those of the files if not
            given. score: a stage, a component, or `mean` of all stages, one for all judges or
            one for each; {"score": x} is the stage `score`. captions: file of captions, by video
            name (.json, .jsonl with video and prompt) or in the order of the first file's rows;
            if not given, the prompts in the rows. embeddings: of the captions, .npy or
            .safetensors: a row for each row of the first file of scores, or one that this
            command wrote. text_encoder: folder or hub id of a UMT5 encoder (a model of
            transformers, or a pipeline of diffusers, such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers)
            that embeds captions whose embeddings OUT does not have yet. revision: of the hub id.
            clusters: numbers of clusters, first:last, or one. seed: of k-means for the table and
            the clusters, and of the shuffles. num_seeds: seeds, from `seed` on, over which the
            range of κ is shown. batch_size: captions that the encoder gets at a time. device:
            where it runs; auto: a GPU where there is one. out: folder to write to; `bias` beside
            the first file of scores if not given.

    Raises:
        ValueError, OSError: whatever cannot be read, matched, embedded or clustered.
    """
    ks = read_range(clusters)
    for key, count in (("num_seeds", num_seeds), ("batch_size", batch_size)):
        if count < 1:
            raise ValueError(f"{key}: expected at least 1, got {count}")
    if seed < 0 or seed + num_seeds > 2**32:
        raise ValueError(f"seed: expected an integer in [0, 2^32 - num_seeds], got {seed}")
    if revision is not None and text_encoder is None:
        raise ValueError(f"revision: expected none without a text_encoder, got {revision}")
    if len(score) not in (1, len(scores)):
        raise ValueError(
            f"score: expected one for all or one for each of {len(scores)} files of scores, got {len(score)}"
        )
    found = name_files(scores, names)
    files = [read_scores(path) for path in scores]
    matched = match_rows(files)
    folder = out or scores[0].parent / "bias"
    which = [score[place % len(score)] for place in range(len(files))]
    values = [
        np.array(pick(file, [rows[place] for rows in matched], which[place]))
        for place, file in enumerate(files)
    ]
    texts = captions_of(matched, files[0], captions)
    vectors = vectors_of(
        matched,
        files[0],
        texts,
        embeddings,
        text_encoder,
        revision,
        folder / EMBEDDINGS,
        batch_size,
        device,
    )
    labels = cluster_all(vectors, ks, range(seed, seed + num_seeds))
    judges = {
        name: judge_bias(*scored, labels, seed)
        for name, scored in zip(found, zip(which, values, strict=True), strict=True)
    }
    shown = [text or rows[0].video or "" for text, rows in zip(texts, matched, strict=True)]
    typicals = {k: [shown[i] for i in typical(vectors, labels[k, seed])] for k in ks}
    notes = [*left_out_lines(found, files, len(matched)), *warnings_about(judges)]
    content = {
        "seed": seed,
        "num_seeds": num_seeds,
        "n_init": N_INIT,
        "notes": notes,
        "judges": bias_json(judges, typicals),
        "videos": [rows[0].video or rows[0].prompt for rows in matched],
        "cluster_of_video": {str(k): labels[k, seed].tolist() for k in ks},
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "bias.json", content)
    for stem, table in zip(("kappa", "clusters"), bias_rows(judges, typicals), strict=True):
        write_csv(folder / f"{stem}.csv", table)
    save_figure(kappa_figure(judges), folder / "kappa")
    save_figure(cluster_figure(judges, labels[ks[-1], seed]), folder / "clusters")
    head = f"{len(matched)} videos, {clusters} clusters, seed {seed}, the best of {N_INIT} starts, range over {num_seeds} seeds"
    tables = [bias_table(judges), "", cluster_table(judges, ks[-1], typicals[ks[-1]])]
    return "\n".join(
        [
            head,
            "",
            *tables,
            "",
            *(f"note: {note}" for note in notes),
            f"tables and figures: {folder}",
        ]
    )


def judge_bias(
    score: str, values: Floats, labels: Mapping[tuple[int, int], Labels], seed: int
) -> JudgeBias:
    """The bias of one judge's scores [n] over all partitions, by k and seed; `seed` is the one that
    is shown.
    """
    found = {key: measure(values, label, seed) for key, label in labels.items()}
    ks, seeds = (list(dict.fromkeys(column)) for column in zip(*labels, strict=True))
    return JudgeBias(
        score,
        values,
        {k: found[k, seed] for k in ks},
        {k: [found[k, s].of_means for s in seeds] for k in ks},
    )


def read_range(text: str) -> list[int]:
    """`10:20` as 10, 11, ..., 20, and `10` as 10 alone. ValueError: anything else."""
    ends = text.split(":")
    if not (
        len(ends) in (1, 2)
        and all(end.isdecimal() for end in ends)
        and 2 <= int(ends[0]) <= int(ends[-1])
    ):
        raise ValueError(f"clusters: expected first:last or one number, at least 2, got {text!r}")
    return list(range(int(ends[0]), int(ends[-1]) + 1))


def captions_of(
    matched: Sequence[Sequence[ScoredRow]], first: ScoreFile, captions: str | None
) -> list[str | None]:
    """The caption of each matched video: of the file, or else the prompt of the first judge that
    has one, or None. ValueError, OSError.
    """
    if captions is None:
        return [next((row.prompt for row in rows if row.prompt), None) for rows in matched]
    try:
        by_name = named_prompts(captions)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"captions: {str(error).removeprefix('prompts: ')}") from error
    rows = [of_judges[0] for of_judges in matched]
    if by_name is None:
        in_order = read_prompts(captions, "captions")
        if len(in_order) != first.num_rows:
            raise ValueError(
                f"captions: expected one for each of {first.num_rows} rows of {first.path}, got {len(in_order)} in {captions}"
            )
        return [in_order[row.place] for row in rows]
    found = [by_name.get(row.video or "", by_name.get(Path(row.video or "").name)) for row in rows]
    missing = [
        row.video or row.prompt for row, caption in zip(rows, found, strict=True) if caption is None
    ]
    if missing:
        raise ValueError(
            f"captions: expected one for each of {len(rows)} videos in {captions}, got none for {len(missing)}: {missing[0]}"
        )
    return list(found)


def vectors_of(
    matched: Sequence[Sequence[ScoredRow]],
    first: ScoreFile,
    captions: Sequence[str | None],
    embeddings: Path | None,
    text_encoder: str | None,
    revision: str | None,
    kept: Path,
    batch_size: int,
    device: str,
) -> Vectors:
    """A direction [D] for each matched video: of given embeddings, or of `kept`, which an encoder
    adds to. ValueError, OSError.
    """
    if embeddings is not None and text_encoder is not None:
        raise ValueError("embeddings: expected those or a text_encoder, got both")
    texts = [caption or "" for caption in captions]
    places = [rows[0].place for rows in matched]
    if embeddings is not None:
        return directions(
            embeddings_in_order(read_embeddings(embeddings), places, texts, first.num_rows)
        )
    if not all(text.strip() for text in texts):
        without = sum(not text.strip() for text in texts)
        raise ValueError(
            f"captions: expected one for each of {len(texts)} videos, got {without} without; name a file of them, or embeddings"
        )
    if text_encoder is None:
        if not kept.is_file():
            raise ValueError(
                f"text_encoder: expected it, or embeddings, as {kept} is not there yet"
            )
        return directions(embeddings_in_order(read_embeddings(kept), places, texts, first.num_rows))
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected cuda to be available, got a torch that sees no GPU")
    where = torch.device(
        "cuda"
        if device == "auto" and torch.cuda.is_available()
        else "cpu"
        if device == "auto"
        else device
    )
    table = embed_captions(texts, kept, text_encoder, revision, where, batch_size)
    return directions(np.stack([table[text] for text in texts]))
