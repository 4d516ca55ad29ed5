"""What a published model says of itself, read before its weights are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from fastgrpo.errors import UserError, require


def read_config(folder: Path, kinds: tuple[Any, ...], key: str) -> Any:
    """Read the config.json of a folder in transformers' format.

    Args:
        folder: The folder.
        kinds: The configuration classes that are taken.
        key: The configuration key that names the folder.

    Raises:
        FileNotFoundError, ValueError: There is none, it is unreadable, or of another model.
    """
    path, types = folder / "config.json", {kind.model_type: kind for kind in kinds}
    if not path.is_file():
        raise FileNotFoundError(f"{key}: expected a model in transformers' format, found no {path}")
    try:
        content, _ = PreTrainedConfig.get_config_dict(folder, local_files_only=True)
        found = content.get("model_type")
        require(found in types, "model_type", " or ".join(types), found)
        return types[found].from_dict(content)
    except (OSError, ValueError, LookupError, TypeError, StrictDataclassError) as error:
        raise UserError(f"{key}: expected a configuration in {path}, got {error}") from error


def weight_shapes(network: Any, config: Any) -> dict[str, torch.Size]:
    """Shapes of all tensors of a network (a class of transformers), which is not allocated."""
    with torch.device("meta"):
        state = network(config).state_dict()
    return {name: value.shape for name, value in state.items()}


def hub_commit(model: str, folder: Path) -> str | None:
    """The hub's commit of a fetched model; None for a local folder."""
    return None if Path(model).expanduser().is_dir() else folder.name
