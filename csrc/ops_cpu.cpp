// The operations on the CPU: which instruction set, how a batch is cut among threads, and the small sums over the batch.
#include "ops.h"

#include <algorithm>
#include <cmath>
#include <string>

namespace fastgrpo {
namespace {

// Elements of a row that one thread takes at a time. A constant: where the sum of a row is beyond the exact range (see `quantised`),
// its bits depend on how it is cut, and may depend on neither threads nor batch.
constexpr int64_t CHUNK = 32768;

struct Choice {
  const CpuKernels* kernels;
  const char* name;
};

Choice best_instructions() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl");
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) return avx512 ? Choice{&cpu_avx512, "avx512"} : Choice{&cpu_avx2, "avx2"};
#endif
  return {&cpu_plain, "plain"};
}

const Choice chosen = best_instructions();

// work(row, begin, end, part) for every chunk of every row, on as many threads as the work is worth.
template <typename Work>
void for_chunks(const Transition& t, const Work& work) {
  const int64_t parts = (t.numel + CHUNK - 1) / CHUNK, size = std::min(t.numel, CHUNK);
  torch::stable::parallel_for(0, t.batch * parts, std::max<int64_t>(CHUNK / size, 1), [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) {
      const int64_t begin = part % parts * CHUNK;
      work(part / parts, begin, std::min(begin + CHUNK, t.numel), part);
    }
  });
}

void log_probs_of(const Transition& t, const std::vector<double>& sums, float* log_probs) {
  const int64_t parts = static_cast<int64_t>(sums.size()) / t.batch;
  for (int64_t row = 0; row < t.batch; ++row) {
    double sum = 0.0;
    for (int64_t part = 0; part < parts; ++part) sum += sums[row * parts + part];
    log_probs[row] = log_prob_of(sum, t.numel, t.std[row], std::log(static_cast<double>(t.std[row])), t.normalized);
  }
}

std::vector<double> empty_sums(const Transition& t) { return std::vector<double>(t.batch * ((t.numel + CHUNK - 1) / CHUNK)); }

struct Cpu {
  static void sde_step(const Transition& t, void* next_latents, float* log_probs, const Tensor&) {
    std::vector<double> sums = empty_sums(t);
    for_chunks(t, [&](int64_t row, int64_t begin, int64_t end, int64_t part) { sums[part] = chosen.kernels->step(t, next_latents, row, begin, end); });
    log_probs_of(t, sums, log_probs);
  }

  static void sde_log_prob(const Transition& t, float* log_probs, const Tensor&) {
    std::vector<double> sums = empty_sums(t);
    for_chunks(t, [&](int64_t row, int64_t begin, int64_t end, int64_t part) { sums[part] = chosen.kernels->squared_error(t, row, begin, end); });
    log_probs_of(t, sums, log_probs);
  }

  static void gradient(const Transition& t, const float* grad_log_probs, const float* grad_loss, void* grad, void* grad_uncond, const Tensor&) {
    for_chunks(t, [&](int64_t row, int64_t begin, int64_t end, int64_t) {
      const float g = grad_loss ? grad_log_probs[row] * *grad_loss : grad_log_probs[row];
      chosen.kernels->gradient(t, gradient_scale(g, t.std[row], t.numel, t.normalized), grad, grad_uncond, row, begin, end);
    });
  }

  static void clipped_ratio_loss(const ClippedLoss& t, const Tensor&) {
    double objective = 0.0, squares = 0.0;
    int64_t clipped = 0;
    for (int64_t i = 0; i < t.batch; ++i) {
      const float log_ratio = t.log_probs[i] - t.old_log_probs[i];
      const float ratio = static_cast<float>(std::exp(static_cast<double>(log_ratio)));
      const ClipTerm term = clip_term(ratio, t.advantages[i], t.bounds, t.batch);
      t.ratio[i] = ratio;
      t.clipped[i] = term.clipped;
      t.grad_log_probs[i] = term.gradient;
      objective += term.objective;
      squares += static_cast<double>(log_ratio) * log_ratio;
      clipped += term.clipped;
    }
    *t.loss = batch_loss(objective, t.batch);
    *t.clip_fraction = batch_fraction(clipped, t.batch);
    *t.approx_kl = batch_kl(squares, t.batch);
  }

  static void grpo_loss(const Transition& t, float* log_probs, const ClippedLoss& loss, const Tensor& like) {
    if (t.batch) sde_log_prob(t, log_probs, like);
    clipped_ratio_loss(loss, like);
  }
};

std::string build_info() {
#if defined(__x86_64__)
  std::string info = std::string("cpu: plain, avx2, avx512; here ") + chosen.name;
#else
  std::string info = "cpu: plain";
#endif
#ifdef FASTGRPO_WITH_CUDA
  info += std::string("; cuda ") + cuda_version();
#else
  info += "; no cuda";
#endif
  return info;
}

}  // namespace

const CpuKernels& best_cpu_kernels() { return *chosen.kernels; }

}  // namespace fastgrpo

STABLE_TORCH_LIBRARY_IMPL(fastgrpo, CPU, m) { fastgrpo::register_operations<fastgrpo::Cpu>(m); }
STABLE_TORCH_LIBRARY_IMPL(fastgrpo, CompositeExplicitAutograd, m) { m.impl("build_info", TORCH_BOX(&fastgrpo::build_info)); }
