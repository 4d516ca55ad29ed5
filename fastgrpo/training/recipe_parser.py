"""Recipes: YAML files and dotted overrides, read into a TrainConfig."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import jsonargparse
import yaml

from fastgrpo.config import TrainConfig
from fastgrpo.errors import fail, one_line, require
from fastgrpo.files import PACKAGED

RENAMED = {
    "fastgrpo.policies.shapes": "fastgrpo.shapes.policy",
    "fastgrpo.rewards.judge": "fastgrpo.rewards.vlm.judge",
    "fastgrpo.rewards.in_process": "fastgrpo.rewards.vlm.qwen",
    "fastgrpo.rewards.served": "fastgrpo.rewards.vlm.served",
    "fastgrpo.rewards.aesthetic": "fastgrpo.rewards.models.aesthetic",
    "fastgrpo.rewards.video_align": "fastgrpo.rewards.models.video_align",
}
"""Modules that a `class_path` of version 0.1 names, and where their classes are now."""
_CLASSES = ("policy", "reward")
"""Keys whose values are classes: to look at one imports it, and with it torch."""
HELDOUT_FILE = "fastgrpo/shapes/heldout.txt"
ACCUMULATION = "update.gradient_accumulation"
"""A key of version 0.1: videos of a process between two optimizer steps."""
OPTIMIZER_STEPS = (
    "update.optimizer_steps, the optimizer steps of an iteration on any number of processes "
    "(videos that a process keeps / gradient_accumulation)"
)
"""What replaces it."""
GONE = ("transport", "guided", "backoff")
"""Arguments of version 0.1's ServerEngine that there is no need for any more."""


def parse_config(
    argv: Sequence[str] | None = None,
    options: type | None = None,
    check: Callable[[Any], None] = lambda values: None,
    **parser_kwargs: Any,
) -> tuple[TrainConfig, str, Any]:
    """Parse `--config RECIPE` (may be repeated, later ones win) and dotted overrides such as
    `--rollout.height 320`.

    Args:
        argv: The arguments; None takes those of the command line.
        options: A dataclass of a command's own options, given as `--options.NAME`.
        check: Called with all values but policy and reward before their classes are imported, and
            with them torch and diffusers; raises for what can be refused at once.
        parser_kwargs: `prog` and `description` of the help.

    Returns:
        The configuration; its YAML text, which `--config` loads again; the instance of `options`,
        or None.

    Raises:
        SystemExit: Code 2 after one line on stderr for a key or value that is not accepted; code 0
            for `--help` and `--print_config`.
    """
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    words = find_recipes(sys.argv[1:] if argv is None else argv)
    try:
        if not any(map(_prints, words)):
            quick = _parser(options, without=_CLASSES)
            check(quick.instantiate(_parse(quick, _without_classes(words))))
        parser = _parser(options, **parser_kwargs)
        namespace = _parse(parser, words)
        values = parser.instantiate(namespace)
        config = TrainConfig(**{f.name: values[f.name] for f in fields(TrainConfig)})
    except (jsonargparse.ArgumentError, ValueError, TypeError, OSError) as error:
        hint = f"; write {OPTIMIZER_STEPS}" * (f"--{ACCUMULATION}" in str(error))
        fail(_name_base_class(one_line(error)) + hint)
    for key in ("config", "options"):
        namespace.pop(key, None)
    namespace["resume"] = "never"  # how this start was asked for is no part of what the run is
    return config, parser.dump(namespace), values.get("options")


def _parser(
    options: type | None, without: Collection[str] = (), **parser_kwargs: Any
) -> jsonargparse.ArgumentParser:
    """A parser of the configuration and a command's `options`, maybe without some keys."""

    def load(text: str) -> Any:
        content = _load_yaml(text)
        if isinstance(content, dict):
            return {key: value for key, value in content.items() if key not in without}
        return content

    mode = f"fastgrpo_yaml_{len(without)}"
    jsonargparse.set_loader(mode, load, (yaml.YAMLError,))
    parser = jsonargparse.ArgumentParser(
        parser_mode=mode,
        exit_on_error=False,
        allow_abbrev=False,  # a key that is cut short is misspelt
        usage="%(prog)s [--config RECIPE ...] [--section.key VALUE ...]",
        **parser_kwargs,
    )
    parser.add_argument("--config", action="config", help="A YAML recipe; may be repeated.")
    parser.add_class_arguments(TrainConfig, as_group=True, skip={*without})
    if options is not None:
        parser.add_class_arguments(options, "options", as_group=True)
    return parser


