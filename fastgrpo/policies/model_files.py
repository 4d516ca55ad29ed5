"""A model in diffusers' format, in a folder or on the hub: what its parts are, and how they load.

All that loads is diffusers' and transformers' own. These functions open it, check it, and say in
one line what is wrong.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastgrpo.errors import UserError, require
from fastgrpo.hub import fetch_files, require_weights

CONFIG_FILES = ("model_index.json", "*/config.json", "tokenizer*/*")
"""What sizes and prompts are checked with: some megabytes at most."""
TEXT_FILES = ("model_index.json", "text_encoder*/*", "tokenizer*/*", "scheduler/*")
NETWORK_FILES = ("model_index.json", "transformer/*", "vae/*")


def fetch(model: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """Find the folder of a model.

    Args:
        model: A folder, or a hub id whose files come from the hub or its cache.
        revision: Branch, tag or commit of a hub id.
        patterns: The files that are needed, of a hub id.

    Raises:
        FileNotFoundError: `model` is no folder and nothing that the hub has (and shows).
        UserError: The hub has it and refuses.
    """
    return fetch_files(model, revision, patterns, "policy", "diffusers")


def read_configs(folder: Path, pipeline: type, parts: Mapping[str, type]) -> dict[str, Any]:
    """Read the configuration of each part of a pipeline.

    Args:
        folder: The model.
        pipeline: The class that model_index.json must name.
        parts: By the name in model_index.json, the class that each part must have.

    Returns:
        By name, a dict with the defaults filled in for a class of diffusers, a config object for a
        class of transformers; and model_index.json itself as "index".

    Raises:
        FileNotFoundError: A file is missing.
        UserError: It is another pipeline, or a part has another class.
    """
    key, index = f"policy.model: {folder}", _read_json(folder, "model_index.json")
    got = index.get("_class_name")
    require(got == pipeline.__name__, key, f"a {pipeline.__name__}", got)
    configs: dict[str, Any] = {"index": index}
    for name, kind in parts.items():
        part = index.get(name)
        got = part[1] if isinstance(part, list) and len(part) > 1 else part
        require(got == kind.__name__, key, f"a {kind.__name__} as {name}", got)
        config = _read_json(folder, f"{name}/config.json")
        if hasattr(kind, "config_class"):
            try:
                configs[name] = kind.config_class.from_dict(config)
            except Exception as error:  # transformers' own checks of types raise what they like
                where = f"policy.model: {folder / name / 'config.json'}"
                raise UserError(
                    f"{where}: expected a {kind.config_class.__name__}, got {error}"
                ) from error
        else:
            parameters = inspect.signature(kind).parameters.values()
            defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
            configs[name] = defaults | config
    return configs


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    """Read one JSON object of a model."""
    try:
        content = json.loads((folder / name).read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(
            f"policy.model: expected a model in diffusers' format, found no {name} in {folder}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"policy.model: expected JSON in {folder / name}, got {error}") from error
    kind = type(content).__name__
    require(kind == "dict", f"policy.model: {folder / name}", "a JSON object", kind)
    return dict(content)


def build_part(kind: Any, config: Any) -> Any:
    """Make one part of a model from its configuration (`read_configs`), with random weights, on
    torch's default device.

    Raises:
        UserError: The configuration has a value that cannot be.
    """
    try:
        return kind.from_config(config)
    except Exception as error:  # diffusers checks no types: whatever a wrong value brings about
        raise UserError(
            f"policy.model: expected the values of a {kind.__name__} in its config.json, got "
            f"{type(error).__name__}: {error}"
        ) from error


def load_part(
    kind: Any, folder: Path, name: str, dtype: torch.dtype, may_have_more: bool = False
) -> Any:
    """Load one part of a model on the CPU, in eval mode.

    Args:
        kind: The class, of diffusers or transformers.
        folder: The model.
        name: The part's subfolder.
        dtype: dtype of its weights.
        may_have_more: Whether the file may hold tensors that the class does not have.

    Raises:
        FileNotFoundError: There are no safetensors.
        UserError: They are unreadable, or other tensors than the configuration says.
    """
    require_weights(folder / name, "policy")
    try:
        module, info = kind.from_pretrained(
            folder,
            subfolder=name,
            dtype=dtype,
            output_loading_info=True,
            local_files_only=True,
            use_safetensors=True,  # never a pickle beside them
        )
    except Exception as error:  # also what a wrong value in config.json brings about
        raise UserError(
            f"policy.model: expected a readable {kind.__name__} in {folder / name}, got "
            f"{type(error).__name__}: {error}"
        ) from error
    keys = ("missing_keys", "mismatched_keys", *(() if may_have_more else ("unexpected_keys",)))
    wrong = {key.removesuffix("_keys"): list(info[key])[:3] for key in keys if info[key]}
    key = f"policy.model: {folder / name}"
    require(not wrong, key, "the tensors of its configuration", wrong)
    return module.eval()


def load_text_pipeline(
    pipeline: Any, model: str, revision: str | None, dtype: torch.dtype, device: torch.device
) -> Any:
    """Load a pipeline with only its text encoders (on `device`, in `dtype`) and tokenizers.

    Raises:
        FileNotFoundError, UserError: As `load_part`.
    """
    import transformers

    folder = fetch(model, revision, TEXT_FILES)
    # One by one: the pipeline would fill what the files lack with random numbers.
    parts: dict[str, Any] = {"transformer": None, "vae": None}
    for name, part in _read_json(folder, "model_index.json").items():
        if name.startswith("text_encoder") and part[1]:
            kind = getattr(transformers, part[1])
            parts[name] = load_part(kind, folder, name, dtype, may_have_more=True)
    for file in folder.glob("tokenizer*/tokenizer.json"):
        parts[file.parent.name] = load_tokenizer(file.parent)
    try:
        whole = pipeline.from_pretrained(folder, dtype=dtype, local_files_only=True, **parts)
    except Exception as error:  # as in load_tokenizer
        raise UserError(
            f"policy.model: expected readable tokenizers in {folder}, got "
            f"{type(error).__name__}: {error}"
        ) from error
    return whole.to(device)


def load_tokenizer(folder: Path) -> Any:
    """Load a tokenizer as its tokenizer.json describes it, if it has one.

    transformers 5 builds some classes anew, from only the vocabulary. LlamaTokenizerFast,
    HunyuanVideo's, then takes bytes for SentencePiece's pieces and loses every space
    (https://github.com/huggingface/transformers/issues/45488). T5TokenizerFast, Wan's, loses the
    bytes of characters that the vocabulary lacks.
    """
    import transformers

    is_fast = (folder / "tokenizer.json").is_file()
    kind: Any = transformers.PreTrainedTokenizerFast if is_fast else transformers.AutoTokenizer
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers package raises nothing narrower
        raise UserError(
            f"policy.model: expected a readable tokenizer in {folder}, got {error}"
        ) from error


@contextmanager
def quiet_diffusers() -> Iterator[None]:
    """Silence diffusers' warnings about what is as it should be."""
    from diffusers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
