// What host and device code share: inlining, bit casts, and the storage dtypes. No torch, no CUDA header, no libm.
#pragma once

#include <cstdint>
#include <cstring>

// Every shared function has internal linkage: the CPU kernels are compiled once per instruction set, and a linker that
// merged their copies could hand AVX-512 code to a machine without it.
#ifdef __CUDACC__
#define FASTGRPO_INLINE static __host__ __device__ __forceinline__
#else
#define FASTGRPO_INLINE static inline __attribute__((always_inline))
#endif

namespace fastgrpo {

// Everything below wants each product and each sum rounded on its own: g++ -ffp-contract=off, nvcc -fmad=false.
#ifdef __FAST_MATH__
#error "fastgrpo must not be compiled with -ffast-math: its results would differ from the reference's"
#endif

enum class Dtype : int32_t { float32, bfloat16, float16 };

FASTGRPO_INLINE int64_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

template <typename To, typename From>
FASTGRPO_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast: sizes differ");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

FASTGRPO_INLINE float float_from_bfloat16(uint16_t bits) { return bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

// Round to nearest, ties to even; a NaN stays one, and quiet.
FASTGRPO_INLINE uint16_t bfloat16_from_float(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}

FASTGRPO_INLINE float float_from_float16(uint16_t bits) {
  // The exponent is moved to its place in fp32 and corrected by a product, which also makes subnormals right.
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16, magnitude = static_cast<uint32_t>(bits & 0x7FFFu) << 13;
  const uint32_t finite = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);
  return bit_cast<float>(sign | (magnitude >= 0x0F800000u ? 0x7F800000u | magnitude : finite));
}

FASTGRPO_INLINE uint16_t float16_from_float(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  const uint32_t normal = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14 the last bit is worth 2^-24: adding 1/2 leaves it at the end of the fraction, rounded by the adder.
  const uint32_t tiny = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3F000000u;
  const uint32_t finite = magnitude < 0x38800000u ? tiny : normal;
  const uint32_t special = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
  return static_cast<uint16_t>(sign | (magnitude >= 0x47800000u ? special : finite));
}

}  // namespace fastgrpo
