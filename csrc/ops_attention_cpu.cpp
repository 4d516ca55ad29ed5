// The operation of attention_cpu.h: check, allocate, cut among threads. On the CPU only.
#include <algorithm>
#include <cmath>

#include "tensors.h"

namespace fastgrpo {
namespace {

// Products that one thread takes at least; results do not depend on it.
constexpr int64_t GRAIN = 1 << 17;

// work(begin, end, scratch) over all heads of all samples.
template <typename Work>
void for_heads(const FewTokens& t, const Work& work) {
  const int64_t products = std::max<int64_t>(t.queries * t.keys * t.channels, 1);
  torch::stable::parallel_for(0, t.batch * t.heads, std::max<int64_t>(GRAIN / products, 1), [&](int64_t begin, int64_t end) {
    constexpr size_t LINE = 64;  // bytes of the widest register: rows of the scratch begin at a multiple
    std::vector<float> scratch(static_cast<size_t>(attention_scratch(t)) + LINE / sizeof(float));
    const uintptr_t start = reinterpret_cast<uintptr_t>(scratch.data());
    work(begin, end, reinterpret_cast<float*>((start + LINE - 1) / LINE * LINE));
  });
}

// [B, `tokens`, H, D] like `like`, where it lies if a token's channels are dense; `kept` keeps a copy alive.
Heads heads_of(const char* name, const Tensor& x, int64_t tokens, const Tensor& like, std::vector<Tensor>& kept) {
  const bool fits = x.dim() == 4 && x.size(0) == like.size(0) && x.size(1) == tokens && x.size(2) == like.size(2) && x.size(3) == like.size(3);
  STD_TORCH_CHECK(fits, name, ": expected another shape, got ", x.dim(), " axes and ", x.numel(), " elements");
  STD_TORCH_CHECK(x.scalar_type() == like.scalar_type(), name, ": expected ", toString(like.scalar_type()), ", got ", toString(x.scalar_type()));
  const bool dense = (x.size(3) == 1 || x.stride(3) == 1) && (x.size(2) == 1 || x.stride(2) == x.size(3));
  kept.push_back(dense ? x : torch::stable::contiguous(x));
  return {kept.back().const_data_ptr(), kept.back().stride(0), kept.back().stride(1)};
}

FewTokens few_tokens(const Tensor& q, const Tensor& k, const Tensor& v, std::vector<Tensor>& kept) {
  STD_TORCH_CHECK(q.dim() == 4 && q.size(2) > 0 && q.size(3) > 0, "q: expected [B, L, H, D], got ", q.dim(), " axes");
  STD_TORCH_CHECK(k.dim() == 4, "k: expected [B, L, H, D], got ", k.dim(), " axes");
  FewTokens t{};
  t.batch = q.size(0), t.queries = q.size(1), t.keys = k.size(1), t.heads = q.size(2), t.channels = q.size(3);
  t.dtype = dtype_of("q", q);
  t.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(t.channels)));
  t.q = heads_of("q", q, t.queries, q, kept), t.k = heads_of("k", k, t.keys, q, kept), t.v = heads_of("v", v, t.keys, q, kept);
  return t;
}

Tensor few_token_attention(const Tensor& q, const Tensor& k, const Tensor& v) {
  std::vector<Tensor> kept;
  FewTokens t = few_tokens(q, k, v, kept);
  Tensor out = new_tensor(q, q.sizes(), q.scalar_type());
  t.out = out.mutable_data_ptr();
  for_heads(t, [&](int64_t begin, int64_t end, float* scratch) { best_cpu_kernels().few_token_attention(t, begin, end, scratch); });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> few_token_attention_backward(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v) {
  std::vector<Tensor> kept;
  FewTokensBackward b{};
  b.forward = few_tokens(q, k, v, kept);
  b.dout = heads_of("dout", dout, b.forward.queries, q, kept);
  Tensor dq = new_tensor(q, q.sizes(), q.scalar_type()), dk = new_tensor(k, k.sizes(), k.scalar_type()), dv = new_tensor(v, v.sizes(), v.scalar_type());
  b.dq = dq.mutable_data_ptr(), b.dk = dk.mutable_data_ptr(), b.dv = dv.mutable_data_ptr();
  for_heads(b.forward, [&](int64_t begin, int64_t end, float* scratch) { best_cpu_kernels().few_token_attention_backward(b, begin, end, scratch); });
  return {dq, dk, dv};
}

}  // namespace
}  // namespace fastgrpo

STABLE_TORCH_LIBRARY_IMPL(fastgrpo, CPU, m) {
  m.impl("few_token_attention", TORCH_BOX(&fastgrpo::few_token_attention));
  m.impl("few_token_attention_backward", TORCH_BOX(&fastgrpo::few_token_attention_backward));
}
