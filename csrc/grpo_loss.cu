// The clipped loss on a GPU (Eq. 11): one block for the whole batch, which also finishes the log-probabilities of grpo_loss.
#include "common.cuh"

namespace fastgrpo {

constexpr int LOSS_THREADS = 512, LOSS_WARPS = LOSS_THREADS / WARP;

// partials: null if the log-probabilities are given.
__global__ void __launch_bounds__(LOSS_THREADS) loss_kernel(Transition t, const double* __restrict__ partials, int blocks, float* log_probs, ClippedLoss l) {
  if (partials) {
    for (int64_t row = threadIdx.x / WARP; row < l.batch; row += LOSS_WARPS) {
      const float log_prob = row_log_prob(t, partials, blocks, row, threadIdx.x % WARP);
      if (threadIdx.x % WARP == 0) log_probs[row] = log_prob;
    }
    __syncthreads();
  }
  double objective = 0.0, squares = 0.0, clipped = 0.0;
  for (int64_t i = threadIdx.x; i < l.batch; i += LOSS_THREADS) {
    const float log_ratio = l.log_probs[i] - l.old_log_probs[i];
    const float ratio = static_cast<float>(exp(static_cast<double>(log_ratio)));
    const ClipTerm term = clip_term(ratio, l.advantages[i], l.bounds, l.batch);
    l.ratio[i] = ratio;
    l.clipped[i] = term.clipped;
    l.grad_log_probs[i] = term.gradient;
    objective += term.objective;
    squares += static_cast<double>(log_ratio) * log_ratio;
    clipped += term.clipped;
  }
  objective = block_sum<LOSS_WARPS>(objective);
  squares = block_sum<LOSS_WARPS>(squares);
  clipped = block_sum<LOSS_WARPS>(clipped);
  if (threadIdx.x == 0) {
    *l.loss = batch_loss(objective, l.batch);
    *l.clip_fraction = batch_fraction(static_cast<int64_t>(clipped), l.batch);
    *l.approx_kl = batch_kl(squares, l.batch);
  }
}

const char* cuda_clipped_loss(const ClippedLoss& l, void* stream) {
  return launch_kernel(loss_kernel, 1, LOSS_THREADS, stream, Transition{}, nullptr, 0, nullptr, l);
}

const char* cuda_grpo_loss(const Transition& t, float* log_probs, const ClippedLoss& l, double* partials, void* stream) {
  if (t.batch == 0) return cuda_clipped_loss(l, stream);
  const char* error = launch_squared_errors(t, partials, stream);
  return error ? error : launch_kernel(loss_kernel, 1, LOSS_THREADS, stream, t, partials, blocks_of_row(t.numel), log_probs, l);
}

}  // namespace fastgrpo
