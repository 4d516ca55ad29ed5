"""The benchmarks' own words: counted bytes, rows and goals, pictures, no number on red tests.
gpu_check.py has a file of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import ops, plot, registry, rows, stopwatch, verify  # noqa: E402

ALL_OPS = {
    "sde_step",
    "sde_log_prob",
    "clipped_ratio_loss",
    "grpo_loss",
    "branch_gradient",
    "ln_modulate",
    "gate_residual",
    "gate_residual_ln_modulate",
    "qk_norm_rope",
}
TRANSITION = ("latents", "next_latents", "velocity", "velocity_uncond")
READ = {
    "sde_step": ("latents", "velocity", "velocity_uncond"),
    "sde_log_prob": TRANSITION,
    "grpo_loss": TRANSITION,
    "branch_gradient": (),
    "ln_modulate": ("x",),
    "gate_residual": ("x", "y"),
    "gate_residual_ln_modulate": ("x", "y"),
    "qk_norm_rope": ("q", "k", "cos", "sin"),
}
"""Large inputs of the forward pass; a backward pass reads those of READ_BACKWARD and what arrives."""
READ_BACKWARD = {**READ, "gate_residual": ("y",), "gate_residual_ln_modulate": ("x", "y")}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def a_row(**changes: object) -> rows.Row:
    row = rows.Row(
        op="sde_step",
        size="wan_1.3b_480p",
        direction="forward",
        backend="triton",
        dtype="bfloat16",
        us=7.0,
        host_us=30.5,
        method="graph",
        bytes=16_773_120,
        flops=25_159_680,
        gb_per_s=2396.2,
        copy_gb_per_s=3000.0,
        speedup_eager=14.0,
        speedup_compile=2.0,
        log_prob_error=5e-8,
        goals="",
        device="NVIDIA H100 80GB HBM3",
        torch="2.11.0+cu130",
        triton="3.6.0",
        driver="580.159.04",
        commit="abc1234",
        date="2026-11-22",
    )
    return dataclasses.replace(row, **changes)  # type: ignore[arg-type]


# -------- registry


def on_meta(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("size", ["wan_1.3b_480p", "wan_14b_240p", "hunyuan_240p"])
def test_counted_bytes_are_those_of_the_tensors(size: str) -> None:
    """Each large tensor that goes in, and each that comes out, measured on tensors without memory."""
    cases = registry.cases(size)
    assert {case.op for case in cases} == ALL_OPS
    for case in cases:
        if case.op not in READ:
            continue
        inputs = case.make(on_meta)
        outputs = [out for out in case.fused(inputs, "reference") if out.numel() > 1000]

        def of(names: tuple[str, ...], inputs: dict[str, Tensor] = inputs) -> int:
            return sum(inputs[name].nbytes for name in names if name in inputs)

        forward = of(READ[case.op]) + sum(out.nbytes for out in outputs)
        assert case.bytes["forward"] == forward, case.op
        if case.wrt:
            gradients = [
                name for name in case.wrt if inputs[name].numel() > 10 * size_of_a_row(inputs)
            ]
            if case.op == "gate_residual":
                gradients.remove("x")  # the arriving gradient itself
            backward = (
                of(READ_BACKWARD[case.op])
                + sum(out.nbytes for out in outputs)
                + of(tuple(gradients))
            )
            if (
                case.op == "gate_residual_ln_modulate"
            ):  # two gradients arrive, and of x and y it is the new x that is needed
                assert len(outputs) == 2
            assert case.bytes["backward"] == backward, case.op
        assert all(count > 0 for count in case.flops.values())
        assert case.flops.keys() == case.bytes.keys()


def size_of_a_row(inputs: dict[str, Tensor]) -> int:
    """Elements of one modulation, which is no large tensor."""
    return inputs["scale"].numel() if "scale" in inputs else 1


def test_counted_bytes_are_those_of_the_goals() -> None:
    """shared/performance.md: a step moves 12 bytes an element, the loss 28 forward and backward, at
    16 x 14 x 60 x 104 elements.
    """
    cases = {case.op: case for case in registry.cases("wan_1.3b_480p")}
    elements = 16 * 14 * 60 * 104
    assert cases["sde_step"].bytes == {"forward": 12 * elements}
    assert cases["grpo_loss"].bytes["forward+backward"] == 28 * elements
    assert cases["ln_modulate"].bytes["forward"] == 4 * 21_840 * 1536


def test_every_case_names_tests_and_runs_by_the_reference() -> None:
    """And the peer computes the same number of results, of the same shapes, near the same values
    where no noise is drawn.
    """
    for size in ("tiny", "tiny_per_head"):
        for case in registry.cases(size):
            assert case.tests.startswith("test_")
            inputs = case.make(ops.draw_on(torch.device("cpu"), 0))
            fused, eager = case.fused(inputs, "reference"), case.eager(inputs)
            assert len(fused) == len(eager) or case.op == "grpo_loss"
            if case.op in ("sde_step", "branch_gradient"):
                assert [out.shape for out in fused] == [out.shape for out in eager]
                continue
            for index, (one, other) in enumerate(zip(fused, eager, strict=False)):
                if case.op == "clipped_ratio_loss" or (case.op == "grpo_loss" and index):
                    continue  # the fractions are defined differently
                torch.testing.assert_close(
                    one.float(),
                    other.float(),
                    rtol=2e-2,
                    atol=6e-2,
                    msg=f"{case.op} {size} result {index}",
                )


def test_every_public_operation_has_a_case() -> None:
    import fastgrpo_kernels

    without = {
        "GRPOStats",
        "gaussian_noise",
        "guided_velocity",
        "gaussian_kl",
    }  # parts of the others, and one that has no fast backend
    assert set(fastgrpo_kernels.__all__) - without == ALL_OPS


# -------- stopwatch


def test_time_on_a_cpu_is_the_median_of_the_wall() -> None:
    calls = iter(range(10**6))
    timing = stopwatch.measure(
        lambda: [lambda: time.sleep(0.5 if next(calls) == 6 else 0.002)] * 2,
        torch.device("cpu"),
        seconds=0.03,
    )
    assert 2_000 <= timing.us < 20_000
    assert (timing.host_us, timing.method) == (timing.us, "wall")


class StubEvent:
    """Of torch.cuda: the wall in place of the device's clock."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: StubEvent) -> float:
        return 1e3 * (end.time - self.time)


