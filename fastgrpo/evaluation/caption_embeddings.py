"""One vector a caption: the mean over tokens of what a UMT5 encoder makes of it, kept in a file."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from fastgrpo.files import find_file
from fastgrpo.hub import fetch_files, require_weights
from fastgrpo.policies.text_cache import fingerprint

MAX_TOKENS = 512
"""Of a caption; the rest is cut off, with a warning."""
Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class Embeddings:
    """Vectors [n, D] and, where the file tells, their captions and what made them."""

    vectors: Vectors
    captions: list[str] | None = None
    encoder: dict[str, str] = field(default_factory=dict)

    def by_caption(self) -> dict[str, Vectors]:
        """The vector of each caption; empty where the file does not tell captions."""
        return dict(zip(self.captions or [], self.vectors, strict=False))


def read_embeddings(path: Path) -> Embeddings:
    """A matrix [n, D] of .npy, or of .safetensors with one tensor. FileNotFoundError, ValueError:
    no such file, or another content.
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
            raise ValueError(
                f"expected a matrix of numbers, a row for each caption, got {vectors.dtype} {list(vectors.shape)}"
            )
        captions = json.loads(header["captions"]) if "captions" in header else None
        return Embeddings(
            vectors.astype(np.float32), captions, json.loads(header.get("encoder", "{}"))
        )
    except (OSError, ValueError, EOFError, SafetensorError) as error:
        raise ValueError(f"embeddings: cannot read {file}: {error}") from error


