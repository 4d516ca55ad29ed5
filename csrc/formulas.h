// The transition and the clipped loss, element by element and sample by sample: the same operations in the same order as
// kernels/fastgrpo_kernels/sde/reference.py, so that the bits agree on every device.
#pragma once

#include "portable.h"

namespace fastgrpo {

// v_uncond + w (v_cond - v_uncond)
FASTGRPO_INLINE float guide(float cond, float uncond, float w) {
  const float difference = cond - uncond;
  const float weighted = w * difference;
  return uncond + weighted;
}

// a x + b v
FASTGRPO_INLINE float mean_of(float a, float x, float b, float v) {
  const float ax = a * x, bv = b * v;
  return ax + bv;
}

// mean + s eps
FASTGRPO_INLINE float add_noise(float mean, float std, float noise) {
  const float scaled = std * noise;
  return mean + scaled;
}

// d logp / dv = c 2 e (-b), with c = d loss / d(e^2) per element from `gradient_scale`
FASTGRPO_INLINE float velocity_gradient(float c, float error, float b) {
  const float twice = 2.0f * error, scaled = c * twice;
  return scaled * -b;
}

// A squared error, rounded to a multiple of q = 2^(2k - 24), 2^k <= std < 2^(k+1): sums of such multiples are exact in float64
// below 2^53 q, and so the same in any order, on any device. See `_exact_row_sum` in reference.py.
FASTGRPO_INLINE double quantised(float squared_error, double rounder) {
  const double shifted = static_cast<double>(squared_error) + rounder;
  return shifted - rounder;
}

// 1.5 * 2^(2k + 28), whose last float64 bit is worth q; 0 (no rounding) where std is 0 or not finite and the log-prob is of no use.
FASTGRPO_INLINE double rounder_of(float std) {
  if (!(std > 0.0f) || std > 3.4028234663852886e38f) return 0.0;
  const int64_t k = (bit_cast<int64_t>(static_cast<double>(std)) >> 52) - 1023;  // a subnormal fp32 is a normal float64
  return bit_cast<double>(((2 * k + 28 + 1023) << 52) | 0x8000000000000);
}

// Log-probability from the sum of squared errors over `numel` elements, given ln std; NaN where std == 0.
FASTGRPO_INLINE float log_prob_of(double sum, int64_t numel, float std, double log_std, bool normalized) {
  if (!(std > 0.0f)) return bit_cast<float>(0x7FC00000);
  const double s = static_cast<double>(std), error = sum / static_cast<double>(numel);
  if (!normalized) return static_cast<float>(-error);
  return static_cast<float>(-(error / (2.0 * s * s) + log_std + 0.91893853320467274178));  // ln(2 pi) / 2
}

// d loss / d(e^2) from d loss / d logp; 0, never NaN, where std == 0.
FASTGRPO_INLINE float gradient_scale(float grad_log_prob, float std, int64_t numel, bool normalized) {
  if (!(std > 0.0f)) return 0.0f;
  const double s = static_cast<double>(std), p = static_cast<double>(numel);
  const double scale = normalized ? -1.0 / (2.0 * s * s * p) : -1.0 / p;
  return static_cast<float>(static_cast<double>(grad_log_prob) * scale);
}

// The bounds of the clipped loss as torch compares an fp32 tensor with a Python number: in fp32.
struct Bounds {
  float low, high, advantage;
};
FASTGRPO_INLINE Bounds bounds_of(double clip_range, double adv_clip) {
  return {static_cast<float>(1.0 - clip_range), static_cast<float>(1.0 + clip_range), static_cast<float>(adv_clip)};
}

// One sample of Eq. 11: ratio = fp32(exp(double(log_ratio))) is an argument, because exp is a library function.
struct ClipTerm {
  float objective, gradient;
  bool clipped;
};
FASTGRPO_INLINE ClipTerm clip_term(float ratio, float advantage, Bounds bounds, int64_t batch) {
  // Comparisons rather than fmin and fmax: a NaN advantage stays NaN, as torch.clamp leaves it.
  float a = advantage < -bounds.advantage ? -bounds.advantage : advantage;
  a = a > bounds.advantage ? bounds.advantage : a;
  const bool clipped = (a > 0.0f && ratio > bounds.high) || (a < 0.0f && ratio < bounds.low);
  const float bounded = ratio < bounds.low ? bounds.low : (ratio > bounds.high ? bounds.high : ratio);
  const float weighted = a * ratio;
  return {(clipped ? bounded : ratio) * a, clipped ? 0.0f : -weighted / static_cast<float>(batch), clipped};
}

// Loss, share of clipped samples and KL of a batch from its three sums.
FASTGRPO_INLINE float batch_loss(double objective, int64_t batch) { return static_cast<float>(-objective / static_cast<double>(batch ? batch : 1)); }
FASTGRPO_INLINE float batch_fraction(int64_t clipped, int64_t batch) { return static_cast<float>(clipped) / static_cast<float>(batch ? batch : 1); }
FASTGRPO_INLINE float batch_kl(double squares, int64_t batch) { return static_cast<float>(0.5 * squares / static_cast<double>(batch ? batch : 1)); }

}  // namespace fastgrpo
