"""loops.py with checkouts that the tests write: what is taken from a source, what is checked of a
peer before it is timed, and the arithmetic of the ratios.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import loops
from benchmarks.common import rows
from benchmarks.peers import checkout, embedded
from fastgrpo.config import RuntimeConfig
from fastgrpo.distributed import collectives

SMALL = ("--rollout.num_prompts", "1", "--rollout.num_inference_steps", "4")

DANCE = """
import a_package_that_is_not_there

def sd3_time_shift(shift, t):
    return shift * t / (1 + (shift - 1) * t)

def flux_step(velocity, latents, sigmas, i, following):
    mean = latents + velocity * (sigmas[i + 1] - sigmas[i])
    following = mean + 0.1 * torch.randn_like(mean) if following is None else following
    return following, -((following.detach() - mean) ** 2).flatten(1).mean(1)

def assert_eq(x, y):
    assert x == y

def run_sample_step(args, z, steps, sigmas, transformer, text, negative, grpo_sample):
    states, log_probs = [z], []
    for i in steps:
        t = torch.full([len(text)], int(sigmas[i] * 1000))
        (v,) = transformer(hidden_states=z, timestep=t, encoder_hidden_states=text)
        z, log_prob = flux_step(v, z, sigmas, i, None)
        states.append(z)
        log_probs.append(log_prob)
    return z, z, torch.stack(states, dim=1), torch.stack(log_probs, dim=1)

def grpo_one_step(args, latents, following, text, negative, transformer, timesteps, i, sigmas):
    (v,) = transformer(hidden_states=latents, timestep=timesteps, encoder_hidden_states=text)
    return flux_step(v, latents, sigmas, i, following)[1]

def sample_reference_model(args, device, transformer, vae, text, negative, reward_model, *_):
    sigmas = sd3_time_shift(args.shift, torch.linspace(1, 0, args.sampling_steps + 1))
    shape = 16, (args.t - 1) // 4 + 1, args.h // 8, args.w // 8
    parts = []
    for i in tqdm(range(len(text)), desc="sampling"):
        z = torch.randn(1, *shape, dtype=torch.bfloat16)
        steps, one = range(args.sampling_steps), text[i : i + 1]
        with torch.no_grad():
            parts.append(run_sample_step(args, z, steps, sigmas, transformer, one, one, True)[2:])
    latents, log_probs = (torch.cat(x) for x in zip(*parts))
    return torch.rand(len(text)), latents, log_probs, sigmas

def gather_tensor(x):
    return x

def train_one_step(
    args, device, transformer, vae, reward, tokenizer, optimizer, schedule, text, negative,
    caption, noise_scheduler, max_grad_norm, preprocess_val,
):
    optimizer.zero_grad()
    text = text.repeat_interleave(args.num_generations, 0)
    rewards, latents, log_probs, sigmas = sample_reference_model(args, device, transformer)
    for i in range(len(text)):
        for step in range(int(args.timestep_fraction * (args.sampling_steps - 1))):
            here = latents[i : i + 1, step], latents[i : i + 1, step + 1], text[i : i + 1]
            t = torch.full([1], int(sigmas[step] * 1000))
            new = grpo_one_step(args, *here, None, transformer, t, step, sigmas)
            (-rewards[i] * torch.exp(new - log_probs[i, step]).mean()).backward()
            dist.barrier()
    optimizer.step()
    schedule.step()
"""


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    collectives.start(RuntimeConfig(device="cpu"))
    yield
    collectives.stop()


@pytest.fixture
def dance(tmp_path: Path) -> Path:
    script = tmp_path / "dance" / "fastvideo" / "train_grpo_wan_2_1.py"
    script.parent.mkdir(parents=True)
    script.write_text(DANCE)
    return tmp_path / "dance"


def test_functions_come_from_a_script_that_cannot_be_imported(tmp_path: Path) -> None:
    """With the caller's globals, of which one can be replaced; loops run over given variables."""
    path = tmp_path / "script.py"
    path.write_text(
        "import nothing_like_this\n"
        "def double(x):\n    return twice * x\n"
        "def main():\n    crash()\n    for i in range(n):\n        out.append(double(i))\n"
    )
    peer, scope = checkout.functions(path, ["double"], {"twice": 2})
    assert peer.double(21) == 42
    scope["twice"] = 3
    assert peer.double(2) == 6
    out: list[int] = []
    exec(checkout.loop(path, "main", "i"), {"n": 3, "out": out, "double": peer.double})
    assert out == [0, 3, 6]
    with pytest.raises(checkout.Changed, match=r"script.py: expected functions triple, got none"):
        checkout.functions(path, ["double", "triple"], {})
    with pytest.raises(checkout.Changed, match=r"a loop over j in main"):
        checkout.loop(path, "main", "j")
    with pytest.raises(checkout.Changed, match=r"No such file"):
        checkout.loop(tmp_path / "gone.py", "main", "i")


def test_modules_come_with_stand_ins_for_what_is_not_installed(tmp_path: Path) -> None:
    """They are gone afterwards: diffusers asks sys.modules what is installed."""
    package = tmp_path / "peer_of_a_test"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import far.away\nimport json\n@far.away.remote\ndef f(): ...\nvalue = json.dumps([1])\n"
    )
    (module,) = checkout.load(tmp_path, ["peer_of_a_test"], ["far", "far.away", "json"])
    assert module.value == "[1]"
    assert not {"far", "far.away"} & sys.modules.keys()
    assert "json" in sys.modules
    assert str(tmp_path) not in sys.path
    with pytest.raises(checkout.Changed, match=r"expected peer_without_it to import"):
        checkout.load(tmp_path, ["peer_without_it"])
    settings = checkout.mapping(a=1, b=2)
    assert (settings.a, {**settings}) == (1, {"a": 1, "b": 2})


