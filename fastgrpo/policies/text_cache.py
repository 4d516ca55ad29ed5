"""Text embeddings made once: from a prompt to the tensors that a text encoder makes of it, on disk.

    <folder>/<hash of the identity>/<number>-<random>.safetensors

A shard holds the tensors of many prompts, each under "<prompt hash>/<tensor name>". Its header
holds the identity of the encoder and a checksum per prompt. There is no other index: opening a
cache reads the headers.

A shard is written under a hidden name and renamed when its bytes are on the disk, and no file is
ever changed. A kill therefore costs only what was not yet in a shard. Two jobs that fill one folder
at the same time at worst make a prompt twice; the shard with the lower number is then read.

Sizes: tensors are stored as the encoder gives them, cut to the prompt's own length. UMT5-XXL in
bf16 takes 4096 x 2 bytes = 8 KiB per token, so 50,000 prompts of 40 tokens take 16 GB in 31 shards.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from fastgrpo.distributed import collectives
from fastgrpo.errors import UserError, require
from fastgrpo.files import atomic_write

logger = logging.getLogger("fastgrpo")

COMMAND = "python -m fastgrpo embed --config RECIPE"
"""What makes missing embeddings, as the messages name it."""
SHARD_BYTES = 1 << 29
"""Bytes of tensors in a shard, about; a process holds twice this while it writes one."""
SHARD_PROMPTS = 2048
"""Prompts in a shard at most; its header is read as a whole, in 2 ms at this size."""
SHARD_SECONDS = 60.0
"""A shard is also written after this time or a twentieth of all time spent, whichever is longer:
what a kill may cost.
"""
_FORMAT = 2  # part of the folder's name, so that shards of the earlier format are not read
_WHOLE_FILE = 1 << 25  # bytes up to which `fingerprint` reads all of a file
_STRIDE, _SAMPLE = (
    1 << 22,
    1 << 16,
)  # bytes: of a larger file it reads the second in each of the first


class _Entry(NamedTuple):
    """Where a prompt's tensors are: the shard, their checksum and their names."""

    shard: Path
    checksum: str
    names: list[str]


