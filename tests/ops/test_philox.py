"""The noise against an independent NumPy Philox-4x32-10, its published vectors, and what normal
noise must look like.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from fastgrpo_kernels import dispatch, gaussian_noise
from fastgrpo_kernels.dispatch import jit, tl
from fastgrpo_kernels.random.philox import box_muller, philox_4x32_10, uniform
from fastgrpo_kernels.random.triton_philox import cos_sin_turns, minus_two_log, normal_tile
from fastgrpo_kernels.random.triton_philox import uniform as uniform_in_triton
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

# Random123's kat_vectors, philox4x32 with 10 rounds: counter, key, output.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
INT64 = st.integers(min_value=-(2**63), max_value=2**63 - 1)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def numpy_philox(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """counter [n, 4], key [n, 2] -> [n, 4]; uint64 products, as the paper's listing has it."""
    c, k = counter.astype(np.uint64), key.astype(np.uint64)
    low = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        p0, p1 = c[:, 0] * np.uint64(0xD2511F53), c[:, 2] * np.uint64(0xCD9E8D57)
        high0, high1 = p0 // np.uint64(2**32), p1 // np.uint64(2**32)
        c = np.stack(
            [high1 ^ c[:, 1] ^ k[:, 0], p1 & low, high0 ^ c[:, 3] ^ k[:, 1], p0 & low], axis=1
        )
        k = (k + np.array([0x9E3779B9, 0xBB67AE85], dtype=np.uint64)) & low
    return c


