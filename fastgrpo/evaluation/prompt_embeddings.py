"""One vector per prompt: the mean over tokens of a UMT5 encoder's output, kept in a file."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from fastgrpo.errors import UserError, require
from fastgrpo.files import atomic_write, find_file
from fastgrpo.hub import fetch_files

if TYPE_CHECKING:  # embeddings that are given or kept are read without torch
    import torch

MAX_TOKENS = 512
"""Of a prompt; the rest is cut off, with a warning."""
Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class Encoder:
    """A text encoder to load.

    Attributes:
        name: Folder or hub id of a UMT5 model of transformers, or of a diffusers pipeline with one,
            such as Wan's.
        revision: Of the hub id.
        device: Where it runs: in bf16 on a GPU, in fp32 on the CPU.
    """

    name: str
    revision: str | None
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        import torch

        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def folders(self) -> tuple[Path, Path]:
        """Where the encoder and its tokenizer are, fetched if need be.

        Raises:
            FileNotFoundError, ValueError: As `hub.fetch_files`.
        """

        def fetch(*patterns: str) -> Path:
            kind = "transformers' or diffusers"
            return fetch_files(self.name, self.revision, patterns, "text_encoder", kind)

        root = fetch("config.json", "model_index.json")
        if (root / "model_index.json").is_file():
            root = fetch("text_encoder/*", "tokenizer/*")
            return root / "text_encoder", root / "tokenizer"
        root = fetch("*.json", "*.model", "*.safetensors")
        return root, root

    def identity(self) -> dict[str, str]:
        """What decides the embeddings. A hub id counts as it is named, so that embeddings that
        were kept serve without a network; a folder counts by its contents.
        """
        known = {
            "text_encoder": self.name,
            "revision": str(self.revision),
            "dtype": str(self.dtype),
            "max_tokens": str(MAX_TOKENS),
        }
        if Path(self.name).expanduser().is_dir():
            from fastgrpo.policies.text_cache import fingerprint

            model, tokenizer = self.folders()
            known |= {"text_encoder": fingerprint(model), "tokenizer": fingerprint(tokenizer)}
        return known

    def load(self) -> tuple[Any, Any]:
        """The encoder (UMT5EncoderModel) and its tokenizer.

        Raises:
            FileNotFoundError, UserError: There is none, or it is another model.
        """
        from transformers import UMT5EncoderModel

        from fastgrpo.policies.model_files import load_part, load_tokenizer

        folder, words = self.folders()
        try:
            # A decoder's tensors may be beside the encoder's.
            encoder = load_part(UMT5EncoderModel, folder, "", self.dtype, may_have_more=True)
            return encoder.to(self.device), load_tokenizer(words)
        except (OSError, ValueError) as error:
            got = str(error).removeprefix("policy.model: ")
            raise UserError(
                f"text_encoder: expected a UMT5 encoder with its tokenizer, got {got}"
            ) from error


def read_matrix(path: Path) -> Vectors:
    """Read vectors [n, D] from .npy.

    Raises:
        FileNotFoundError, UserError: There is no such file, or its content is something else.
    """
    file = find_file(str(path), "embeddings")
    try:
        vectors = np.load(file, allow_pickle=False)
        ok = isinstance(vectors, np.ndarray) and vectors.ndim == 2 and vectors.dtype.kind in "fiu"
        require(ok, f"{file}", "a matrix of numbers, a row for each prompt", vectors)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"embeddings: cannot read {file} as .npy: {error}") from error
    return vectors.astype(np.float32)


def read_kept(path: Path) -> tuple[dict[str, str], dict[str, Vectors]]:
    """Read a file of `_write_kept`: what made the vectors, and the vector [D] of each prompt.

    Raises:
        UserError: The file is damaged.
    """
    try:
        with safe_open(path, framework="np") as file:
            header = file.metadata()
            prompts, vectors = json.loads(header["captions"]), file.get_tensor("embeddings")
            return json.loads(header["encoder"]), dict(zip(prompts, vectors, strict=True))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"embeddings: cannot read {path}: {error}") from error


def _write_kept(path: Path, identity: dict[str, str], table: dict[str, Vectors]) -> None:
    """Write a .safetensors file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"captions": json.dumps(list(table)), "encoder": json.dumps(identity)}
    with atomic_write(path) as partial:
        save_file({"embeddings": np.stack(list(table.values()))}, partial, header)


def embed_prompts(
    prompts: Sequence[str], path: Path, encoder: Encoder | None, batch_size: int
) -> Vectors:
    """A vector for each prompt: from the file `path` if the same encoder made it, else made now and
    added to the file.

    Args:
        prompts: n prompts, none empty.
        path: The .safetensors file that keeps the embeddings; it may not exist yet.
        encoder: What makes them; None if the file has them all, whichever encoder made them.
        batch_size: Prompts that the encoder gets at a time.

    Returns:
        [n, D].

    Raises:
        UserError, FileNotFoundError: The encoder cannot be had, or the file is damaged.
    """
    made_by, table = read_kept(path) if path.is_file() else ({}, {})
    identity = encoder.identity() if encoder else made_by
    if identity != made_by:
        table = {}
    missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in table]
    if missing:
        if encoder is None:
            raise UserError(
                f"text_encoder: expected it, or embeddings, as {path} has none for "
                f"{len(missing)} of {len(prompts)} prompts: {missing[0][:80]!r}"
            )
        made = mean_embeddings(*encoder.load(), missing, batch_size)
        table |= dict(zip(missing, made, strict=True))
        _write_kept(path, identity, table)
    return np.stack([table[prompt] for prompt in prompts])


def mean_embeddings(
    encoder: Any, tokenizer: Any, prompts: Sequence[str], batch_size: int
) -> Vectors:
    """The mean of the encoder's last hidden state over the tokens that are not padding, the end
    token among them: [n, D] float32. Warns if prompts are cut to MAX_TOKENS.
    """
    import torch

    # Prompts of similar length together, so that little is padding.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    vectors = np.empty((len(prompts), encoder.config.d_model), np.float32)
    at_limit = 0
    for start in tqdm(range(0, len(order), batch_size), desc="embed", unit="batch", disable=None):
        chosen = order[start : start + batch_size]
        batch = tokenizer(
            [prompts[i] for i in chosen],
            padding=True,
            truncation=True,
            max_length=MAX_TOKENS,
            return_tensors="pt",
        ).to(encoder.device)
        with torch.no_grad():
            hidden = encoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        weights = batch.attention_mask.unsqueeze(-1).float()
        mean = (hidden.last_hidden_state.float() * weights).sum(1) / weights.sum(1)
        vectors[chosen] = mean.cpu().numpy()
        at_limit += int((batch.attention_mask.sum(1) >= MAX_TOKENS).sum())
    if at_limit:
        warnings.warn(
            f"{at_limit} of {len(prompts)} prompts have {MAX_TOKENS} tokens or more; the rest of "
            "them is cut off",
            stacklevel=2,
        )
    return vectors
