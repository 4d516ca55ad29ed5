"""Text embeddings made once: from a prompt to the tensors that a text encoder makes of it, on disk.

    <folder>/<hash of the identity>/shard-<hash>.safetensors   "<prompt hash>/<tensor name>"; in the header identity and checksums
                                    index.json                 which prompts are in which shard

Sizes, tensors stored as the encoder gives them, cut to the prompt's own length: UMT5-XXL in bf16
takes 4096 x 2 bytes = 8 KiB a token. So 50,000 prompts of 40 tokens take 16.4 GB in 31 shards
(93 GB if all had 226 tokens, 210 GB at 512). Their index has 3 MB and is read in half a second;
a prompt is read in microseconds where its pages are in memory.

Nothing is ever written in place. A shard comes under a hidden name, is flushed to the disk and
renamed to a name that its content decides; the index only saves reading the shards' headers, and
what it lacks is taken from there. So a kill costs what was not yet in a shard, and two jobs that
fill one folder at a time cannot harm each other: at worst they make a prompt twice.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from fastgrpo.distributed import collectives

COMMAND = "python -m fastgrpo embed --config RECIPE"
"""What makes missing embeddings, as the messages name it."""
SHARD_BYTES = 1 << 29
"""Tensors that a process collects before it writes them: memory stays below twice this."""
SHARD_PROMPTS = 2048
"""Prompts in a shard at most: its header is read as a whole when it is first asked for, in 2 ms at
this size.
"""
_PARTIAL = ".partial-"
_WHOLE_FILE = 1 << 25
_MALFORMED = (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError)


@dataclass(frozen=True)
class _Entry:
    """Where a prompt's tensors are: shard, their names, and the CRC-32 of their names, dtypes,
    shapes and bytes.
    """

    shard: str
    checksum: str
    names: tuple[str, ...]


def _entries(shard: str, prompts: Mapping[str, Sequence[str]]) -> dict[str, _Entry]:
    return {
        key: _Entry(shard, checksum, tuple(names)) for key, (checksum, *names) in prompts.items()
    }


class TextCache:
    """The embeddings of one text encoder.

    Args:
        folder: holds the caches of several encoders, one folder each; on several nodes, of a
            file system that they share. identity: whatever decides what the encoder makes of a
            prompt: `fingerprint` of it and of its tokenizer, the greatest length, the dtype, how
            a prompt is cleaned (diffusers' Wan pipeline calls ftfy where that is installed, and
            only there). Another identity is another folder, so nothing made otherwise is ever
            taken for it.

    Raises:
        ValueError: a shard that is cut short or unreadable, or one made under another identity;
            names the file.
    """

    def __init__(self, folder: Path, identity: Mapping[str, str]) -> None:
        self.identity = dict(identity)
        self.folder = (
            Path(folder)
            / hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:12]
        )
        self._shards: dict[str, int] = {}
        self._entries: dict[str, _Entry] = {}
        self._handles: dict[str, Any] = {}
        self._in_index: set[str] = set()
        self.refresh()

    def __len__(self) -> int:
        """Prompts that have embeddings."""
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Size of all shards on disk."""
        return sum(self._shards.values())

    def missing(self, prompts: Iterable[str]) -> list[str]:
        """Those without embeddings, each once, in the order given."""
        return [p for p in dict.fromkeys(prompts) if prompt_key(p) not in self._entries]

    def get(self, prompt: str) -> dict[str, Tensor]:
        """A prompt's tensors, on the CPU, as the encoder gave them; a copy, which the caller may
        change.

        Read from a memory-mapped shard and checked against their checksum.

        Raises:
            ValueError: the prompt has no embedding (names it, and the command that makes it), or
                its shard is damaged (names the file).
        """
        key = prompt_key(prompt)
        if key not in self._entries:
            self.refresh()  # another process may have made it meanwhile
        entry = self._entries.get(key)
        if entry is None:
            raise ValueError(
                f"{self.folder}: no text embedding of the prompt {_shown(prompt)}; make it with `{COMMAND}`"
            )
        path = self.folder / entry.shard
        try:
            if entry.shard not in self._handles:
                self._handles[entry.shard] = safe_open(path, framework="pt")
            tensors = {
                name: self._handles[entry.shard].get_tensor(f"{key}/{name}").clone()
                for name in entry.names
            }
        except (SafetensorError, OSError) as error:
            raise ValueError(_unreadable(path, error)) from error
        if _checksum(tensors) != entry.checksum:
            raise ValueError(
                _unreadable(
                    path, f"the embedding of {_shown(prompt)} is not the one that was written"
                )
            )
        return tensors

    def write_shard(self, embeddings: Mapping[str, Mapping[str, Tensor]]) -> Path:
        """Put these prompts' tensors (contiguous, on the CPU) into a shard of their own; seen after
        `refresh`. The file it wrote.
        """
        keys = {prompt_key(p): tensors for p, tensors in embeddings.items()}
        prompts = json.dumps({key: [_checksum(tensors), *tensors] for key, tensors in keys.items()})
        # Checksums in the name: where two jobs made the same prompts with other bits, both shards
        # stay whole, and one of them is read.
        path = (
            self.folder / f"shard-{hashlib.sha256(prompts.encode()).hexdigest()[:16]}.safetensors"
        )
        flat = {
            f"{key}/{name}": tensor
            for key, tensors in keys.items()
            for name, tensor in tensors.items()
        }
        with _whole(path) as partial:
            save_file(flat, partial, {"identity": json.dumps(self.identity), "prompts": prompts})
        return path

    def refresh(self) -> None:
        """Read the index and the headers of the shards that it lacks: all that was written up to
        now, by whatever process.
        """
        index = self._read_index()
        found = {
            path.name: path.stat().st_size
            for path in sorted(self.folder.glob("shard-*.safetensors"))
        }
        self._in_index = set(index)
        if gone := sorted(index.keys() - found.keys()):
            _say(
                f"note: {self.folder} lacks {', '.join(gone)}; what was in there counts as missing"
            )
        self._shards, self._entries, self._handles = {}, {}, {}
        # Those of the index first, in its order: which of two embeddings of a prompt is taken must
        # not change with a new shard.
        for name in [*(n for n in index if n in found), *(n for n in found if n not in index)]:
            size, entries = index.get(name) or (found[name], self._read_header(self.folder / name))
            if found[name] != size:
                raise ValueError(
                    _unreadable(self.folder / name, f"expected {size} bytes, found {found[name]}")
                )
            self._shards[name] = size
            for key, entry in entries.items():
                self._entries.setdefault(key, entry)

    def write_index(self) -> None:
        """Save what `refresh` found, if it is more, or less, than the index has."""
        if self._in_index == set(self._shards) and (self.folder / "index.json").exists():
            return
        shards: dict[str, dict[str, Any]] = {
            name: {"bytes": size, "prompts": {}} for name, size in self._shards.items()
        }
        for key, entry in self._entries.items():
            shards[entry.shard]["prompts"][key] = [entry.checksum, *entry.names]
        with _whole(self.folder / "index.json") as partial:
            partial.write_text(
                json.dumps({"identity": self.identity, "prompt_count": len(self), "shards": shards})
            )
        self._in_index = set(self._shards)

    def _read_index(self) -> dict[str, tuple[int, dict[str, _Entry]]]:
        """Size and entries of each shard that the index has; nothing where there is no readable
        one.
        """
        path = self.folder / "index.json"
        try:
            index = json.loads(path.read_text())
            identity, shards = (
                index["identity"],
                {
                    n: (int(s["bytes"]), _entries(n, s["prompts"]))
                    for n, s in index["shards"].items()
                },
            )
        except FileNotFoundError:
            return {}
        except _MALFORMED as error:
            _say(
                f"note: {path} is unreadable ({error!r}); the shards' own headers are read instead"
            )
            return {}
        self._require_own(identity, path)
        return shards

    def _read_header(self, path: Path) -> dict[str, _Entry]:
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata()
            identity, entries = (
                json.loads(header["identity"]),
                _entries(path.name, json.loads(header["prompts"])),
            )
        except _MALFORMED as error:
            raise ValueError(_unreadable(path, error)) from error
        self._require_own(identity, path)
        return entries

    def _require_own(self, identity: Mapping[str, str], path: Path) -> None:
        if identity != self.identity:
            different = "; ".join(_differences(identity, self.identity))
            raise ValueError(
                f"{path}: expected embeddings of this text encoder, found those of another: {different}. Move it away"
            )


