"""Every policy takes what `fastgrpo.interfaces.Policy` says, by position and by name."""

from __future__ import annotations

import inspect

import pytest

from fastgrpo.interfaces import Policy
from fastgrpo.policies.hunyuan_video import HunyuanVideoPolicy
from fastgrpo.policies.wan import WanPolicy
from fastgrpo.shapes.policy import ShapesPolicy


@pytest.mark.parametrize("policy", [WanPolicy, HunyuanVideoPolicy, ShapesPolicy])
def test_parameter_names_are_those_of_the_base_class(policy: type[Policy]) -> None:
    for name, method in inspect.getmembers(Policy, inspect.isfunction):
        if not name.startswith("_"):
            got = list(inspect.signature(getattr(policy, name)).parameters)
            assert got == list(inspect.signature(method).parameters), name
