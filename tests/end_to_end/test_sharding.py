"""Sharding, activation policies and checkpoints across world sizes, on a tiny Wan transformer of
diffusers: the same training, up to rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_wan import CPU, TinyWan, digest, make_trainer, state_of, without_times
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from fastgrpo.distributed.sharding import attention_operators, gathered
from fastgrpo.training import checkpoint
from fastgrpo.training.step import RolloutInterrupted
from fastgrpo.training.weights import copy_weights, using_weights

MODULES = Path(__file__).resolve().parent / "modules"
INPUTS = torch.ones(1, 4, 2, 4, 4), torch.tensor([937.0]), torch.ones(1, 3, 8)
EXTRAS = {"kl_coef": 0.1, "ema_decay": 0.5}
SCRIPT = """
import json, pathlib, sys, torch
sys.path.insert(0, {modules!r})
from conftest import TinyJudge
from tiny_wan import *
from fastgrpo.distributed import collectives
from fastgrpo.training import checkpoint
from fastgrpo.config import RuntimeConfig
from fastgrpo.training.weights import using_weights
collectives.start(RuntimeConfig(device="cpu", timeout_minutes=1))
folder, answer = pathlib.Path({folder!r}), {{}}
{body}
print(json.dumps(answer))
collectives.stop()
"""


@pytest.fixture
def trainer(one_rank: Any, tiny_judge: Any) -> Any:
    """trainer(...): tiny_wan.make_trainer in this process alone."""
    return functools.partial(make_trainer, tiny_judge())


@pytest.fixture(scope="module")
def run_tiny(
    run_ranks: Callable[..., list[Any]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Any]:
    """run_tiny(body): a script on two ranks with everything of tiny_wan imported; its folder and
    what each rank put into `answer`.
    """

    def run(body: str, world_size: int = 2) -> tuple[Path, list[Any]]:
        folder = tmp_path_factory.mktemp("ranks")
        return folder, run_ranks(
            SCRIPT.format(modules=str(MODULES), folder=str(folder), body=body), world_size
        )

    return run


def assert_close(
    got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], part: str, tolerance: float
) -> None:
    """Every tensor of that part within `tolerance` of the largest entry of all of them."""
    names = [
        name
        for name in expected
        if name.startswith(part.split("*")[0]) and name.endswith(part.split("*")[-1])
    ]
    assert len(names) > 20
    assert got.keys() == expected.keys()
    largest = max(float(expected[name].abs().max()) for name in names)
    for name in names:
        torch.testing.assert_close(
            got[name],
            expected[name],
            rtol=0,
            atol=tolerance * largest,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize(
    ("shard", "dtype", "lora"),  # every pair of two settings
    [
        ("none", torch.float32, False),
        ("none", torch.bfloat16, True),
        ("full", torch.float32, True),
        ("full", torch.bfloat16, False),
    ],
)
def test_ratio_is_one_and_no_activation_policy_changes_a_bit(
    trainer: Any, shard: str, dtype: torch.dtype, lora: bool
) -> None:
    """With both branches of the guidance; with LoRA also KL and EMA. Two iterations, the second
    from weights that have moved.
    """
    results, update = [], EXTRAS if lora else {}
    for activations in ("none", "full", "keep_attention"):
        one = trainer(lora=lora, dtype=dtype, shard=shard, activations=activations, update=update)
        metrics = [without_times(one.step(i)) for i in (1, 2)]
        assert [m["ratio_drift"] for m in metrics] == [0.0, 0.0]
        assert [m["kl"] > 0 for m in metrics] == [False, lora]
        results.append((metrics, digest(state_of(one))))
    assert results[0] == results[1] == results[2]


def test_parameters_kept_gathered_change_no_bit_and_are_freed(trainer: Any) -> None:
    ends = []
    for keep in (False, True):
        one = trainer(shard="full", keep_gathered=keep, update=EXTRAS)
        network = one.policy.transformer
        ends.append((without_times(one.step(1)), without_times(one.step(2)), digest(state_of(one))))
        assert all(isinstance(p, DTensor) for p in network.parameters())
    assert ends[0] == ends[1]
    with torch.no_grad(), gathered(network, True):
        network(*INPUTS)
        assert not any(isinstance(p, DTensor) for p in network.parameters())
    assert all(isinstance(p, DTensor) for p in network.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_reduced_in_every_backward_or_in_the_last_pass(
    trainer: Any, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """On one rank the sums keep their order, so not a bit changes."""
    calls: list[None] = []
    group = torch.distributed.fsdp._fully_shard._fsdp_param_group
    reduce = group.foreach_reduce
    monkeypatch.setattr(group, "foreach_reduce", lambda *a: calls.append(None) or reduce(*a))
    ends, reductions = [], []
    for every in ("backward", "step"):
        one = trainer(shard="full", dtype=dtype, reduce_every=every, update=EXTRAS)
        metrics = [without_times(one.step(i)) for i in (1, 2)]
        ends.append((metrics, digest(state_of(one))))
        reductions.append(len(calls))
        calls.clear()
        assert all(isinstance(p.grad, DTensor | None) for p in one.trainable.values())
    assert ends[0] == ends[1]
    passes = 4  # an iteration's: two prompts, two videos each, of int(0.6 x 3) = 1 step
    assert reductions[0] == passes * reductions[1]


def test_a_forward_frees_what_it_gathered_and_leaves_its_inputs_alone(trainer: Any) -> None:
    network, seen = trainer(shard="full", dtype=torch.bfloat16).policy.transformer, {}
    for name, module in (("network", network), ("block", network.blocks[0])):
        module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args}))
    network.proj_out.register_forward_pre_hook(lambda module, _: seen.update(weight=module.weight))
    with (
        torch.no_grad(),
        gathered(network, False),
        torch.autocast("cpu", torch.bfloat16, cache_enabled=False),
    ):
        network(*INPUTS)
    assert all(isinstance(p, DTensor) for p in network.parameters()), (
        "the root's, too: an update would miss their gradients"
    )
    assert [x.dtype for x in seen["network"]] == [torch.float32] * 3, (
        "a timestep of 937 would be 936 in bf16"
    )
    assert [x.dtype for x in seen["block"][3]] == [torch.float32] * 2, "rotary angles"
    assert seen["weight"].dtype == torch.bfloat16
    assert {p.dtype for p in network.parameters()} == {torch.float32}


def test_other_weights_reach_a_network_that_is_gathered(trainer: Any) -> None:
    """What is gathered in bf16 is dropped; the fp32 shards are exchanged, without a bit lost."""
    one, other = (trainer(shard="full", dtype=torch.bfloat16, seed=seed) for seed in (0, 1))
    network, weights = one.policy.transformer, copy_weights(other.trainable)
    with (
        torch.no_grad(),
        gathered(network, True),
        torch.autocast("cpu", torch.bfloat16, cache_enabled=False),
    ):
        before, expected = network(*INPUTS).sample, other.policy.transformer(*INPUTS).sample
        with using_weights(one.policy, weights):
            assert torch.equal(network(*INPUTS).sample, expected)
        assert torch.equal(network(*INPUTS).sample, before)
    assert not torch.equal(before, expected)
    for name, kept in copy_weights(other.trainable).items():
        assert torch.equal(weights[name], kept)


@pytest.mark.parametrize("lora", [False, True])
def test_without_adapters_is_the_base_and_a_checkpoint_holds_what_is_trained(
    trainer: Any, lora: bool, tmp_path: Path
) -> None:
    one = trainer(lora=lora, shard="full", update=EXTRAS)
    one.step(1)
    names = {name for name in state_of(one) if name.startswith("model/")}
    trained = {
        f"model/{name}" for name, p in one.policy.transformer.named_parameters() if p.requires_grad
    }
    assert names == trained
    assert all("lora" in name for name in trained) == lora
    path = checkpoint.save(tmp_path, 1, one.tensors(), one.state_dict(), 1)
    policy: Any = TinyWan(lora=lora)
    checkpoint.load_weights(path, policy.transformer, ema=True)
    for name, weights in policy.transformer.named_parameters():
        if weights.requires_grad:
            assert torch.equal(weights, state_of(one)[f"ema/{name}"])


def count_attention(one: Any) -> tuple[int, int]:
    """Attention forwards and backwards of one backward pass."""
    network = one.policy.transformer
    loss = network(*INPUTS).sample.square().mean()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        loss.backward()
    forward, backward = (
        f"aten::_scaled_dot_product_flash_attention_for_cpu{end}" for end in ("", "_backward")
    )
    counts = {event.key: event.count for event in seen.key_averages()}
    return counts.get(forward, 0), counts[backward]


def test_backward_runs_attention_again_or_not(
    trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A selective checkpoint dispatches an operator that it kept once, without running it; one that
    it did not keep is seen twice.
    """
    assert count_attention(trainer(activations="none")) == (0, 4)
    assert count_attention(trainer(activations="full")) == (4, 4)
    assert count_attention(trainer(activations="keep_attention")) == (4, 4)
    monkeypatch.setattr(
        "fastgrpo.distributed.sharding._ATTENTION",
        ("aten::_scaled_dot_product_cudnn_attention", "flash_attn::_flash_attn_forward"),
    )
    assert count_attention(trainer(activations="keep_attention")) == (8, 4)
    assert [str(op) for op in attention_operators()] == [
        "aten._scaled_dot_product_cudnn_attention.default"
    ]