def embed_missing(
    cache: TextCache,
    prompts: Sequence[str],
    encode_one: Callable[[str], Mapping[str, Tensor]],
    shard_bytes: int = SHARD_BYTES,
    shard_prompts: int = SHARD_PROMPTS,
    least_seconds: float = 60.0,
) -> int:
    """Make the embeddings that `cache` lacks: all ranks together, each those prompts whose hash
    falls to it. Rank 0 says what is done.

    Without `collectives.start` each process does its share and does not wait for the others;
    `TextCache.refresh` shows theirs.

    Args:
        cache: the same on every rank. prompts: the same on every rank. Embeddings of prompts
            that are not among them stay. encode_one: tensors of one prompt, on any device;
            called for this rank's missing prompts only, so it may load the encoder when it is
            first called. shard_bytes: a shard is written when it holds this much, shard_prompts:
            or so many prompts, least_seconds: or so much time was spent on it and at least a
            twentieth of all: what a kill may cost.

    Returns:
        How many this rank made.

    Raises:
        ValueError: `encode_one` gave nothing, or numbers that are not finite, for a prompt; or
            ranks do not see each other's files.
    """
    world, rank = collectives.world_size(), collectives.rank()
    cache.refresh()
    missing = cache.missing(prompts)
    if missing:
        _announce(cache, prompts, missing)
    if collectives.started():
        collectives.gather(
            None
        )  # no one writes before all have looked, or their counts would differ
    # By hash, not by place in the list: whatever a rank sees of the others' work, no prompt is left
    # out.
    mine = [p for p in missing if int(prompt_key(p), 16) % world == rank]
    _clear_leftovers(cache.folder)
    with tqdm(
        total=len(mine), unit="prompt", desc="embed", disable=None if rank == 0 else True
    ) as progress:
        shard: dict[str, dict[str, Tensor]] = {}
        size, begun, written = 0, time.monotonic(), time.monotonic()
        try:
            for prompt in mine:
                shard[prompt] = _checked(prompt, encode_one(prompt))
                size += sum(t.nbytes for t in shard[prompt].values())
                progress.update()
                now = time.monotonic()
                due = now - written > max(least_seconds, (now - begun) / 20)
                if size >= shard_bytes or len(shard) >= shard_prompts or due:
                    cache.write_shard(shard)
                    shard, size, written = {}, 0, time.monotonic()
        finally:
            if shard:
                cache.write_shard(shard)
    _merge(cache, prompts, wait=collectives.started())
    ready = len(dict.fromkeys(prompts)) - len(cache.missing(prompts))
    _say(
        f"text embeddings: {ready} prompts ready in {cache.folder}, {len(missing)} of them new, {_size(cache.nbytes)} in all"
    )
    return len(mine)


