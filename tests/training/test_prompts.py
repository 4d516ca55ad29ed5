"""Caption files, and the endless walk over them that a position alone describes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgrpo.training.prompts import checked_text, draw_prompts, read_prompts, unique_keys

CAPTIONS = [f"caption {i}" for i in range(7)]
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "content",
    [
        b"a red square\n\n  \t\na blue cross  \n  caf\xc3\xa9\n\n",
        b"a red square\r\na blue cross\r\n\r\ncaf\xc3\xa9",
        # a byte order mark is no part of a caption
        b"\xef\xbb\xbfa red square\na blue cross\ncaf\xc3\xa9\n",
    ],
    ids=["blank lines", "CRLF, no final newline", "byte order mark"],
)
def test_one_caption_a_line(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "captions.txt"
    file.write_bytes(content)
    assert read_prompts(str(file), "prompts.train") == ["a red square", "a blue cross", "café"]


@pytest.mark.parametrize(
    "unseen", ["\u200b", "\ufeff \u2060", "&nbsp;", "&amp;nbsp; &#8203;", "\x0c\x1f", "\u3000"]
)
def test_a_line_of_which_nothing_is_seen_is_blank(tmp_path: Path, unseen: str) -> None:
    """A pipeline's cleaning would make the empty prompt, the unconditional branch, of it."""
    file = tmp_path / "captions.txt"
    file.write_text(f"one\n{unseen}\ntwo\u200b &nbsp;\n", encoding="utf-8")
    assert read_prompts(str(file), "prompts.train") == ["one", "two\u200b &nbsp;"]
    assert checked_text(unseen, "where") == ""


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"one\ntwo \xed\xa0\x80\n", "a.txt, line 2: expected UTF-8 text, got"),
        ("a.txt", "one\ntwo".encode("utf-16"), "a.txt, line 1: expected UTF-8 text, got"),
        ("a.txt", b"one\nt\0w\0o\0", "a.txt, line 2: expected text without NUL, got"),
        (
            "a.jsonl",
            b'{"prompt": "a"}\n{"prompt": "\\ud83d"}',
            "line 2, column 'prompt': expected v",
        ),
        (
            "a.jsonl",
            b'{"prompt": "a\\u0000"}',
            "line 1, column 'prompt': expected text without NUL",
        ),
        (
            "a.jsonl",
            b'{"prompt": "a", "prompt": "b"}',
            "line 1: expected a JSON object, got the key",
        ),
        ("a.jsonl", b'{"prompt": "a"}\n' + b"[" * 100_000, "line 2: expected a JSON object, got"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": "\xff"}', "a.jsonl, line 2: expected UTF-8"),
    ],
)
def test_what_is_no_text_is_named(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"prompts\.train: ") as caught:
        read_prompts(str(tmp_path / name), "prompts.train")
    assert words in str(caught.value)


def test_only_line_ends_end_a_caption(tmp_path: Path) -> None:
    """str.splitlines would break a caption at a form feed, NEL or a Unicode line separator."""
    captions = ["one\u2028still one", "two\x0cstill two", "three\x85still three"]
    file = tmp_path / "captions.txt"
    file.write_text("\n".join(captions), encoding="utf-8", newline="")
    assert read_prompts(str(file), "prompts.train") == captions


@pytest.mark.parametrize(
    "content",
    [b"\x00\xff\xfe\x80", "naïve".encode("latin-1"), b"", b"\n \n\t\n", b"\xef\xbb\xbf\n"],
)
def test_a_file_without_readable_captions_is_refused_by_key_and_name(
    tmp_path: Path, content: bytes
) -> None:
    file = tmp_path / "captions.txt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"prompts\.validation") as caught:
        read_prompts(str(file), "prompts.validation")
    assert str(file) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"prompts\.train"):
        read_prompts(str(tmp_path / "none.txt"), "prompts.train")
    with pytest.raises(FileNotFoundError, match=r"prompts\.train"):
        read_prompts(str(tmp_path), "prompts.train")


