// The operations of gelu_cpu.h: check, allocate, call. On the CPU only; a GPU has Triton's.
#include "rows_cpu.h"

namespace fastgrpo {
namespace {

BiasGelu rows_of(const Tensor& x, const std::optional<Tensor>& bias, std::vector<Tensor>& kept) {
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) > 0, "x: expected [..., C], got ", x.dim(), " axes and ", x.numel(), " elements");
  BiasGelu t{};
  t.dtype = dtype_of("x", x);
  t.channels = x.size(x.dim() - 1), t.rows = x.numel() / t.channels;
  t.x = rows("x", x, x, t.dtype, kept);
  if (bias) {
    t.bias_dtype = dtype_of("bias", *bias);
    kept.push_back(bias->is_contiguous() ? *bias : torch::stable::contiguous(*bias));
    t.bias = checked("bias", kept.back(), bias->scalar_type(), t.channels, x);
  }
  return t;
}

Tensor bias_gelu(const Tensor& x, const std::optional<Tensor>& bias) {
  std::vector<Tensor> kept;
  BiasGelu t = rows_of(x, bias, kept);
  Tensor out = new_tensor(x, x.sizes(), x.scalar_type());
  t.out = out.mutable_data_ptr();
  for_items(t.rows, t.channels, [&](int64_t begin, int64_t end) { best_cpu_kernels().bias_gelu(t, begin, end); });
  return out;
}

// Gradients of x and of bias; the latter is empty unless needs_bias.
std::tuple<Tensor, Tensor> bias_gelu_backward(const Tensor& dout, const Tensor& x, const std::optional<Tensor>& bias, bool needs_bias) {
  std::vector<Tensor> kept;
  BiasGeluBackward b{};
  b.forward = rows_of(x, bias, kept);
  b.dout = rows("dout", dout, x, b.forward.dtype, kept);
  Tensor dx = new_tensor(x, x.sizes(), x.scalar_type());
  b.dx = dx.mutable_data_ptr();
  const bool needed = bias && needs_bias;
  const int64_t parts = num_parts(b.forward.rows), channels = b.forward.channels;
  std::vector<float> sums(static_cast<size_t>(needed ? parts * channels : 0));
  b.dbias = needed ? sums.data() : nullptr;
  for_items(parts, std::min(b.forward.rows, PART_TOKENS) * channels,
            [&](int64_t begin, int64_t end) { best_cpu_kernels().bias_gelu_backward(b, begin, end); });
  if (!needed) return {dx, empty(x)};
  return {dx, add_parts(sums, 1, parts, channels, bias->sizes(), *bias)};
}

}  // namespace
}  // namespace fastgrpo

STABLE_TORCH_LIBRARY_IMPL(fastgrpo, CPU, m) {
  m.impl("bias_gelu", TORCH_BOX(&fastgrpo::bias_gelu));
  m.impl("bias_gelu_backward", TORCH_BOX(&fastgrpo::bias_gelu_backward));
}
