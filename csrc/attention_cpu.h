// The CPU's loops of attention over few tokens, one head of one sample at a time, all of it in the first-level cache.
// kernels/fastgrpo_kernels/attention/ says what they compute.
//
// Every sum runs over its terms in their order, in every instruction set: what is vectorised is what lies beside it.
// Included by kernels_cpu.h, under its conditions.
#pragma once

#include "exponential.h"
#include "launch.h"
#include "norm_cpu.h"
#include "storage_cpu.h"

namespace fastgrpo {
namespace {

// Rows of floats, `step` apart, whose width is a multiple of LANES.
struct Rows {
  float* data;
  int64_t step;
};

int to_lanes(int64_t n) { return static_cast<int>((n + LANES - 1) / LANES * LANES); }

// Takes the next rows of the scratch.
Rows take(float*& scratch, int64_t count, int64_t width) {
  const Rows made = {scratch, to_lanes(width)};
  scratch += count * made.step;
  return made;
}

// Whether the loops can work on what is stored, without a copy.
bool in_place(Dtype dtype, int64_t channels) { return dtype == Dtype::float32 && channels % LANES == 0; }

// A head's rows in fp32: where they lie, or copied and filled up with zeros.
Rows head_rows(const FewTokens& t, const Heads& x, int64_t tokens, int64_t sample, int64_t head, float*& scratch) {
  const int n = static_cast<int>(t.channels);
  const int64_t start = sample * x.sample_stride + head * n;
  // Rows that are read are not written.
  if (in_place(t.dtype, n)) return {const_cast<float*>(static_cast<const float*>(x.data)) + start, x.token_stride};
  const Rows rows = take(scratch, tokens, n);
  for (int64_t token = 0; token < tokens; ++token) {
    float* row = rows.data + token * rows.step;
    const float* values = load(at(x.data, t.dtype, start + token * x.token_stride), t.dtype, n, row);
    if (values != row) memcpy(row, values, static_cast<size_t>(n) * sizeof(float));
    for (int i = n; i < rows.step; ++i) row[i] = 0.0f;
  }
  return rows;
}

// [tokens, n] -> [n, tokens], filled up with zeros.
Rows transposed(const Rows& rows, int64_t tokens, int n, float*& scratch) {
  const Rows made = take(scratch, n, tokens);
  for (int i = 0; i < n; ++i) {
    float* row = made.data + i * made.step;
    for (int64_t token = 0; token < tokens; ++token) row[token] = rows.data[token * rows.step + i];
    for (int64_t token = tokens; token < made.step; ++token) row[token] = 0.0f;
  }
  return made;
}

// The left side of a product, by strides: a matrix, or its transpose.
struct Left {
  const float* data;
  int64_t row_stride, term_stride;
};

// As many floats as a register holds, at any address: the compiler leaves arrays of sums in memory, and these in registers.
#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX2__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif
typedef float Vector __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));

// ROWS rows of a product of `terms` terms.
template <int ROWS>
FASTGRPO_INLINE void product_rows(const Left& a, const Rows& b, int64_t terms, int width, const Rows& out) {
  constexpr int PIECES = LANES / WIDTH;
  for (int first = 0; first < width; first += LANES) {
    Vector sums[ROWS][PIECES];
    for (int row = 0; row < ROWS; ++row) {
      for (int piece = 0; piece < PIECES; ++piece) sums[row][piece] = Vector{};
    }
    for (int64_t term = 0; term < terms; ++term) {
      const float* right = b.data + term * b.step + first;
      for (int row = 0; row < ROWS; ++row) {
        const float left = a.data[row * a.row_stride + term * a.term_stride];
        for (int piece = 0; piece < PIECES; ++piece) sums[row][piece] += left * *reinterpret_cast<const Vector*>(right + piece * WIDTH);
      }
    }
    for (int row = 0; row < ROWS; ++row) {
      for (int piece = 0; piece < PIECES; ++piece) *reinterpret_cast<Vector*>(out.data + row * out.step + first + piece * WIDTH) = sums[row][piece];
    }
  }
}

// out [rows, width] = a [rows, terms] b [terms, width].
void product(const Left& a, const Rows& b, int64_t rows, int64_t terms, int width, const Rows& out) {
  constexpr int TOGETHER = 4;  // their sums fill the registers
  int64_t row = 0;
  for (; row + TOGETHER <= rows; row += TOGETHER) {
    product_rows<TOGETHER>({a.data + row * a.row_stride, a.row_stride, a.term_stride}, b, terms, width, {out.data + row * out.step, out.step});
  }
  for (; row < rows; ++row) {
    product_rows<1>({a.data + row * a.row_stride, a.row_stride, a.term_stride}, b, terms, width, {out.data + row * out.step, out.step});
  }
}

