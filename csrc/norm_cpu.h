// The CPU's loops of a transformer's pointwise work: gated residual, LayerNorm and modulation; RMSNorm and rotation of queries and keys.
// kernels/fastgrpo_kernels/norm/ says what they compute.
//
// A row's sums go through 16 running sums in every instruction set, so that all of them give the same bits.
// Included by kernels_cpu.h, under its conditions.
#pragma once

#include "launch.h"
#include "storage_cpu.h"

namespace fastgrpo {
namespace {

constexpr int LANES = 16;

// The sum of term(0) ... term(n - 1).
template <typename Term>
FASTGRPO_INLINE float row_sum(int n, const Term& term) {
  float sums[LANES] = {};
  int i = 0;
  for (; i + LANES <= n; i += LANES) {
    for (int lane = 0; lane < LANES; ++lane) sums[lane] += term(i + lane);
  }
  for (int lane = 0; i < n; ++i, ++lane) sums[lane] += term(i);
  // Written out: with a loop around them the compiler keeps the sums in memory.
  for (int lane = 0; lane < 8; ++lane) sums[lane] += sums[lane + 8];
  for (int lane = 0; lane < 4; ++lane) sums[lane] += sums[lane + 4];
  return (sums[0] + sums[2]) + (sums[1] + sums[3]);
}

FASTGRPO_INLINE float row_mean(float sum, int n) { return sum / static_cast<float>(n); }

FASTGRPO_INLINE float inverse_root(float value) { return 1.0f / __builtin_sqrtf(value); }

// One token's gate, scale or shift.
const float* modulation_row(const Modulation& m, Dtype dtype, int64_t sample, int64_t token, int n, float* buffer) {
  return load(at(m.data, dtype, sample * m.sample_stride + token * m.token_stride), dtype, n, buffer);
}


void gated_norm(const GatedNorm& t, int64_t begin, int64_t end, float* scratch) {
  const int n = static_cast<int>(t.channels);
  float *x_buffer = scratch, *y_buffer = scratch + n, *gate_buffer = scratch + 2 * n, *sum_buffer = scratch + 3 * n;
  float *scale_buffer = scratch + 4 * n, *shift_buffer = scratch + 5 * n, *out_buffer = scratch + 6 * n;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t sample = row / t.tokens, token = row % t.tokens;
    const float* x = load(at(t.x, t.dtype, row * n), t.dtype, n, x_buffer);
    if (t.y != nullptr) {
      const float* y = load(at(t.y, t.y_dtype, row * n), t.y_dtype, n, y_buffer);
      void* target = at(t.residual, t.dtype, row * n);
      float* sum = writable(target, t.dtype, sum_buffer);
      if (t.gate.data != nullptr) {
        const float* gate = modulation_row(t.gate, t.modulation_dtype, sample, token, n, gate_buffer);
#pragma GCC ivdep
        for (int i = 0; i < n; ++i) {
          const float gated = gate[i] * y[i];
          sum[i] = x[i] + gated;
        }
      } else {
#pragma GCC ivdep
        for (int i = 0; i < n; ++i) sum[i] = x[i] + y[i];
      }
      store_written(sum, t.dtype, n, target);
      x = load(target, t.dtype, n, x_buffer);  // the LayerNorm sees the residual as stored
    }
    if (t.scale.data == nullptr) continue;
    const float mean = row_mean(row_sum(n, [&](int i) { return x[i]; }), n);
    const float variance = row_mean(row_sum(n, [&](int i) {
      const float centred = x[i] - mean;
      return centred * centred;
    }), n);
    const float rstd = inverse_root(variance + t.eps);
    const float* scale = modulation_row(t.scale, t.modulation_dtype, sample, token, n, scale_buffer);
    const float* shift = modulation_row(t.shift, t.modulation_dtype, sample, token, n, shift_buffer);
    void* target = at(t.modulated, t.dtype, row * n);
    float* out = writable(target, t.dtype, out_buffer);
#pragma GCC ivdep
    for (int i = 0; i < n; ++i) {
      const float normed = (x[i] - mean) * rstd;
      const float scaled = normed * (1.0f + scale[i]);
      out[i] = scaled + shift[i];
    }
    store_written(out, t.dtype, n, target);
    t.statistics[2 * row] = mean;
    t.statistics[2 * row + 1] = rstd;
  }
}

// Adds values to a part's sum, or stores them as one token's gradient.
FASTGRPO_INLINE void add_or_store(const GatedNormBackward& t, const float* values, void* target, int64_t part, int64_t row, int n) {
  if (t.per_token) return store(values, t.modulation_dtype, n, at(target, t.modulation_dtype, row * n));
  float* sum = static_cast<float*>(target) + part * n;
#pragma GCC ivdep
  for (int i = 0; i < n; ++i) sum[i] += values[i];
}

// The gradient of row `row` before its LayerNorm, in fp32, to `grad`; the gradients of scale and shift on the way.
void layer_norm_backward(const GatedNormBackward& t, int64_t part, int64_t row, float* grad, float* scratch) {
  const int n = static_cast<int>(t.channels);
  float *normed = scratch, *scaled = scratch + n, *buffer = scratch + 2 * n, *dout_buffer = scratch + 3 * n;
  const float mean = t.statistics[2 * row], rstd = t.statistics[2 * row + 1];
  const float* x = load(at(t.residual, t.dtype, row * n), t.dtype, n, buffer);
  const float* dout = load(at(t.dmodulated, t.dtype, row * n), t.dtype, n, dout_buffer);
#pragma GCC ivdep
  for (int i = 0; i < n; ++i) normed[i] = (x[i] - mean) * rstd;
  if (t.dscale != nullptr) {
#pragma GCC ivdep
    for (int i = 0; i < n; ++i) scaled[i] = dout[i] * normed[i];
    add_or_store(t, scaled, t.dscale, part, row, n);
    add_or_store(t, dout, t.dshift, part, row, n);
  }
  const float* scale = modulation_row(t.scale, t.modulation_dtype, row / t.tokens, row % t.tokens, n, buffer);
#pragma GCC ivdep
  for (int i = 0; i < n; ++i) scaled[i] = dout[i] * (1.0f + scale[i]);
  const float mean_grad = row_mean(row_sum(n, [&](int i) { return scaled[i]; }), n);
  const float mean_dot = row_mean(row_sum(n, [&](int i) { return scaled[i] * normed[i]; }), n);
#pragma GCC ivdep
  for (int i = 0; i < n; ++i) {
    const float along = normed[i] * mean_dot;
    grad[i] = (scaled[i] - mean_grad - along) * rstd;
  }
}

void gated_norm_backward(const GatedNormBackward& t, int64_t begin, int64_t end, float* scratch) {
  const int n = static_cast<int>(t.channels);
  float *grad_buffer = scratch, *y_buffer = scratch + n, *gate_buffer = scratch + 2 * n, *out_buffer = scratch + 3 * n;
  for (int64_t part = begin; part < end; ++part) {
    const int64_t sample = part / t.parts, first = part % t.parts * PART_TOKENS;
    const int64_t last = first + PART_TOKENS < t.tokens ? first + PART_TOKENS : t.tokens;
    void* const sums[] = {t.dgate, t.dscale, t.dshift};
    for (void* sum : sums) {
      if (sum != nullptr && !t.per_token) memset(static_cast<float*>(sum) + part * n, 0, static_cast<size_t>(n) * sizeof(float));
    }
    for (int64_t row = sample * t.tokens + first; row < sample * t.tokens + last; ++row) {
      const float* grad = nullptr;
      if (t.dmodulated != nullptr) {
        void* target = at(t.dx, t.dtype, row * n);
        float* sum = writable(target, t.dtype, grad_buffer);
        layer_norm_backward(t, part, row, sum, scratch + 4 * n);
        if (t.dresidual != nullptr) {
          const float* dresidual = load(at(t.dresidual, t.dtype, row * n), t.dtype, n, out_buffer);
#pragma GCC ivdep
          for (int i = 0; i < n; ++i) sum[i] += dresidual[i];
        }
        store_written(sum, t.dtype, n, target);
        grad = sum;
      } else {
        grad = load(at(t.dresidual, t.dtype, row * n), t.dtype, n, grad_buffer);
      }
      if (t.dgate != nullptr) {
        const float* y = load(at(t.y, t.y_dtype, row * n), t.y_dtype, n, y_buffer);
#pragma GCC ivdep
        for (int i = 0; i < n; ++i) out_buffer[i] = y[i] * grad[i];
        add_or_store(t, out_buffer, t.dgate, part, row, n);
      }
      if (t.dy != nullptr) {
        void* target = at(t.dy, t.y_dtype, row * n);
        if (t.gate.data == nullptr) {
          store(grad, t.y_dtype, n, target);
          continue;
        }
        const float* gate = modulation_row(t.gate, t.modulation_dtype, sample, row % t.tokens, n, gate_buffer);
        float* dy = writable(target, t.y_dtype, out_buffer);
#pragma GCC ivdep
        for (int i = 0; i < n; ++i) dy[i] = grad[i] * gate[i];
        store_written(dy, t.y_dtype, n, target);
      }
    }
  }
}


// Turns the pairs of one head's channels by the angles of c and s, in place; back by -1 as direction.
FASTGRPO_INLINE void rotate(float* values, const float* c, const float* s, float direction, int pairs) {
#pragma GCC ivdep
  for (int i = 0; i < pairs; ++i) {
    const float even = values[2 * i], odd = values[2 * i + 1], sine = direction * s[i];
    const float even_c = even * c[i], odd_s = odd * sine, even_s = even * sine, odd_c = odd * c[i];
    values[2 * i] = even_c - odd_s;
    values[2 * i + 1] = even_s + odd_c;
  }
}

FASTGRPO_INLINE void rotate_token(const NormRope& t, float* values, int64_t token, float direction) {
  if (token >= t.turned) return;
  for (int64_t head = 0; head < t.channels; head += t.head_channels) {
    rotate(values + head, t.cos + token * t.angle_stride, t.sin + token * t.angle_stride, direction, static_cast<int>(t.head_channels / 2));
  }
}

void qk_norm(const NormRope& t, int64_t begin, int64_t end, float* scratch) {
  const int n = static_cast<int>(t.channels), width = static_cast<int>(t.width);
  float *x_buffer = scratch, *out_buffer = scratch + n, *weight_buffer = scratch + 2 * n;
  const float* weight = load(t.weight, t.weight_dtype, width, weight_buffer);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t sample = row / t.tokens, token = row % t.tokens;
    const float* x = load(at(t.x, t.dtype, sample * t.sample_stride + token * t.token_stride), t.dtype, n, x_buffer);
    void* target = at(t.out, t.dtype, row * n);
    float* out = writable(target, t.dtype, out_buffer);
    for (int group = 0; group < n; group += width) {
      const float* values = x + group;
      float* normed = out + group;
      const float mean = row_mean(row_sum(width, [&](int i) { return values[i] * values[i]; }), width);
      const float rstd = inverse_root(mean + t.eps);
#pragma GCC ivdep
      for (int i = 0; i < width; ++i) {
        const float scaled = values[i] * rstd;
        normed[i] = scaled * weight[i];
      }
      t.rstd[(row * n + group) / width] = rstd;
    }
    rotate_token(t, out, token, 1.0f);
    store_written(out, t.dtype, n, target);
  }
}

