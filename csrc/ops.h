// The operations of bindings.cpp, written once: check, allocate, launch. A Device has five static functions that launch.
#pragma once

#include <tuple>

#include "tensors.h"

namespace fastgrpo {

// Where the results of a clipped loss go, and the struct that its kernel reads.
struct LossTensors {
  Tensor loss, ratio, clipped, clip_fraction, approx_kl, grad_log_probs;
  ClippedLoss arguments;
};

inline LossTensors loss_tensors(const Tensor& log_probs, const Tensor& old_log_probs, const Tensor& advantages, double clip_range, double adv_clip) {
  const int64_t batch = log_probs.numel();
  const float* ours = vector_data<float>("log_probs", log_probs, batch, log_probs);
  const float* old = vector_data<float>("old_log_probs", old_log_probs, batch, log_probs);
  const float* gains = vector_data<float>("advantages", advantages, batch, log_probs);
  LossTensors t{new_scalar(log_probs), new_vector(log_probs, batch), new_vector(log_probs, batch, ScalarType::Bool),
                new_scalar(log_probs), new_scalar(log_probs), new_vector(log_probs, batch), {}};
  t.arguments = {ours,
                 old,
                 gains,
                 t.loss.mutable_data_ptr<float>(),
                 t.ratio.mutable_data_ptr<float>(),
                 t.clipped.mutable_data_ptr<bool>(),
                 t.clip_fraction.mutable_data_ptr<float>(),
                 t.approx_kl.mutable_data_ptr<float>(),
                 t.grad_log_probs.mutable_data_ptr<float>(),
                 bounds_of(clip_range, adv_clip),
                 batch};
  return t;
}

template <typename Device>
std::tuple<Tensor, Tensor> sde_step(const Tensor& latents, const Tensor& velocity, const std::optional<Tensor>& velocity_uncond, const Tensor& a,
                                    const Tensor& b, const Tensor& std, const Tensor& seeds, const Tensor& steps, double guidance_scale, bool normalized) {
  Transition t = transition_of(latents, nullptr, velocity, velocity_uncond, a, b, std, guidance_scale, normalized);
  t.seeds = vector_data<int64_t>("seeds", seeds, t.batch, latents);
  t.steps = vector_data<int64_t>("steps", steps, t.batch, latents);
  Tensor next_latents = new_tensor(latents, latents.sizes(), latents.scalar_type()), log_probs = new_vector(latents, t.batch);
  if (t.batch) Device::sde_step(t, next_latents.mutable_data_ptr(), log_probs.mutable_data_ptr<float>(), latents);
  return {next_latents, log_probs};
}

template <typename Device>
Tensor sde_log_prob(const Tensor& latents, const Tensor& next_latents, const Tensor& velocity, const std::optional<Tensor>& velocity_uncond,
                    const Tensor& a, const Tensor& b, const Tensor& std, double guidance_scale, bool normalized) {
  const Transition t = transition_of(latents, &next_latents, velocity, velocity_uncond, a, b, std, guidance_scale, normalized);
  Tensor log_probs = new_vector(latents, t.batch);
  if (t.batch) Device::sde_log_prob(t, log_probs.mutable_data_ptr<float>(), latents);
  return log_probs;
}

template <typename Device>
std::tuple<Tensor, Tensor> sde_log_prob_backward(const Tensor& grad_log_probs, const std::optional<Tensor>& grad_loss, const Tensor& latents,
                                                 const Tensor& next_latents, const Tensor& velocity, const std::optional<Tensor>& velocity_uncond,
                                                 const Tensor& a, const Tensor& b, const Tensor& std, double guidance_scale, bool normalized,
                                                 bool needs_uncond) {
  const Transition t = transition_of(latents, &next_latents, velocity, velocity_uncond, a, b, std, guidance_scale, normalized);
  STD_TORCH_CHECK(!needs_uncond || velocity_uncond, "velocity_uncond: expected a tensor when its gradient is needed, got None");
  const float* of_log_probs = vector_data<float>("grad_log_probs", grad_log_probs, t.batch, latents);
  const float* of_loss = grad_loss ? vector_data<float>("grad_loss", *grad_loss, 1, latents) : nullptr;
  Tensor grad = new_tensor(velocity, velocity.sizes(), velocity.scalar_type());
  Tensor grad_uncond = needs_uncond ? new_tensor(velocity, velocity.sizes(), velocity.scalar_type()) : new_vector(velocity, 0, velocity.scalar_type());
  if (t.batch) Device::gradient(t, of_log_probs, of_loss, grad.mutable_data_ptr(), needs_uncond ? grad_uncond.mutable_data_ptr() : nullptr, latents);
  return {grad, grad_uncond};
}

template <typename Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> clipped_ratio_loss(const Tensor& log_probs, const Tensor& old_log_probs,
                                                                              const Tensor& advantages, double clip_range, double adv_clip) {
  const LossTensors t = loss_tensors(log_probs, old_log_probs, advantages, clip_range, adv_clip);
  Device::clipped_ratio_loss(t.arguments, log_probs);
  return {t.loss, t.ratio, t.clipped, t.clip_fraction, t.approx_kl, t.grad_log_probs};
}

template <typename Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> grpo_loss(
    const Tensor& latents, const Tensor& next_latents, const Tensor& velocity, const std::optional<Tensor>& velocity_uncond, const Tensor& old_log_probs,
    const Tensor& advantages, const Tensor& a, const Tensor& b, const Tensor& std, double guidance_scale, bool normalized, double clip_range,
    double adv_clip) {
  const Transition transition = transition_of(latents, &next_latents, velocity, velocity_uncond, a, b, std, guidance_scale, normalized);
  Tensor log_probs = new_vector(latents, transition.batch);
  const LossTensors t = loss_tensors(log_probs, old_log_probs, advantages, clip_range, adv_clip);
  Device::grpo_loss(transition, log_probs.mutable_data_ptr<float>(), t.arguments, latents);
  return {t.loss, log_probs, t.ratio, t.clipped, t.clip_fraction, t.approx_kl, t.grad_log_probs};
}

// Registered by ops_cpu.cpp and ops_cuda.cpp under their dispatch keys.
template <typename Device>
void register_operations(torch::stable::detail::StableLibrary& m) {
  m.impl("sde_step", TORCH_BOX(&sde_step<Device>));
  m.impl("sde_log_prob", TORCH_BOX(&sde_log_prob<Device>));
  m.impl("sde_log_prob_backward", TORCH_BOX(&sde_log_prob_backward<Device>));
  m.impl("clipped_ratio_loss", TORCH_BOX(&clipped_ratio_loss<Device>));
  m.impl("grpo_loss", TORCH_BOX(&grpo_loss<Device>));
}

}  // namespace fastgrpo
