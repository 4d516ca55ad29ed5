"""The page in a real browser: every figure is there, videos play, nothing is asked for, nothing
overflows, everything is legible.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastgrpo.evaluation.report import page as report

PROMPTS = [
    "a red square moving right",
    "a word-that-is-longer-than-any-telephone-is-wide-and-has-no-place-to-break_" * 2,
]
JUDGE = {
    "judge/asked_again": 2,
    "judge/answers": 96,
    "time/backpressure": 0.5,
    "num_invalid_videos": 1,
}
ALL = ["reward", "weights", "hoyer", "ratio_drift", "stability", "time", "memory", "judge"]


@pytest.fixture(scope="module")
def pages(
    tmp_path_factory: pytest.TempPathFactory,
    make_run: Callable[..., Path],
    add_samples: Callable[..., None],
) -> dict[str, Path]:
    """A report of one run, and one of six."""
    folder = tmp_path_factory.mktemp("runs")
    runs = []
    for index in range(6):
        run = make_run(
            folder / f"run_{index}_with_a_long_name",
            gain=0.002 * index,
            metrics=JUDGE | {"memory/peak_gb": 40 + index},
        )
        (run / "config.yaml").write_text((run / "config.yaml").read_text() + f"seed: {index}\n")
        (run / "judge.json").write_text(
            json.dumps({"stages": {"visual_quality": "0123456789abcdef" * 4}, "seed": index})
        )
        add_samples(run, 20, PROMPTS, 100 + 20 * index)
        runs.append(run)
    add_samples(runs[0], 0, PROMPTS, 40)
    return {"one": report.write_report(runs[0]), "six": report.write_report(*runs)}


@pytest.mark.parametrize(("which", "videos"), [("one", 4), ("six", 14)])
def test_all_is_there_and_plays_and_nothing_is_asked_for(
    pages: dict[str, Path], browse: Callable[..., Any], which: str, videos: int
) -> None:
    visit = browse(
        pages[which],
        """
        const videos = [...document.querySelectorAll("video")];
        const button = document.getElementById("play"), words = [button.textContent];
        // A browser starts a muted video by itself only when it comes into view.
        button.click();
        words.push(button.textContent);
        button.click();
        const pause = () => new Promise((done) => setTimeout(done, 20));
        for (let i = 0; i < 500 && !videos.every((v) => v.currentTime > 0.1); i++) await pause();
        const playing = videos.filter((v) => !v.paused && v.currentTime > 0.1).length;
        button.click();
        return {
          figures: [...document.querySelectorAll("#curves figure")]
            .map((f) => [f.id, f.querySelector("img").naturalWidth > 0]),
          images: [...document.images].filter((i) => !i.complete || !i.naturalWidth).length,
          alt: [...document.images].filter((i) => !i.alt).length,
          durations: videos.map((v) => v.duration), sizes: videos.map((v) => v.videoWidth),
          words: words, playing: playing, paused: videos.filter((v) => v.paused).length,
          errors: videos.filter((v) => v.error).length,
          headings: [...document.querySelectorAll("h1, h2, h3")].map((h) => +h.tagName[1]),
        };
        """,
    )
    seen = visit.value
    assert seen["figures"] == [[name, True] for name in ALL]
    assert (seen["images"], seen["alt"], seen["errors"]) == (0, 0, 0)
    assert seen["durations"] == [1.0] * videos  # 8 frames at 8 frames a second
    assert seen["sizes"] == [256] * videos
    assert (seen["playing"], seen["paused"]) == (videos, videos)
    assert seen["words"] == ["Pause all videos", "Play all videos"]
    assert seen["headings"][0] == 1
    assert all(
        later - earlier <= 1
        for earlier, later in zip(seen["headings"], seen["headings"][1:], strict=False)
    )
    assert seen["headings"].count(1) == 1
    assert visit.console == []
    assert visit.requests == [pages[which].as_uri()]


@pytest.mark.parametrize("which", ["one", "six"])
def test_a_phone_shows_it_without_scrolling_sideways(
    pages: dict[str, Path], browse: Callable[..., Any], which: str
) -> None:
    visit = browse(
        pages[which],
        """
        document.querySelectorAll("details").forEach((d) => { d.open = true; });
        const root = document.documentElement;
        return {
          page: [root.scrollWidth, innerWidth],
          wide: [...document.querySelectorAll("picture img")]
            .filter((i) => i.currentSrc !== i.previousElementSibling.srcset).length,
          letters: Math.min(...[...document.querySelectorAll("main *")]
            .filter((e) => e.children.length === 0 && e.textContent.trim())
            .map((e) => parseFloat(getComputedStyle(e).fontSize))),
        };
        """,
        width=390,
    )
    width, room = visit.value["page"]
    assert width <= room == 390
    assert visit.value["wide"] == 0
    assert visit.value["letters"] >= 11


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_legible_and_figures_follow_the_colour_scheme(
    pages: dict[str, Path], browse: Callable[..., Any], scheme: str
) -> None:
    """Contrast of every text with what is behind it is at least 4.5 (WCAG 2.2, AA); a figure's own
    paper is the card's.
    """
    visit = browse(
        pages["six"],
        """
        document.querySelectorAll("details").forEach((d) => { d.open = true; });
        const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
        const paper = (e) => {
          const c = numbers(getComputedStyle(e).backgroundColor);
          return c[3] === 0 ? paper(e.parentElement) : c;
        };
        const light = (c) => c.slice(0, 3).map((v) => v / 255)
          .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
          .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
        const contrast = (a, b) => {
          const [x, y] = [light(a), light(b)].sort((p, q) => p - q);
          return (y + 0.05) / (x + 0.05);
        };
        const shows = (e) => !e.closest("[aria-hidden]") && e.checkVisibility() &&
          [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
        const texts = [...document.querySelectorAll("main *")].filter(shows);
        const colour = (e) => numbers(getComputedStyle(e).color);
        const lowest = Math.min(...texts.map((e) => contrast(colour(e), paper(e))));
        const image = document.querySelector("#reward img");
        const canvas = document.createElement("canvas");
        canvas.width = canvas.height = 4;
        canvas.getContext("2d").drawImage(image, 0, 0);
        const pixel = [...canvas.getContext("2d").getImageData(1, 1, 1, 1).data].slice(0, 3);
        const ink = light(colour(document.body));
        return { texts: texts.length, lowest: lowest, pixel: pixel, card: paper(image), ink: ink };
        """,
        scheme=scheme,
    )
    seen = visit.value
    assert seen["texts"] > 100
    assert seen["lowest"] >= 4.5
    assert seen["pixel"] == seen["card"]
    assert (seen["ink"] > 0.5) == (scheme == "dark")
