// The CPU's loops, written so that g++ vectorises them; included once per instruction set, with FASTGRPO_ISA as its name.
//
// Here the loops of a transition, in norm_cpu.h and gelu_cpu.h those of a transformer's pointwise work, in attention_cpu.h those of its
// attention. Only portable.h and headers that include nothing else may be included here: see there.

#include "attention_cpu.h"
#include "gelu_cpu.h"
#include "launch.h"
#include "norm_cpu.h"
#include "normals.h"
#include "philox.h"
#include "storage_cpu.h"

namespace fastgrpo {
namespace {

constexpr int BLOCK = 256;  // elements; a multiple of 8 (accumulators) and of 4 (Philox)

// Standard normals of `quads` groups of four elements, the first being `quad`.
void noise_block(int64_t seed, int64_t step, int64_t quad, int quads, float* __restrict__ noise) {
  int32_t radius_n[BLOCK / 2], angle_n[BLOCK / 2];
  float radius[BLOCK / 2];
  for (int i = 0; i < quads; ++i) {
    const Words w = noise_words(seed, step, quad + i);
    radius_n[2 * i] = static_cast<int32_t>(w.w0 >> 9), radius_n[2 * i + 1] = static_cast<int32_t>(w.w2 >> 9);
    angle_n[2 * i] = static_cast<int32_t>(w.w1 >> 9), angle_n[2 * i + 1] = static_cast<int32_t>(w.w3 >> 9);
  }
  for (int i = 0; i < 2 * quads; ++i) radius[i] = radius64(radius_n[i]);
  for (int i = 0; i < 2 * quads; ++i) {
    float c, s;
    cos_sin64(angle_n[i], c, s);
    noise[2 * i] = radius[i] * c;
    noise[2 * i + 1] = radius[i] * s;
  }
}

void mean_block(const Transition& t, int64_t row, int64_t index, int n, float* __restrict__ mean) {
  float x_buffer[BLOCK], cond_buffer[BLOCK], uncond_buffer[BLOCK];
  const float a = t.a[row], b = t.b[row], w = t.guidance_scale;
  const float* x = load(at(t.latents, t.latents_dtype, index), t.latents_dtype, n, x_buffer);
  const float* cond = load(at(t.velocity, t.velocity_dtype, index), t.velocity_dtype, n, cond_buffer);
  if (t.uncond == nullptr) {
    for (int i = 0; i < n; ++i) mean[i] = mean_of(a, x[i], b, cond[i]);
    return;
  }
  const float* uncond = load(at(t.uncond, t.velocity_dtype, index), t.velocity_dtype, n, uncond_buffer);
  for (int i = 0; i < n; ++i) mean[i] = mean_of(a, x[i], b, guide(cond[i], uncond[i], w));
}

// Eight running sums, as many as a register holds; their order is free because the sum is exact.
double squared_error_block(const float* __restrict__ stored, const float* __restrict__ mean, int n, double rounder) {
  double sums[8] = {};
  int i = 0;
  for (; i + 8 <= n; i += 8) {
    for (int lane = 0; lane < 8; ++lane) {
      const float error = stored[i + lane] - mean[i + lane];
      sums[lane] += quantised(error * error, rounder);
    }
  }
  for (; i < n; ++i) {
    const float error = stored[i] - mean[i];
    sums[i & 7] += quantised(error * error, rounder);
  }
  return ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]));
}


double step(const Transition& t, void* next_latents, int64_t row, int64_t begin, int64_t end) {
  float noise[BLOCK], mean[BLOCK], next[BLOCK], stored_buffer[BLOCK];
  const float std = t.std[row];
  const double rounder = rounder_of(std);
  double sum = 0.0;
  for (int64_t offset = begin; offset < end; offset += BLOCK) {
    const int n = static_cast<int>(end - offset < BLOCK ? end - offset : BLOCK);
    const int64_t index = row * t.numel + offset;
    noise_block(t.seeds[row], t.steps[row], offset / 4, (n + 3) / 4, noise);
    mean_block(t, row, index, n, mean);
    for (int i = 0; i < n; ++i) next[i] = add_noise(mean[i], std, noise[i]);
    void* target = at(next_latents, t.latents_dtype, index);
    store(next, t.latents_dtype, n, target);
    sum += squared_error_block(load(target, t.latents_dtype, n, stored_buffer), mean, n, rounder);
  }
  return sum;
}

double squared_error(const Transition& t, int64_t row, int64_t begin, int64_t end) {
  float mean[BLOCK], stored_buffer[BLOCK];
  const double rounder = rounder_of(t.std[row]);
  double sum = 0.0;
  for (int64_t offset = begin; offset < end; offset += BLOCK) {
    const int n = static_cast<int>(end - offset < BLOCK ? end - offset : BLOCK);
    const int64_t index = row * t.numel + offset;
    mean_block(t, row, index, n, mean);
    sum += squared_error_block(load(at(t.next_latents, t.latents_dtype, index), t.latents_dtype, n, stored_buffer), mean, n, rounder);
  }
  return sum;
}

void gradient(const Transition& t, float scale, void* grad, void* grad_uncond, int64_t row, int64_t begin, int64_t end) {
  float mean[BLOCK], stored_buffer[BLOCK], cond[BLOCK], uncond[BLOCK];
  const float b = t.b[row], w = t.guidance_scale;
  for (int64_t offset = begin; offset < end; offset += BLOCK) {
    const int n = static_cast<int>(end - offset < BLOCK ? end - offset : BLOCK);
    const int64_t index = row * t.numel + offset;
    mean_block(t, row, index, n, mean);
    const float* stored = load(at(t.next_latents, t.latents_dtype, index), t.latents_dtype, n, stored_buffer);
    for (int i = 0; i < n; ++i) {
      const float guided = velocity_gradient(scale, stored[i] - mean[i], b);
      cond[i] = t.uncond == nullptr ? guided : guided * w;
      uncond[i] = guided - cond[i];
    }
    store(cond, t.velocity_dtype, n, at(grad, t.velocity_dtype, index));
    if (grad_uncond != nullptr) store(uncond, t.velocity_dtype, n, at(grad_uncond, t.velocity_dtype, index));
  }
}

}  // namespace

extern const CpuKernels FASTGRPO_ISA;
const CpuKernels FASTGRPO_ISA = {&step, &squared_error, &gradient, &gated_norm, &gated_norm_backward, &qk_norm, &qk_norm_backward,
                               &bias_gelu, &bias_gelu_backward, &few_token_attention, &few_token_attention_backward};

}  // namespace fastgrpo
