// Tensors by torch's stable ABI: checked pointers in, new tensors out.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <vector>

#include "launch.h"

namespace fastgrpo {

using torch::headeronly::ScalarType;
using torch::headeronly::toString;
using torch::stable::Tensor;

inline Dtype dtype_of(const char* name, const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  if (type == ScalarType::Float) return Dtype::float32;
  if (type == ScalarType::BFloat16) return Dtype::bfloat16;
  STD_TORCH_CHECK(type == ScalarType::Half, name, ": expected float32, bfloat16 or float16, got ", toString(type));
  return Dtype::float16;
}

// The data of a contiguous tensor, after a check of its dtype, its number of elements and its device (that of `like`).
inline const void* checked(const char* name, const Tensor& tensor, ScalarType type, int64_t numel, const Tensor& like) {
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, ": expected ", toString(type), ", got ",
                  toString(tensor.scalar_type()));
  STD_TORCH_CHECK(tensor.numel() == numel, name, ": expected ", numel, " elements, got ", tensor.numel());
  STD_TORCH_CHECK(tensor.is_contiguous(), name, ": expected a contiguous tensor, got other strides");
  STD_TORCH_CHECK(tensor.device() == like.device(), name, ": expected the device of the first argument, got another");
  return tensor.const_data_ptr();
}

template <typename T>
const T* vector_data(const char* name, const Tensor& tensor, int64_t batch, const Tensor& like) {
  const ScalarType type = std::is_same_v<T, float> ? ScalarType::Float : ScalarType::Long;
  return static_cast<const T*>(checked(name, tensor, type, batch, like));
}

// Not torch::stable::empty, which looks its operator up by name: half of a small operation's time.
inline Tensor new_tensor(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType type) {
  int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle made = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(like.get(), sizes.data(), static_cast<int64_t>(sizes.size()), &dtype, nullptr, nullptr, 0, nullptr, &made));
  return Tensor(made);
}

inline Tensor new_vector(const Tensor& like, int64_t size, ScalarType type = ScalarType::Float) { return new_tensor(like, {size}, type); }

inline Tensor new_scalar(const Tensor& like) { return new_tensor(like, {}, ScalarType::Float); }

// The arguments that every operation on a transition shares.
inline Transition transition_of(const Tensor& latents, const Tensor* next_latents, const Tensor& velocity, const std::optional<Tensor>& uncond,
                                const Tensor& a, const Tensor& b, const Tensor& std, double guidance_scale, bool normalized) {
  STD_TORCH_CHECK(latents.dim() >= 1, "latents: expected the batch first, got a scalar");
  const int64_t batch = latents.size(0), total = latents.numel();
  STD_TORCH_CHECK(batch == 0 || total > 0, "latents: expected at least one element per sample, got none");
  Transition t{};
  t.latents_dtype = dtype_of("latents", latents);
  t.velocity_dtype = dtype_of("velocity", velocity);
  t.latents = checked("latents", latents, latents.scalar_type(), total, latents);
  t.next_latents = next_latents ? checked("next_latents", *next_latents, latents.scalar_type(), total, latents) : nullptr;
  t.velocity = checked("velocity", velocity, velocity.scalar_type(), total, latents);
  t.uncond = uncond ? checked("velocity_uncond", *uncond, velocity.scalar_type(), total, latents) : nullptr;
  t.a = vector_data<float>("a", a, batch, latents);
  t.b = vector_data<float>("b", b, batch, latents);
  t.std = vector_data<float>("std", std, batch, latents);
  t.batch = batch;
  t.numel = batch ? total / batch : 0;
  t.guidance_scale = static_cast<float>(guidance_scale);
  t.normalized = normalized;
  return t;
}

}  // namespace fastgrpo
