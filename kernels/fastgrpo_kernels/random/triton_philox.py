"""`philox.gaussian_noise` inside a Triton kernel: the same integers, and normals within 2^-21 of
its own, relatively.

Philox-4x32-10 is Triton's. Box-Muller is written out in fp32, without the approximate functions and
the stack frame that `tl.randn` has. The two steps that often lose digits lose none here: a uniform
is an odd multiple of 2^-24, so u = m 2^k and the reduction of an angle to an eighth of a turn are
exact. Polynomials and their order are those of csrc/normals.h, so that Triton and CUDA make the
same noise on a GPU, to the bit. tests/ops/test_philox.py tries all 2^23 uniforms: radius, cosine
and sine are each at most one fp32 number away from those of `philox.box_muller`, which with the two
roundings of the product makes 6 * 2^-24 for a normal (8 * 2^-24 in Triton's interpreter, which does
not fuse multiply-adds).

Launch with enable_fp_fusion=False: the multiply-adds to be fused are written as such. A quad is
four elements, one call of Philox.
"""

from __future__ import annotations

from ..dispatch import jit, tl


@jit
def normal_tile(seed, step, first, TILE: tl.constexpr):
    """[TILE] normals, fp32: elements first, first + 1, ... of the sample with this seed (int64) at
    this step (int64).

    first: int64, a multiple of TILE; TILE: a power of two, at least 8. So the counters of a tile
    differ in their low word only. A thread makes two neighbouring quads, the eight elements that it
    loads: joining them moves nothing between threads.
    """
    quad = first // 4
    low = (quad & 0xFFFFFFFF).to(tl.uint32) + 2 * tl.arange(0, TILE // 8).to(tl.uint32)
    high, step = (quad >> 32).to(tl.uint32), step.to(tl.uint32)
    n0, n1, n2, n3 = normal_quad(seed, low, high, step)
    n4, n5, n6, n7 = normal_quad(seed, low + 1, high, step)
    evens = tl.join(tl.join(n0, n4), tl.join(n2, n6))
    odds = tl.join(tl.join(n1, n5), tl.join(n3, n7))
    # The last axis runs fastest: n0 n1 n2 ... n7 of one thread, then of the next.
    return tl.reshape(tl.join(evens, odds), (TILE,))


@jit
def normal_quad(seed, low, high, step):
    """The four normals of each quad, whose counter is (low, high, step, 0), all uint32. seed:
    int64.
    """
    w0, w1, w2, w3 = tl.philox(seed, low, high, step, 0, 10)
    n0, n1 = box_muller(uniform(w0), uniform(w1))
    n2, n3 = box_muller(uniform(w2), uniform(w3))
    return n0, n1, n2, n3


@jit
def uniform(words):
    """((word >> 9) + 1/2) * 2^-23 in (0, 1), fp32, exact. words: uint32."""
    one_to_two = ((words >> 9) | 0x3F800000).to(tl.float32, bitcast=True)
    return one_to_two - 0.999999940395355224609375  # 1 - 2^-24


@jit
def box_muller(u, v):
    """r cos(2 pi v), r sin(2 pi v) with r = sqrt(-2 ln u). u, v: fp32, values of `uniform`."""
    radius = tl.sqrt_rn(minus_two_log(u))
    cos, sin = cos_sin_turns(v)
    return radius * cos, radius * sin


@jit
def minus_two_log(u):
    """-2 ln u, fp32. u = m 2^k, 2/3 <= m < 4/3, x = m - 1:  -2 k ln 2 - 2 x + x^2 P(x)."""
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F2AAAAB) >> 23  # k; the constant is 2/3
    x = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    p = tl.fma(x, -0.24014303, 0.25690136)
    p = tl.fma(p, x, -0.21508472)
    p = tl.fma(p, x, 0.243915528)
    p = tl.fma(p, x, -0.28608912)
    p = tl.fma(p, x, 0.33359158)
    p = tl.fma(p, x, -0.39999196)
    p = tl.fma(p, x, 0.4999964)
    p = tl.fma(p, x, -0.66666668)
    p = tl.fma(p, x, 1.0)
    return tl.fma(exponent.to(tl.float32), -1.386294364, tl.fma(p, x * x, -2.0 * x))


@jit
def cos_sin_turns(v):
    """cos(2 pi v), sin(2 pi v), fp32. v: values of `uniform`.

    4 v = quarter + y, |y| < 1/2, exact; cosine and sine of y pi / 2 by polynomials, swapped and
    negated by the quarter.
    """
    # 1.5 * 2^23 rounds to a whole number, which the last bits then hold.
    shifted = tl.fma(v, 4.0, 12582912.0)
    quarter = shifted.to(tl.int32, bitcast=True)
    y = tl.fma(v, 4.0, 12582912.0 - shifted)
    z = y * y
    p = tl.fma(z, -0.004604834, 0.07968141)
    p = tl.fma(p, z, -0.6459636)
    # pi / 2 in two parts.
    sin = tl.fma(y, 1.57079637050628662109375, tl.fma(y, -4.37113900018624283e-8, (y * z) * p))
    p = tl.fma(z, 0.00090376654, -0.020860165)
    p = tl.fma(p, z, 0.25366923)
    p = tl.fma(p, z, -1.2337005)
    cos = tl.fma(z, p, 1.0)
    odd = (quarter & 1) != 0
    return negate(tl.where(odd, sin, cos), quarter + 1), negate(tl.where(odd, cos, sin), quarter)


@jit
def negate(x, quarter):
    """-x where bit 1 of the quarter is set."""
    return (x.to(tl.int32, bitcast=True) ^ ((quarter & 2) << 30)).to(tl.float32, bitcast=True)