def test_json_lines(tmp_path: Path) -> None:
    """The column `prompt`, or else `caption`; blank lines and blank captions are left out, line
    ends inside a caption are kept.
    """
    file = tmp_path / "captions.JSONL"
    file.write_bytes(
        b'\xef\xbb\xbf{"id": 1, "caption": "not this", "prompt": " a red square "}\r\n\n  \n'
        b'{"prompt": ""}\n'
        b'{"prompt": "caf\\u00e9\\nterrace"}\n{"prompt": "one\xe2\x80\xa8still one"}'
    )
    assert read_prompts(str(file), "prompts.train") == [
        "a red square",
        "café\nterrace",
        "one\u2028still one",
    ]
    file.write_text('{"caption": "a"}\n{"caption": "b", "prompt": "c"}\n')
    assert read_prompts(str(file), "prompts.train") == ["a", "b"]  # the first line decides


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"prompt": "a"}\n\n{"prompt": "b"', ["line 3", "JSON object"]),
        ('{"prompt": "a"}\na plain caption\n', ["line 2", "JSON object"]),
        ('"a"\n', ["line 1", "JSON object"]),
        ('{"text": "a", "id": 3}\n', ["line 1", "'prompt' or 'caption'", "['text', 'id']"]),
        ('{"prompt": "a"}\n{"caption": "b"}\n', ["line 2", "'prompt'", "['caption']"]),
        ('{"prompt": "a"}\n{"prompt": null}\n', ["line 2", "column 'prompt'", "None"]),
        ('{"caption": "a"}\n{"caption": ["b"]}\n', ["line 2", "column 'caption'", "['b']"]),
        ('{"prompt": " "}\n', ["at least one prompt"]),
        ("", ["at least one prompt"]),
    ],
)
def test_a_bad_line_of_json_is_named(tmp_path: Path, content: str, words: list[str]) -> None:
    file = tmp_path / "captions.jsonl"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"prompts\.train: ") as caught:
        read_prompts(str(file), "prompts.train")
    assert all(word in str(caught.value) for word in [str(file), *words]), caught.value


@pytest.mark.parametrize("name", ["captions.json", "captions.csv", "captions.TSV"])
def test_a_table_that_would_pass_for_text_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("prompt\na red square\n")
    with pytest.raises(
        ValueError, match=r"prompts\.train: expected a text file, \.jsonl or \.parquet"
    ) as caught:
        read_prompts(str(tmp_path / name), "prompts.train")
    assert name in str(caught.value)


