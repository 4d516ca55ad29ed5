"""Score existing videos with a judge: raw answers (1 to 10) and rewards (a tenth of them), one row
per video.

python -m fastgrpo score --videos DIR|LIST|FILE --prompts FILE --output scores.jsonl --config RECIPE
[--reward.init_args.KEY VALUE ...]

The judge is the section `reward` of a recipe, of which nothing else is read, or a class by its
dotted path (--reward CLASS). A command that was stopped goes on where it was. Exit code 0: all
videos have scores. 1: some have an error in their row. 2: nothing could start.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import jsonargparse
import yaml

from fastgrpo.errors import fail, require
from fastgrpo.evaluation.options import ScoreOptions
from fastgrpo.files import find_file
from fastgrpo.training.trust import read_mapping


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code as the command's description says."""
    parser = jsonargparse.ArgumentParser(
        prog="python -m fastgrpo score", description=__doc__, exit_on_error=False
    )
    parser.add_argument(
        "--config",
        action="config",
        help="A recipe, for its section `reward`; may be given several times.",
    )
    parser.add_argument(
        "--retry_failed",
        action="store_true",
        help="Score the videos again whose rows have an error.",
    )
    parser.add_class_arguments(ScoreOptions, as_group=False, skip={"retry_failed"})
    try:
        parsed = parser.parse_args(only_reward(sys.argv[1:] if argv is None else argv))
        parser.validate(parsed, skip_unset=False)
        given = parsed.reward.clone().as_dict().get("init_args")
        values = parser.instantiate(parsed).as_dict()
        values.pop("config")
        options = ScoreOptions(**values)
        from fastgrpo.evaluation.score import score

        done, failed = score(options, given)
    except (jsonargparse.ArgumentError, yaml.YAMLError, ValueError, TypeError, OSError) as error:
        fail(error)
    except RuntimeError as error:  # of a judge: lost on the way, or out of memory
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 1
    print(done)
    return 1 if failed else 0


def only_reward(argv: Sequence[str]) -> list[str]:
    """The arguments, with each recipe's file replaced by the text of its section `reward`."""
    words = list(argv)
    for i in range(len(words)):
        flag, equals, path = words[i].partition("=")
        at = i if equals else i + 1
        if flag == "--config" and at < len(words):
            path = path or words[at]
            reward = read_mapping(find_file(path, "config")).get("reward")
            require(reward, "config", "a recipe with the section reward", path)
            words[at] = f"{flag}=" * bool(equals) + yaml.safe_dump({"reward": reward})
    return words