Left left(const Rows& rows) { return {rows.data, rows.step, 1}; }
Left left_transposed(const Rows& rows) { return {rows.data, 1, rows.step}; }

// Scores of one query -> weights, in place; 0 beyond the last key.
void softmax(float* row, int keys, int width, float scale) {
  for (int i = 0; i < width; ++i) row[i] *= scale;
  for (int i = keys; i < width; ++i) row[i] = -__builtin_inff();
  float tops[LANES];
  for (int lane = 0; lane < LANES; ++lane) tops[lane] = -__builtin_inff();
  for (int i = 0; i < width; i += LANES) {
    for (int lane = 0; lane < LANES; ++lane) tops[lane] = row[i + lane] > tops[lane] ? row[i + lane] : tops[lane];
  }
  float top = tops[0];
  for (int lane = 1; lane < LANES; ++lane) top = tops[lane] > top ? tops[lane] : top;
  for (int i = 0; i < width; ++i) row[i] = exp_of(row[i] - top);
  const float inverse = 1.0f / row_sum(width, [&](int i) { return row[i]; });
  for (int i = 0; i < width; ++i) row[i] *= inverse;
}

// softmax(q k^T scale) [queries, keys].
Rows attention_weights(const FewTokens& t, const Rows& q, const Rows& k, float*& scratch) {
  const int n = static_cast<int>(t.channels);
  const Rows keys = transposed(k, t.keys, n, scratch), weights = take(scratch, t.queries, t.keys);
  const int width = static_cast<int>(weights.step);
  product(left(q), keys, t.queries, n, width, weights);
  for (int64_t query = 0; query < t.queries; ++query) softmax(weights.data + query * weights.step, static_cast<int>(t.keys), width, t.scale);
  return weights;
}

// A product that is a result: [tokens, channels] of one head of a contiguous tensor.
void result(const FewTokens& t, const Left& a, const Rows& b, int64_t tokens, int64_t terms, void* target, int64_t sample, int64_t head, float* scratch) {
  const int n = static_cast<int>(t.channels);
  const int64_t step = t.heads * n, start = sample * tokens * step + head * n;
  if (in_place(t.dtype, n)) return product(a, b, tokens, terms, n, {static_cast<float*>(target) + start, step});
  const Rows rows = take(scratch, tokens, n);
  product(a, b, tokens, terms, to_lanes(n), rows);
  for (int64_t token = 0; token < tokens; ++token) store(rows.data + token * rows.step, t.dtype, n, at(target, t.dtype, start + token * step));
}

void few_token_attention(const FewTokens& t, int64_t begin, int64_t end, float* const scratch) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t sample = item / t.heads, head = item % t.heads;
    float* free = scratch;
    const Rows q = head_rows(t, t.q, t.queries, sample, head, free), k = head_rows(t, t.k, t.keys, sample, head, free);
    const Rows v = head_rows(t, t.v, t.keys, sample, head, free);
    const Rows weights = attention_weights(t, q, k, free);
    result(t, left(weights), v, t.queries, t.keys, t.out, sample, head, free);
  }
}

void few_token_attention_backward(const FewTokensBackward& b, int64_t begin, int64_t end, float* const scratch) {
  const FewTokens& t = b.forward;
  const int n = static_cast<int>(t.channels);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t sample = item / t.heads, head = item % t.heads;
    float* free = scratch;
    const Rows q = head_rows(t, t.q, t.queries, sample, head, free), k = head_rows(t, t.k, t.keys, sample, head, free);
    const Rows v = head_rows(t, t.v, t.keys, sample, head, free), dout = head_rows(t, b.dout, t.queries, sample, head, free);
    const Rows weights = attention_weights(t, q, k, free);
    const Rows values = transposed(v, t.keys, n, free), scores = take(free, t.queries, t.keys);
    const int width = static_cast<int>(scores.step);
    product(left(dout), values, t.queries, n, width, scores);  // gradients of the weights, then of the scores
    for (int64_t query = 0; query < t.queries; ++query) {
      const float* p = weights.data + query * weights.step;
      float* row = scores.data + query * scores.step;
      const float mean = row_sum(width, [&](int i) { return p[i] * row[i]; });
#pragma GCC ivdep
      for (int i = 0; i < width; ++i) row[i] = p[i] * (row[i] - mean) * t.scale;
    }
    result(t, left(scores), k, t.queries, t.keys, b.dq, sample, head, free);
    result(t, left_transposed(scores), q, t.keys, t.queries, b.dk, sample, head, free);
    result(t, left_transposed(weights), dout, t.keys, t.queries, b.dv, sample, head, free);
  }
}

}  // namespace
}  // namespace fastgrpo
