// How the CPU's loops read and write what is stored: through fp32 buffers in the first-level cache, so that one loop serves every dtype.
#pragma once

#include "portable.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace fastgrpo {
namespace {

const void* at(const void* base, Dtype dtype, int64_t index) { return static_cast<const char*>(base) + index * size_of(dtype); }
void* at(void* base, Dtype dtype, int64_t index) { return static_cast<char*>(base) + index * size_of(dtype); }

// n stored values as fp32: the memory itself for fp32, else the buffer.
const float* load(const void* source, Dtype dtype, int n, float* buffer) {
  if (dtype == Dtype::float32) return static_cast<const float*>(source);
  const uint16_t* bits = static_cast<const uint16_t*>(source);
  if (dtype == Dtype::bfloat16) {
    for (int i = 0; i < n; ++i) buffer[i] = float_from_bfloat16(bits[i]);
    return buffer;
  }
  int i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8) _mm256_storeu_ps(buffer + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bits + i))));
#endif
  for (; i < n; ++i) buffer[i] = float_from_float16(bits[i]);
  return buffer;
}

void store(const float* __restrict__ values, Dtype dtype, int n, void* target) {
  if (dtype == Dtype::float32) {
    memcpy(target, values, static_cast<size_t>(n) * sizeof(float));
    return;
  }
  uint16_t* __restrict__ bits = static_cast<uint16_t*>(target);
  if (dtype == Dtype::bfloat16) {
    for (int i = 0; i < n; ++i) bits[i] = bfloat16_from_float(values[i]);
    return;
  }
  int i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8) _mm_storeu_si128(reinterpret_cast<__m128i*>(bits + i), _mm256_cvtps_ph(_mm256_loadu_ps(values + i), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; i < n; ++i) bits[i] = float16_from_float(values[i]);
}

// Where n values may be written before `store_written`: the memory itself for fp32, else the buffer.
float* writable(void* target, Dtype dtype, float* buffer) { return dtype == Dtype::float32 ? static_cast<float*>(target) : buffer; }

void store_written(const float* values, Dtype dtype, int n, void* target) {
  if (dtype != Dtype::float32) store(values, dtype, n, target);
}

}  // namespace
}  // namespace fastgrpo