@pytest.mark.parametrize("shard", ["none", "full"])
def test_compiled_blocks(trainer: Any, monkeypatch: pytest.MonkeyPatch, shard: str) -> None:
    """One compilation for all blocks of a kind, and one for their training forward; kept attention
    stays kept.
    """
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    one = trainer(shard=shard, activations="keep_attention", compile=True)
    metrics = one.step(1)
    assert len(graphs) == 2
    assert metrics["ratio_drift"] < 1e-5
    monkeypatch.undo()
    eager = trainer(shard=shard)
    eager.step(1)
    assert_close(state_of(one), state_of(eager), "optimizer/*exp_avg", 1e-5)


def test_leaving_a_rollout_changes_nothing(trainer: Any) -> None:
    one, other = trainer(update=EXTRAS), trainer(update=EXTRAS)
    for each in (one, other):
        each.step(1)
    before, asked = (digest(state_of(one)), one.state_dict()), []
    with pytest.raises(RolloutInterrupted):
        one.step(2, lambda: asked.append(None) or len(asked) == 3)
    assert (digest(state_of(one)), one.state_dict()) == before
    assert len(asked) == 3
    one.judge.collect(4)  # a resumed run starts with an empty queue
    assert without_times(one.step(2)) == without_times(other.step(2))
    assert digest(state_of(one)) == digest(state_of(other))


