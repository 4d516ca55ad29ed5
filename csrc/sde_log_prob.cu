// sde_log_prob on a GPU, and its gradient in one pass over both branches; the second stage of every log-probability.
#include "common.cuh"

namespace fastgrpo {

template <typename L, typename V, bool GUIDED>
__global__ void __launch_bounds__(THREADS) squared_error_kernel(Transition t, double* __restrict__ partials, int blocks) {
  const TileIndex tile = tile_index(blocks);
  const Row<L, V> row(t, tile.row);
  const double rounder = rounder_of(row.std);
  double sum = 0.0;
  for (int64_t index = tile.first; index < t.numel; index += tile.stride) {
    const int64_t count = t.numel - index;
    float mean[VECTOR];
    const Vec8<L> stored = load(row.next_latents, index, count, row.vector);
    Args<L, V, GUIDED>(row, index, count).means(row, mean);
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
      const float error = to_float(stored.values[i]) - mean[i];
      if (i < count) sum += quantised(error * error, rounder);
    }
  }
  sum = block_sum<THREADS / WARP>(sum);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

template <typename L, typename V, bool GUIDED>
__global__ void __launch_bounds__(THREADS) gradient_kernel(Transition t, const float* __restrict__ grad_log_probs, const float* __restrict__ grad_loss,
                                                           V* __restrict__ grad, V* __restrict__ grad_uncond, int blocks) {
  const TileIndex tile = tile_index(blocks);
  const Row<L, V> row(t, tile.row);
  V* cond_row = grad + tile.row * t.numel;
  V* uncond_row = grad_uncond ? grad_uncond + tile.row * t.numel : nullptr;
  const bool vector = row.vector && aligned(cond_row) && aligned(uncond_row);
  const float g = grad_loss ? grad_log_probs[tile.row] * *grad_loss : grad_log_probs[tile.row];
  const float scale = gradient_scale(g, row.std, t.numel, t.normalized);
  for (int64_t index = tile.first; index < t.numel; index += tile.stride) {
    const int64_t count = t.numel - index;
    float mean[VECTOR];
    const Vec8<L> stored = load(row.next_latents, index, count, row.vector);
    Args<L, V, GUIDED>(row, index, count).means(row, mean);
    Vec8<V> cond, uncond;
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
      const float guided = velocity_gradient(scale, to_float(stored.values[i]) - mean[i], row.b);
      const float to_cond = GUIDED ? guided * row.w : guided;
      cond.values[i] = stored_as<V>(to_cond);
      uncond.values[i] = stored_as<V>(guided - to_cond);
    }
    store(cond, cond_row, index, count, vector);
    if (uncond_row) store(uncond, uncond_row, index, count, vector);
  }
}

// One warp per row, as in the loss kernel: the same order, so the same bits even beyond the exact range.
__global__ void __launch_bounds__(WARP) log_prob_kernel(Transition t, const double* __restrict__ partials, float* __restrict__ log_probs, int blocks) {
  const float log_prob = row_log_prob(t, partials, blocks, blockIdx.x, threadIdx.x);
  if (threadIdx.x == 0) log_probs[blockIdx.x] = log_prob;
}

const char* launch_log_probs(const Transition& t, const double* partials, float* log_probs, void* stream) {
  return launch_kernel(log_prob_kernel, t.batch, WARP, stream, t, partials, log_probs, blocks_of_row(t.numel));
}

const char* launch_squared_errors(const Transition& t, double* partials, void* stream) {
  const int blocks = blocks_of_row(t.numel);
  return with_types(t, [&](auto latent, auto velocity, auto guided) {
    return launch_kernel(squared_error_kernel<decltype(latent), decltype(velocity), guided()>, t.batch * blocks, THREADS, stream, t, partials, blocks);
  });
}

const char* cuda_sde_log_prob(const Transition& t, float* log_probs, double* partials, void* stream) {
  const char* error = launch_squared_errors(t, partials, stream);
  return error ? error : launch_log_probs(t, partials, log_probs, stream);
}

const char* cuda_gradient(const Transition& t, const float* grad_log_probs, const float* grad_loss, void* grad, void* grad_uncond, void* stream) {
  const int blocks = blocks_of_row(t.numel);
  return with_types(t, [&](auto latent, auto velocity, auto guided) {
    using V = decltype(velocity);
    return launch_kernel(gradient_kernel<decltype(latent), V, guided()>, t.batch * blocks, THREADS, stream, t, grad_log_probs, grad_loss,
                 static_cast<V*>(grad), static_cast<V*>(grad_uncond), blocks);
  });
}

int64_t cuda_partial_sums(int64_t numel) { return blocks_of_row(numel); }

}  // namespace fastgrpo