@pytest.mark.parametrize("capturable", [True, False])
def test_time_on_a_gpu_is_that_of_a_graph(
    capturable: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With torch.cuda's parts replaced: what is prepared, warmed up, captured and replayed, in
    which order and on which stream.
    """
    entered: list[str] = []

    class Stream:
        def wait_stream(self, other: object) -> None:
            entered.append("wait")

    class Graph:
        def replay(self) -> None:
            entered.append("replay")
            time.sleep(0.004)

    @contextlib.contextmanager
    def capture(graph: Graph, stream: Stream) -> Iterator[None]:
        entered.append("capture")
        if not capturable:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        yield
        entered.append("captured")

    @contextlib.contextmanager
    def on(stream: Stream) -> Iterator[None]:
        entered.append("stream")
        yield
        entered.append("left")

    for name, stub in {
        "Stream": Stream,
        "Event": StubEvent,
        "CUDAGraph": Graph,
        "graph": capture,
        "stream": on,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def prepare() -> list[stopwatch.Call]:
        entered.append("prepared")
        return [lambda: entered.append("call")] * 2

    timing = stopwatch.measure(prepare, torch.device("cuda"), seconds=0.01)
    assert entered[:4] == ["wait", "stream", "prepared", "call"]
    assert entered[-2:] == ["left", "wait"]
    assert timing.method == ("graph" if capturable else "events")
    if capturable:
        assert entered[entered.index("capture") :][:4] == ["capture", "call", "call", "captured"]
        assert 2_000 <= timing.us < 20_000  # two calls in 4 ms
        assert timing.host_us < 1_000
    else:
        assert timing.us == timing.host_us
        assert (
            "no CUDA graph, host-launched figures instead: operation not permitted when stream is capturing"
            in capsys.readouterr().out
        )


def test_copy_bandwidth_counts_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        stopwatch, "measure", lambda prepare, device, seconds: stopwatch.Timing(2.0, 2.0, "wall")
    )
    assert stopwatch.copy_bandwidth(torch.device("cpu"), numel=1000) == pytest.approx(
        2 * 4000 / 2e-6 / 1e9
    )


# -------- rows


def test_rows_survive_the_csv_and_newer_ones_replace_older(tmp_path: Path) -> None:
    path = tmp_path / "data" / "ops.csv"
    first = [
        a_row(),
        a_row(backend="eager", speedup_eager=None, log_prob_error=None),
        a_row(op="ln_modulate", commit="old"),
    ]
    assert rows.write_csv(path, first) == first
    assert rows.read_csv(path) == first
    newer = a_row(us=6.0, commit="def5678")
    rows.write_csv(path, [newer])
    assert rows.read_csv(path) == [first[1], first[2], newer]
    path.write_text(path.read_text().replace("host_us", "host"))
    with pytest.raises(ValueError, match="expected the columns op, size"):
        rows.write_csv(path, [newer])


def test_provenance_names_device_versions_and_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTGRPO_COMMIT", raising=False)
    about = rows.provenance(torch.device("cpu"))
    assert about.keys() == {"device", "torch", "triton", "driver", "commit", "date"}
    assert about["torch"] == torch.__version__
    assert all(about.values())
    assert rows.csv_name(torch.device("cpu")) == "cpu_ops.csv"
    monkeypatch.setenv("FASTGRPO_COMMIT", "carried")
    assert rows.revision() == "carried"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert rows.csv_name(torch.device("cuda")) == "nvidia_h100_80gb_hbm3_ops.csv"


def test_goals_are_judged_on_their_device_alone() -> None:
    assert rows.judge(a_row()) == "G8 9 us: met; G8 eager 12x: met; G8 error 1e-6: met"
    assert rows.judge(a_row(us=9.5, speedup_eager=11.0, log_prob_error=2e-6)) == (
        "G8 9 us: not met; G8 eager 12x: not met; G8 error 1e-6: not met"
    )
    assert rows.judge(a_row(size="wan_14b_240p", log_prob_error=None)) == ""
    assert rows.judge(
        a_row(op="grpo_loss", direction="forward+backward", us=21.0, log_prob_error=None)
    ).startswith("G8 20 us: not met")
    pointwise = a_row(
        op="ln_modulate",
        gb_per_s=2550.0,
        speedup_eager=5.0,
        speedup_compile=1.0,
        log_prob_error=None,
    )
    assert rows.judge(pointwise) == "G7 copy 85 %: met; G7 eager 5x: met; G7 compile 0.97x: met"
    slow = dataclasses.replace(pointwise, direction="backward", gb_per_s=2549.0, speedup_eager=4.9)
    assert (
        rows.judge(slow) == "G7 copy 85 %: not met; G7 eager 5x: not met; G7 compile 1.1x: not met"
    )
    for other in (
        a_row(device="AMD EPYC"),
        a_row(backend="eager"),
        a_row(backend="reference"),
    ):
        assert rows.judge(other) == ""


def test_the_table_has_every_figure() -> None:
    text = rows.table([a_row(goals="G8 9 us: met"), a_row(backend="eager", speedup_eager=None)])
    assert [
        word in text for word in ("7.0", "30.5", "2396.2", "79.9", "14.00", "G8 9 us: met")
    ] == [True] * 6
    assert "–" in text.splitlines()[2]
    assert len(rows.table([a_row()], head=False).splitlines()) == 1


def test_plot_draws_a_file_for_each_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = [
        a_row(),
        a_row(backend="eager", speedup_eager=None),
        a_row(direction="backward"),
        a_row(size="tiny", method="wall"),
    ]
    path = tmp_path / "some_ops.csv"
    rows.write_csv(path, table)
    assert plot.main([str(path)]) == 0
    assert (tmp_path / "some_ops.png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path / "some_ops.png") in capsys.readouterr().out
    panels = plot.draw(table).axes
    assert len(panels) == 4
    assert sorted(bar.get_width() for bar in panels[0].patches if bar.get_width()) == pytest.approx(
        [79.873] * 3, rel=1e-3
    )
    with pytest.raises(ValueError, match="at least one row"):
        plot.draw([])


# -------- verify

GREEN = """
import pytest
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_it(backend):
    pass
@pytest.mark.parametrize("backend", ["cpp-float32", "cuda-float32", "cuda-bfloat16"])
def test_dtypes(backend):
    if "cuda" in backend:
        pytest.skip("no GPU")
@pytest.mark.parametrize("refused", ["cuda"])
def test_errors(refused):
    pass
def test_other_machine():
    pytest.skip("no")
"""
RED = "def test_it():\n    assert 1 == 2, 'the reason'\n"


def folder_of(folder: Path, **files: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    return folder


def test_a_verdict_says_what_the_tests_said(tmp_path: Path) -> None:
    folder_of(
        tmp_path,
        test_green=GREEN,
        test_red=RED,
        test_skipped="import pytest\npytest.skip('no', allow_module_level=True)\n",
    )
    green = verify.verdict(tmp_path / "test_green.py")
    assert (green.green, green.words, green.backends, green.output) == (
        True,
        "4 passed, 3 skipped",
        ("cpp", "reference"),
        "",
    )
    red = verify.verdict(tmp_path / "test_red.py")
    assert (red.green, red.words) == (False, "1 failed")
    assert "the reason" in red.output
    skipped = verify.verdict(tmp_path / "test_skipped.py")
    assert (skipped.green, skipped.idle, skipped.output) == (False, True, "")
    assert verify.verdict(tmp_path / "test_none.py").words == "no file test_none.py"
    (tmp_path / "test_slow.py").write_text("import time\ndef test_it():\n    time.sleep(60)\n")
    assert verify.verdict(tmp_path / "test_slow.py", timeout=3.0).words == "not done after 3 s"


def test_a_green_verdict_is_remembered_until_something_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "ROOT", tmp_path)
    monkeypatch.setattr(verify, "STAMPS", tmp_path / "build" / "verified.json")
    (tmp_path / "tests").mkdir()
    folder = folder_of(tmp_path / "tests" / "ops", test_green=GREEN, test_red=RED)
    runs: list[str] = []
    monkeypatch.setattr(
        verify,
        "_run",
        lambda tests, timeout: (
            runs.append(tests.name) or verify.Verdict("green" in tests.name, "words", ("cpp",), 1.0)
        ),
    )

    def again() -> tuple[verify.Verdict, verify.Verdict]:
        verify._verdict.cache_clear()  # as another process
        verify.fingerprint.cache_clear()
        return verify.verdict(folder / "test_green.py"), verify.verdict(folder / "test_red.py")

    try:
        first = again()
        assert runs == ["test_green.py", "test_red.py"]
        assert again() == first
        assert runs == ["test_green.py", "test_red.py", "test_red.py"]
        (folder / "conftest.py").write_text("# changed\n")
        again()
        assert runs[3:] == ["test_green.py", "test_red.py"]
        (tmp_path / "build" / "verified.json").write_text("not json")
        again()
        assert runs[5:] == ["test_green.py", "test_red.py"]
    finally:
        verify._verdict.cache_clear()
        verify.fingerprint.cache_clear()


def test_the_tests_see_the_device_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTGRPO_KERNELS", "reference")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    environment = verify.environment()
    assert not {"FASTGRPO_KERNELS", "TRITON_INTERPRET"} & environment.keys()
    assert environment["PYTHONPATH"].split(os.pathsep)[:2] == [
        str(verify.ROOT),
        str(verify.ROOT / "kernels"),
    ]


# -------- ops


@pytest.fixture
def quick_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopwatch, "copy_bandwidth", lambda device: 40.0)


@pytest.mark.usefixtures("quick_copy")
def test_ops_on_the_cpu_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Green tests: rows for the backends that they have shown, printed and written."""
    tests = folder_of(tmp_path / "tests", test_grpo_loss=GREEN, test_gate_residual=GREEN)
    chosen = ["grpo_loss", "gate_residual", "gate_residual_ln_modulate"]
    arguments = [
        "--device",
        "cpu",
        "--sizes",
        "tiny",
        "--seconds",
        "0.001",
        "--csv",
        str(tmp_path),
        "--ops",
        *chosen,
    ]
    assert ops.main(arguments, tests) == 0
    out = capsys.readouterr().out
    found = rows.read_csv(tmp_path / "cpu_ops.csv")
    keys = {(row.op, row.direction, row.backend) for row in found}
    for op in chosen:
        assert {
            (op, direction, by)
            for direction in ("forward", "backward")
            for by in ("reference", "eager")
        } <= keys
    assert ("grpo_loss", "forward+backward", "eager") in keys
    for row in found:
        assert row.us > 0
        assert row.copy_gb_per_s == 40.0
        assert row.gb_per_s == pytest.approx(row.bytes / row.us / 1e3, rel=1e-3)
        assert (row.speedup_eager is None) == (row.backend == "eager")
        assert row.speedup_compile is None
        assert (row.method, row.commit, row.dtype) == ("wall", rows.revision(), "bfloat16")
    errors = {
        row.log_prob_error
        for row in found
        if row.op == "grpo_loss" and row.direction == "forward" and row.backend == "reference"
    }
    assert len(errors) == 1
    assert 0.0 <= errors.pop() < 1e-6  # type: ignore[operator]
    assert out.count("grpo_loss ") >= 6
    assert str(tmp_path / "cpu_ops.csv") in out


@pytest.mark.usefixtures("quick_copy")
def test_an_operation_with_red_tests_gets_no_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tests = folder_of(tmp_path / "tests", test_ln_modulate=RED, test_grpo_loss=GREEN)
    chosen = ["--ops", "ln_modulate", "clipped_ratio_loss", "qk_norm_rope"]
    arguments = [
        "--device",
        "cpu",
        "--sizes",
        "tiny",
        "--seconds",
        "0.001",
        "--csv",
        str(tmp_path),
        *chosen,
    ]
    assert ops.main(arguments, tests) == 1
    out = capsys.readouterr().out
    assert "ln_modulate: tests red: no number (test_ln_modulate.py: 1 failed)" in out
    assert (
        "qk_norm_rope: tests red: no number (test_qk_norm_rope.py: no file test_qk_norm_rope.py)"
        in out
    )
    assert "the reason" in out
    assert {row.op for row in rows.read_csv(tmp_path / "cpu_ops.csv")} == {"clipped_ratio_loss"}


@pytest.mark.usefixtures("quick_copy")
def test_a_family_that_no_test_has_shown_gets_no_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops.dispatch, "unsupported_reason", lambda backend, op, tensor: "")
    tests = folder_of(tmp_path / "tests", test_branch_gradient=GREEN.replace("cpp", "triton"))
    arguments = [
        "--device",
        "cpu",
        "--sizes",
        "tiny",
        "--seconds",
        "0.001",
        "--csv",
        str(tmp_path),
        "--ops",
        "branch_gradient",
    ]
    assert ops.main(arguments, tests) == 0
    assert "no test of the backend cpp ran: no number" in capsys.readouterr().out
    assert {row.backend for row in rows.read_csv(tmp_path / "cpu_ops.csv")} == {
        "reference",
        "eager",
    }


@pytest.mark.usefixtures("quick_copy")
def test_a_case_that_fails_costs_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = registry.cases("tiny")
    broken = [
        dataclasses.replace(case, eager=lambda inputs: 1 / 0) if case.op == "ln_modulate" else case
        for case in whole
    ]
    monkeypatch.setattr(ops, "cases", lambda name: broken)
    monkeypatch.setattr(
        ops, "verdict", lambda path: verify.Verdict(True, "", ("cpp", "triton"), 0.0)
    )
    arguments = [
        "--device",
        "cpu",
        "--sizes",
        "tiny",
        "--seconds",
        "0.001",
        "--csv",
        str(tmp_path),
        "--ops",
        "ln_modulate",
        "gate_residual",
    ]
    assert ops.main(arguments) == 1
    assert "ln_modulate tiny: FAILED, no number: ZeroDivisionError" in capsys.readouterr().out
    assert {row.op for row in rows.read_csv(tmp_path / "cpu_ops.csv")} == {"gate_residual"}
    assert ops.main([*arguments, "--budget", "-1"]) == 0
    assert "left out, the budget of -1 s is spent" in capsys.readouterr().out


def test_unknown_operations_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ops.main(["--ops", "softmax"])
    assert "got softmax" in capsys.readouterr().err
