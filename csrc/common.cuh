// Shared by the GPU kernels: eight elements per thread in 16-byte accesses, the division of a row into blocks, sums in a fixed order.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#else
#include "unit/emulated_gpu.h"  // the unit test runs these kernels on threads of the host
#endif

#include <type_traits>

#include "launch.h"

namespace fastgrpo {

constexpr int THREADS = 256, VECTOR = 8, WARP = 32;

#ifndef FASTGRPO_MAX_BLOCKS  // the unit test takes fewer, to see a thread go round its loop
#define FASTGRPO_MAX_BLOCKS 2048
#endif

// Blocks of a row: a function of its length only, never of the batch. Where the sum of a row is beyond the exact range (see `quantised`)
// its bits depend on the cut, and a sample's bits may not depend on its neighbours.
inline int blocks_of_row(int64_t numel) {
  const int64_t blocks = (numel + THREADS * VECTOR - 1) / (THREADS * VECTOR);
  return static_cast<int>(blocks < FASTGRPO_MAX_BLOCKS ? blocks : FASTGRPO_MAX_BLOCKS);
}

// One block of one row: the grid is one-dimensional because its second dimension ends at 65,535.
struct TileIndex {
  int64_t row, first, stride;  // elements: where this thread starts, how far it jumps
};
__device__ __forceinline__ TileIndex tile_index(int blocks) {
  const int64_t row = blockIdx.x / blocks, block = blockIdx.x % blocks;
  return {row, (block * THREADS + threadIdx.x) * VECTOR, static_cast<int64_t>(blocks) * THREADS * VECTOR};
}


template <typename T>
struct alignas(16) Vec8 {
  T values[VECTOR];
};

__device__ __forceinline__ bool aligned(const void* p) { return (reinterpret_cast<uintptr_t>(p) & 15) == 0; }

// `count` >= 8 on an aligned row: one or two 16-byte loads. At the end of a row, or on a row that is not aligned: one by one.
template <typename T>
__device__ __forceinline__ Vec8<T> load(const T* row, int64_t index, int64_t count, bool vector) {
  Vec8<T> result;
  if (vector && count >= VECTOR) {
    const uint4* source = reinterpret_cast<const uint4*>(row + index);
    uint4* target = reinterpret_cast<uint4*>(result.values);
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(T) * VECTOR / 16); ++i) target[i] = source[i];
  } else {
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) result.values[i] = i < count ? row[index + i] : T(0.0f);
  }
  return result;
}

template <typename T>
__device__ __forceinline__ void store(const Vec8<T>& vec, T* row, int64_t index, int64_t count, bool vector) {
  if (vector && count >= VECTOR) {
    uint4* target = reinterpret_cast<uint4*>(row + index);
    const uint4* source = reinterpret_cast<const uint4*>(vec.values);
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(T) * VECTOR / 16); ++i) __stwb(target + i, source[i]);  // an assignment may be split again
  } else {
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
      if (i < count) row[index + i] = vec.values[i];
    }
  }
}

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }

template <typename T>
__device__ __forceinline__ T stored_as(float value);
template <>
__device__ __forceinline__ float stored_as(float value) { return value; }
template <>
__device__ __forceinline__ __nv_bfloat16 stored_as(float value) { return __float2bfloat16_rn(value); }
template <>
__device__ __forceinline__ __half stored_as(float value) { return __float2half_rn(value); }


// One row's pointers and coefficients; L is the dtype of the latents, V of the velocities.
template <typename L, typename V>
struct Row {
  const L *latents, *next_latents;
  const V *velocity, *uncond;
  float a, b, std, w;
  int64_t numel;
  bool vector;

  __device__ __forceinline__ Row(const Transition& t, int64_t row)
      : a(t.a[row]), b(t.b[row]), std(t.std[row]), w(t.guidance_scale), numel(t.numel) {
    const int64_t offset = row * t.numel;
    latents = static_cast<const L*>(t.latents) + offset;
    next_latents = t.next_latents ? static_cast<const L*>(t.next_latents) + offset : nullptr;
    velocity = static_cast<const V*>(t.velocity) + offset;
    uncond = t.uncond ? static_cast<const V*>(t.uncond) + offset : nullptr;
    vector = aligned(latents) && aligned(next_latents) && aligned(velocity) && aligned(uncond);
  }
};