def _parse(parser: jsonargparse.ArgumentParser, words: Sequence[str]) -> jsonargparse.Namespace:
    """Parse and check what a file may hold: the parser accepts null for any key there, and any
    value for a section.
    """
    namespace = parser.parse_args(words)
    for key, kind in get_type_hints(TrainConfig).items():
        if is_dataclass(kind):
            is_section = isinstance(namespace[key], jsonargparse.Namespace)
            require(is_section, key, "keys and their values", namespace[key])
    parser.validate(namespace, skip_unset=False)
    return namespace


def _prints(word: str) -> bool:
    """Whether an argument asks to print and to end: the help, that of a class
    (`--policy.help CLASS`), or the configuration (`--print_config=skip_default`).
    """
    key = word.partition("=")[0]
    return key in ("-h", "--help", "--print_config") or key.endswith(".help")


def _without_classes(words: Sequence[str]) -> list[str]:
    """The arguments without those of policy and reward, and their values."""
    kept, is_value = [], False
    for word in words:
        if word.startswith("--"):
            key, equals, _ = word.partition("=")
            is_class = key[2:].split(".")[0].rstrip("+") in _CLASSES
            is_value = is_class and not equals
            if is_class:
                continue
        elif is_value:
            is_value = False
            continue
        kept.append(word)
    return kept


def find_recipes(argv: Sequence[str]) -> list[str]:
    """Replace each `--config FILE` that the working directory does not have by the file beside the
    installed package, if it is there.
    """
    words = []
    for before, word in zip(["", *argv], argv, strict=False):
        missing = before == "--config" and not Path(word).exists()
        words.append(str(PACKAGED / word) if missing and (PACKAGED / word).is_file() else word)
    return words


def _name_base_class(message: str) -> str:
    """Say in our words that a class has the wrong base class; the innermost key is the one."""
    found = re.findall(
        r'key "([\w.]+)"|path (\S+) does not correspond to a subclass of (\w+)', message
    )
    wrong = [(given, base) for _, given, base in found if given]
    if not wrong:
        return message
    key = ".".join(key for key, _, _ in found if key)
    given, base = wrong[-1]
    module = "fastgrpo.rewards.vlm.engine" if base == "Engine" else "fastgrpo.interfaces"
    return f"{key}: expected a subclass of {module}.{base}, got {given}"


class _Loader(yaml.SafeLoader):
    """YAML in which a key that is given twice is an error. PyYAML takes the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in keys:
                message = f"the key {key!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, message, key_node.start_mark)
            keys.add(key)
        return super().construct_mapping(node, deep)


def _load_yaml(text: str) -> Any:
    try:
        content = yaml.load(text, _Loader)
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply") from error
    if mends := [*_names_of_version_01(content)]:
        raise yaml.YAMLError(
            f"this was written for an earlier version of fastgrpo: {', '.join(mends)}"
        )
    return content


def _names_of_version_01(content: Any) -> Iterator[str]:
    """What to change in a configuration of version 0.1; nothing for a current one."""
    if not isinstance(content, dict):
        return
    module, _, _ = str(content.get("class_path", "")).rpartition(".")
    if module in RENAMED:
        yield f"replace {module} by {RENAMED[module]}"
    if module == "fastgrpo.rewards.served" and isinstance(content.get("init_args"), dict):
        yield from (f"remove {key}" for key in GONE if key in content["init_args"])
    for key, value in content.items():
        if key == "update" and isinstance(value, dict) and "gradient_accumulation" in value:
            yield f"replace {ACCUMULATION} by {OPTIMIZER_STEPS}"
        if key == "prompts" and isinstance(value, dict) and "heldout" in value:
            yield "replace prompts.heldout by prompts.validation"
        if value == HELDOUT_FILE:
            yield f"replace {HELDOUT_FILE} by fastgrpo/shapes/validation.txt"
        yield from _names_of_version_01(value)
