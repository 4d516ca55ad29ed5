"""Pictures and videos of a page: what stands beside what, and that the bytes are those of the
files.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path

import pytest

from fastgrpo.evaluation.report import report_media
from fastgrpo.evaluation.report.report_media import (
    attachments,
    data_url,
    sample_columns,
    videos_section,
)
from fastgrpo.evaluation.report.run_record import RunRecord


def record(folder: Path, label: str) -> RunRecord:
    return RunRecord(folder, label, [], {})


def decoded(url: str) -> bytes:
    return base64.b64decode(url.partition(",")[2], validate=True)


@pytest.mark.parametrize(
    ("name", "kind"), [("a.png", "image/png"), ("a.svg", "image/svg+xml"), ("a.mp4", "video/mp4")]
)
def test_a_url_is_the_file(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / name).write_bytes(bytes(range(256)))
    url = data_url(tmp_path / name)
    assert url.startswith(f"data:{kind};base64,")
    assert decoded(url) == bytes(range(256))


def test_what_stands_side_by_side(tmp_path: Path, add_samples: Callable[..., None]) -> None:
    one, two, none = (tmp_path / name for name in ("one", "two", "none"))
    for run, iterations in ((one, (0, 10, 20)), (two, (5, 30)), (none, ())):
        for iteration in iterations:
            add_samples(run, iteration, ["a"], 100)
    first, second, third = record(one, "one"), record(two, "two"), record(none, "none")

    def names(*runs: RunRecord) -> dict[str, str]:
        return {
            label: f"{folder.parent.parent.name}/{folder.name}"
            for label, folder in sample_columns(runs).items()
        }

    assert names(first) == {
        "untrained": "one/iteration_000000",
        "iteration 20": "one/iteration_000020",
    }
    assert names(third) == {}
    assert names(third, first, second) == {
        "one · untrained": "one/iteration_000000",
        "one · iteration 20": "one/iteration_000020",
        "two · iteration 30": "two/iteration_000030",
    }


def test_clips_and_their_sheet(tmp_path: Path, add_samples: Callable[..., None]) -> None:
    run = record(tmp_path / "run", "run")
    assert videos_section([run], tmp_path)["videos_note"].startswith("No sample videos yet")
    add_samples(run.folder, 0, ["a", "b"], 51)
    add_samples(run.folder, 20, ["b"], 204)
    section = videos_section([run], tmp_path)
    (pair,) = section["pairs"]
    assert (pair["prompt"], [clip["label"] for clip in pair["clips"]]) == (
        "b",
        ["untrained", "iteration 20"],
    )
    assert [clip["scores"] for clip in pair["clips"]] == ["0.20  0.50  –", "0.80  0.50  –"]
    assert (
        decoded(pair["clips"][0]["video"])
        == (run.folder / "samples" / "iteration_000000" / "01_b.mp4").read_bytes()
    )
    assert decoded(section["sheet"]).startswith(b"\xff\xd8")  # a JPEG
    assert (tmp_path / "contact_sheet.png").exists()
    (run.folder / "samples" / "iteration_000020" / "samples.json").write_text("{")
    with pytest.raises(ValueError, match=r"iteration_000020/samples\.json"):
        videos_section([run], tmp_path)


def test_the_first_prompts_of_many(
    tmp_path: Path, add_samples: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = record(tmp_path / "run", "run")
    for iteration in (0, 1):
        add_samples(run.folder, iteration, ["a", "b", "c"], 9)
    assert "first" not in videos_section([run], tmp_path)["videos_note"]
    monkeypatch.setattr(report_media, "MAX_PROMPTS", 2)
    section = videos_section([run], tmp_path)
    assert [pair["prompt"] for pair in section["pairs"]] == ["a", "b"]
    assert "The first 2 of 3 prompts." in section["videos_note"]


def test_what_is_attached(tmp_path: Path) -> None:
    (tmp_path / "curves.svg").write_bytes(b"<svg></svg>")
    (tmp_path / "curves.png").write_bytes(b"the same as pixels")
    (tmp_path / "photo.png").write_bytes(b"pixels")
    (tmp_path / "table.csv").write_text('mode,score\n"a, b",0.5\n\n')
    (tmp_path / "notes.md").write_text("x" * 20_005)
    (tmp_path / "weights.bin").write_bytes(b"nothing to look at")
    (folder,) = attachments([tmp_path])
    assert folder["name"] == tmp_path.name
    assert [(image["name"], decoded(image["image"])) for image in folder["images"]] == [
        ("curves.svg", b"<svg></svg>"),
        ("photo.png", b"pixels"),
    ]
    assert folder["texts"] == [
        {"name": "notes.md", "text": "x" * 20_000 + "\n… and 5 characters more in the file"},
        {"name": "table.csv", "text": 'mode,score\n"a, b",0.5\n\n'},
    ]
    assert attachments([]) == []