def write_parquet(file: Path, **columns: list[Any]) -> str:
    pyarrow = pytest.importorskip("pyarrow", reason="parquet is read by pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table(columns), file, row_group_size=2)
    return str(file)


def test_parquet(tmp_path: Path) -> None:
    path = write_parquet(
        tmp_path / "a.parquet",
        id=[1, 2, 3, 4],
        caption=["w", "x", "y", "z"],
        prompt=["a ", "", "b\nc", "é"],
    )
    assert read_prompts(path, "prompts.train") == ["a", "b\nc", "é"]
    assert read_prompts(
        write_parquet(tmp_path / "b.parquet", caption=["x", "y"]), "prompts.train"
    ) == ["x", "y"]


def test_what_is_wrong_with_a_parquet_file_is_named(tmp_path: Path) -> None:
    for path, words in (
        (
            write_parquet(tmp_path / "names.parquet", text=["a"], id=[1]),
            ["'prompt' or 'caption'", "['text', 'id']"],
        ),
        (
            write_parquet(tmp_path / "null.parquet", prompt=["a", "b", None]),
            ["row 3", "column 'prompt'", "None"],
        ),
        (
            write_parquet(tmp_path / "numbers.parquet", caption=[1, 2]),
            ["row 1", "column 'caption'", "got 1"],
        ),
        (write_parquet(tmp_path / "empty.parquet", prompt=["", " "]), ["at least one prompt"]),
    ):
        with pytest.raises(ValueError, match=r"prompts\.validation: ") as caught:
            read_prompts(path, "prompts.validation")
        assert all(word in str(caught.value) for word in [path, *words]), caught.value
    pyarrow = pytest.importorskip("pyarrow")
    invalid = pyarrow.array([b"one", b"two \xed\xa0\x80"]).view(pyarrow.string())
    path = write_parquet(tmp_path / "invalid.parquet", prompt=invalid)
    with pytest.raises(ValueError, match=r"invalid.parquet, row 2, column 'prompt': expected val"):
        read_prompts(path, "prompts.validation")
    damaged = tmp_path / "null.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-9])
    with pytest.raises(
        ValueError, match=r"prompts\.validation: cannot read .*null\.parquet as parquet"
    ):
        read_prompts(str(damaged), "prompts.validation")


@pytest.mark.parametrize(
    ("library", "path"), [("pyarrow", "captions.parquet"), ("datasets", "hub:owner/captions")]
)
def test_a_library_that_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, library, None)
    (tmp_path / "captions.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"prompts\.train: .*needs.* " + library) as caught:
        read_prompts(path, "prompts.train")
    assert "pip install" in str(caught.value)
    assert path in str(caught.value)


class Rows:
    """What `datasets.load_dataset` gives, as far as it is used."""

    def __init__(self, **columns: list[Any]) -> None:
        self.columns = columns
        self.column_names = list(columns)

    def __getitem__(self, name: str) -> list[Any]:
        return self.columns[name]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[Any]]:
    """stand_in(result): put a library in the place of `datasets` whose load_dataset gives, or
    raises, that; its calls.
    """

    def put(result: Any) -> list[Any]:
        calls = []

        def load_dataset(*names: str, split: str) -> Any:
            calls.append((*names, split))
            if isinstance(result, Exception):
                raise result
            return result

        library: Any = ModuleType("datasets")
        library.load_dataset, library.exceptions = (
            load_dataset,
            SimpleNamespace(DatasetsError=KeyError),
        )
        monkeypatch.setitem(sys.modules, "datasets", library)
        return calls

    return put


def test_a_data_set_of_the_hub(stand_in: Callable[[Any], list[Any]]) -> None:
    calls = stand_in(Rows(id=[1, 2, 3], prompt=[" a", "", "b"]))
    assert read_prompts("hub:owner/captions", "prompts.train") == ["a", "b"]
    assert read_prompts("hub:owner/captions:validation[:2]", "prompts.train") == ["a", "b"]
    assert read_prompts("hub:owner/captions/short:test", "prompts.train") == ["a", "b"]
    assert calls == [
        ("owner/captions", "train"),
        ("owner/captions", "validation[:2]"),
        ("owner/captions", "short", "test"),
    ]


@pytest.mark.parametrize(
    ("path", "result", "words"),
    [
        ("hub:captions", Rows(prompt=["a"]), ["OWNER/NAME", "'hub:captions'"]),
        ("hub:owner//x", Rows(prompt=["a"]), ["OWNER/NAME"]),
        ("hub:o/c", ConnectionError("no network"), ["cannot load hub:o/c", "no network"]),
        ("hub:o/c", ValueError("Unknown split"), ["cannot load hub:o/c", "Unknown split"]),
        ("hub:o/c", Rows(text=["a"]), ["hub:o/c", "'prompt' or 'caption'", "['text']"]),
        (
            "hub:o/c:test",
            Rows(prompt=["a", None]),
            ["hub:o/c:test", "row 2", "column 'prompt'", "None"],
        ),
        ("hub:o/c", Rows(prompt=[]), ["hub:o/c", "at least one prompt"]),
    ],
)
def test_what_is_wrong_with_a_data_set_is_named(
    stand_in: Any, path: str, result: Any, words: list[str]
) -> None:
    stand_in(result)
    with pytest.raises(ValueError, match=r"prompts\.train: ") as caught:
        read_prompts(path, "prompts.train")
    assert all(word in str(caught.value) for word in words), caught.value


