// sde_step on a GPU: guidance, affine step, noise made in registers, rounding to storage, and the squared error of what was stored.
// One pass: 12 bytes per element with bf16 velocities and fp32 latents.
#include "common.cuh"
#include "normals.h"
#include "philox.h"

namespace fastgrpo {

// The noise of eight elements: two Philox calls, four pairs.
__device__ __forceinline__ void normals(int64_t seed, int64_t step, int64_t index, float (&noise)[VECTOR]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const Words words = noise_words(seed, step, index / 4 + half);
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      const float radius = radius32(static_cast<int32_t>((pair ? words.w2 : words.w0) >> 9));
      float c, s;
      cos_sin32(static_cast<int32_t>((pair ? words.w3 : words.w1) >> 9), c, s);
      noise[4 * half + 2 * pair] = radius * c;
      noise[4 * half + 2 * pair + 1] = radius * s;
    }
  }
}

template <typename L, typename V, bool GUIDED>
__global__ void __launch_bounds__(THREADS) sde_step_kernel(Transition t, L* __restrict__ next_latents, double* __restrict__ partials, int blocks) {
  const TileIndex tile = tile_index(blocks);
  const Row<L, V> row(t, tile.row);
  L* next_row = next_latents + tile.row * t.numel;
  const bool vector = row.vector && aligned(next_row);
  const int64_t seed = t.seeds[tile.row], step = t.steps[tile.row];
  const double rounder = rounder_of(row.std);
  double sum = 0.0;
  for (int64_t index = tile.first; index < t.numel; index += tile.stride) {
    const int64_t count = t.numel - index;
    float mean[VECTOR], noise[VECTOR];
    const Args<L, V, GUIDED> args(row, index, count);
    normals(seed, step, index, noise);
    args.means(row, mean);
    Vec8<L> next;
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
      next.values[i] = stored_as<L>(add_noise(mean[i], row.std, noise[i]));
      const float error = to_float(next.values[i]) - mean[i];
      if (i < count) sum += quantised(error * error, rounder);
    }
    store(next, next_row, index, count, vector);
  }
  sum = block_sum<THREADS / WARP>(sum);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

const char* cuda_sde_step(const Transition& t, void* next_latents, float* log_probs, double* partials, void* stream) {
  const int blocks = blocks_of_row(t.numel);
  const char* error = with_types(t, [&](auto latent, auto velocity, auto guided) {
    using L = decltype(latent);
    return launch_kernel(sde_step_kernel<L, decltype(velocity), guided()>, t.batch * blocks, THREADS, stream, t, static_cast<L*>(next_latents), partials, blocks);
  });
  return error ? error : launch_log_probs(t, partials, log_probs, stream);
}

}  // namespace fastgrpo