LAYOUTS = {
    "copies": {"shard": "none"},
    "sharded": {"shard": "full", "activations": "keep_attention"},
    "gathered": {"shard": "full", "keep_gathered": True, "activations": "none"},
    "replicas": {"shard": "full", "replicas": 2},
    "once": {"shard": "full", "reduce_every": "step"},
    "once, replicas": {"shard": "full", "replicas": 2, "reduce_every": "step"},
}
TRAIN = f"""
updates = {EXTRAS!r}
for name, layout in {LAYOUTS!r}.items():
    trainer = make_trainer(TinyJudge(), update=updates, **layout)
    metrics, hashes = [], []
    for i in (1, 2):
        metrics.append(without_times(trainer.step(i)))
        state = state_of(trainer)
        hashes.append(digest(state))
        if collectives.rank() == 0:
            torch.save(state, folder / f"{{name}}_{{i}}.pt")
    with using_weights(trainer.policy, trainer.evaluation_weights):
        export = sharding.full_state_dict(trainer.policy.transformer)
        if collectives.rank() == 0:
            torch.save(export, folder / f"{{name}}_export.pt")
    weights = digest({{n: whole(p.detach()) for n, p in trainer.trainable.items()}})
    answer[name] = [metrics, hashes, len(export), weights]
"""


