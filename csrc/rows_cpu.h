// What the CPU's operations on rows share: cut among threads, contiguous rows, sums of parts. Included by the ops_*_cpu.cpp.
#pragma once

#include <algorithm>

#include "tensors.h"

namespace fastgrpo {

// Values that one thread takes at least; results do not depend on it.
constexpr int64_t GRAIN = 32768;

// work(begin, end) over [0, count), items of `values` numbers.
template <typename Work>
void for_items(int64_t count, int64_t values, const Work& work) {
  if (count) torch::stable::parallel_for(0, count, std::max<int64_t>(GRAIN / values, 1), work);
}

// work(begin, end, scratch), the same with scratch for rows of `channels`.
template <typename Work>
void for_rows(int64_t count, int64_t values, int64_t channels, const Work& work) {
  for_items(count, values, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(static_cast<size_t>(SCRATCH_ROWS * channels));
    work(begin, end, scratch.data());
  });
}

inline int64_t num_parts(int64_t tokens) { return (tokens + PART_TOKENS - 1) / PART_TOKENS; }

// [batch, width] in the dtype of `like` from fp32 [batch, parts, width]: in float64, in the order of the parts.
inline Tensor add_parts(const std::vector<float>& sums, int64_t batch, int64_t parts, int64_t width, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                        const Tensor& like) {
  Tensor out = new_tensor(like, sizes, like.scalar_type());
  const Dtype dtype = dtype_of("like", like);
  std::vector<double> total(static_cast<size_t>(width));
  char* target = static_cast<char*>(out.mutable_data_ptr());
  for (int64_t sample = 0; sample < batch; ++sample) {
    std::fill(total.begin(), total.end(), 0.0);
    for (int64_t part = sample * parts; part < (sample + 1) * parts; ++part) {
      for (int64_t i = 0; i < width; ++i) total[i] += sums[part * width + i];
    }
    for (int64_t i = 0; i < width; ++i, target += size_of(dtype)) {
      const float value = static_cast<float>(total[i]);
      const uint16_t bits = dtype == Dtype::bfloat16 ? bfloat16_from_float(value) : float16_from_float(value);
      if (dtype == Dtype::float32) memcpy(target, &value, sizeof(value));
      if (dtype != Dtype::float32) memcpy(target, &bits, sizeof(bits));
    }
  }
  return out;
}

inline void check_shape(const char* name, const Tensor& tensor, torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  bool fits = tensor.dim() == static_cast<int64_t>(sizes.size());
  for (size_t i = 0; fits && i < sizes.size(); ++i) fits = tensor.size(static_cast<int64_t>(i)) == sizes[i];
  STD_TORCH_CHECK(fits, name, ": expected another shape, got ", tensor.dim(), " axes and ", tensor.numel(), " elements");
}

// The data of a tensor of the shape of `like` and of `dtype`, contiguous: a copy only if it is not. `kept` keeps a copy alive.
inline const void* rows(const char* name, const std::optional<Tensor>& tensor, const Tensor& like, Dtype dtype, std::vector<Tensor>& kept) {
  if (!tensor) return nullptr;
  check_shape(name, *tensor, like.sizes());
  STD_TORCH_CHECK(dtype_of(name, *tensor) == dtype, name, ": expected the dtype of the other rows, got ", toString(tensor->scalar_type()));
  kept.push_back(tensor->is_contiguous() ? *tensor : torch::stable::contiguous(*tensor));
  return kept.back().const_data_ptr();
}

inline Tensor empty(const Tensor& like) { return new_vector(like, 0, like.scalar_type()); }

}  // namespace fastgrpo
