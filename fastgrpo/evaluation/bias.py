"""Measure how much judges' scores depend on what videos show: match the files of scores, embed and
cluster the prompts, write tables and figures (Eq. 3; the mathematics is in kappa.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastgrpo.errors import require
from fastgrpo.evaluation.bias_tables import (
    bias_rows,
    bias_table,
    cluster_figure,
    cluster_table,
    kappa_figure,
    warnings_about,
)
from fastgrpo.evaluation.figures import save_figure
from fastgrpo.evaluation.kappa import N_INIT, cluster_all, directions, measure_all, typical
from fastgrpo.evaluation.options import BiasOptions
from fastgrpo.evaluation.prompt_embeddings import Encoder, Vectors, embed_prompts, read_matrix
from fastgrpo.evaluation.score_rows import (
    ScoredRow,
    left_out_lines,
    match_rows,
    name_files,
    pick,
    read_scores,
)
from fastgrpo.evaluation.tables import write_csv, write_json
from fastgrpo.training.trust import check_links


def measure_bias(options: BiasOptions) -> str:
    """The bias of each judge, as text; the same as JSON, CSV and figures in a folder.

    Writes OUTPUT/bias.json, kappa.csv, clusters.csv, kappa.png and .svg (κ over k), clusters.png
    and .svg (scores by cluster, greatest k), and embeddings.safetensors, from which a second call
    takes the embeddings without an encoder.

    Raises:
        UserError, OSError: Something cannot be read, matched, embedded or clustered.
    """
    ks, seed, folder = _read_range(options.clusters), options.seed, options.folder
    if options.output is None:
        check_links(folder.parent, folder.name)
    names = name_files(options.scores, options.names)
    files = [read_scores(path) for path in options.scores]
    matched = match_rows(files)
    which = list(options.score) * (len(files) // len(options.score))
    values = [
        np.array(pick(file, rows, score), dtype=np.float64)
        for file, rows, score in zip(files, zip(*matched, strict=True), which, strict=True)
    ]
    first = [rows[0] for rows in matched]
    prompts = [next((row.prompt for row in rows if row.prompt), "") for rows in matched]
    vectors = _vectors_of(first, files[0].num_rows, prompts, options)
    labels = cluster_all(vectors, ks, range(seed, seed + options.num_seeds))
    judges = {
        name: measure_all(score, scores, labels, seed)
        for name, score, scores in zip(names, which, values, strict=True)
    }
    shown = [text or row.video or "" for text, row in zip(prompts, first, strict=True)]
    typicals = {k: [shown[i] for i in typical(vectors, labels[k, seed])] for k in ks}
    notes = [*left_out_lines(names, files, len(matched)), *warnings_about(judges)]
    tables = bias_rows(judges, typicals)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(
        folder / "bias.json",
        {
            "seed": seed,
            "num_seeds": options.num_seeds,
            "n_init": N_INIT,
            "notes": notes,
            **tables,
            "videos": [row.video or row.prompt for row in first],
            "cluster_of_video": {str(k): labels[k, seed].tolist() for k in ks},
        },
    )
    for stem, rows in tables.items():
        write_csv(folder / f"{stem}.csv", rows)
    save_figure(kappa_figure(judges), folder / "kappa")
    save_figure(cluster_figure(judges, labels[ks[-1], seed]), folder / "clusters")
    lines = [
        f"{len(matched)} videos, {options.clusters} clusters, seed {seed}, the best of {N_INIT} "
        f"starts, range over {options.num_seeds} seeds",
        "",
        bias_table(judges),
        "",
        cluster_table(judges, ks[-1], typicals[ks[-1]]),
        "",
        *(f"note: {note}" for note in notes),
        f"tables and figures: {folder}",
    ]
    return "\n".join(lines)


def _read_range(text: str) -> list[int]:
    """`10:20` as 10, 11, ..., 20; `10` as only 10."""
    ends = text.split(":")
    ok = len(ends) in (1, 2) and all(end.isdecimal() for end in ends)
    ok = ok and 2 <= int(ends[0]) <= int(ends[-1])
    require(ok, "clusters", "first:last or one number, at least 2", text)
    return list(range(int(ends[0]), int(ends[-1]) + 1))


def _vectors_of(
    first: Sequence[ScoredRow], num_rows: int, prompts: Sequence[str], options: BiasOptions
) -> Vectors:
    """A direction [D] for each matched video: of the given embeddings, or of those that OUTPUT
    keeps, to which an encoder adds.

    Args:
        first: The first judge's rows of the matched videos.
        num_rows: Of the first file, and of the given embeddings.
        prompts: Of the matched videos, for an encoder.
        options: Which embeddings.
    """
    if options.embeddings is not None:
        given = read_matrix(options.embeddings)
        expected = f"a row for each of the {num_rows} rows of {options.scores[0]}"
        require(len(given) == num_rows, "embeddings", expected, len(given))
        return directions(given[[row.row_index for row in first]])
    without = sum(not prompt.strip() for prompt in prompts)
    expected = f"one in a file's row for each of {len(prompts)} videos, or embeddings"
    require(not without, "prompts", expected, f"{without} videos without")
    encoder = None
    if options.text_encoder is not None:
        # torch and transformers are loaded only for an encoder.
        from fastgrpo.evaluation.score import select_device

        device = select_device(options.device)
        encoder = Encoder(options.text_encoder, options.revision, device)
    kept = options.folder / "embeddings.safetensors"
    return directions(embed_prompts(prompts, kept, encoder, options.batch_size))
