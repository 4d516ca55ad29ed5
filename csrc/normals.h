// Box-Muller twice: in float64 for the CPU, whose normals have the bits of the reference, and in fp32 for the GPU.
//
//   uniform(n) = (n + 1/2) 2^-23, n = word >> 9        radius = sqrt(-2 ln u)        cos, sin of 2 pi v
//
// Only 2^23 arguments exist, and csrc/unit/numbers.cpp tries them all: the float64 path gives the reference's fp32 bits (whose margin is 20
// float64 ulps, kernels/fastgrpo_kernels/random/philox.py), the fp32 path stays within one fp32 ulp of them. No branches and no
// library calls, so that a compiler can vectorise every function, and host and device give the same bits.
#pragma once

#include "portable.h"

namespace fastgrpo {

// n < 2^23 as the 24-bit number n + 1/2, exact in either precision.
FASTGRPO_INLINE double uniform64(int32_t n) { return (static_cast<double>(n) + 0.5) * 0x1p-23; }
FASTGRPO_INLINE float uniform32(int32_t n) { return (static_cast<float>(n) + 0.5f) * 0x1p-23f; }

// u = 2^exponent * fraction, with the fraction in [low, 2 low); u is exact in fp32, whatever the precision of what follows.
struct Split {
  float fraction;
  int32_t exponent;
};
FASTGRPO_INLINE Split split(float u, float low) {
  const int32_t above = bit_cast<int32_t>(u) - bit_cast<int32_t>(low);
  const int32_t exponent = above >> 23;
  return {bit_cast<float>(bit_cast<int32_t>(u) - exponent * (1 << 23)), exponent};
}

// The quarter turn nearest to 2 pi v: round(4 v), 0 to 4.
FASTGRPO_INLINE int32_t quarter_turns(int32_t n) { return (n + (1 << 20)) >> 21; }

// cos and sin of (quarters pi/2 + rest), from those of the rest.
FASTGRPO_INLINE void rotate(int32_t quarters, float cosine, float sine, float& c, float& s) {
  const int32_t odd = -(quarters & 1), cos_bits = bit_cast<int32_t>(cosine), sin_bits = bit_cast<int32_t>(sine);
  const int32_t c_bits = (sin_bits & odd) | (cos_bits & ~odd), s_bits = (cos_bits & odd) | (sin_bits & ~odd);
  c = bit_cast<float>(static_cast<int32_t>(c_bits ^ static_cast<int32_t>(static_cast<uint32_t>((quarters + 1) & 2) << 30)));
  s = bit_cast<float>(static_cast<int32_t>(s_bits ^ static_cast<int32_t>(static_cast<uint32_t>(quarters & 2) << 30)));
}


// -2 ln u by ln f = 2 artanh((f - 1) / (f + 1)), |argument| <= 0.1716; the last term is below 2^-55 of the first.
FASTGRPO_INLINE double minus_two_log64(int32_t n) {
  const Split u = split(uniform32(n), 0.70710678f);
  const double f = u.fraction, s = (f - 1.0) / (f + 1.0), z = s * s;
  double p = 1.0 / 21;
  p = p * z + 1.0 / 19;
  p = p * z + 1.0 / 17;
  p = p * z + 1.0 / 15;
  p = p * z + 1.0 / 13;
  p = p * z + 1.0 / 11;
  p = p * z + 1.0 / 9;
  p = p * z + 1.0 / 7;
  p = p * z + 1.0 / 5;
  p = p * z + 1.0 / 3;
  const double half_log_f = s + s * (z * p);
  return -4.0 * half_log_f - 2.0 * static_cast<double>(u.exponent) * 0x1.62e42fefa39efp-1;  // ln 2
}

FASTGRPO_INLINE float radius64(int32_t n) { return static_cast<float>(__builtin_sqrt(minus_two_log64(n))); }

// cos and sin of fl(v * fl(2 pi)), the reference's angle, not of 2 pi v: near their zeros the two differ by more than fp32 forgives.
FASTGRPO_INLINE void cos_sin64(int32_t n, float& c, float& s) {
  const double angle = uniform64(n) * 6.283185307179586;
  const int32_t quarters = quarter_turns(n);
  const double q = static_cast<double>(quarters);
  const double r = (angle - q * 0x1.921fb544p+0) - q * 0x1.0b4611a626331p-34;  // pi/2 in 33 bits, so that the product is exact, and the rest
  const double z = r * r;
  double ps = 1.0 / 355687428096000;  // 17!
  ps = 1.0 / 1307674368000 - z * ps;
  ps = 1.0 / 6227020800 - z * ps;
  ps = 1.0 / 39916800 - z * ps;
  ps = 1.0 / 362880 - z * ps;
  ps = 1.0 / 5040 - z * ps;
  ps = 1.0 / 120 - z * ps;
  ps = 1.0 / 6 - z * ps;
  double pc = 1.0 / 6402373705728000;  // 18!
  pc = 1.0 / 20922789888000 - z * pc;
  pc = 1.0 / 87178291200 - z * pc;
  pc = 1.0 / 479001600 - z * pc;
  pc = 1.0 / 3628800 - z * pc;
  pc = 1.0 / 40320 - z * pc;
  pc = 1.0 / 720 - z * pc;
  pc = 1.0 / 24 - z * pc;
  pc = 0.5 - z * pc;
  rotate(quarters, static_cast<float>(1.0 - z * pc), static_cast<float>(r - r * (z * ps)), c, s);
}


// Fused here by name, on both sides: a correctly rounded operation like the others, and the same bits everywhere.
FASTGRPO_INLINE float fused(float x, float y, float z) {
#ifdef __CUDA_ARCH__
  return __fmaf_rn(x, y, z);
#else
  return __builtin_fmaf(x, y, z);
#endif
}

// ln u = exponent ln 2 + log1p(f - 1), f in [2/3, 4/3): x - x^2/2 + x^3 Q(x), Q fitted to 2^-30 of the logarithm.
FASTGRPO_INLINE float minus_two_log32(int32_t n) {
  const Split u = split(uniform32(n), 0.66666669f);
  const float x = u.fraction - 1.0f;
  float p = 0.120071515f;
  p = fused(p, x, -0.12845068f);
  p = fused(p, x, 0.10754236f);
  p = fused(p, x, -0.121957764f);
  p = fused(p, x, 0.14304456f);
  p = fused(p, x, -0.16679579f);
  p = fused(p, x, 0.19999598f);
  p = fused(p, x, -0.2499982f);
  p = fused(p, x, 0.33333334f);
  p = fused(p, x, -0.5f);
  const float log1p = fused(p, x * x, x);
  return -2.0f * fused(static_cast<float>(u.exponent), 0.693147182f, log1p);
}

FASTGRPO_INLINE float radius32(int32_t n) {
#ifdef __CUDA_ARCH__
  return __fsqrt_rn(minus_two_log32(n));
#else
  return __builtin_sqrtf(minus_two_log32(n));
#endif
}

// cos and sin of 2 pi v: the rest r = 4 v - round(4 v), in quarter turns, is exact; polynomials fitted to 2^-28 and 2^-33.
FASTGRPO_INLINE void cos_sin32(int32_t n, float& c, float& s) {
  const int32_t quarters = quarter_turns(n);
  const float r = static_cast<float>(2 * (n - quarters * (1 << 21)) + 1) * 0x1p-22f;
  const float z = r * r;
  float ps = -0.004604834f;
  ps = fused(ps, z, 0.07968141f);
  ps = fused(ps, z, -0.6459636f);
  const float sine = fused(r, 0x1.921fb6p+0f, fused(r, -0x1.777a5cp-25f, (r * z) * ps));  // pi/2 in two fp32 parts
  float pc = 0.00090376654f;
  pc = fused(pc, z, -0.020860165f);
  pc = fused(pc, z, 0.25366923f);
  pc = fused(pc, z, -1.2337005f);
  rotate(quarters, fused(pc, z, 1.0f), sine, c, s);
}

}  // namespace fastgrpo
