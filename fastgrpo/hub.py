"""Where a model's files are: a local folder, or the hub through its cache, with one clear line when
they cannot be had.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import errors, snapshot_download


def fetch_files(
    model: str, revision: str | None, patterns: Sequence[str], key: str, library: str
) -> Path:
    """The folder of a model: `model` itself, or a hub id's files that match `patterns`, from the
    hub or its cache.

    key: of the recipe, under which `model` and `revision` stand. library: whose format the
    folder has.

    Raises:
        FileNotFoundError: neither a folder nor something that the hub has (and shows).
            ValueError: the hub has it and refuses.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ValueError(
                f"{key}.revision: expected none beside a local folder, got {revision!r} with {folder}"
            )
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model) or model.startswith("."):
        raise FileNotFoundError(
            f"{key}.model: expected a folder in {library}' format or a hub id OWNER/NAME, found no folder at {folder.absolute()}"
        )
    at = model if revision is None else f"{model} at revision {revision!r}"
    login = "log in with `hf auth login` or set HF_TOKEN"
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(patterns)))
    except errors.GatedRepoError as error:
        raise ValueError(
            f"{key}.model: {at} is gated: accept its terms at https://huggingface.co/{model} with your account, then {login}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{key}.model: found no folder at {folder.absolute()} and no model {model} on the hub. If it is private, {login}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"{key}.revision: the hub has {model}, but no revision {revision!r} of it"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{key}.model: found no folder at {folder.absolute()}, and {at} is not in the hub's local cache, nor can the hub be reached. "
            f"Download it with `hf download {model}` where there is a network, or give a folder"
        ) from error
    except (errors.HfHubHTTPError, OSError) as error:
        raise ValueError(f"{key}.model: cannot fetch {at} from the hub: {error}") from error


def require_weights(folder: Path, key: str) -> None:
    """FileNotFoundError: the folder has no safetensors, or not all that its index names."""
    files = {path.name for path in folder.glob("*.safetensors")}
    for index in folder.glob("*.safetensors.index.json"):
        missing = sorted(
            set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()) - files
        )
        if missing:
            raise FileNotFoundError(
                f"{key}.model: expected the files that {index} names, found no {missing[0]} ({len(missing)} missing)"
            )
    if not files:
        raise FileNotFoundError(f"{key}.model: expected safetensors in {folder}, found none")
