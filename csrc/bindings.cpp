// Schemas, one line per operation. The reference.py of the folders of kernels/fastgrpo_kernels/ say what they compute; the files beside
// them hold their fakes and their autograd.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fastgrpo, m) {
  m.def("sde_step(Tensor latents, Tensor velocity, Tensor? velocity_uncond, Tensor a, Tensor b, Tensor std, Tensor seeds, Tensor steps, float guidance_scale, bool normalized) -> (Tensor, Tensor)");
  m.def("sde_log_prob(Tensor latents, Tensor next_latents, Tensor velocity, Tensor? velocity_uncond, Tensor a, Tensor b, Tensor std, float guidance_scale, bool normalized) -> Tensor");
  m.def("sde_log_prob_backward(Tensor grad_log_probs, Tensor? grad_loss, Tensor latents, Tensor next_latents, Tensor velocity, Tensor? velocity_uncond, Tensor a, Tensor b, Tensor std, float guidance_scale, bool normalized, bool needs_uncond) -> (Tensor, Tensor)");
  m.def("clipped_ratio_loss(Tensor log_probs, Tensor old_log_probs, Tensor advantages, float clip_range, float adv_clip) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("grpo_loss(Tensor latents, Tensor next_latents, Tensor velocity, Tensor? velocity_uncond, Tensor old_log_probs, Tensor advantages, Tensor a, Tensor b, Tensor std, float guidance_scale, bool normalized, float clip_range, float adv_clip) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("gate_residual_ln_modulate(Tensor x, Tensor? y, Tensor? gate, Tensor? scale, Tensor? shift, float eps) -> (Tensor, Tensor, Tensor)");
  m.def("gate_residual_ln_modulate_backward(Tensor? dresidual, Tensor? dmodulated, Tensor? residual, Tensor? statistics, Tensor? y, Tensor? gate, Tensor? scale, bool[] needed) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("qk_norm_rope(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor? cos, Tensor? sin, float eps) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("qk_norm_rope_backward(Tensor[] gradients, Tensor?[] saved, bool needs_weights) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("bias_gelu(Tensor x, Tensor? bias) -> Tensor");
  m.def("bias_gelu_backward(Tensor dout, Tensor x, Tensor? bias, bool needs_bias) -> (Tensor, Tensor)");
  m.def("few_token_attention(Tensor q, Tensor k, Tensor v) -> Tensor");
  m.def("few_token_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor, Tensor)");
  m.def("build_info() -> str");
}
