"""The forward of a whole Wan transformer under `fastgrpo_kernels.patch`: whatever arguments
diffusers' own takes, by name or by position, it takes alike.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from fastgrpo_kernels import patch

from fastgrpo.errors import UserError
from fastgrpo.policies.fused import fuse

TOKENS = 3 * 2 * 3  # of latents [3, 4, 6] in patches of [1, 2, 2]


def new_network(patch_size: tuple[int, int, int]) -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=patch_size,
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    ).eval()


@pytest.fixture(scope="module")
def networks() -> tuple[Any, Any]:
    """A network as diffusers made it, and the same one patched."""
    torch.manual_seed(0)
    plain = new_network((1, 2, 2))
    patched = copy.deepcopy(plain)
    patch(patched)
    return plain, patched


def tensors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents, timesteps and text of two videos."""
    draw = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 3, 4, 6, generator=draw)
    return latents, torch.tensor([900.0, 300.0]), torch.randn(2, 5, 8, generator=draw)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ((), {}),
        ((None,), {}),
        ((None, False), {}),
        ((None, False, None), {}),
        ((), {"return_dict": False, "encoder_hidden_states_image": None}),
        ((None, True, {}), {}),
        ((), {"attention_kwargs": {}}),
    ],
)
def test_it_takes_the_arguments_of_diffusers(
    networks: tuple[Any, Any], more: tuple[Any, ...], named: dict[str, Any]
) -> None:
    with torch.no_grad():
        expected, got = (network(*tensors(), *more, **named) for network in networks)
    assert type(got) is type(expected)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-4, atol=1e-5)


def test_one_timestep_per_token(networks: tuple[Any, Any]) -> None:
    """As Wan 2.2 ti2v gives them; velocity and every gradient."""
    latents, _, text = tensors()
    timesteps = torch.linspace(0.0, 999.0, 2 * TOKENS).reshape(2, TOKENS)
    outputs = [network(latents, timesteps, text, return_dict=False)[0] for network in networks]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
    parameters = [[*network.parameters()] for network in networks]
    expected, got = (
        torch.autograd.grad(out.square().sum(), mine)
        for out, mine in zip(outputs, parameters, strict=True)
    )
    for theirs, ours in zip(expected, got, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


def test_gradient_checkpointing_of_diffusers_runs_each_block_again(
    networks: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    network, calls = copy.deepcopy(networks[1]), []
    gradients = []
    for block in network.blocks:
        forward = block.forward
        monkeypatch.setattr(
            block, "forward", lambda *a, _forward=forward: (calls.append(1), _forward(*a))[1]
        )
    for checkpointing in (False, True):
        network.gradient_checkpointing = False
        if checkpointing:
            network.enable_gradient_checkpointing()
        calls.clear()
        with torch.no_grad():
            network(*tensors())
        assert len(calls) == 2, "without gradients nothing is kept, so nothing is run again"
        out = network(*tensors()).sample
        gradients.append(torch.autograd.grad(out.square().sum(), [*network.parameters()]))
        assert len(calls) == (6 if checkpointing else 4)
    assert all(map(torch.equal, *gradients))


def test_hooks_of_layers_are_called() -> None:
    """Offloading hangs on them. With patches of one pixel the embedding is a linear layer."""
    network = new_network((1, 1, 1))
    patch(network)
    expected, calls = network(*tensors()).sample, []
    layers = network.patch_embedding, network.blocks[0].ffn.net[0].proj
    for layer in layers:
        layer.register_forward_hook(lambda layer, *_: calls.append(layer))
    torch.testing.assert_close(network(*tensors()).sample, expected)
    assert calls == [*layers]


def test_auto_leaves_what_it_does_not_know_as_it_is() -> None:
    network = torch.nn.Linear(2, 2)
    with pytest.warns(UserWarning, match="auto takes diffusers' own operations: .* got Linear"):
        assert not fuse(network, "auto", torch.device("cpu"))
    with pytest.raises(UserError, match="got Linear; set it to false"):
        fuse(network, True, torch.device("cpu"))
