"""Where a model's files are: a local folder, or the Hugging Face hub through its cache."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import errors, snapshot_download

from fastgrpo.errors import UserError, require


def fetch_files(
    model: str, revision: str | None, patterns: Sequence[str], key: str, library: str
) -> Path:
    """Find a model's folder, or download it.

    Args:
        model: A folder, or a hub id OWNER/NAME.
        revision: Of the hub's model.
        patterns: Which of the hub's files are needed.
        key: Of the recipe, under which `model` and `revision` stand.
        library: Whose format the folder has, for the message.

    Returns:
        The folder with the files.

    Raises:
        FileNotFoundError: It is neither a folder nor a model that the hub has and shows.
        ValueError: The hub has it and refuses.
    """
    folder = Path(os.path.expanduser(model))
    if folder.is_dir():
        require(revision is None, f"{key}.revision", f"none beside the folder {folder}", revision)
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model) or model.startswith("."):
        raise FileNotFoundError(
            f"{key}.model: expected a folder in {library}' format or a hub id OWNER/NAME, "
            f"found no folder at {folder.absolute()}"
        )
    at = model if revision is None else f"{model} at revision {revision!r}"
    login = "log in with `hf auth login` or set HF_TOKEN"
    nowhere = f"{key}.model: found no folder at {folder.absolute()}"
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(patterns)))
    except errors.GatedRepoError as error:
        raise ValueError(
            f"{key}.model: {at} is gated: accept its terms at https://huggingface.co/{model} "
            f"with your account, then {login}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{nowhere} and no model {model} on the hub. If it is private, {login}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"{key}.revision: the hub has {model}, but no revision {revision!r} of it"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{nowhere}, and {at} is not in the hub's local cache, nor can the hub be reached. "
            f"Download it with `hf download {model}` where there is a network, or give a folder"
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        raise ValueError(f"{key}.model: cannot fetch {at} from the hub: {error}") from error


def require_weights(folder: Path, key: str) -> None:
    """Check that a folder has safetensors, and all that its index names.

    Raises:
        FileNotFoundError: It has not.
        UserError: The index is damaged.
    """
    files = {path.name for path in folder.glob("*.safetensors")}
    for index in folder.glob("*.safetensors.index.json"):
        try:
            content = json.loads(index.read_text(encoding="utf-8"))
            named = set(map(str, content["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            got = f"{type(error).__name__}: {error}"
            raise UserError(
                f"{key}.model: expected JSON with a weight_map of names in {index}, got {got}"
            ) from error
        if missing := sorted(named - files):
            raise FileNotFoundError(
                f"{key}.model: expected the files that {index} names, found no {missing[0]} "
                f"({len(missing)} missing)"
            )
    if not files:
        raise FileNotFoundError(f"{key}.model: expected safetensors in {folder}, found none")
