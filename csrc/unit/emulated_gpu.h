// A GPU of one block, on threads of the host: what the kernels use of CUDA, no more. Where there is no GPU, index arithmetic, ragged
// ends, alignment, barriers and reductions are tested all the same, under the sanitizers.
#pragma once

#include <math.h>
#include <pthread.h>

#include <thread>
#include <vector>

#include "../portable.h"

#define __global__
#define __device__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(threads)

struct Index {
  unsigned x;
};
inline thread_local Index threadIdx, blockIdx;


struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline void __stwb(uint4* target, uint4 value) { *target = value; }

struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float value) : bits(fastgrpo::bfloat16_from_float(value)) {}
};
struct __half {
  uint16_t bits;
  __half() = default;
  explicit __half(float value) : bits(fastgrpo::float16_from_float(value)) {}
};
inline float __bfloat162float(__nv_bfloat16 value) { return fastgrpo::float_from_bfloat16(value.bits); }
inline float __half2float(__half value) { return fastgrpo::float_from_float16(value.bits); }
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return __nv_bfloat16(value); }
inline __half __float2half_rn(float value) { return __half(value); }


struct Block {
  pthread_barrier_t all, warps[32];
  double exchanged[1024];
};
inline Block block;

inline void __syncthreads() { pthread_barrier_wait(&block.all); }

inline double __shfl_xor_sync(unsigned, double value, int lane) {
  pthread_barrier_t* warp = &block.warps[threadIdx.x / 32];
  block.exchanged[threadIdx.x] = value;
  pthread_barrier_wait(warp);
  const double other = block.exchanged[threadIdx.x ^ static_cast<unsigned>(lane)];
  pthread_barrier_wait(warp);
  return other;
}

namespace fastgrpo {

// The blocks of a grid one after the other, in the order that a GPU would be least likely to take: the last first.
template <typename... Parameters, typename... Arguments>
const char* launch_kernel(void (*kernel)(Parameters...), int64_t blocks, int threads, void*, Arguments... arguments) {
  pthread_barrier_init(&block.all, nullptr, static_cast<unsigned>(threads));
  for (int warp = 0; warp < threads / 32; ++warp) pthread_barrier_init(&block.warps[warp], nullptr, 32);
  std::vector<std::thread> pool;
  for (int thread = 0; thread < threads; ++thread) {
    pool.emplace_back([=] {
      threadIdx.x = static_cast<unsigned>(thread);
      for (int64_t b = blocks; b-- > 0;) {
        blockIdx.x = static_cast<unsigned>(b);
        kernel(arguments...);
        __syncthreads();
      }
    });
  }
  for (std::thread& thread : pool) thread.join();
  pthread_barrier_destroy(&block.all);
  for (int warp = 0; warp < threads / 32; ++warp) pthread_barrier_destroy(&block.warps[warp]);
  return nullptr;
}

}  // namespace fastgrpo
