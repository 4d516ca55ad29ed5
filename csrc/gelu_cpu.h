// The CPU's loops of GELU (tanh) with the bias before it. kernels/fastgrpo_kernels/activation/ says what they compute.
//
//   p = exp(-2 |u|)      sigmoid(2 u) = 1 / (1 + p) where h >= 0, p / (1 + p) where h < 0
//
// p is never above 1, so nothing overflows and nothing cancels: out has the relative precision of fp32 everywhere.
// Included by kernels_cpu.h, under its conditions.
#pragma once

#include "launch.h"
#include "storage_cpu.h"

namespace fastgrpo {
namespace {

constexpr int COLUMNS = 256;  // of a row, at a time: what is between the loops stays in the first-level cache

// |h|, but no more than where p is 0 already: beyond it h^3 could become infinity. A NaN stays one.
FASTGRPO_INLINE float limited(float h) {
  const float a = __builtin_fabsf(h);
  return a > 11.6875f ? 11.6875f : a;
}

// -2 |u| log2(e) = nearest + rest, |rest| <= 1/2, of n values. In float64, since an absolute error here is a relative one of p. A loop of its
// own: the way through both would be too long for a processor to have enough of them at a time.
FASTGRPO_INLINE void exponents(const float* h, int n, float* nearest, float* rest) {
#pragma GCC ivdep
  for (int i = 0; i < n; ++i) {
    const double a = static_cast<double>(limited(h[i]));
    const double exponent = a * (a * a * -0.1029432395800235 + -2.302208198144325);
    const double whole = (exponent + 0x1.8p52) - 0x1.8p52;
    nearest[i] = static_cast<float>(whole);
    rest[i] = static_cast<float>(exponent - whole);
  }
}

// sigmoid(2 u) = lead unit / (1 + power); the unit keeps a small lead out of fp32's subnormals.
struct Sigmoid {
  float power, lead, unit;
};
FASTGRPO_INLINE Sigmoid sigmoid(float h, float nearest, float r) {
  // 2^r, fitted to 2^-28 and 1 at 0.
  const float square = r * r;
  const float high = 0x1.416b5ep-13f * r + 0x1.5f082ep-10f, middle = 0x1.3b2de0p-7f * r + 0x1.c6af7cp-5f, low = 0x1.ebfbdcp-3f * r + 0x1.62e430p-1f;
  const float p = ((high * square + middle) * square + low) * r + 1.0f;
  // 2^(nearest + 64): the adder puts the exponent in place. 0 for -191, the least there is.
  const uint32_t bits = bit_cast<uint32_t>(nearest + (0x1.8p23f + 191.0f));
  const float scaled = p * bit_cast<float>(bits << 23), power = scaled * 0x1p-64f;
  return h < 0.0f ? Sigmoid{power, scaled, 0x1p-64f} : Sigmoid{power, 1.0f, 1.0f};
}

// x + bias of n columns from element `index`, in fp32.
FASTGRPO_INLINE const float* biased(const BiasGelu& t, int64_t index, const float* bias, int n, float* buffer) {
  const float* x = load(at(t.x, t.dtype, index), t.dtype, n, buffer);
  if (bias == nullptr) return x;
#pragma GCC ivdep
  for (int i = 0; i < n; ++i) buffer[i] = x[i] + bias[i];
  return buffer;
}

FASTGRPO_INLINE int width_at(const BiasGelu& t, int64_t column) {
  return static_cast<int>(t.channels - column < COLUMNS ? t.channels - column : COLUMNS);
}

const float* bias_at(const BiasGelu& t, int64_t column, int n, float* buffer) {
  return t.bias == nullptr ? nullptr : load(at(t.bias, t.bias_dtype, column), t.bias_dtype, n, buffer);
}


void bias_gelu(const BiasGelu& t, int64_t begin, int64_t end) {
  float h_buffer[COLUMNS], bias_buffer[COLUMNS], out_buffer[COLUMNS], nearest[COLUMNS], rest[COLUMNS];
  for (int64_t column = 0; column < t.channels; column += COLUMNS) {
    const int n = width_at(t, column);
    const float* bias = bias_at(t, column, n, bias_buffer);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t index = row * t.channels + column;
      const float* h = biased(t, index, bias, n, h_buffer);
      exponents(h, n, nearest, rest);
      void* target = at(t.out, t.dtype, index);
      float* out = writable(target, t.dtype, out_buffer);
#pragma GCC ivdep
      for (int i = 0; i < n; ++i) {
        const Sigmoid s = sigmoid(h[i], nearest[i], rest[i]);
        const float above = h[i] * s.lead;
        out[i] = above / (1.0f + s.power) * s.unit;
      }
      store_written(out, t.dtype, n, target);
    }
  }
}

// d out / dh = s + h s (1 - s) 2 du/dh.
FASTGRPO_INLINE float gelu_slope(float h, float nearest, float rest) {
  const Sigmoid s = sigmoid(h, nearest, rest);
  const float inverse = 1.0f / (1.0f + s.power), a = limited(h);
  const float slope = __builtin_copysignf(a, h) * (a * a * 0.21406444881780076f + 1.5957691216057308f);
  const float curved = slope * ((h < 0.0f ? s.lead : s.power) * inverse);
  return (s.lead + curved) * inverse * s.unit;
}

// Over parts of PART_TOKENS rows.
void bias_gelu_backward(const BiasGeluBackward& b, int64_t begin, int64_t end) {
  const BiasGelu& t = b.forward;
  float h_buffer[COLUMNS], bias_buffer[COLUMNS], dout_buffer[COLUMNS], dx_buffer[COLUMNS], nearest[COLUMNS], rest[COLUMNS];
  for (int64_t part = begin; part < end; ++part) {
    const int64_t first = part * PART_TOKENS, last = first + PART_TOKENS < t.rows ? first + PART_TOKENS : t.rows;
    for (int64_t column = 0; column < t.channels; column += COLUMNS) {
      const int n = width_at(t, column);
      const float* bias = bias_at(t, column, n, bias_buffer);
      float* sum = b.dbias == nullptr ? nullptr : b.dbias + part * t.channels + column;
      if (sum != nullptr) memset(sum, 0, static_cast<size_t>(n) * sizeof(float));
      for (int64_t row = first; row < last; ++row) {
        const int64_t index = row * t.channels + column;
        const float* h = biased(t, index, bias, n, h_buffer);
        exponents(h, n, nearest, rest);
        const float* dout = load(at(b.dout, t.dtype, index), t.dtype, n, dout_buffer);
        void* target = at(b.dx, t.dtype, index);
        float* dx = writable(target, t.dtype, dx_buffer);
#pragma GCC ivdep
        for (int i = 0; i < n; ++i) dx[i] = dout[i] * gelu_slope(h[i], nearest[i], rest[i]);
        store_written(dx, t.dtype, n, target);
        if (sum == nullptr) continue;
#pragma GCC ivdep
        for (int i = 0; i < n; ++i) sum[i] += dx[i];
      }
    }
  }
}

}  // namespace
}  // namespace fastgrpo
