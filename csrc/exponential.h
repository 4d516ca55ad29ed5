// exp in fp32 for the CPU's loops, within 1 ulp: no branches and no library calls, so that a compiler can vectorise it.
#pragma once

#include "portable.h"

namespace fastgrpo {

// x = n ln 2 + r, |r| <= ln 2 / 2: 2^n (1 + r + r^2 Q(r)), Q fitted to 2^-28 of the exponential. exp(0) is 1; NaN stays NaN.
FASTGRPO_INLINE float exp_of(float x) {
  // Beyond these ends the result is 0 or infinite. A comparison with NaN is false: NaN passes.
  x = x < -104.0f ? -104.0f : x;
  x = x > 89.0f ? 89.0f : x;
  // A sum with 1.5 2^23 has no bits for a fraction: it rounds to an integer, which its last bits hold.
  const float rounded = x * 0x1.715476p+0f + 0x1.8p23f;
  const float n = rounded - 0x1.8p23f;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in 9 bits, so that the product is exact, and the rest
  float q = 0.0013814467f;
  q = q * r + 0.008368781f;
  q = q * r + 0.041668393f;
  q = q * r + 0.1666652f;
  q = q * r + 0.49999994f;
  const float fraction = 1.0f + (r + (r * r) * q);
  // In two factors, each of them a normal number, where 2^n is not one.
  const int32_t exponent = bit_cast<int32_t>(rounded) - 0x4B400000, half = exponent >> 1;
  const float first = bit_cast<float>(static_cast<uint32_t>(half + 127) << 23);
  const float second = bit_cast<float>(static_cast<uint32_t>(exponent - half + 127) << 23);
  return (fraction * first) * second;
}

}  // namespace fastgrpo
