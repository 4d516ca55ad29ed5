// The operations on a GPU: on torch's current stream, with scratch from torch's allocator and errors as text. No host synchronisation.
#include "ops.h"

// Absent from a torch without CUDA, in which this library still loads and serves the CPU: hence weak. Declared by torch only under USE_CUDA.
extern "C" __attribute__((weak)) AOTI_TORCH_EXPORT AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace fastgrpo {
namespace {

// While it lives, the device of a tensor is the current one; holds that device's stream.
struct Launch {
  explicit Launch(const Tensor& like) : index(like.get_device_index()), guard(index) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "fastgrpo: expected a torch built with CUDA for a CUDA tensor, got one without");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
    check("choosing the device", cuda_set_device(index));
  }

  void check(const char* what, const char* error) const {
    STD_TORCH_CHECK(error == nullptr, "fastgrpo: ", what, " on cuda:", index, " failed: ", error);
  }

  int32_t index;
  torch::stable::accelerator::DeviceGuard guard;
  void* stream = nullptr;
};

Tensor empty_partials(const Transition& t, const Tensor& like) {
  return new_vector(like, t.batch * (t.batch ? cuda_partial_sums(t.numel) : 0), ScalarType::Double);
}

struct Cuda {
  static void sde_step(const Transition& t, void* next_latents, float* log_probs, const Tensor& like) {
    const Launch launch(like);
    const Tensor partials = empty_partials(t, like);
    launch.check("sde_step", cuda_sde_step(t, next_latents, log_probs, partials.mutable_data_ptr<double>(), launch.stream));
  }

  static void sde_log_prob(const Transition& t, float* log_probs, const Tensor& like) {
    const Launch launch(like);
    const Tensor partials = empty_partials(t, like);
    launch.check("sde_log_prob", cuda_sde_log_prob(t, log_probs, partials.mutable_data_ptr<double>(), launch.stream));
  }

  static void gradient(const Transition& t, const float* grad_log_probs, const float* grad_loss, void* grad, void* grad_uncond, const Tensor& like) {
    const Launch launch(like);
    launch.check("sde_log_prob_backward", cuda_gradient(t, grad_log_probs, grad_loss, grad, grad_uncond, launch.stream));
  }

  static void clipped_ratio_loss(const ClippedLoss& loss, const Tensor& like) {
    const Launch launch(like);
    launch.check("clipped_ratio_loss", cuda_clipped_loss(loss, launch.stream));
  }

  static void grpo_loss(const Transition& t, float* log_probs, const ClippedLoss& loss, const Tensor& like) {
    const Launch launch(like);
    const Tensor partials = empty_partials(t, like);
    launch.check("grpo_loss", cuda_grpo_loss(t, log_probs, loss, partials.mutable_data_ptr<double>(), launch.stream));
  }
};

}  // namespace
}  // namespace fastgrpo

STABLE_TORCH_LIBRARY_IMPL(fastgrpo, CUDA, m) { fastgrpo::register_operations<fastgrpo::Cuda>(m); }