def numpy_noise(seed: int, step: int, numel: int, first: int = 0) -> np.ndarray:
    """One sample's noise from element `first` on, fp32, from NumPy's integers and NumPy's (another
    library's) log, cos and sin.
    """
    quads = -(-numel // 4)
    counter = np.array(
        [(q % 2**32, q // 2**32, step, 0) for q in range(first // 4, first // 4 + quads)],
        dtype=np.uint64,
    )
    unsigned = seed % 2**64
    key = np.tile(np.array([unsigned % 2**32, unsigned // 2**32], dtype=np.uint64), (quads, 1))
    u = (np.floor(numpy_philox(counter, key) / 512.0) + 0.5) / 2**23
    radius = np.sqrt(-2 * np.log(u[:, 0::2])).astype(np.float32)
    angle = 2 * np.pi * u[:, 1::2]
    out = np.empty((quads, 4), dtype=np.float32)
    out[:, 0::2] = radius * np.cos(angle).astype(np.float32)
    out[:, 1::2] = radius * np.sin(angle).astype(np.float32)
    return out.reshape(-1)[:numel]


def words(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.int64))


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_published_vectors(
    counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    ours = philox_4x32_10(*(tuple(torch.tensor([w]) for w in words) for words in (counter, key)))
    assert tuple(int(word) for word in ours) == expected
    theirs = numpy_philox(np.array([counter]), np.array([key]))
    assert tuple(int(word) for word in theirs[0]) == expected


def test_integers_equal_numpy() -> None:
    rng = np.random.default_rng(0)
    counter = rng.integers(0, 2**32, (20_000, 4), dtype=np.uint64)
    key = rng.integers(0, 2**32, (20_000, 2), dtype=np.uint64)
    edges = np.array([0, 1, 2**31 - 1, 2**31, 2**32 - 1], dtype=np.uint64)
    counter[:5_000] = rng.choice(edges, (5_000, 4))
    key[:5_000] = rng.choice(edges, (5_000, 2))
    c, k = words(counter), words(key)
    ours = torch.stack(philox_4x32_10(c.unbind(1), k.unbind(1)), dim=1)
    assert torch.equal(ours, words(numpy_philox(counter, key)))


def test_uniform_is_open_symmetric_and_exact_in_fp32() -> None:
    word = torch.tensor([0, 511, 512, 2**31, 2**32 - 1])
    expected = [2.0**-24, 2.0**-24, 3 * 2.0**-24, 0.5 + 2.0**-24, 1 - 2.0**-24]
    assert uniform(word).tolist() == expected
    assert torch.equal(uniform(word).float().double(), uniform(word))


def test_box_muller_by_hand() -> None:
    u = torch.tensor([math.exp(-2.0), math.exp(-0.5)], dtype=torch.float64)
    v = torch.tensor([1 / 6, 0.75], dtype=torch.float64)
    cosine, sine = box_muller(u, v)
    assert cosine.dtype == sine.dtype == torch.float32
    torch.testing.assert_close(cosine, torch.tensor([1.0, 0.0]), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(sine, torch.tensor([math.sqrt(3.0), -1.0]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**32, -(2**63), 2**63 - 1, 0x0123_4567_89AB_CDEF])
@pytest.mark.parametrize("step", [0, 15, 2**32 - 1])
def test_noise_equals_numpy_bit_for_bit(seed: int, step: int) -> None:
    for numel in (1, 2, 3, 4, 5, 768, 1001):
        ours = gaussian_noise(torch.tensor([seed]), step, (numel,))
        assert ours.dtype == torch.float32
        np.testing.assert_array_equal(ours[0].numpy(), numpy_noise(seed, step, numel))


def test_shape_is_only_a_view_of_the_elements() -> None:
    seeds = torch.tensor([5, 6])
    flat = gaussian_noise(seeds, 2, (768,), "cpu")
    assert torch.equal(gaussian_noise(seeds, 2, (96, 8, 1, 1)).reshape(2, -1), flat)
    assert gaussian_noise(seeds, 2, ()).shape == (2,)
    assert torch.equal(gaussian_noise(seeds, 2, ()), flat[:, 0])
    assert torch.equal(gaussian_noise(seeds, 2, torch.Size((767,))), flat[:, :767])


def test_moments_distribution_and_tails() -> None:
    noise = gaussian_noise(torch.arange(64), 3, (16_384,)).double().flatten()
    n = noise.numel()
    # Moments of N(0, 1): the k-th sample moment has variance (m_2k - m_k^2) / n.
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10_170)):
        assert abs(noise.pow(power).mean().item() - moment) < 4 * math.sqrt(variance / n), power
    for bound in (1.0, 2.0, 3.0, 4.0):
        expected = math.erfc(bound / math.sqrt(2))
        share = (noise.abs() > bound).double().mean().item()
        assert abs(share - expected) < 4 * math.sqrt(expected / n), bound
    # The smallest uniform is 2^-24.
    assert noise.abs().max() <= math.sqrt(2 * 24 * math.log(2)) + 1e-6
    # Kolmogorov-Smirnov: 1.95 / sqrt(n) is exceeded once in a thousand.
    cdf = torch.special.ndtr(noise.sort().values)
    rank = torch.arange(n, dtype=torch.float64)
    distance = torch.maximum((cdf - rank / n).abs().max(), (cdf - (rank + 1) / n).abs().max())
    assert distance < 1.95 / math.sqrt(n)


def test_no_correlation_between_steps_seeds_and_elements() -> None:
    numel = 65_536
    neighbours = [0, 1, 2, 2**32, 2**33, -1]
    rows = [gaussian_noise(torch.tensor(neighbours), step, (numel,)) for step in range(4)]
    noise = torch.cat(rows).double()  # 24 rows
    correlation = noise @ noise.T / numel
    off_diagonal = correlation - torch.diag(correlation.diagonal())
    assert off_diagonal.abs().max() < 5 / math.sqrt(numel)
    for lag in (1, 2, 3, 4, 8):
        products = noise[:, lag:] * noise[:, :-lag]
        assert abs(products.mean().item()) < 5 / math.sqrt(products.numel()), lag
        squares = (noise[:, lag:].square() - 1) * (noise[:, :-lag].square() - 1)
        assert abs(squares.mean().item()) < 5 * 2 / math.sqrt(squares.numel()), lag


@given(
    seeds=st.lists(INT64, min_size=1, max_size=23),
    numel=st.integers(1, 133),
    step=st.integers(0, 2**32 - 1),
    data=st.data(),
)
@settings(deadline=None, max_examples=80)
def test_same_bits_whatever_the_batch(
    seeds: list[int], numel: int, step: int, data: st.DataObject
) -> None:
    whole = gaussian_noise(torch.tensor(seeds), step, (numel,))
    order = data.draw(st.permutations(range(len(seeds))))
    assert torch.equal(
        gaussian_noise(torch.tensor(seeds)[list(order)], step, (numel,)), whole[list(order)]
    )
    cut = data.draw(st.integers(0, len(seeds)))
    parts = [
        gaussian_noise(torch.tensor(part, dtype=torch.int64), step, (numel,))
        for part in (seeds[:cut], seeds[cut:])
    ]
    assert torch.equal(torch.cat(parts), whole)
    longer = gaussian_noise(torch.tensor(seeds), step, (numel + 7,))
    assert torch.equal(longer[:, :numel], whole)


@given(
    pairs=st.lists(st.tuples(INT64, st.integers(0, 2**32 - 1)), max_size=9),
    numel=st.integers(1, 70),
)
@settings(deadline=None, max_examples=40)
def test_step_tensor_equals_scalar_calls(pairs: list[tuple[int, int]], numel: int) -> None:
    seeds = torch.tensor([seed for seed, _ in pairs], dtype=torch.int64)
    steps = torch.tensor([step for _, step in pairs], dtype=torch.int64)
    together = gaussian_noise(seeds, steps, (numel,))
    assert together.shape == (len(pairs), numel)
    for row, (seed, step) in zip(together, pairs, strict=True):
        assert torch.equal(row, gaussian_noise(torch.tensor([seed]), step, (numel,))[0])


@pytest.mark.usefixtures("two_threads")
def test_same_bits_with_two_threads() -> None:
    noise = gaussian_noise(torch.arange(3), 1, (100_003,))
    torch.set_num_threads(1)
    assert torch.equal(gaussian_noise(torch.arange(3), 1, (100_003,)), noise)


def test_empty_batch_and_strided_seeds() -> None:
    empty = gaussian_noise(torch.empty(0, dtype=torch.int64), 0, (3, 5))
    assert empty.shape == (0, 3, 5)
    seeds = torch.arange(10)
    assert torch.equal(
        gaussian_noise(seeds[::3], 0, (9,)), gaussian_noise(torch.tensor([0, 3, 6, 9]), 0, (9,))
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (torch.zeros(2), 0, (4,)),
            r"seeds: expected an int64 tensor \[B\], got torch.float32 \[2\]",
        ),
        ((torch.zeros(2, 1, dtype=torch.int64), 0, (4,)), r"seeds: .* got torch.int64 \[2, 1\]"),
        (([1, 2], 0, (4,)), r"seeds: .* got list \[1, 2\]"),
        ((torch.arange(2), -1, (4,)), r"step: expected a value in \[0, 2\^32\), got -1"),
        ((torch.arange(2), 2**32, (4,)), r"step: .* got 4294967296"),
        (
            (torch.arange(2), 1.0, (4,)),
            r"step: expected an int or an int64 tensor \[2\], got float 1.0",
        ),
        ((torch.arange(2), True, (4,)), r"step: .* got bool True"),
        ((torch.arange(2), torch.arange(3), (4,)), r"step: .* \[2\], got torch.int64 \[3\]"),
        ((torch.arange(2), torch.zeros(2), (4,)), r"step: .* got torch.float32 \[2\]"),
        (
            (torch.arange(2), torch.tensor([0, -7]), (4,)),
            r"step: expected values in \[0, 2\^32\), got \[0, -7\]",
        ),
        (
            (torch.arange(2), 0, (4, 0)),
            r"shape: expected positive sizes of one sample, got \(4, 0\)",
        ),
        ((torch.arange(2), 0, (4, 1.5)), r"shape: .* got \(4, 1.5\)"),
    ],
)
def test_bad_noise_arguments(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gaussian_noise(*arguments)  # type: ignore[arg-type]


@jit
def _normals_kernel(seeds, steps, firsts, out, TILE: tl.constexpr):
    row = tl.program_id(0)
    normals = normal_tile(tl.load(seeds + row), tl.load(steps + row), tl.load(firsts + row), TILE)
    tl.store(out + row * TILE + tl.arange(0, TILE), normals)


@jit
def _box_muller_kernel(uniforms, radius, cos, sin, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    u = uniform_in_triton((offsets << 9).to(tl.uint32))
    c, s = cos_sin_turns(u)
    tl.store(uniforms + offsets, u)
    tl.store(radius + offsets, tl.sqrt_rn(minus_two_log(u)))
    tl.store(cos + offsets, c)
    tl.store(sin + offsets, s)


@pytest.fixture
def triton_device(device: str) -> str:
    if reason := dispatch.unsupported_reason("triton", "sde_step", torch.empty(0, device=device)):
        pytest.skip(reason)
    return device


def ordinal(x: Tensor) -> Tensor:
    """fp32 numbers counted in their order, as int64."""
    bits = x.view(torch.int32).long()
    return torch.where(bits >= 0, bits, -(bits & 0x7FFFFFFF))


@pytest.fixture
def fused_multiply_add(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the interpreter round a multiply-add once, as a GPU does; it rounds twice. (float64
    holds the product exactly.)
    """
    if dispatch.INTERPRETED:
        from triton.runtime import interpreter

        def fma(builder: Any, x: Any, y: Any, z: Any) -> Any:
            a, b, c = (value.data.astype(np.float64) for value in (x, y, z))
            exact = a * b + c
            return interpreter.TensorHandle(exact.astype(np.float32), z.dtype.scalar)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", fma)


@pytest.mark.usefixtures("fused_multiply_add")
def test_all_uniforms_in_triton(triton_device: str) -> None:
    """Every uniform is exact; its radius, cosine and sine are at most one fp32 number away from the
    reference's, and few are.
    """
    block = 1024 if triton_device == "cuda" else 2**18
    count = 2**23
    ours = torch.empty(4, count, device=triton_device)
    _box_muller_kernel[(count // block,)](*ours, BLOCK=block, num_warps=4, enable_fp_fusion=False)
    u = uniform(torch.arange(count) << 9)
    ours = ours.cpu()
    assert torch.equal(ours[0].double(), u)
    radius, _ = box_muller(u, torch.zeros_like(u))  # r cos 0 = r
    cos, sin = box_muller(torch.full_like(u, math.exp(-0.5)), u)  # r = 1
    for got, expected, share in (
        (ours[1], radius, 0.14),
        (ours[2], cos, 0.05),
        (ours[3], sin, 0.05),
    ):
        away = (ordinal(got) - ordinal(expected)).abs()
        assert away.max() <= 1
        assert away.double().mean() < share


@pytest.mark.parametrize("tile", [8, 1024])
def test_noise_in_triton(triton_device: str, tile: int) -> None:
    """Any seed, step and element, also beyond 2^32 quads: NumPy's noise, within the bound of
    `triton_philox`.
    """
    keys = [
        (0, 0, 0),
        (-1, 2**32 - 1, 5 * tile),
        (-(2**63), 2**31, 2**31),
        (2**63 - 1, 7, 2**34),
        (0x0123_4567_89AB_CDEF, 3, 2**40 + 3 * tile),
    ]
    seeds, steps, firsts = torch.tensor(keys, device=triton_device).T.contiguous()
    ours = torch.empty(len(keys), tile, device=triton_device)
    _normals_kernel[(len(keys),)](
        seeds, steps, firsts, ours, TILE=tile, num_warps=4, enable_fp_fusion=False
    )
    for row, (seed, step, first) in zip(ours.cpu().numpy(), keys, strict=True):
        np.testing.assert_allclose(row, numpy_noise(seed, step, tile, first), rtol=2.0**-21, atol=0)


@pytest.mark.slow
@pytest.mark.skipif(
    np.finfo(np.longdouble).eps > 2e-19, reason="needs a long double wider than a double"
)
def test_no_uniform_is_near_a_rounding_boundary() -> None:
    """All 2^23 uniforms: radius, cos and sin stay over 20 float64 ulps away from where fp32
    rounding would change.

    So any library's double-precision functions give the same fp32 values, which is what
    box_muller promises.
    """
    u = uniform(torch.arange(2**23) << 9)
    assert u.unique().numel() == 2**23
    angle = (u * (2.0 * math.pi)).numpy().astype(np.longdouble)
    radius = np.sqrt(-2 * np.log(u.numpy().astype(np.longdouble)))
    of_radius, _ = box_muller(u, torch.zeros_like(u))  # r cos 0 = r
    of_cosine, of_sine = box_muller(torch.full_like(u, math.exp(-0.5)), u)  # r = 1
    for ours, exact in ((of_radius, radius), (of_cosine, np.cos(angle)), (of_sine, np.sin(angle))):
        rounded = exact.astype(np.float32)
        np.testing.assert_array_equal(ours.numpy(), rounded)
        nearest = rounded.astype(np.longdouble)
        above = np.nextafter(rounded, np.float32(np.inf)).astype(np.longdouble)
        below = np.nextafter(rounded, np.float32(-np.inf)).astype(np.longdouble)
        margin = np.minimum(
            np.abs(exact - (nearest + above) / 2), np.abs(exact - (nearest + below) / 2)
        )
        assert (margin / np.spacing(np.abs(exact.astype(np.float64)))).min() > 20