@pytest.fixture(scope="module")
def trained(run_tiny: Any) -> tuple[Path, list[Any]]:
    """Two iterations of each layout on two ranks."""
    return run_tiny(TRAIN)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_and_weights_are_those_of_one_process(
    trained: Any, trainer: Any, layout: str
) -> None:
    """The first iteration's gradients (Adam's first moment), and with EMA and KL where the second
    ends.
    """
    folder, answers = trained
    alone = trainer(update=EXTRAS)
    for i in (1, 2):
        metrics, got = alone.step(i), answers[0][layout][0][i - 1]
        state, expected = torch.load(folder / f"{layout}_{i}.pt"), state_of(alone)
        assert got["ratio_drift"] == metrics["ratio_drift"] == 0.0
        for key in ("reward", "reward_std", "kl", "grad_norm", "loss"):
            assert got[key] == pytest.approx(metrics[key], rel=1e-4, abs=1e-7), (i, key)
        # An element whose gradient is rounding error moves by a whole learning rate, 1e-3, either
        # way: not in the first moment.
        assert_close(state, expected, "optimizer/*exp_avg", 1e-6 if i == 1 else 1e-3)
        for part in ("model/", "ema/"):
            moved = torch.cat(
                [
                    (state[name] - expected[name]).abs().flatten()
                    for name in expected
                    if name.startswith(part)
                ]
            )
            assert moved.quantile(0.98) < 1e-6, part
    assert got["kl"] > 0
    first, second = (torch.load(folder / f"{layout}_{i}.pt") for i in (1, 2))
    for name, average in second.items():
        if name.startswith("ema/"):
            expected = 0.5 * first[name] + 0.5 * second[name.replace("ema/", "model/")]
            torch.testing.assert_close(average, expected, rtol=1e-6, atol=1e-7)


