// The interface between torch and the kernels: plain structs and functions over raw pointers. Neither side includes the other's headers.
#pragma once

#include "formulas.h"

namespace fastgrpo {

// x, x', v and the coefficients of a batch of transitions: B samples (rows) of P elements, contiguous.
struct Transition {
  const void* latents;        // [B, P]
  const void* next_latents;   // [B, P], dtype of latents; unused by the step, which makes it
  const void* velocity;       // [B, P]
  const void* uncond;         // [B, P], dtype of velocity, or null
  const float *a, *b, *std;   // [B]
  const int64_t *seeds, *steps;  // [B], for the step only
  Dtype latents_dtype, velocity_dtype;
  int64_t batch, numel;
  float guidance_scale;
  bool normalized;
};

// The clipped loss of a batch: its fp32 inputs [B], and where its results go.
struct ClippedLoss {
  const float *log_probs, *old_log_probs, *advantages;
  float *loss, *ratio;  // [], [B]
  bool* clipped;        // [B]
  float *clip_fraction, *approx_kl, *grad_log_probs;  // [], [], [B]
  Bounds bounds;
  int64_t batch;
};

// A gate, scale or shift [B, 1 or L, C] where it lies: strides of samples and tokens in elements, 0 along what is shared. Null: none.
struct Modulation {
  const void* data;
  int64_t sample_stride, token_stride;
};

// gate_residual and ln_modulate, alone (without scale, without y) or fused: B samples of L tokens (rows) of C channels, contiguous.
struct GatedNorm {
  const void *x, *y;
  Modulation gate, scale, shift;
  void *residual, *modulated;
  float* statistics;  // [B, L, 2]: mean and 1 / standard deviation
  Dtype dtype, y_dtype, modulation_dtype;  // dtype: of x and of both results
  int64_t batch, tokens, channels;
  float eps;
};

// Its backward. What is null is not there, or not wanted.
struct GatedNormBackward {
  const void *dresidual, *dmodulated, *residual, *y;
  const float* statistics;
  Modulation gate, scale;
  void *dx, *dy;
  void *dgate, *dscale, *dshift;  // [B, L, C] if there is one modulation per token; else float32 [B * parts, C], to be added up
  Dtype dtype, y_dtype, modulation_dtype;
  int64_t batch, tokens, channels, parts;
  bool per_token;
};

// One half of qk_norm_rope: x [B, L, H, D], a token's H D channels contiguous, and what is made of it, contiguous.
struct NormRope {
  const void *x, *weight;  // weight [width]: H D, or D
  const float *cos, *sin;  // [turned, D / 2], rows `angle_stride` apart; null: no rotation
  void* out;
  float* rstd;  // [B, L, H D / width]
  Dtype dtype, weight_dtype;
  int64_t batch, tokens, channels, head_channels, width, turned;
  int64_t sample_stride, token_stride, angle_stride;
  float eps;
};
struct NormRopeBackward {
  NormRope forward;  // `out` is unused, `rstd` is read
  const void* dout;
  int64_t dout_sample_stride, dout_token_stride;
  void* dx;
  float* dweight;  // [B * parts, width], to be added up; or null
  int64_t parts;
};

// bias_gelu: rows of `channels` numbers, contiguous.
struct BiasGelu {
  const void *x, *bias;  // bias [channels], or null
  void* out;
  Dtype dtype, bias_dtype;  // dtype: of x and of the result
  int64_t rows, channels;
};
struct BiasGeluBackward {
  BiasGelu forward;  // `out` is unused
  const void* dout;
  void* dx;
  float* dbias;  // [parts, channels], to be added up; or null
};

// Queries, keys or values [B, L, H, D] where they lie, a token's H D channels contiguous: strides in elements.
struct Heads {
  const void* data;
  int64_t sample_stride, token_stride;
};

// few_token_attention: queries [B, queries, H, D], keys and values [B, keys, H, D], the result like the queries, contiguous.
struct FewTokens {
  Heads q, k, v;
  void* out;
  Dtype dtype;
  int64_t batch, queries, keys, heads, channels;  // channels: of one head
  float scale;
};
struct FewTokensBackward {
  FewTokens forward;  // `out` is unused
  Heads dout;
  void *dq, *dk, *dv;  // contiguous
};

// Tokens that one part of a sum over tokens adds up. A constant: bits may depend on neither threads nor batch.
constexpr int64_t PART_TOKENS = 64;

// One instruction set's loops: of a transition over elements [begin, end) of a row, begin being a multiple of 4; they return a sum of
// squared errors. Of the others over rows [begin, end), forward, and over parts of rows, backward; `scratch` holds 8 rows in fp32. Of
// attention over heads [begin, end) of all samples; `scratch` holds attention_scratch() floats.
struct CpuKernels {
  double (*step)(const Transition&, void* next_latents, int64_t row, int64_t begin, int64_t end);
  double (*squared_error)(const Transition&, int64_t row, int64_t begin, int64_t end);
  void (*gradient)(const Transition&, float scale, void* grad, void* grad_uncond, int64_t row, int64_t begin, int64_t end);
  void (*gated_norm)(const GatedNorm&, int64_t begin, int64_t end, float* scratch);
  void (*gated_norm_backward)(const GatedNormBackward&, int64_t begin, int64_t end, float* scratch);
  void (*qk_norm)(const NormRope&, int64_t begin, int64_t end, float* scratch);
  void (*qk_norm_backward)(const NormRopeBackward&, int64_t begin, int64_t end, float* scratch);
  void (*bias_gelu)(const BiasGelu&, int64_t begin, int64_t end);
  void (*bias_gelu_backward)(const BiasGeluBackward&, int64_t begin, int64_t end);
  void (*few_token_attention)(const FewTokens&, int64_t begin, int64_t end, float* scratch);
  void (*few_token_attention_backward)(const FewTokensBackward&, int64_t begin, int64_t end, float* scratch);
};
constexpr int64_t SCRATCH_ROWS = 8;
// For a backward pass: q, k, v, the gradient and one result; keys and values transposed; two matrices [queries, keys]. 16: rows are filled up.
inline int64_t attention_scratch(const FewTokens& t) {
  const int64_t tokens = t.queries + t.keys, longest = t.queries > t.keys ? t.queries : t.keys;
  return (2 * tokens + longest) * (t.channels + 16) + 2 * (t.channels + t.queries) * (t.keys + 16);
}
extern const CpuKernels cpu_plain, cpu_avx2, cpu_avx512;
const CpuKernels& best_cpu_kernels();  // of this processor

// GPU: `partials` is scratch of partial_sums(numel) float64 per row; `stream` a cudaStream_t. They return null, or an error as text.
int64_t cuda_partial_sums(int64_t numel);
const char* cuda_sde_step(const Transition&, void* next_latents, float* log_probs, double* partials, void* stream);
const char* cuda_sde_log_prob(const Transition&, float* log_probs, double* partials, void* stream);
const char* cuda_grpo_loss(const Transition&, float* log_probs, const ClippedLoss&, double* partials, void* stream);
const char* cuda_clipped_loss(const ClippedLoss&, void* stream);
const char* cuda_gradient(const Transition&, const float* grad_log_probs, const float* grad_loss, void* grad, void* grad_uncond, void* stream);
const char* cuda_set_device(int device);
const char* cuda_version();  // of the toolkit, and what it compiled for

}  // namespace fastgrpo