def fingerprint(folder: Path) -> str:
    """SHA-256 over a model's folder, in 16 hex digits, for an identity.

    Each file counts with name, size and bytes, one above 32 MiB with its first and last MiB
    only: 11 GB of weights cost milliseconds. FileNotFoundError without such a folder, or a file
    in it.
    """
    files = sorted(p for p in Path(folder).rglob("*") if p.is_file() and not p.name.startswith("."))
    if not files:
        raise FileNotFoundError(f"expected a folder with a model's files, found none at {folder}")
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder).as_posix()} {size}\n".encode())
        with open(file, "rb") as stream:
            if size <= _WHOLE_FILE:
                digest.update(stream.read())
            else:
                digest.update(stream.read(1 << 20))
                stream.seek(-(1 << 20), os.SEEK_END)
                digest.update(stream.read())
    return digest.hexdigest()[:16]


def prompt_key(prompt: str) -> str:
    """What a prompt is called on disk: 128 bits of its SHA-256, as 32 hex digits."""
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _announce(cache: TextCache, prompts: Sequence[str], missing: Sequence[str]) -> None:
    total = len(dict.fromkeys(prompts))
    others = len(cache) - (total - len(missing))
    kept = f"; {others} of prompts that are not in this list stay" if others else ""
    _say(
        f"text embeddings: {total - len(missing)} of {total} prompts are in {cache.folder}, {len(missing)} to make{kept}"
    )
    if len(cache) == 0:
        _announce_other_caches(cache)