void qk_norm_backward(const NormRopeBackward& b, int64_t begin, int64_t end, float* scratch) {
  const NormRope& t = b.forward;
  const int n = static_cast<int>(t.channels), width = static_cast<int>(t.width);
  float *x_buffer = scratch, *dout_buffer = scratch + n, *grad = scratch + 2 * n, *normed = scratch + 3 * n;
  float *dx_buffer = scratch + 4 * n, *weight_buffer = scratch + 5 * n;
  const float* weight = load(t.weight, t.weight_dtype, width, weight_buffer);
  for (int64_t part = begin; part < end; ++part) {
    const int64_t sample = part / b.parts, first = part % b.parts * PART_TOKENS;
    const int64_t last = first + PART_TOKENS < t.tokens ? first + PART_TOKENS : t.tokens;
    float* dweight = b.dweight == nullptr ? nullptr : b.dweight + part * width;
    if (dweight != nullptr) memset(dweight, 0, static_cast<size_t>(width) * sizeof(float));
    for (int64_t token = first; token < last; ++token) {
      const int64_t row = sample * t.tokens + token;
      const float* x = load(at(t.x, t.dtype, sample * t.sample_stride + token * t.token_stride), t.dtype, n, x_buffer);
      const int64_t dout_index = sample * b.dout_sample_stride + token * b.dout_token_stride;
      memcpy(grad, load(at(b.dout, t.dtype, dout_index), t.dtype, n, dout_buffer), static_cast<size_t>(n) * sizeof(float));
      rotate_token(t, grad, token, -1.0f);
      void* target = at(b.dx, t.dtype, row * n);
      float* dx = writable(target, t.dtype, dx_buffer);
      for (int group = 0; group < n; group += width) {
        const float rstd = t.rstd[(row * n + group) / width];
#pragma GCC ivdep
        for (int i = 0; i < width; ++i) normed[i] = x[group + i] * rstd;
        if (dweight != nullptr) {
#pragma GCC ivdep
          for (int i = 0; i < width; ++i) {
            const float product = grad[group + i] * normed[i];
            dweight[i] += product;
          }
        }
        float* scaled = grad + group;
#pragma GCC ivdep
        for (int i = 0; i < width; ++i) scaled[i] *= weight[i];
        const float mean_dot = row_mean(row_sum(width, [&](int i) { return scaled[i] * normed[i]; }), width);
#pragma GCC ivdep
        for (int i = 0; i < width; ++i) {
          const float along = normed[i] * mean_dot;
          dx[group + i] = (scaled[i] - along) * rstd;
        }
      }
      store_written(dx, t.dtype, n, target);
    }
  }
}

}  // namespace
}  // namespace fastgrpo
