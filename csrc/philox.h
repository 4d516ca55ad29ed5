// Philox-4x32-10 (Salmon et al., SC 2011) as kernels/fastgrpo_kernels/random/philox.py has it:
// key = the two words of the seed, counter = (quad low, quad high, step, 0); one call gives the noise of 4 elements.
#pragma once

#include "portable.h"

namespace fastgrpo {

struct Words {
  uint32_t w0, w1, w2, w3;
};

FASTGRPO_INLINE Words philox_4x32_10(Words c, uint32_t k0, uint32_t k1) {
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(c.w0) * 0xD2511F53u, p1 = static_cast<uint64_t>(c.w2) * 0xCD9E8D57u;
    c = {static_cast<uint32_t>(p1 >> 32) ^ c.w1 ^ k0, static_cast<uint32_t>(p1), static_cast<uint32_t>(p0 >> 32) ^ c.w3 ^ k1,
         static_cast<uint32_t>(p0)};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

// The words of elements 4 quad .. 4 quad + 3 of one sample's noise.
FASTGRPO_INLINE Words noise_words(int64_t seed, int64_t step, int64_t quad) {
  const uint64_t key = static_cast<uint64_t>(seed), index = static_cast<uint64_t>(quad);
  return philox_4x32_10({static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32), static_cast<uint32_t>(step), 0u},
                        static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32));
}

}  // namespace fastgrpo
