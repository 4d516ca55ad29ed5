// Batches of transitions of every kind, and what the formulas say of them in the plainest words: ragged lengths, rows that are not
// aligned, every dtype, extreme std. Buffers have exactly their size, so the sanitizer sees a step beyond their ends.
#pragma once

#include <cmath>
#include <memory>
#include <random>
#include <vector>

#include "../launch.h"
#include "../normals.h"
#include "../philox.h"
#include "expect.h"

namespace fastgrpo {

// Stored numbers, `shift` elements after the start of an allocation of exactly the right size.
struct Stored {
  Dtype dtype;
  int64_t count, shift;
  std::unique_ptr<char[]> memory;

  Stored(Dtype dtype, int64_t count, int64_t shift)
      : dtype(dtype), count(count), shift(shift), memory(new char[static_cast<size_t>((count + shift) * size_of(dtype))]) {
    for (int64_t i = 0; i < count; ++i) set(i, NAN);
  }
  void* data() const { return memory.get() + shift * size_of(dtype); }
  float get(int64_t i) const {
    if (dtype == Dtype::float32) return static_cast<const float*>(data())[i];
    const uint16_t bits = static_cast<const uint16_t*>(data())[i];
    return dtype == Dtype::bfloat16 ? float_from_bfloat16(bits) : float_from_float16(bits);
  }
  void set(int64_t i, float value) {
    if (dtype == Dtype::float32) {
      static_cast<float*>(data())[i] = value;
    } else {
      static_cast<uint16_t*>(data())[i] = dtype == Dtype::bfloat16 ? bfloat16_from_float(value) : float16_from_float(value);
    }
  }
  float round(float value) const {
    if (dtype == Dtype::float32) return value;
    return dtype == Dtype::bfloat16 ? float_from_bfloat16(bfloat16_from_float(value)) : float_from_float16(float16_from_float(value));
  }
};

inline bool same(float x, float y) { return x == y || (std::isnan(x) && std::isnan(y)); }

// One batch of transitions, and what the formulas say of it, in the plainest words.
struct Case {
  Dtype latents_dtype, velocity_dtype;
  int64_t batch, numel, shift;
  bool guided, normalized;
  Stored x, next, cond, uncond;
  std::vector<float> a, b, std, mean, grad_log_probs, log_probs;
  std::vector<int64_t> seeds, steps;
  Transition t;

  Case(std::mt19937_64& random, Dtype latents, Dtype velocity, int64_t batch, int64_t numel, int64_t shift, bool guided, bool normalized, std::vector<float> stds)
      : latents_dtype(latents), velocity_dtype(velocity), batch(batch), numel(numel), shift(shift), guided(guided), normalized(normalized),
        x(latents, batch * numel, shift), next(latents, batch * numel, shift), cond(velocity, batch * numel, shift), uncond(velocity, batch * numel, shift) {
    std::normal_distribution<float> normal;
    for (int64_t row = 0; row < batch; ++row) {
      a.push_back(0.9f + 0.01f * normal(random)), b.push_back(0.2f * normal(random)), std.push_back(stds[row % stds.size()]);
      seeds.push_back(static_cast<int64_t>(random())), steps.push_back(static_cast<int64_t>(random() >> 32));
      grad_log_probs.push_back(normal(random)), log_probs.push_back(NAN);
    }
    t = {x.data(), next.data(), cond.data(), guided ? uncond.data() : nullptr, a.data(), b.data(), std.data(), seeds.data(), steps.data(),
         latents, velocity, batch, numel, 3.5f, normalized};
    for (int64_t i = 0; i < batch * numel; ++i) {
      x.set(i, normal(random)), cond.set(i, normal(random)), uncond.set(i, normal(random));
      const float v = guided ? uncond.get(i) + 3.5f * (cond.get(i) - uncond.get(i)) : cond.get(i);
      mean.push_back(a[i / numel] * x.get(i) + b[i / numel] * v);
      next.set(i, mean[i] + std[i / numel] * normal(random));
    }
  }