def test_the_datasets_library_itself(tmp_path: Path) -> None:
    """On a folder that is called like a data set, which it takes for one. In a process of its own:
    it reads its settings on import.
    """
    pytest.importorskip("datasets", reason="hub: is read by the datasets library")
    folder = tmp_path / "owner" / "captions"
    folder.mkdir(parents=True)
    for split, captions in (("train", ["a", "", "b"]), ("test", ["c", None])):
        (folder / f"{split}.jsonl").write_text(
            "".join(json.dumps({"caption": c}) + "\n" for c in captions)
        )
    script = """
import json
from fastgrpo.training.prompts import read_prompts
def ask(path):
    try:
        return read_prompts(path, "prompts.train")
    except ValueError as error:
        return str(error)
names = ("captions", "captions:test", "captions:none", "nowhere")
print(json.dumps([ask("hub:owner/" + name) for name in names]))
"""
    own = {
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    }
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=os.environ | own,
        capture_output=True,
        text=True,
        check=True,
    )
    train, test, no_split, nowhere = json.loads(done.stdout.splitlines()[-1])
    assert train == ["a", "b"]
    assert "hub:owner/captions:test, row 2, column 'caption'" in test
    assert "cannot load hub:owner/captions:none" in no_split
    assert "cannot load hub:owner/nowhere" in nowhere


def test_every_epoch_is_a_permutation_of_its_own() -> None:
    walk = draw_prompts(CAPTIONS, 0, 7 * 40, seed=3)
    epochs = [walk[i : i + 7] for i in range(0, len(walk), 7)]
    assert all(sorted(epoch) == CAPTIONS for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 30  # of 40, out of 5040 orders
    # Each place is taken by each caption now and then: 40 epochs leave one out with probability
    # 0.002.
    assert all(len({epoch[place] for epoch in epochs}) >= 6 for place in range(7))


def test_the_seed_changes_the_order() -> None:
    assert len({tuple(draw_prompts(CAPTIONS, 0, 7, seed)) for seed in range(20)}) > 15


@given(
    position=st.integers(0, 100),
    counts=st.lists(st.integers(0, 30), max_size=5),
    seed=st.integers(0, 2**63 - 1),
    shuffle=st.booleans(),
)
def test_any_split_of_a_range_draws_the_same(
    position: int, counts: list[int], seed: int, shuffle: bool
) -> None:
    whole = draw_prompts(CAPTIONS, position, sum(counts), seed, shuffle)
    parts, at = [], position
    for count in counts:
        parts += draw_prompts(CAPTIONS, at, count, seed, shuffle)
        at += count
    assert parts == whole
    # What was drawn in between, of whatever list, changes nothing.
    draw_prompts(CAPTIONS[:3], 5, 20, seed + 1, shuffle)
    assert draw_prompts(CAPTIONS, position, sum(counts), seed, shuffle) == whole


def test_without_shuffling_the_files_order_repeats() -> None:
    assert draw_prompts(CAPTIONS, 5, 6, seed=1, shuffle=False) == [
        CAPTIONS[i] for i in (5, 6, 0, 1, 2, 3)
    ]


def test_a_json_key_given_twice_with_two_values_is_refused() -> None:
    """`json.loads` by itself takes the last, and the prompt that was meant may be the first."""
    read = partial(json.loads, object_pairs_hook=unique_keys)
    assert read('{"a": 1, "b": {"a": 2}, "a": 1}') == {"a": 1, "b": {"a": 2}}
    with pytest.raises(ValueError, match="the key 'a' is given twice"):
        read('{"b": [{"a": "a cat", "a": "a dog"}]}')
