"""The prompts of video files: by their names, or in order where there is but one order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastgrpo.evaluation.video_prompts import list_videos, match_prompts


def test_captions_by_name(tmp_path: Path) -> None:
    names = ["videos/b.mp4", "videos/a.mp4"]
    a, b = (
        {"video": "a.mp4", "prompt": " caption a "},
        {"video": "videos/b.mp4", "prompt": "caption b"},
    )
    contents = {
        "1.json": json.dumps([a, b]),
        "2.json": json.dumps(
            {"a.mp4": "caption a", "b.mp4": "caption b", "other.mp4": "not there"}
        ),
        "samples.json": json.dumps(
            {"fps": 8, "stages": None, "samples": [{**a, "still": "a.png"}, b]}
        ),
        "3.jsonl": f"{json.dumps(a)}\n\n{json.dumps(b)}\n",
        "4.jsonl": json.dumps({"prompt": "caption b"}) + "\n" + json.dumps({"prompt": "caption a"}),
        "5.txt": "caption b\ncaption a\n",
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
        assert match_prompts(names, str(tmp_path / name)) == ["caption b", "caption a"], name


def test_lines_after_the_last_caption_are_none(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n\r\n \r\n")
    assert match_prompts(["a.mp4", "b.mp4"], str(tmp_path / "p.txt")) == ["one", "two"]


def test_the_videos_of_a_folder_and_of_a_list(tmp_path: Path) -> None:
    """A link to nothing is a video that is missing, not none; a folder is no video."""
    (tmp_path / "b.MP4").touch()
    (tmp_path / "a.mp4").symlink_to("nowhere")
    (tmp_path / "c.mp4").mkdir()
    names = [str(tmp_path / name) for name in ("a.mp4", "b.MP4")]
    assert list_videos(str(tmp_path)) == names
    (tmp_path / "list.txt").write_bytes("\r\n\r\n".join(names).encode("utf-8-sig"))
    assert list_videos(str(tmp_path / "list.txt")) == names
    (tmp_path / "list.txt").write_bytes(b"caf\xe9.mp4\n")
    with pytest.raises(ValueError, match=r"videos: .*list.txt: expected paths in UTF-8"):
        list_videos(str(tmp_path / "list.txt"))


@pytest.mark.parametrize(
    ("names", "has_one_order"),
    [
        ("1 2 3", True),
        ("01 02 10", True),
        ("1 10 2", False),
        ("clip-2 clip", False),
        ("Ape Cat bee", False),
        ("a_10 a_9", False),
    ],
)
def test_captions_in_order_of_names(tmp_path: Path, names: str, has_one_order: bool) -> None:
    videos = [f"{name}.mp4" for name in names.split()]
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"caption {i}\n" for i in range(len(videos))))
    captions = [f"caption {i}" for i in range(len(videos))]
    assert match_prompts(videos, str(path)) == captions  # of a list that somebody wrote
    if has_one_order:
        assert match_prompts(videos, str(path), sorted_by_name=True) == captions
        return
    with pytest.raises(ValueError, match=r"the videos have two orders, in which .* in \.jsonl, or"):
        match_prompts(videos, str(path), sorted_by_name=True)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "one\ntwo\nthree\n", "for each of 4 videos in .*, got 3"),
        ("p.txt", "one\n\ntwo\nthree\nfour\n", "as their order counts, got 'none in number 2'"),
        (
            "p.jsonl",
            '{"prompt": "1"}\n{"prompt": " "}\n' * 2,
            "order counts, got 'none in number 2",
        ),
        ("p.json", '{"a.mp4": "one", "a.mp4": "two"}', "p.json as JSON .*'a.mp4' is given twice"),
        ("p.jsonl", '{"prompt": "one"}\n', "for each of 4 videos in .*, got 1"),
        (
            "p.json",
            '{"a.mp4": "one", "c.mp4": "two", "d.mp4": "three"}',
            "for each of 4 videos in .*none for 1: .*b.mp4",
        ),
        ("p.json", '[{"video": "a.mp4"}]', "entry 1: expected the texts video and prompt"),
        (
            "p.json",
            '[{"video": "a.mp4", "prompt": "x"}, {"video": "a.mp4", "prompt": "y"}]',
            "expected one prompt for a.mp4",
        ),
        ("p.json", '{"a.mp4": "\\ud800"}', "p.json, entry 1: expected valid text"),
        ("p.jsonl", '{"video": "a.mp4", "prompt": "\\udfff"}', "p.jsonl, entry 1: expected valid"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": "\\udfff"}', "p.jsonl, line 2, column 'prompt'"),
        ("p.json", "[" * 99_999, "cannot read .* as JSON"),
        ("p.json", "3", "entry 1: expected the texts"),
        ("p.json", "{", "cannot read .* as JSON"),
        ("p.jsonl", '{"video": "a.mp4", "prompt": "x"}\nhello\n', "cannot read .* as JSON"),
    ],
)
def test_captions_that_do_not_fit(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        match_prompts([f"videos/{letter}.mp4" for letter in "abcd"], str(tmp_path / name))