def test_a_commit_is_that_of_the_checkout_itself(tmp_path: Path) -> None:
    run = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    subprocess.run([*run, "init", "-q"], check=True)
    subprocess.run([*run, "commit", "-q", "--allow-empty", "-m", "one"], check=True)
    head = subprocess.run([*run, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    assert checkout.commit(tmp_path) == head.stdout[:7]
    (tmp_path / "inside").mkdir()
    assert checkout.commit(tmp_path / "inside") == "unknown"


def test_a_peer_that_does_other_work_gets_no_number() -> None:
    """Too few forwards, and weights that stay as they are."""
    world = embedded.load_world(SMALL)
    assert (world.num_videos, world.num_steps, world.trained_steps) == (16, 4, 1)
    assert len(world.chosen) == 8
    network = torch.nn.Linear(1, 1)
    network.videos = 0  # type: ignore[assignment]

    def forwards(count: int) -> None:
        network.videos += count  # type: ignore[operator, assignment]

    def loop(sampled: int, change: float) -> Any:
        def update() -> None:
            forwards(8)
            network.weight.data += change

        return SimpleNamespace(network=network, rollout=lambda: forwards(sampled), update=update)

    for made, message in (
        (loop(63, 1.0), "rollout: expected 64 forwards of a video, got 63"),
        (loop(64, 0.0), "update: expected other weights, got the same"),
    ):
        variant = loops.Variant("peer", "16 a pass", lambda w: None, loop=made)
        with pytest.raises(ValueError, match=message):
            loops.check(variant, world)
    loops.check(loops.Variant("peer", "16 a pass", lambda w: None, loop=loop(64, 1.0)), world)


def test_ratios_are_medians_of_the_rounds_pairs() -> None:
    ours = loops.Variant(loops.OURS, "16 a pass", lambda w: None)
    peer = loops.Variant("dancegrpo", "16 a pass", lambda w: None)
    ours.cpu = {"rollout": [1.0, 2.0, 1.0], "update": [1.0, 1.0, 2.0]}
    peer.cpu = {"rollout": [2.0, 3.0, 9.0], "update": [1.0, 1.6, 3.2]}
    ours.wall, peer.wall = ours.cpu, peer.cpu
    about = rows.provenance(torch.device("cpu"))
    row = loops.row_of(peer, ours, about, trainer_commit="abc", peak_mb=None)
    assert (row.rollout_cpu_s, row.update_cpu_s) == (3.0, 1.6)
    assert (row.rollout_ratio, row.update_ratio) == (2.0, 1.6)  # of 2, 1.5, 9 and 1, 1.6, 1.6
    assert row.both_ratio == pytest.approx(4.6 / 3)  # of 3/2, 4.6/3, 12.2/3
    assert row.goals == "C2 rollout 1.5x: met; C2 update 1.5x: met"
    assert loops.row_of(ours, ours, about, trainer_commit="abc", peak_mb=None).goals == ""


def test_it_runs_and_a_broken_checkout_costs_no_other(
    dance: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], read: Any
) -> None:
    """The peer at equal micro-batch and as it ships, ours beside it, each with its ratio."""
    options = ["--dancegrpo", str(dance), "--flow_grpo", str(tmp_path), "--csv", str(tmp_path)]
    options += ["--micro_batches", "4", "--rounds", "2", "--slow_rounds", "1", "--no-memory"]
    assert loops.main([*options, *SMALL]) == 1
    assert "flow_grpo, 4 a pass: FAILED, no number: Changed" in capsys.readouterr().out
    found = {(r["trainer"], r["setting"], r["against"]): r for r in read("cpu_loops.csv")}
    assert found.keys() == {
        ("fastgrpo", "4 a pass", "4 a pass"),
        ("dancegrpo", "4 a pass", "4 a pass"),
        ("fastgrpo", "as shipped", "as shipped"),
        ("fastgrpo", "1 a pass", "1 a pass"),
        ("dancegrpo", "as shipped", "as shipped"),
        ("dancegrpo", "as shipped", "1 a pass"),
    }
    for (trainer, _, _), row in found.items():
        assert row["drift"] == ("0" if trainer == "fastgrpo" else "")
        assert float(row["both_ratio"]) > 0
    assert found["dancegrpo", "4 a pass", "4 a pass"]["rounds"] == "2"
    assert found["fastgrpo", "1 a pass", "1 a pass"]["both_ratio"] == "1"


@pytest.mark.slow
def test_a_peak_is_that_of_a_process_of_its_own(
    dance: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    variant = loops.Variant("dancegrpo", "4 a pass", lambda w: None)
    options = ["--dancegrpo", str(dance), "--micro_batches", "4", *SMALL]
    peak = loops.peak_mb(variant, options)
    assert peak is not None
    assert 100 < peak < 4000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--micro_batches", "5"], "--micro_batches: expected divisors of 64 and 32 videos, got 5"),
        (["--unirl", "/nowhere"], "--unirl: expected the folder of a checkout, got /nowhere"),
    ],
)
def test_options_that_cannot_be_are_one_line(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = loops.main(options)
    except SystemExit as error:
        code = int(error.code or 0)
    assert code == 2
    assert message in capsys.readouterr().err
