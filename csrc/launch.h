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

// One instruction set's loops over elements [begin, end) of a row; begin is a multiple of 4. They return a sum of squared errors.
struct CpuKernels {
  double (*step)(const Transition&, void* next_latents, int64_t row, int64_t begin, int64_t end);
  double (*squared_error)(const Transition&, int64_t row, int64_t begin, int64_t end);
  void (*gradient)(const Transition&, float scale, void* grad, void* grad_uncond, int64_t row, int64_t begin, int64_t end);
};
extern const CpuKernels cpu_plain, cpu_avx2, cpu_avx512;

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