def write_embeddings(path: Path, embeddings: Embeddings) -> None:
    """A .safetensors file, at once or not at all, that `read_embeddings` reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    header = {
        "captions": json.dumps(embeddings.captions),
        "encoder": json.dumps(embeddings.encoder),
    }
    save_file({"embeddings": np.ascontiguousarray(embeddings.vectors)}, temporary, header)
    os.replace(temporary, path)


def embed_captions(
    captions: Sequence[str],
    path: Path,
    text_encoder: str,
    revision: str | None,
    device: torch.device,
    batch_size: int,
) -> dict[str, Vectors]:
    """A vector [D] for each caption: those in the file `path` if the same encoder made them, the
    others made now and added to it.

    Args:
        text_encoder: a folder or hub id: a UMT5 model of transformers, or a pipeline of
            diffusers with one, such as Wan's. revision: of the hub id. device: where the encoder
            runs, in bf16 on a GPU and in fp32 on the CPU.

    Raises:
        ValueError, FileNotFoundError: an encoder that cannot be had, an empty caption, or a
            damaged file.
    """
    if not all(caption.strip() for caption in captions):
        raise ValueError("captions: expected words in each, got an empty one")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    identity = {
        "text_encoder": text_encoder,
        "revision": str(revision),
        "dtype": str(dtype),
        "max_tokens": str(MAX_TOKENS),
    }
    if (
        Path(text_encoder).expanduser().is_dir()
    ):  # of a hub id the revision has to do: the file serves where there is no network
        model, tokenizer = encoder_folders(text_encoder, revision)
        identity |= {"text_encoder": fingerprint(model), "tokenizer": fingerprint(tokenizer)}
    known = read_embeddings(path) if path.is_file() else Embeddings(np.empty((0, 0), np.float32))
    table = known.by_caption() if known.encoder == identity else {}
    missing = [caption for caption in dict.fromkeys(captions) if caption not in table]
    if missing:
        encoder, tokenizer_of_it = load_encoder(text_encoder, revision, device, dtype)
        table |= dict(
            zip(
                missing, mean_embeddings(encoder, tokenizer_of_it, missing, batch_size), strict=True
            )
        )
        write_embeddings(path, Embeddings(np.stack(list(table.values())), list(table), identity))
    return table


def encoder_folders(text_encoder: str, revision: str | None) -> tuple[Path, Path]:
    """Where the encoder and its tokenizer are, fetched if need be. FileNotFoundError, ValueError:
    as `hub.fetch_files`.
    """

    def fetch(*patterns: str) -> Path:
        return fetch_files(
            text_encoder, revision, patterns, "text_encoder", "transformers' or diffusers"
        )

    root = fetch("config.json", "model_index.json")
    if (root / "model_index.json").is_file():
        root = fetch("text_encoder/*", "tokenizer/*")
        return root / "text_encoder", root / "tokenizer"
    root = fetch("*.json", "*.model", "*.safetensors")
    return root, root


def load_encoder(
    text_encoder: str, revision: str | None, device: torch.device, dtype: torch.dtype
) -> tuple[Any, Any]:
    """The encoder (UMT5EncoderModel) on `device` and its tokenizer. FileNotFoundError, ValueError:
    none there, or another model.
    """
    from transformers import UMT5EncoderModel

    from fastgrpo.policies.pretrained import load_tokenizer

    folder, words = encoder_folders(text_encoder, revision)
    require_weights(folder, "text_encoder")
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
        if kind != "umt5":
            raise ValueError(f"model_type {kind}")
        # Only tensors of a decoder may be beside those of the encoder.
        encoder, info = UMT5EncoderModel.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, local_files_only=True
        )
        if info["missing_keys"] or info["mismatched_keys"]:
            raise ValueError(
                f"one without {list(info['missing_keys'])[:3]}, of other sizes {list(info['mismatched_keys'])[:3]}"
            )
        return encoder.eval().to(device), load_tokenizer(words)
    except (OSError, RuntimeError, ValueError, AttributeError, SafetensorError) as error:
        raise ValueError(
            f"text_encoder: expected a readable UMT5 encoder with its tokenizer in {folder}, got {error}"
        ) from error


@torch.no_grad()
def mean_embeddings(
    encoder: Any, tokenizer: Any, captions: Sequence[str], batch_size: int
) -> Vectors:
    """[n, D] float32: the mean of the encoder's last hidden state over the tokens that are not
    padding, the end token among them.

    Warns where captions are cut to MAX_TOKENS.
    """
    order = sorted(
        range(len(captions)), key=lambda i: len(captions[i])
    )  # alike in length, so that little is padding
    vectors = np.empty((len(captions), encoder.config.d_model), np.float32)
    at_limit = 0
    for start in tqdm(range(0, len(order), batch_size), desc="embed", unit="batch", disable=None):
        chosen = order[start : start + batch_size]
        batch = tokenizer(
            [captions[i] for i in chosen],
            padding=True,
            truncation=True,
            max_length=MAX_TOKENS,
            return_tensors="pt",
        )
        mask = batch.attention_mask.to(encoder.device)
        hidden = encoder(
            input_ids=batch.input_ids.to(encoder.device), attention_mask=mask
        ).last_hidden_state.float()
        weights = mask.unsqueeze(-1).float()
        vectors[chosen] = ((hidden * weights).sum(1) / weights.sum(1)).cpu().numpy()
        at_limit += int((mask.sum(1) >= MAX_TOKENS).sum())
    if at_limit:
        warnings.warn(
            f"{at_limit} of {len(captions)} captions have {MAX_TOKENS} tokens or more; the rest of them is cut off",
            stacklevel=2,
        )
    return vectors


def embeddings_in_order(
    embeddings: Embeddings, places: Sequence[int], captions: Sequence[str], num_rows: int
) -> Vectors:
    """The vectors of captions: by their texts where the file tells captions, else by `places` in a
    file of `num_rows` rows.

    ValueError: a caption, or a row, that is not there.
    """
    table: Mapping[str, Vectors] = embeddings.by_caption()
    if embeddings.captions is None:
        if len(embeddings.vectors) != num_rows:
            raise ValueError(
                f"embeddings: expected a row for each of the {num_rows} rows of the first file of scores, got {len(embeddings.vectors)}"
            )
        return embeddings.vectors[list(places)]
    missing = [caption for caption in captions if caption not in table]
    if missing:
        raise ValueError(
            f"embeddings: expected one for each of {len(captions)} captions, got none for {len(missing)}: {missing[0][:80]!r}"
        )
    return np.stack([table[caption] for caption in captions])
