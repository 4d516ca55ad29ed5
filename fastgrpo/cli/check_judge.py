"""Ask a running endpoint what it really does with videos, and print what holds."""

from __future__ import annotations

import jsonargparse

from fastgrpo.errors import fail


def check(
    endpoint: str,
    model: str = "",
    api_key_env: str = "FASTGRPO_JUDGE_TOKEN",
    patience: float = 30.0,
) -> int:
    """Print a table of the checks of an OpenAI-compatible endpoint of any make.

    "cannot tell" stands where an endpoint gives no evidence.

    Args:
        endpoint: Base URL, such as http://host:8000/v1.
        model: The model's name there; by default the only one.
        api_key_env: Environment variable that holds the key.
        patience: Seconds for which a request is tried again.

    Returns:
        1 if a check fails, else 0.
    """
    import torch

    from fastgrpo.rewards.vlm.endpoint_check import CHECKS
    from fastgrpo.rewards.vlm.served import ServerEngine

    engine = ServerEngine(
        (endpoint,), model, api_key_env, patience=patience, set_aside=patience / 10
    )
    try:
        engine.load(torch.device("cpu"))
        (findings,) = engine.check(CHECKS).values()
    finally:
        engine.close()
    for finding in findings:
        print(f"{finding.check:<15}{finding.verdict:<12} {finding.evidence}")
    return int(any(finding.holds is False for finding in findings))


def main(argv: list[str] | None = None) -> int:
    """Exit code 0: no check fails; 1: one does; 2: the endpoint cannot be asked."""
    try:
        return int(jsonargparse.auto_cli(check, args=argv, as_positional=False))
    except ValueError as error:
        fail(error)
