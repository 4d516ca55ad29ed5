// The CPU's loops of norm_cpu.h: against the formulas in float64, and every instruction set against the plain one, bit for bit.
#include <algorithm>

#include "loops.h"

using namespace fastgrpo;

namespace {

// B samples of L tokens of n channels through all of gated_norm, forward and backward.
void test_gated_norm(Numbers& numbers, Dtype dtype, Dtype modulation, int64_t n, bool per_token, int64_t shift) {
  const int64_t B = 2, L = PART_TOKENS + 3, rows = B * L, parts = 2, length = per_token ? L : 1;
  const Stored x = numbers.stored(dtype, rows * n, shift), y = numbers.stored(modulation, rows * n, shift);
  const Stored gate = numbers.stored(modulation, B * length * n, shift), scale = numbers.stored(modulation, B * length * n, 0);
  const Stored dresidual = numbers.stored(dtype, rows * n, shift), dmodulated = numbers.stored(dtype, rows * n, shift);
  const Dtype sum_dtype = per_token ? modulation : Dtype::float32;
  const int64_t sum_count = (per_token ? rows : B * parts) * n;
  std::vector<std::vector<Stored>> made;
  for (const Isa& isa : instruction_sets()) {
    std::vector<Stored> out;
    for (int i = 0; i < 4; ++i) out.emplace_back(i == 3 ? modulation : dtype, rows * n, shift);  // residual, modulated, dx, dy
    for (int i = 0; i < 3; ++i) out.emplace_back(sum_dtype, sum_count, 0);                       // dgate, dscale, dshift
    std::vector<float> statistics(2 * rows), scratch(SCRATCH_ROWS * n);
    const auto view = [&](const Stored& m) { return Modulation{m.data(), length * n, per_token ? n : 0}; };
    const GatedNorm t{x.data(), y.data(), view(gate), view(scale), view(gate), out[0].data(), out[1].data(), statistics.data(),
                      dtype, modulation, modulation, B, L, n, 1e-6f};
    isa.kernels->gated_norm(t, 0, 5, scratch.data());
    isa.kernels->gated_norm(t, 5, rows, scratch.data());
    const GatedNormBackward b{dresidual.data(), dmodulated.data(), out[0].data(), y.data(), statistics.data(), view(gate), view(scale), out[2].data(), out[3].data(),
                              out[4].data(), out[5].data(), out[6].data(), dtype, modulation, modulation, B, L, n, parts, per_token};
    isa.kernels->gated_norm_backward(b, 0, B * parts, scratch.data());
    if (!made.empty()) {
      for (int i = 0; i < 7; ++i) expect_same(isa.name, "gated_norm", out[i], made[0][i]);
    }
    made.push_back(std::move(out));
  }

  const std::vector<Stored>& out = made[0];
  std::vector<double> sums(3 * B * n, 0.0), normed(n), scaled(n);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t sample = row / L, m = (sample * length + (per_token ? row % L : 0)) * n;
    double mean = 0.0, variance = 0.0, mean_grad = 0.0, mean_dot = 0.0;
    for (int64_t i = 0; i < n; ++i) {
      const double residual = double(x.get(row * n + i)) + double(gate.get(m + i)) * y.get(row * n + i);
      EXPECT(near(out[0].get(row * n + i), residual, dtype, 1.0), "residual of %d channels: %a, expected %a", int(n), out[0].get(row * n + i), residual);
      mean += out[0].get(row * n + i) / double(n);
    }
    for (int64_t i = 0; i < n; ++i) variance += (out[0].get(row * n + i) - mean) * (out[0].get(row * n + i) - mean) / n;
    const double rstd = 1.0 / std::sqrt(variance + 1e-6);
    for (int64_t i = 0; i < n; ++i) {
      normed[i] = (out[0].get(row * n + i) - mean) * rstd;
      const double modulated = normed[i] * (1.0 + scale.get(m + i)) + gate.get(m + i);
      EXPECT(near(out[1].get(row * n + i), modulated, dtype, 8.0), "modulated, %d channels: %a, expected %a", int(n), out[1].get(row * n + i), modulated);
      scaled[i] = dmodulated.get(row * n + i) * (1.0 + scale.get(m + i));
      mean_grad += scaled[i] / n, mean_dot += scaled[i] * normed[i] / n;
    }
    for (int64_t i = 0; i < n; ++i) {
      const double grad = dresidual.get(row * n + i) + rstd * (scaled[i] - mean_grad - normed[i] * mean_dot);
      const double dy = grad * gate.get(m + i), size = 8.0 * rstd;
      EXPECT(near(out[2].get(row * n + i), grad, dtype, size), "dx of %d channels: %a, expected %a", int(n), out[2].get(row * n + i), grad);
      EXPECT(near(out[3].get(row * n + i), dy, modulation, 4 * size), "dy of %d channels: %a, expected %a", int(n), out[3].get(row * n + i), dy);
      const double terms[] = {y.get(row * n + i) * grad, dmodulated.get(row * n + i) * normed[i], dmodulated.get(row * n + i)};
      for (int k = 0; k < 3; ++k) {
        sums[(k * B + sample) * n + i] += terms[k];
        if (per_token) EXPECT(near(out[4 + k].get(row * n + i), terms[k], modulation, 4 * size), "gradient %d of a token: %a, expected %a", k, out[4 + k].get(row * n + i), terms[k]);
      }
    }
  }
  for (int64_t i = 0; i < 3 * B * n && !per_token; ++i) {
    const int64_t k = i / (B * n), sample = i / n % B, channel = i % n;
    const double sum = double(out[4 + k].get(sample * parts * n + channel)) + out[4 + k].get((sample * parts + 1) * n + channel);
    EXPECT(std::abs(sum - sums[i]) < 0.01, "sum %d over tokens: %a, expected %a", int(k), sum, sums[i]);
  }
}

