// What the tests of the CPU's loops share: random tensors, the instruction sets of this processor, and how exact is exact.
#pragma once

#include "cases.h"

namespace fastgrpo {

struct Numbers {
  std::mt19937_64 random{5};
  std::normal_distribution<float> normal;

  Stored stored(Dtype dtype, int64_t count, int64_t shift) {
    Stored made(dtype, count, shift);
    for (int64_t i = 0; i < count; ++i) made.set(i, normal(random));
    return made;
  }
};

struct Isa {
  const char* name;
  const CpuKernels* kernels;
};

inline std::vector<Isa> instruction_sets() {
  std::vector<Isa> sets = {{"plain", &cpu_plain}};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) sets.push_back({"avx2", &cpu_avx2});
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
    sets.push_back({"avx512", &cpu_avx512});
  }
#endif
  return sets;
}

// 8 ulps of the dtype, and of fp32 sums; `size` is the size of what was added up.
inline bool near(float actual, double expected, Dtype dtype, double size) {
  const double ulp = dtype == Dtype::float32 ? 0x1p-23 : dtype == Dtype::bfloat16 ? 0x1p-8 : 0x1p-11;
  return std::abs(actual - expected) <= ulp * std::abs(expected) + 0x1p-18 * (size + 1.0);
}

inline void expect_same(const char* who, const char* what, const Stored& actual, const Stored& plain) {
  for (int64_t i = 0; i < actual.count; ++i) {
    EXPECT(same(actual.get(i), plain.get(i)), "%s, %s, element %d of %d: %a, plain %a", who, what, int(i), int(actual.count), actual.get(i), plain.get(i));
  }
}

}  // namespace fastgrpo
