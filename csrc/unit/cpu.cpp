// The CPU's loops, for every instruction set that this processor has.
#include <algorithm>

#include "cases.h"

using namespace fastgrpo;

namespace {

void test_cpu(const char* who, const CpuKernels& kernels, const Case& c, int64_t chunk) {
  Stored next(c.latents_dtype, c.batch * c.numel, c.shift), grad(c.velocity_dtype, c.batch * c.numel, c.shift), grad_uncond(c.velocity_dtype, c.batch * c.numel, c.shift);
  std::vector<float> of_step, of_stored;
  for (int64_t row = 0; row < c.batch; ++row) {
    double step = 0.0, stored = 0.0;
    for (int64_t begin = 0; begin < c.numel; begin += chunk) {
      const int64_t end = std::min(begin + chunk, c.numel);
      step += kernels.step(c.t, next.data(), row, begin, end);
      stored += kernels.squared_error(c.t, row, begin, end);
      kernels.gradient(c.t, gradient_scale(c.grad_log_probs[row], c.std[row], c.numel, c.normalized), grad.data(), c.guided ? grad_uncond.data() : nullptr, row, begin, end);
    }
    const double log_std = std::log(static_cast<double>(c.std[row]));
    of_step.push_back(log_prob_of(step, c.numel, c.std[row], log_std, c.normalized));
    of_stored.push_back(log_prob_of(stored, c.numel, c.std[row], log_std, c.normalized));
  }
  c.check_step(who, false, next);
  c.check_log_probs(who, next, of_step);
  c.check_log_probs(who, c.next, of_stored);
  c.check_gradient(who, grad, c.guided ? &grad_uncond : nullptr, 1.0f);
}

}  // namespace

void test_cpu_kernels() {
  for_cases([](const Case& c, int index) {
    const int64_t chunk = index % 2 ? 512 : 1 << 20;
    test_cpu("plain", cpu_plain, c, chunk);
#if defined(__x86_64__)
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) test_cpu("avx2", cpu_avx2, c, chunk);
    if (avx512) test_cpu("avx512", cpu_avx512, c, chunk);
    if (index == 1) std::printf("CPU kernels: plain%s%s\n", __builtin_cpu_supports("avx2") ? ", avx2" : "", avx512 ? ", avx512" : "");
#endif
  });
}