// B samples of L tokens of H heads of D channels, forward and backward; every token 3 channels after the end of the one before.
void test_qk_norm(Numbers& numbers, Dtype dtype, Dtype weight_dtype, int64_t H, int64_t D, bool across, int64_t shift) {
  const int64_t B = 2, L = PART_TOKENS + 3, n = H * D, width = across ? n : D, step = n + 3, rows = B * L, parts = 2, turned = L - 2;
  const Stored x = numbers.stored(dtype, rows * step, shift), weight = numbers.stored(weight_dtype, width, shift), dout = numbers.stored(dtype, rows * step, shift);
  std::vector<float> cosine, sine;
  for (int64_t i = 0; i < turned * D / 2; ++i) {
    const float angle = 3.0f * numbers.normal(numbers.random);
    cosine.push_back(std::cos(angle)), sine.push_back(std::sin(angle));
  }
  std::vector<std::vector<Stored>> made;
  for (const Isa& isa : instruction_sets()) {
    std::vector<Stored> out;
    out.emplace_back(dtype, rows * n, shift), out.emplace_back(dtype, rows * n, shift), out.emplace_back(Dtype::float32, B * parts * width, 0);
    std::vector<float> rstd(rows * n / width), scratch(SCRATCH_ROWS * n);
    const NormRope t{x.data(), weight.data(), cosine.data(), sine.data(), out[0].data(), rstd.data(), dtype, weight_dtype,
                     B, L, n, D, width, turned, L * step, step, D / 2, 1e-6f};
    isa.kernels->qk_norm(t, 0, 7, scratch.data());
    isa.kernels->qk_norm(t, 7, rows, scratch.data());
    const NormRopeBackward b{t, dout.data(), L * step, step, out[1].data(), static_cast<float*>(out[2].data()), parts};
    isa.kernels->qk_norm_backward(b, 0, B * parts, scratch.data());
    if (!made.empty()) {
      for (int i = 0; i < 3; ++i) expect_same(isa.name, "qk_norm", out[i], made[0][i]);
    }
    made.push_back(std::move(out));
  }

  const std::vector<Stored>& out = made[0];
  std::vector<double> dweight(width, 0.0), y(n), grad(n);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t group = 0; group < n; group += width) {
      double mean = 0.0;
      for (int64_t i = 0; i < width; ++i) mean += double(x.get(row * step + group + i)) * x.get(row * step + group + i) / width;
      const double rstd = 1.0 / std::sqrt(mean + 1e-6);
      double mean_dot = 0.0;
      for (int64_t i = 0; i < width; ++i) {
        const int64_t channel = group + i, pair = channel % D / 2, at = row % L * (D / 2) + pair, first = channel - channel % 2;
        const double c = row % L < turned ? cosine[at] : 1.0, s = row % L < turned ? sine[at] : 0.0;
        const auto normed = [&](int64_t k) { return x.get(row * step + k) * rstd * weight.get(k % width); };
        const double even = normed(first), odd = normed(first + 1), d_even = dout.get(row * step + first), d_odd = dout.get(row * step + first + 1);
        y[channel] = channel % 2 ? even * s + odd * c : even * c - odd * s;
        grad[channel] = channel % 2 ? d_odd * c - d_even * s : d_even * c + d_odd * s;
        const double xhat = x.get(row * step + channel) * rstd;
        dweight[i] += grad[channel] * xhat;
        mean_dot += grad[channel] * weight.get(i) * xhat / width;
      }
      for (int64_t i = 0; i < width; ++i) {
        const int64_t channel = group + i, at = row * n + channel;
        const double xhat = x.get(row * step + channel) * rstd, dx = rstd * (grad[channel] * weight.get(i) - xhat * mean_dot);
        EXPECT(near(out[0].get(at), y[channel], dtype, 4.0), "q' of %d x %d channels: %a, expected %a", int(H), int(D), out[0].get(at), y[channel]);
        EXPECT(near(out[1].get(at), dx, dtype, 8.0 * rstd), "dq of %d x %d channels: %a, expected %a", int(H), int(D), out[1].get(at), dx);
      }
    }
  }
  for (int64_t i = 0; i < width; ++i) {
    double sum = 0.0;
    for (int64_t part = 0; part < B * parts; ++part) sum += out[2].get(part * width + i);
    EXPECT(std::abs(sum - dweight[i]) < 0.01, "gradient of weight %d: %a, expected %a", int(i), sum, dweight[i]);
  }
}

}  // namespace

void test_norms() {
  Numbers numbers;
  const Dtype all[] = {Dtype::float32, Dtype::bfloat16, Dtype::float16};
  int index = 0;
  for (int64_t n : {2, 7, 16, 33, 128}) {
    for (Dtype dtype : all) {
      for (Dtype modulation : all) {
        ++index;
        test_gated_norm(numbers, dtype, modulation, n, index % 2 == 0, index % 3);
        test_qk_norm(numbers, dtype, modulation, 1 + index % 3, n + n % 2, index % 4 < 2, index % 3);
      }
    }
  }
}
