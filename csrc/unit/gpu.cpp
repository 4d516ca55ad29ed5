// The GPU's kernels themselves, on an emulated GPU: a launch on a real one is tested by tests/ops where there is one.
#define FASTGRPO_MAX_BLOCKS 2
#include "../grpo_loss.cu"
#include "../sde_log_prob.cu"
#include "../sde_step.cu"
#include "cases.h"

using namespace fastgrpo;

namespace {

// The shifts of the outputs, whose alignment counts too.
void test_gpu(const Case& c, int64_t shift, int64_t uncond_shift) {
  const char* who = "emulated GPU";
  const int64_t count = c.batch * c.numel;
  Stored next(c.latents_dtype, count, shift), grad(c.velocity_dtype, count, shift), grad_uncond(c.velocity_dtype, count, uncond_shift);
  std::vector<double> partials(c.batch * cuda_partial_sums(c.numel), NAN);
  std::vector<float> log_probs(c.batch, NAN);
  cuda_sde_step(c.t, next.data(), log_probs.data(), partials.data(), nullptr);
  c.check_step(who, true, next);
  c.check_log_probs(who, next, log_probs);
  cuda_sde_log_prob(c.t, log_probs.data(), partials.data(), nullptr);
  c.check_log_probs(who, c.next, log_probs);
  const float grad_loss = 0.25f;
  cuda_gradient(c.t, c.grad_log_probs.data(), &grad_loss, grad.data(), c.guided ? grad_uncond.data() : nullptr, nullptr);
  c.check_gradient(who, grad, c.guided ? &grad_uncond : nullptr, grad_loss);
}

void test_gpu_loss(std::mt19937_64& random, int64_t batch, bool with_log_probs) {
  std::normal_distribution<float> normal;
  const Case c(random, Dtype::float32, Dtype::bfloat16, batch, with_log_probs ? 40 : 1, 0, true, true, {0.1f, 0.05f});
  std::vector<float> log_probs(batch), old(batch), advantages(batch), ratio(batch, NAN), gradient(batch, NAN), scalars(3, NAN);
  std::unique_ptr<bool[]> clipped(new bool[static_cast<size_t>(batch)]);
  for (int64_t i = 0; i < batch; ++i) {
    const float truth = c.expected_log_prob(i, c.next);
    log_probs[i] = with_log_probs ? NAN : truth, old[i] = truth + 0.3f * normal(random), advantages[i] = 4.0f * normal(random);
  }
  const ClippedLoss l{log_probs.data(), old.data(), advantages.data(), &scalars[0], ratio.data(), clipped.get(), &scalars[1], &scalars[2], gradient.data(), bounds_of(0.2, 5.0), batch};
  std::vector<double> partials(batch * cuda_partial_sums(c.numel), NAN);
  with_log_probs ? cuda_grpo_loss(c.t, log_probs.data(), l, partials.data(), nullptr) : cuda_clipped_loss(l, nullptr);
  if (with_log_probs) c.check_log_probs("loss kernel", c.next, log_probs);
  double objective = 0.0, squares = 0.0, count = 0.0;
  for (int64_t i = 0; i < batch; ++i) {
    const float log_ratio = log_probs[i] - old[i];
    const ClipTerm term = clip_term(static_cast<float>(std::exp(static_cast<double>(log_ratio))), advantages[i], l.bounds, batch);
    EXPECT(clipped[i] == term.clipped && gradient[i] == term.gradient, "sample %d: %d, %a", int(i), clipped[i], gradient[i]);
    objective += term.objective, squares += static_cast<double>(log_ratio) * log_ratio, count += term.clipped;
  }
  const double n = batch ? static_cast<double>(batch) : 1.0;
  EXPECT(std::fabs(scalars[0] + objective / n) <= 1e-6 * std::fabs(objective / n), "loss of %d: %a, expected %a", int(batch), scalars[0], -objective / n);
  EXPECT(scalars[1] == static_cast<float>(count / n) && std::fabs(scalars[2] - 0.5 * squares / n) <= 1e-6 * squares / n, "clip fraction %a, KL %a", scalars[1], scalars[2]);
}

}  // namespace

void test_gpu_kernels() {
  for_cases([](const Case& c, int index) {
    if (index % 7 == 0 || c.numel == 5000) test_gpu(c, c.shift + index / 3 % 2, c.shift + index / 6 % 2);  // 256 threads a launch: not every case
  });
  std::mt19937_64 random(3);
  for (int64_t batch : {0, 1, 5, 37}) {
    test_gpu_loss(random, batch, true);
    test_gpu_loss(random, batch, false);
  }
  test_gpu_loss(random, 700, false);
}
