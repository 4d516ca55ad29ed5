// The CPU's loops, written so that g++ vectorises them; included once per instruction set, with FASTGRPO_ISA as its name.
//
// A block of a row at a time goes through fp32 buffers that stay in the first-level cache, so that one loop serves every dtype.
// Only portable.h and headers that include nothing else may be included here: see there.

#include "launch.h"
#include "normals.h"
#include "philox.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace fastgrpo {
namespace {

constexpr int BLOCK = 256;  // elements; a multiple of 8 (accumulators) and of 4 (Philox)


const void* at(const void* base, Dtype dtype, int64_t index) { return static_cast<const char*>(base) + index * size_of(dtype); }
void* at(void* base, Dtype dtype, int64_t index) { return static_cast<char*>(base) + index * size_of(dtype); }

// n stored values as fp32: the memory itself for fp32, else the buffer.
const float* load(const void* source, Dtype dtype, int n, float* buffer) {
  if (dtype == Dtype::float32) return static_cast<const float*>(source);
  const uint16_t* bits = static_cast<const uint16_t*>(source);
  if (dtype == Dtype::bfloat16) {
    for (int i = 0; i < n; ++i) buffer[i] = float_from_bfloat16(bits[i]);
    return buffer;
  }
  int i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8) _mm256_storeu_ps(buffer + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bits + i))));
#endif
  for (; i < n; ++i) buffer[i] = float_from_float16(bits[i]);
  return buffer;
}

void store(const float* __restrict__ values, Dtype dtype, int n, void* target) {
  if (dtype == Dtype::float32) {
    memcpy(target, values, static_cast<size_t>(n) * sizeof(float));
    return;
  }
  uint16_t* __restrict__ bits = static_cast<uint16_t*>(target);
  if (dtype == Dtype::bfloat16) {
    for (int i = 0; i < n; ++i) bits[i] = bfloat16_from_float(values[i]);
    return;
  }
  int i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8) _mm_storeu_si128(reinterpret_cast<__m128i*>(bits + i), _mm256_cvtps_ph(_mm256_loadu_ps(values + i), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; i < n; ++i) bits[i] = float16_from_float(values[i]);
}


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
const CpuKernels FASTGRPO_ISA = {&step, &squared_error, &gradient};

}  // namespace fastgrpo