def _announce_other_caches(cache: TextCache) -> None:
    """Where embeddings are made anew beside others, say what makes the difference to the most
    similar of those.
    """
    near: tuple[list[str], Path] | None = None
    for index in sorted(cache.folder.parent.glob("*/index.json")):
        try:
            lines = _differences(json.loads(index.read_text())["identity"], cache.identity)
        except _MALFORMED:
            continue
        if near is None or len(lines) < len(near[0]):
            near = lines, index.parent
    if near is not None and near[0]:
        _say(f"note: the embeddings in {near[1]} do not serve: {'; '.join(near[0])}")


def _differences(there: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    keys = [k for k in dict.fromkeys([*wanted, *there]) if there.get(k) != wanted.get(k)]
    return [f"{k}: expected {wanted.get(k)!r}, found {there.get(k)!r}" for k in keys]


def _checked(prompt: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, contiguous and in memory of their own: a cut view would keep the
    padded whole alive.
    """
    if not tensors:
        raise ValueError(f"the text encoder gave no tensor for the prompt {_shown(prompt)}")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(
                f"the text encoder gave numbers that are not finite in {name!r} for the prompt {_shown(prompt)}"
            )
    return {
        name: torch.empty(t.shape, dtype=t.dtype, device="cpu").copy_(t.detach())
        for name, t in tensors.items()
    }


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    value = 0
    for name, tensor in tensors.items():
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode(), value)
        value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, value)
    return f"{value:08x}"


def _merge(cache: TextCache, prompts: Sequence[str], wait: bool) -> None:
    """Rank 0 writes the index of all ranks' shards, then all read it; alone, each process does
    both.
    """
    if wait:
        collectives.gather(None)
    if not wait or collectives.rank() == 0:
        cache.refresh()
        if len(cache):
            cache.write_index()
    if not wait:
        return
    collectives.gather(None)
    cache.refresh()
    unseen = collectives.gather(len(cache.missing(prompts)))
    if any(unseen):
        raise ValueError(
            f"{cache.folder}: {max(unseen)} prompts are still without embeddings on rank {unseen.index(max(unseen))}; "
            "expected a folder on a file system that all nodes share"
        )


def _clear_leftovers(folder: Path) -> None:
    """Remove what killed processes left. One that writes right now began less than an hour ago."""
    for path in folder.glob(f"{_PARTIAL}*"):
        with suppress(FileNotFoundError):  # another rank was first, or the writer was done
            if time.time() - path.stat().st_mtime > 3600:
                shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A file to write in a hidden folder of its own; it moves to `path` when its bytes are on the
    disk, no name points to half of one.
    """
    folder = (
        path.parent / f"{_PARTIAL}{os.urandom(8).hex()}"
    )  # a folder: safetensors has a temporary file beside the one it writes
    partial = folder / path.name
    try:
        folder.mkdir(parents=True)
        partial.touch()
        mode = partial.stat().st_mode
        yield partial
        os.chmod(partial, mode)  # safetensors lets no one else read it
        _sync(partial)
        os.replace(partial, path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.3g} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.3g} MB"


def _unreadable(path: Path, error: object) -> str:
    return f"{path}: cannot be read ({error}). If it is damaged, delete it; `{COMMAND}` then makes its prompts again"


def _shown(prompt: str) -> str:
    return repr(prompt) if len(prompt) <= 200 else f"{prompt[:200]!r}..."


def _say(text: str) -> None:
    if collectives.rank() == 0:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