  float expected_log_prob(int64_t row, const Stored& stored) const {
    double sum = 0.0;
    for (int64_t i = row * numel; i < (row + 1) * numel; ++i) {
      const float error = stored.get(i) - mean[i];
      sum += quantised(error * error, rounder_of(std[row]));
    }
    return log_prob_of(sum, numel, std[row], std::log(static_cast<double>(std[row])), normalized);
  }

  void check_log_probs(const char* who, const Stored& stored, const std::vector<float>& actual) const {
    for (int64_t row = 0; row < batch; ++row) {
      const float expected = expected_log_prob(row, stored);
      EXPECT(same(actual[row], expected), "%s, row %d of length %d, shift %d: log-prob %a, expected %a", who, int(row), int(numel), int(shift), actual[row], expected);
    }
  }

  // path32: the GPU's normals.
  void check_step(const char* who, bool path32, const Stored& actual) const {
    for (int64_t i = 0; i < batch * numel; ++i) {
      const int64_t row = i / numel, element = i % numel;
      const Words w = noise_words(seeds[row], steps[row], element / 4);
      const int32_t first = static_cast<int32_t>((element % 4 < 2 ? w.w0 : w.w2) >> 9), second = static_cast<int32_t>((element % 4 < 2 ? w.w1 : w.w3) >> 9);
      float c, s;
      if (path32) cos_sin32(second, c, s);
      if (!path32) cos_sin64(second, c, s);
      const float noise = (path32 ? radius32(first) : radius64(first)) * (element % 2 ? s : c);
      const float expected = actual.round(mean[i] + std[row] * noise);
      EXPECT(same(actual.get(i), expected), "%s, element %d of %d, shift %d: x' %a, expected %a", who, int(element), int(numel), int(shift), actual.get(i), expected);
    }
  }

  void check_gradient(const char* who, const Stored& grad, const Stored* grad_uncond, float grad_loss) const {
    for (int64_t i = 0; i < batch * numel; ++i) {
      const int64_t row = i / numel;
      const float g = grad_log_probs[row] * grad_loss, e = next.get(i) - mean[i];
      const double s = std[row], p = static_cast<double>(numel);
      const float scale = std[row] == 0.0f ? 0.0f : static_cast<float>(static_cast<double>(g) * (normalized ? -1.0 / (2 * s * s * p) : -1.0 / p));
      const float total = (scale * (2.0f * e)) * -b[row], to_cond = guided ? total * 3.5f : total;
      EXPECT(same(grad.get(i), grad.round(to_cond)), "%s, element %d: gradient %a, expected %a", who, int(i % numel), grad.get(i), to_cond);
      if (grad_uncond) {
        EXPECT(same(grad_uncond->get(i), grad.round(total - to_cond)), "%s, element %d: unconditional gradient %a", who, int(i % numel), grad_uncond->get(i));
      }
    }
  }
};

// Each length with each pair of dtypes; shift, guidance, std and the rest take turns, so that over the lengths every dtype meets each.
template <typename Test>
void for_cases(const Test& test) {
  std::mt19937_64 random(2);
  const Dtype all[] = {Dtype::float32, Dtype::bfloat16, Dtype::float16};
  const std::vector<float> ordinary = {0.1f, 0.25f}, extreme = {0.0f, 1e-44f, 1e-20f, 1e-3f, 1e15f};
  int index = 0;
  for (int64_t numel : {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 31, 33, 255, 256, 257, 263, 511, 768, 1025, 5000}) {
    for (Dtype latents : all) {
      for (Dtype velocity : all) {
        ++index;
        test(Case(random, latents, velocity, 3, numel, index % 3, index % 2 == 0, index % 5 != 0, index % 4 ? ordinary : extreme), index);
      }
    }
  }
}

}  // namespace fastgrpo
