// The operations of norm_cpu.h: check, allocate, call. On the CPU only; a GPU has Triton's.
#include "rows_cpu.h"

namespace fastgrpo {
namespace {

// [B, 1 or L, C] where it lies, if its channels are neighbours.
Modulation modulation(const char* name, const std::optional<Tensor>& tensor, const Tensor& like, int64_t length, Dtype dtype, std::vector<Tensor>& kept) {
  if (!tensor) return {nullptr, 0, 0};
  check_shape(name, *tensor, {like.size(0), length, like.size(2)});
  STD_TORCH_CHECK(dtype_of(name, *tensor) == dtype, name, ": expected the dtype of the other modulations, got ", toString(tensor->scalar_type()));
  kept.push_back(tensor->stride(2) == 1 || like.size(2) == 1 ? *tensor : torch::stable::contiguous(*tensor));
  const Tensor& view = kept.back();
  return {view.const_data_ptr(), view.stride(0), length == 1 ? 0 : view.stride(1)};
}

const Tensor& first_given(const std::optional<Tensor>& one, const std::optional<Tensor>& other) { return one ? *one : other.value(); }


std::tuple<Tensor, Tensor, Tensor> gate_residual_ln_modulate(const Tensor& x, const std::optional<Tensor>& y, const std::optional<Tensor>& gate,
                                                             const std::optional<Tensor>& scale, const std::optional<Tensor>& shift, double eps) {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(2) > 0, "x: expected [B, L, C], got ", x.dim(), " axes");
  STD_TORCH_CHECK(y || scale, "y, scale: expected at least one, got None");
  STD_TORCH_CHECK(scale.has_value() == shift.has_value() && (y || !gate), "gate, scale, shift: expected a gate with y and a scale with shift, got one alone");
  std::vector<Tensor> kept;
  GatedNorm t{};
  t.batch = x.size(0), t.tokens = x.size(1), t.channels = x.size(2), t.eps = static_cast<float>(eps);
  t.dtype = dtype_of("x", x), t.y_dtype = y ? dtype_of("y", *y) : t.dtype;
  t.x = rows("x", x, x, t.dtype, kept), t.y = rows("y", y, x, t.y_dtype, kept);
  if (gate || scale) {
    const Tensor& first = first_given(scale, gate);
    const int64_t length = first.dim() == 3 && first.size(1) == t.tokens ? t.tokens : 1;
    t.modulation_dtype = dtype_of("scale", first);
    t.gate = modulation("gate", gate, x, length, t.modulation_dtype, kept);
    t.scale = modulation("scale", scale, x, length, t.modulation_dtype, kept);
    t.shift = modulation("shift", shift, x, length, t.modulation_dtype, kept);
  }
  Tensor residual = y ? new_tensor(x, x.sizes(), x.scalar_type()) : empty(x);
  Tensor modulated = scale ? new_tensor(x, x.sizes(), x.scalar_type()) : empty(x);
  Tensor statistics = scale ? new_tensor(x, {t.batch, t.tokens, 2}, ScalarType::Float) : new_vector(x, 0);
  t.residual = residual.mutable_data_ptr(), t.modulated = modulated.mutable_data_ptr(), t.statistics = statistics.mutable_data_ptr<float>();
  for_rows(t.batch * t.tokens, t.channels, t.channels,
           [&](int64_t begin, int64_t end, float* scratch) { best_cpu_kernels().gated_norm(t, begin, end, scratch); });
  return {residual, modulated, statistics};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gate_residual_ln_modulate_backward(
    const std::optional<Tensor>& dresidual, const std::optional<Tensor>& dmodulated, const std::optional<Tensor>& residual,
    const std::optional<Tensor>& statistics, const std::optional<Tensor>& y, const std::optional<Tensor>& gate, const std::optional<Tensor>& scale,
    const std::vector<bool>& needed) {
  STD_TORCH_CHECK(dresidual || dmodulated, "dresidual, dmodulated: expected at least one, got None");
  STD_TORCH_CHECK(!dmodulated || (residual && statistics && scale), "residual, statistics, scale: expected them with dmodulated, got None");
  STD_TORCH_CHECK(needed.size() == 2 && (!needed[0] || (gate && y)) && (!needed[1] || dmodulated),
                  "needed: expected [gate, scale and shift], each only where it is given, got another");
  const Tensor& like = first_given(dmodulated, dresidual);
  STD_TORCH_CHECK(like.dim() == 3 && like.size(2) > 0, "dmodulated: expected [B, L, C], got ", like.dim(), " axes");
  std::vector<Tensor> kept;
  GatedNormBackward t{};
  t.batch = like.size(0), t.tokens = like.size(1), t.channels = like.size(2), t.parts = num_parts(t.tokens);
  t.dtype = dtype_of("dmodulated", like), t.y_dtype = y ? dtype_of("y", *y) : t.dtype;
  t.dresidual = rows("dresidual", dresidual, like, t.dtype, kept), t.dmodulated = rows("dmodulated", dmodulated, like, t.dtype, kept);
  t.residual = rows("residual", residual, like, t.dtype, kept), t.y = rows("y", y, like, t.y_dtype, kept);
  if (dmodulated) t.statistics = static_cast<const float*>(checked("statistics", *statistics, ScalarType::Float, 2 * t.batch * t.tokens, like));
  const std::optional<Tensor>& first = scale ? scale : gate;
  if (first) {
    const int64_t length = first->dim() == 3 && first->size(1) == t.tokens ? t.tokens : 1;
    t.per_token = length != 1;
    t.modulation_dtype = dtype_of("scale", *first);
    t.gate = modulation("gate", gate, like, length, t.modulation_dtype, kept);
    t.scale = modulation("scale", scale, like, length, t.modulation_dtype, kept);
  }
  Tensor dx = dmodulated ? new_tensor(like, like.sizes(), like.scalar_type()) : empty(like);
  const bool wants_dy = y && (gate || t.y_dtype != t.dtype);
  Tensor dy = wants_dy ? new_tensor(*y, y->sizes(), y->scalar_type()) : empty(like);
  t.dx = dx.mutable_data_ptr(), t.dy = wants_dy ? dy.mutable_data_ptr() : nullptr;

  const bool wanted[] = {needed[0], needed[1], needed[1]};
  void** const targets[] = {&t.dgate, &t.dscale, &t.dshift};
  Tensor sums[] = {empty(like), empty(like), empty(like)};
  std::vector<float> parts[3];
  for (int i = 0; i < 3; ++i) {
    if (!wanted[i]) continue;
    if (t.per_token) {
      sums[i] = new_tensor(*first, like.sizes(), first->scalar_type());
      *targets[i] = sums[i].mutable_data_ptr();
    } else {
      parts[i].resize(static_cast<size_t>(t.batch * t.parts * t.channels));
      *targets[i] = parts[i].data();
    }
  }
  for_rows(t.batch * t.parts, std::min(t.tokens, PART_TOKENS) * t.channels, t.channels,
           [&](int64_t begin, int64_t end, float* scratch) { best_cpu_kernels().gated_norm_backward(t, begin, end, scratch); });
  for (int i = 0; i < 3; ++i) {
    if (wanted[i] && !t.per_token) sums[i] = add_parts(parts[i], t.batch, t.parts, t.channels, {t.batch, 1, t.channels}, *first);
  }
  return {dx, dy, sums[0], sums[1], sums[2]};
}


// One half of qk_norm_rope; `x` is [B, L, H, D].
NormRope half(const char* name, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& cos, const std::optional<Tensor>& sin, double eps,
              std::vector<Tensor>& kept) {
  STD_TORCH_CHECK(x.dim() == 4 && x.size(2) > 0 && x.size(3) > 0 && x.size(3) % 2 == 0, name, ": expected [B, L, H, D] with an even D, got ", x.dim(), " axes");
  NormRope t{};
  t.batch = x.size(0), t.tokens = x.size(1), t.head_channels = x.size(3), t.channels = x.size(2) * x.size(3), t.eps = static_cast<float>(eps);
  t.dtype = dtype_of(name, x);
  const bool dense = x.stride(3) == 1 && (x.size(2) == 1 || x.stride(2) == x.size(3));
  kept.push_back(dense ? x : torch::stable::contiguous(x));
  t.x = kept.back().const_data_ptr(), t.sample_stride = kept.back().stride(0), t.token_stride = kept.back().stride(1);
  t.width = weight.numel(), t.weight_dtype = dtype_of("weight", weight);
  STD_TORCH_CHECK(t.width == t.channels || t.width == t.head_channels, "weight: expected ", t.channels, " or ", t.head_channels, " elements, got ", t.width);
  kept.push_back(weight.is_contiguous() ? weight : torch::stable::contiguous(weight));
  t.weight = kept.back().const_data_ptr();
  STD_TORCH_CHECK(cos.has_value() == sin.has_value(), "cos, sin: expected both or neither, got one");
  if (cos) {
    t.turned = cos->size(0), t.angle_stride = t.head_channels / 2;
    const float** const targets[] = {&t.cos, &t.sin};
    const Tensor* const tables[] = {&*cos, &*sin};
    for (int i = 0; i < 2; ++i) {
      kept.push_back(tables[i]->is_contiguous() ? *tables[i] : torch::stable::contiguous(*tables[i]));
      *targets[i] = static_cast<const float*>(checked("cos, sin", kept.back(), ScalarType::Float, t.turned * t.angle_stride, x));
    }
    STD_TORCH_CHECK(t.turned <= t.tokens, "cos, sin: expected at most ", t.tokens, " rows, got ", t.turned);
  }
  return t;
}

std::tuple<Tensor, Tensor> forward_half(NormRope t, const Tensor& x) {
  Tensor out = new_tensor(x, x.sizes(), x.scalar_type());
  Tensor rstd = new_tensor(x, {t.batch, t.tokens, t.channels / t.width}, ScalarType::Float);
  t.out = out.mutable_data_ptr(), t.rstd = rstd.mutable_data_ptr<float>();
  for_rows(t.batch * t.tokens, t.channels, t.channels,
           [&](int64_t begin, int64_t end, float* scratch) { best_cpu_kernels().qk_norm(t, begin, end, scratch); });
  return {out, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> qk_norm_rope(const Tensor& q, const Tensor& k, const Tensor& q_weight, const Tensor& k_weight,
                                                        const std::optional<Tensor>& cos, const std::optional<Tensor>& sin, double eps) {
  std::vector<Tensor> kept;
  const auto [q_out, q_rstd] = forward_half(half("q", q, q_weight, cos, sin, eps, kept), q);
  const auto [k_out, k_rstd] = forward_half(half("k", k, k_weight, cos, sin, eps, kept), k);
  return {q_out, k_out, q_rstd, k_rstd};
}

// Gradients of x and of its weight, which is empty unless needs_weight.
std::tuple<Tensor, Tensor> backward_half(const NormRope& forward, const Tensor& x, const Tensor& weight, const Tensor& dout, bool needs_weight) {
  STD_TORCH_CHECK(dout.scalar_type() == x.scalar_type(), "gradients: expected ", toString(x.scalar_type()), ", got ", toString(dout.scalar_type()));
  check_shape("gradients", dout, x.sizes());
  const bool dense = dout.stride(3) == 1 && (x.size(2) == 1 || dout.stride(2) == x.size(3));
  const Tensor arriving = dense ? dout : torch::stable::contiguous(dout);
  Tensor dx = new_tensor(x, x.sizes(), x.scalar_type());
  NormRopeBackward t{};
  t.forward = forward, t.parts = num_parts(forward.tokens);
  t.dout = arriving.const_data_ptr(), t.dout_sample_stride = arriving.stride(0), t.dout_token_stride = arriving.stride(1);
  t.dx = dx.mutable_data_ptr();
  std::vector<float> sums(static_cast<size_t>(needs_weight ? forward.batch * t.parts * forward.width : 0));
  t.dweight = needs_weight ? sums.data() : nullptr;
  for_rows(forward.batch * t.parts, std::min(forward.tokens, PART_TOKENS) * forward.channels, forward.channels,
           [&](int64_t begin, int64_t end, float* scratch) { best_cpu_kernels().qk_norm_backward(t, begin, end, scratch); });
  if (!needs_weight) return {dx, empty(weight)};
  return {dx, add_parts(sums, 1, forward.batch * t.parts, forward.width, weight.sizes(), weight)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> qk_norm_rope_backward(const std::vector<Tensor>& gradients, const std::vector<std::optional<Tensor>>& saved,
                                                                 bool needs_weights) {
  STD_TORCH_CHECK(gradients.size() == 2 && saved.size() == 8, "gradients, saved: expected 2 and 8 tensors, got ", gradients.size(), " and ", saved.size());
  std::vector<Tensor> kept;
  std::tuple<Tensor, Tensor> made[2];
  for (int i = 0; i < 2; ++i) {
    const Tensor &x = saved[i].value(), &weight = saved[2 + i].value(), &rstd = saved[6 + i].value();
    NormRope t = half(i ? "k" : "q", x, weight, saved[4], saved[5], 0.0, kept);
    t.rstd = const_cast<float*>(static_cast<const float*>(checked("rstd", rstd, ScalarType::Float, t.batch * t.tokens * t.channels / t.width, x)));
    made[i] = backward_half(t, x, weight, gradients[i], needs_weights);
  }
  return {std::get<0>(made[0]), std::get<0>(made[1]), std::get<1>(made[0]), std::get<1>(made[1])};
}

}  // namespace
}  // namespace fastgrpo

STABLE_TORCH_LIBRARY_IMPL(fastgrpo, CPU, m) {
  m.impl("gate_residual_ln_modulate", TORCH_BOX(&fastgrpo::gate_residual_ln_modulate));
  m.impl("gate_residual_ln_modulate_backward", TORCH_BOX(&fastgrpo::gate_residual_ln_modulate_backward));
  m.impl("qk_norm_rope", TORCH_BOX(&fastgrpo::qk_norm_rope));
  m.impl("qk_norm_rope_backward", TORCH_BOX(&fastgrpo::qk_norm_rope_backward));
}