class TextCache:
    """The embeddings of one text encoder.

    Args:
        folder: Holds the caches of several encoders, one folder each. On several nodes it lies on
            a file system that they share.
        identity: All that decides what the encoder makes of a prompt: `fingerprint` of it and of
            its tokenizer, the greatest length, the dtype, how a prompt is cleaned. Another identity
            is another folder, so an embedding made otherwise is never read.

    Raises:
        UserError: A shard is damaged, or was made under another identity; names the file.
    """

    def __init__(self, folder: Path, identity: Mapping[str, str]) -> None:
        self.identity = dict(identity)
        digest = hashlib.sha256(json.dumps([_FORMAT, self.identity], sort_keys=True).encode())
        self.folder = Path(folder) / digest.hexdigest()[:12]
        self.refresh()

    def __len__(self) -> int:
        """Number of prompts that have embeddings."""
        return len(self._entries)

    def missing(self, prompts: Iterable[str]) -> list[str]:
        """The prompts without embeddings, each once, in the order given."""
        return [p for p in dict.fromkeys(prompts) if prompt_key(p) not in self._entries]

    def get(self, prompt: str) -> dict[str, Tensor]:
        """Read a prompt's tensors.

        Returns:
            Copies on the CPU, shaped and typed as the encoder gave them.

        Raises:
            UserError: The prompt has no embedding, or its shard is damaged.
        """
        key = prompt_key(prompt)
        if key not in self._entries:
            self.refresh()  # another process may have made it meanwhile
        entry, shown = self._entries.get(key), prompt[:200]
        if entry is None:
            raise UserError(
                f"{self.folder}: no text embedding of the prompt {shown!r}; "
                f"make it with `{COMMAND}`"
            )
        try:
            if entry.shard not in self._handles:
                self._handles[entry.shard] = safe_open(entry.shard, framework="pt")
            file = self._handles[entry.shard]
            tensors = {name: file.get_tensor(f"{key}/{name}").clone() for name in entry.names}
        except (SafetensorError, OSError) as error:
            raise _damaged(entry.shard, error) from error
        if _checksum(tensors) != entry.checksum:
            raise _damaged(entry.shard, f"the embedding of {shown!r} is not what was written")
        return tensors

    def write(self, embeddings: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Write the tensors (contiguous, on the CPU) of these prompts as one shard."""
        keyed = {prompt_key(prompt): tensors for prompt, tensors in embeddings.items()}
        prompts = {key: [_checksum(tensors), *tensors] for key, tensors in keyed.items()}
        header = {"identity": json.dumps(self.identity), "prompts": json.dumps(prompts)}
        flat = {f"{key}/{name}": t for key, tensors in keyed.items() for name, t in tensors.items()}
        # The number keeps the order of writing; the random part tells two writers apart.
        path = self.folder / f"{self._num_shards:06d}-{secrets.token_hex(4)}.safetensors"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as partial:
                save_file(flat, partial, header)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be written: {error}") from error
        self._num_shards += 1

    def refresh(self) -> None:
        """Read the headers of all shards that any process has written up to now."""
        self._entries: dict[str, _Entry] = {}
        self._handles: dict[Path, Any] = {}
        shards = sorted(self.folder.glob("[0-9]*.safetensors"))
        self._num_shards = len(shards)
        for path in shards:
            for key, (checksum, *names) in self._read_header(path).items():
                self._entries.setdefault(key, _Entry(path, checksum, names))

    def _read_header(self, path: Path) -> dict[str, list[str]]:
        try:
            with safe_open(path, framework="pt") as file:  # fails if the file is cut short
                header = file.metadata()
            identity, prompts = (json.loads(header[key]) for key in ("identity", "prompts"))
            entries = {key: [str(checksum), *names] for key, (checksum, *names) in prompts.items()}
        except Exception as error:  # whatever a damaged header brings about
            raise _damaged(path, error) from error
        require(identity == self.identity, str(path), f"embeddings of {self.identity}", identity)
        return entries


def embed_missing(
    cache: TextCache, prompts: Sequence[str], encode_one: Callable[[str], Mapping[str, Tensor]]
) -> int:
    """Make the embeddings that `cache` lacks, all ranks together. A prompt's hash decides its rank.

    Before `collectives.start`, each process makes its share and does not wait for the others;
    `TextCache.refresh` finds theirs.

    Args:
        cache: The same folder on every rank.
        prompts: The same on every rank.
        encode_one: Gives the tensors of one prompt, on any device. It is only called for this
            rank's missing prompts, so it may load the encoder at its first call.

    Returns:
        How many prompts this rank made.

    Raises:
        UserError: `encode_one` gave no tensors or non-finite numbers, or the ranks do not see each
            other's files.
    """
    prompts = list(dict.fromkeys(prompts))
    cache.refresh()
    missing = cache.missing(prompts)
    if missing:
        ready = len(prompts) - len(missing)
        logger.info(
            f"text embeddings: {ready} of {len(prompts)} prompts are in {cache.folder}, "
            f"{len(missing)} to make"
        )
    if collectives.started():
        collectives.gather(None)  # nobody writes before all have counted
    world, rank = collectives.world_size(), collectives.rank()
    mine = [p for p in missing if int(prompt_key(p), 16) % world == rank]
    shard: dict[str, dict[str, Tensor]] = {}
    size, start = 0, time.monotonic()
    written = start
    joined = collectives.failing_together if collectives.started() else nullcontext
    with joined("text embeddings"):
        if rank == 0:
            _remove_old_partial_files(cache.folder)
        try:
            for prompt in tqdm(mine, "embed", unit="prompt", disable=None if rank == 0 else True):
                shard[prompt] = _checked(prompt, encode_one(prompt))
                size += sum(tensor.nbytes for tensor in shard[prompt].values())
                now = time.monotonic()
                is_late = now - written > max(SHARD_SECONDS, (now - start) / 20)
                if size >= SHARD_BYTES or len(shard) >= SHARD_PROMPTS or is_late:
                    cache.write(shard)
                    shard, size, written = {}, 0, now
        finally:
            if shard:
                cache.write(shard)
    cache.refresh()  # all have written
    if collectives.started():
        unseen = collectives.gather(len(cache.missing(prompts)))
        require(
            not any(unseen),
            str(cache.folder),
            "a folder on a file system that all nodes share",
            f"{max(unseen)} prompts without embeddings on rank {unseen.index(max(unseen))}",
        )
    ready = len(prompts) - len(cache.missing(prompts))
    logger.info(
        f"text embeddings: {ready} prompts ready in {cache.folder}, {len(missing)} of them new"
    )
    return len(mine)


def fingerprint(folder: Path, whole: bool = False) -> str:
    """SHA-256, in 16 hex digits, over the names, sizes and bytes of a model's files.

    Args:
        folder: The model.
        whole: Read every byte, some seconds for 10 GB. Otherwise a file above 32 MiB counts with
            64 KiB in every 4 MiB and its end, which notice a tensor that has changed throughout.

    Raises:
        FileNotFoundError: There is no such folder, or no file in it.
    """
    files = sorted(p for p in Path(folder).rglob("*") if p.is_file() and not p.name.startswith("."))
    if not files:
        raise FileNotFoundError(f"expected a folder with a model's files, found none at {folder}")

    def digest_of(file: Path) -> bytes:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            if whole or size <= _WHOLE_FILE:
                return hashlib.file_digest(stream, "sha256").digest()
            digest = hashlib.sha256()
            for start in (*range(0, size, _STRIDE), size - _SAMPLE):
                stream.seek(start)
                digest.update(stream.read(_SAMPLE))
        return digest.digest()

    digest = hashlib.sha256()
    with ThreadPoolExecutor() as pool:  # hashing lets other threads run
        for file, content in zip(files, pool.map(digest_of, files), strict=True):
            name = f"{file.relative_to(folder).as_posix()} {file.stat().st_size}\n"
            digest.update(name.encode(errors="surrogateescape") + content)
    return digest.hexdigest()[:16]


def prompt_key(prompt: str) -> str:
    """The name of a prompt on disk: 128 bits of its SHA-256, as 32 hex digits."""
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _checked(prompt: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy an encoder's tensors to the CPU. A view would keep the padded whole alive."""
    wrong = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    key = f"the text encoder's output for the prompt {prompt[:200]!r}"
    require(bool(tensors) and not wrong, key, "tensors of finite numbers", wrong or "no tensor")
    return {
        name: torch.empty(t.shape, dtype=t.dtype).copy_(t.detach()) for name, t in tensors.items()
    }


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """CRC-32 over names, dtypes, shapes and bytes."""
    value = 0
    for name, tensor in tensors.items():
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode(), value)
        value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, value)
    return f"{value:08x}"


def _remove_old_partial_files(folder: Path) -> None:
    """Remove what killed processes left half written. A file touched in the last hour may still
    have a writer.
    """
    for path in folder.glob(".partial-*"):
        with suppress(OSError):  # its writer is done, or the cache is only to be read
            if time.time() - path.stat().st_mtime > 3600:
                path.unlink()


def _damaged(path: Path, error: object) -> UserError:
    return UserError(
        f"{path}: cannot be read ({error}). Delete it if it is damaged; "
        f"`{COMMAND}` then makes its prompts again"
    )
