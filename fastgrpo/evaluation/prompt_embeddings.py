"""One vector per prompt: the mean over tokens of a UMT5 encoder's output, kept in a file."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from fastgrpo.errors import UserError, require
from fastgrpo.files import atomic_write, find_file
from fastgrpo.hub import fetch_files, require_weights
from fastgrpo.policies.text_cache import fingerprint

MAX_TOKENS = 512
"""Of a prompt; the rest is cut off, with a warning."""
Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class Embeddings:
    """Vectors [n, D] and, if the file has them, their prompts and what made them."""

    vectors: Vectors
    prompts: list[str] | None = None
    encoder: dict[str, str] = field(default_factory=dict)

    def by_prompt(self) -> dict[str, Vectors]:
        """The vector [D] of each prompt; empty if the file has no prompts."""
        return dict(zip(self.prompts or [], self.vectors, strict=False))


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
            model, tokenizer = self.folders()
            known |= {"text_encoder": fingerprint(model), "tokenizer": fingerprint(tokenizer)}
        return known

    def load(self) -> tuple[Any, Any]:
        """The encoder (UMT5EncoderModel) and its tokenizer.

        Raises:
            FileNotFoundError, UserError: There is none, or it is another model.
        """
        from transformers import UMT5EncoderModel

        from fastgrpo.policies.model_files import load_tokenizer

        folder, words = self.folders()
        require_weights(folder, "text_encoder")
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            if config.get("model_type") != "umt5":
                raise ValueError(f"model_type {config.get('model_type')}")
            # Tensors of a decoder may be beside those of the encoder; no others.
            encoder, info = UMT5EncoderModel.from_pretrained(
                folder, dtype=self.dtype, output_loading_info=True, local_files_only=True
            )
            missing, mismatched = list(info["missing_keys"]), list(info["mismatched_keys"])
            if missing or mismatched:
                raise ValueError(f"one without {missing[:3]}, of other sizes {mismatched[:3]}")
            return encoder.eval().to(self.device), load_tokenizer(words)
        except (OSError, RuntimeError, ValueError, AttributeError, SafetensorError) as error:
            raise UserError(
                "text_encoder: expected a readable UMT5 encoder with its tokenizer in "
                f"{folder}, got {error}"
            ) from error


def read_embeddings(path: Path) -> Embeddings:
    """Read a matrix [n, D] from .npy, or from .safetensors with one tensor.

    Raises:
        FileNotFoundError, UserError: There is no such file, or its content is something else.
    """
    file = find_file(str(path), "embeddings")
    header: dict[str, str] = {}
    try:
        if file.suffix == ".npy":
            vectors = np.load(file, allow_pickle=False)
        elif file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as tensors:  # numpy has no bf16
                names, header = list(tensors.keys()), tensors.metadata() or {}
                if len(names) != 1:
                    raise ValueError(f"expected one tensor, got {len(names)}")
                vectors = tensors.get_tensor(names[0]).float().numpy()
        else:
            raise ValueError("expected .npy or .safetensors")
        if vectors.ndim != 2 or vectors.dtype.kind not in "fiu":
            got = f"{vectors.dtype} {list(vectors.shape)}"
            raise ValueError(f"expected a matrix of numbers, a row for each prompt, got {got}")
        prompts = json.loads(header.get("captions", "null"))
        return Embeddings(
            vectors.astype(np.float32), prompts, json.loads(header.get("encoder", "{}"))
        )
    except (OSError, ValueError, EOFError, SafetensorError) as error:
        raise UserError(f"embeddings: cannot read {file}: {error}") from error


def write_embeddings(path: Path, embeddings: Embeddings) -> None:
    """Write a .safetensors file, whole or not at all, that `read_embeddings` reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"captions": json.dumps(embeddings.prompts), "encoder": json.dumps(embeddings.encoder)}
    with atomic_write(path) as partial:
        save_file({"embeddings": np.ascontiguousarray(embeddings.vectors)}, partial, header)


def embed_prompts(prompts: Sequence[str], path: Path, encoder: Encoder, batch_size: int) -> Vectors:
    """A vector for each prompt: from the file `path` if the same encoder made it, else made now and
    added to the file.

    Args:
        prompts: n prompts, none empty.
        path: The .safetensors file that keeps the embeddings; it may not exist yet.
        encoder: What makes them.
        batch_size: Prompts that the encoder gets at a time.

    Returns:
        [n, D].

    Raises:
        UserError, FileNotFoundError: The encoder cannot be had, or the file is damaged.
    """
    identity = encoder.identity()
    known = read_embeddings(path) if path.is_file() else Embeddings(np.empty((0, 0), np.float32))
    table = known.by_prompt() if known.encoder == identity else {}
    missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in table]
    if missing:
        made = mean_embeddings(*encoder.load(), missing, batch_size)
        table |= dict(zip(missing, made, strict=True))
        write_embeddings(path, Embeddings(np.stack(list(table.values())), list(table), identity))
    return np.stack([table[prompt] for prompt in prompts])


@torch.no_grad()
def mean_embeddings(
    encoder: Any, tokenizer: Any, prompts: Sequence[str], batch_size: int
) -> Vectors:
    """The mean of the encoder's last hidden state over the tokens that are not padding, the end
    token among them: [n, D] float32. Warns if prompts are cut to MAX_TOKENS.
    """
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


def embeddings_in_order(
    embeddings: Embeddings, row_indices: Sequence[int], prompts: Sequence[str], num_rows: int
) -> Vectors:
    """The vectors of n prompts: by their texts if the file has prompts, else by row.

    Args:
        embeddings: The file.
        row_indices: n row numbers, for a file without prompts.
        prompts: n prompts, for a file with prompts.
        num_rows: The rows that a file without prompts must have.
    """
    if embeddings.prompts is None:
        expected = f"a row for each of the {num_rows} rows of the first file of scores"
        got = len(embeddings.vectors)
        require(got == num_rows, "embeddings", expected, got)
        return embeddings.vectors[list(row_indices)]
    table = embeddings.by_prompt()
    missing = [prompt for prompt in prompts if prompt not in table]
    if missing:
        raise UserError(
            f"embeddings: expected one for each of {len(prompts)} prompts, got none for "
            f"{len(missing)}: {missing[0][:80]!r}"
        )
    return np.stack([table[prompt] for prompt in prompts])