def test_layouts_agree_with_each_other(trained: Any) -> None:
    folder, answers = trained
    assert answers[0]["sharded"][1:] == answers[0]["gathered"][1:], (
        "kept gathered, other activations: not a bit"
    )
    copies = torch.load(folder / "copies_1.pt")
    for layout in ("sharded", "replicas", "once", "once, replicas"):
        assert_close(torch.load(folder / f"{layout}_1.pt"), copies, "optimizer/*exp_avg", 1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_hold_the_same_weights_after_every_update(trained: Any, layout: str) -> None:
    _, (first, second) = trained
    assert first[layout][0] == second[layout][0], "metrics"
    assert first[layout][1] == second[layout][1], "checkpoints"
    assert first[layout][3] == second[layout][3], "weights"
    assert len(set(first[layout][1])) == 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_export_is_the_average_whole_and_loads(trained: Any, layout: str) -> None:
    folder, (first, second) = trained
    export, state = (
        torch.load(folder / f"{layout}_export.pt"),
        torch.load(folder / f"{layout}_2.pt"),
    )
    network = TinyWan(seed=9).transformer
    network.load_state_dict(export)
    for name, weights in network.state_dict().items():
        assert torch.equal(weights, state[f"ema/{name}"])
        assert weights.device == CPU
    assert (first[layout][2], second[layout][2]) == (len(export), 0)


SOME_UNSEEN = ["a cat", "unseen 1", "unseen 2", "unseen 3", "unseen 4", "a dog"]
SKIPPED = f"""
# Rank 1's group gives no signal in iteration 1, none of them in 2, rank 0's in 3.
trainer = make_trainer(TinyJudge(), {SOME_UNSEEN!r}, shard="full")
rows = [without_times(trainer.step(i)) for i in (1, 2, 3)]
keys = ("num_skipped_groups", "ratio_drift", "grad_norm")
answer = {{key: [row[key] for row in rows] for key in keys}}
answer["hash"] = digest(state_of(trainer))

# A rank whose weights differ gets rank 0's, and one that has none.
for layout in ({{"shard": "none"}}, {{"shard": "full"}}, {{"shard": "full", "replicas": 2}}):
    other = make_trainer(TinyJudge(), seed=collectives.rank(), **layout)
    answer.setdefault("broadcast", []).append(digest(state_of(other)))
    with torch.device("meta" if collectives.rank() else "cpu"):
        policy = TinyWan(seed=5)
    sharding.prepare(policy.transformer, ParallelConfig(**layout), CPU, torch.float32)
    inputs = torch.ones(1, 4, 2, 4, 4), torch.tensor([937.0]), torch.ones(1, 3, 8)
    with torch.no_grad():
        total = float(policy.transformer(*inputs).sample.double().sum())
    answer.setdefault("from meta", []).append(total)
"""


def test_a_rank_without_a_group_keeps_step_and_every_rank_gets_rank_0s_weights(
    run_tiny: Any, trainer: Any
) -> None:
    _, (first, second) = run_tiny(SKIPPED)
    assert first == second
    assert first["num_skipped_groups"] == [1, 2, 1]
    assert [drift is None or drift != drift or drift == 0.0 for drift in first["ratio_drift"]] == [
        True
    ] * 3
    alone = trainer(SOME_UNSEEN)
    norms = [alone.step(i)["grad_norm"] for i in (1, 2, 3)]
    assert first["grad_norm"] == pytest.approx(norms, rel=1e-5, nan_ok=True)
    assert min(norms[0], norms[2]) > 0
    assert first["broadcast"] == [digest(state_of(trainer()))] * 3
    with torch.no_grad():
        expected = float(TinyWan(seed=5).transformer(*INPUTS).sample.double().sum())
    assert first["from meta"] == [expected] * 3


RESHARD = """
for name in ("full", "lora"):
    trainer = make_trainer(TinyJudge(), update={update!r}, lora=name == "lora", shard="full")
    tensors = trainer.tensors()
    saved = checkpoint.newest(pathlib.Path({source!r}) / name)
    checkpoint.load(saved, tensors)
    trainer.load_tensors(tensors)
    trainer.load_state_dict(checkpoint.read_state(saved))
    answer[name] = [digest(state_of(trainer))]
    checkpoint.save(folder / name, 1, trainer.tensors(), trainer.state_dict(), 1)
    answer[name].append(without_times(trainer.step(2)))
"""


def test_a_checkpoint_goes_from_one_rank_to_two_and_back(
    trainer: Any, run_tiny: Any, tmp_path: Path
) -> None:
    """Weights, optimizer and EMA to the bit, whole -> sharded over two ranks -> whole; each goes on
    as the first would have.
    """
    kinds: dict[str, Any] = {"full": {"lora": False}, "lora": {"lora": True}}
    begun = {name: trainer(update=EXTRAS, **kind) for name, kind in kinds.items()}
    before = {}
    for name, one in begun.items():
        one.step(1)
        before[name] = digest(state_of(one))
        checkpoint.save(tmp_path / name, 1, one.tensors(), one.state_dict(), 1)
    folder, (first, second) = run_tiny(RESHARD.format(update=EXTRAS, source=str(tmp_path)))
    assert first == second
    for name, kind in kinds.items():
        again = trainer(update=EXTRAS, **kind)
        tensors = again.tensors()
        saved = checkpoint.newest(folder / name)
        assert saved is not None
        checkpoint.load(saved, tensors)
        again.load_tensors(tensors)
        again.load_state_dict(checkpoint.read_state(saved))
        assert first[name][0] == digest(state_of(again)) == before[name]
        expected = without_times(begun[name].step(2))
        assert without_times(again.step(2)) == expected
        assert digest(state_of(again)) == digest(state_of(begun[name]))
        for key in ("reward", "reward_std", "kl", "grad_norm", "loss"):
            assert first[name][1][key] == pytest.approx(expected[key], rel=1e-4, abs=1e-7), key