// Eight elements of a transition as they are stored. Loading is separate from computing, so that work can be done during the loads.
template <typename L, typename V, bool GUIDED>
struct Args {
  Vec8<L> x;
  Vec8<V> cond, uncond;

  __device__ __forceinline__ Args(const Row<L, V>& row, int64_t index, int64_t count)
      : x(load(row.latents, index, count, row.vector)), cond(load(row.velocity, index, count, row.vector)) {
    if (GUIDED) uncond = load(row.uncond, index, count, row.vector);
  }

  __device__ __forceinline__ void means(const Row<L, V>& row, float (&mean)[VECTOR]) const {
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
      float v = to_float(cond.values[i]);
      if (GUIDED) v = guide(v, to_float(uncond.values[i]), row.w);
      mean[i] = mean_of(row.a, to_float(x.values[i]), row.b, v);
    }
  }
};


__device__ __forceinline__ double warp_sum(double value) {
#pragma unroll
  for (int lane = WARP / 2; lane > 0; lane /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, lane);
  return value;
}

// The sum over a block, in thread 0; a block calls it any number of times.
template <int WARPS>
__device__ __forceinline__ double block_sum(double value) {
  __shared__ double of_warps[WARPS];
  value = warp_sum(value);
  __syncthreads();  // a previous call may still read of_warps
  if (threadIdx.x % WARP == 0) of_warps[threadIdx.x / WARP] = value;
  __syncthreads();
  double sum = 0.0;
#pragma unroll
  for (int i = 0; i < WARPS; ++i) sum += of_warps[i];
  return sum;
}

// The log-probability of a row from the partial sums of its blocks; all lanes of a warp call it and get the result.
__device__ __forceinline__ float row_log_prob(const Transition& t, const double* partials, int blocks, int64_t row, int lane) {
  double sum = 0.0;
  for (int i = lane; i < blocks; i += WARP) sum += partials[row * blocks + i];
  const float std = t.std[row];
  return log_prob_of(warp_sum(sum), t.numel, std, log(static_cast<double>(std)), t.normalized);
}


#ifdef __CUDACC__
// Launch a kernel; the error, or null.
template <typename... Parameters, typename... Arguments>
const char* launch_kernel(void (*kernel)(Parameters...), int64_t blocks, int threads, void* stream, Arguments... arguments) {
  if (blocks > 0x7FFFFFFF) return "the batch is too large for one launch, split it";
  kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads), 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
#endif

// Call launch(L(), V(), GUIDED) with the C++ types of the dtypes, and std::true_type if there is an unconditional branch.
template <typename L, typename V, typename Launch>
const char* with_guidance(const Transition& t, const Launch& launch) {
  if (t.uncond) return launch(L(), V(), std::true_type());
  return launch(L(), V(), std::false_type());
}
template <typename L, typename Launch>
const char* with_velocity(const Transition& t, const Launch& launch) {
  if (t.velocity_dtype == Dtype::float32) return with_guidance<L, float>(t, launch);
  if (t.velocity_dtype == Dtype::bfloat16) return with_guidance<L, __nv_bfloat16>(t, launch);
  return with_guidance<L, __half>(t, launch);
}
template <typename Launch>
const char* with_types(const Transition& t, const Launch& launch) {
  if (t.latents_dtype == Dtype::float32) return with_velocity<float>(t, launch);
  if (t.latents_dtype == Dtype::bfloat16) return with_velocity<__nv_bfloat16>(t, launch);
  return with_velocity<__half>(t, launch);
}

// The second launch of a step or a log-prob: partial sums -> log-probabilities. And the first launch of a log-prob or a loss.
const char* launch_log_probs(const Transition& t, const double* partials, float* log_probs, void* stream);
const char* launch_squared_errors(const Transition& t, double* partials, void* stream);

}  // namespace fastgrpo
