// exponential.h against float64, and the loops of attention_cpu.h: against the formulas in float64, and every instruction set against the
// plain one, bit for bit.
#include <algorithm>
#include <limits>

#include "../exponential.h"
#include "loops.h"

using namespace fastgrpo;

namespace {

void test_exponential() {
  const float infinite = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  EXPECT(exp_of(0.0f) == 1.0f && exp_of(-0.0f) == 1.0f, "exp(0): %a", exp_of(0.0f));
  EXPECT(exp_of(-infinite) == 0.0f && exp_of(-1e30f) == 0.0f && exp_of(-104.5f) == 0.0f, "exp of what is very small: %a", exp_of(-infinite));
  EXPECT(exp_of(infinite) == infinite && exp_of(1e30f) == infinite && exp_of(88.8f) == infinite, "exp of what is very large: %a", exp_of(infinite));
  EXPECT(std::isnan(exp_of(nan)) && std::isnan(exp_of(-nan)), "exp(NaN): %a", exp_of(nan));
  for (int i = -110 * 4096; i < 88.7 * 4096; ++i) {
    const float x = static_cast<float>(i + 0.37) * 0x1p-12f;
    const double exact = std::exp(static_cast<double>(x)), ulp = std::max(std::ldexp(1.0, std::ilogb(exact) - 23), 0x1p-149);
    EXPECT(std::abs(exp_of(x) - exact) <= ulp, "exp(%a): %a, expected %a", x, exp_of(x), exact);
  }
}

// B samples of L queries and T keys in H heads of D channels, forward and backward; every token 3 channels after the end of the one before.
void test_attention(Numbers& numbers, Dtype dtype, int64_t L, int64_t T, int64_t D, int64_t shift) {
  const int64_t B = 2, H = 3, step = H * D + 3, items = B * H;
  const Stored q = numbers.stored(dtype, B * L * step, shift), k = numbers.stored(dtype, B * T * step, 0), v = numbers.stored(dtype, B * T * step, shift);
  const Stored dout = numbers.stored(dtype, B * L * step, shift);
  const auto view = [&](const Stored& x, int64_t tokens) { return Heads{x.data(), tokens * step, step}; };
  const char* const names[] = {"out", "dq", "dk", "dv"};
  std::vector<std::vector<Stored>> made;
  for (const Isa& isa : instruction_sets()) {
    std::vector<Stored> out;
    for (int i = 0; i < 4; ++i) out.emplace_back(dtype, B * H * D * (i < 2 ? L : T), shift);
    const FewTokens t{view(q, L), view(k, T), view(v, T), out[0].data(), dtype, B, L, T, H, D, static_cast<float>(1.0 / std::sqrt(double(D)))};
    std::vector<float> scratch(attention_scratch(t));  // of this size, so that the sanitizer sees what lies beyond
    isa.kernels->few_token_attention(t, 0, 2, scratch.data());
    isa.kernels->few_token_attention(t, 2, items, scratch.data());
    const FewTokensBackward b{t, view(dout, L), out[1].data(), out[2].data(), out[3].data()};
    isa.kernels->few_token_attention_backward(b, 0, 1, scratch.data());
    isa.kernels->few_token_attention_backward(b, 1, items, scratch.data());
    if (!made.empty()) {
      for (int i = 0; i < 4; ++i) expect_same(isa.name, names[i], out[i], made[0][i]);
    }
    made.push_back(std::move(out));
  }

  const double scale = 1.0 / std::sqrt(double(D));
  std::vector<double> expected[4];
  for (int i = 0; i < 4; ++i) expected[i].assign(B * H * D * (i < 2 ? L : T), 0.0);
  for (int64_t row = 0; row < B * L * H; ++row) {
    const int64_t sample = row / (L * H), head = row % H, mine = row / H * step + head * D;
    std::vector<double> p(T, 0.0), dp(T, 0.0);
    double sum = 0.0, mean = 0.0;
    for (int64_t key = 0; key < T; ++key) {
      const int64_t its = (sample * T + key) * step + head * D;
      for (int64_t i = 0; i < D; ++i) p[key] += scale * q.get(mine + i) * k.get(its + i), dp[key] += double(dout.get(mine + i)) * v.get(its + i);
      sum += p[key] = std::exp(p[key]);
    }
    for (int64_t key = 0; key < T; ++key) p[key] /= sum, mean += p[key] * dp[key];
    for (int64_t key = 0; key < T; ++key) {
      const int64_t its = (sample * T + key) * step + head * D, to = ((sample * T + key) * H + head) * D;
      const double ds = p[key] * (dp[key] - mean) * scale;
      for (int64_t i = 0; i < D; ++i) {
        expected[0][row * D + i] += p[key] * v.get(its + i);
        expected[1][row * D + i] += ds * k.get(its + i);
        expected[2][to + i] += ds * q.get(mine + i);
        expected[3][to + i] += p[key] * dout.get(mine + i);
      }
    }
  }
  for (int which = 0; which < 4; ++which) {
    for (size_t i = 0; i < expected[which].size(); ++i) {
      const float actual = made[0][which].get(i);
      EXPECT(near(actual, expected[which][i], dtype, 8.0), "%s of %d queries, %d keys, %d channels: %a, expected %a", names[which], int(L), int(T), int(D), actual, expected[which][i]);
    }
  }
}

}  // namespace

void test_attention() {
  test_exponential();
  Numbers numbers;
  int index = 0;
  for (Dtype dtype : {Dtype::float32, Dtype::bfloat16, Dtype::float16}) {
    for (int64_t D : {1, 7, 16, 32}) {
      for (int64_t L : {1, 5, 8}) {
        for (int64_t T : {1, 3, 16, 21}) test_attention(numbers, dtype, L, T, D, ++index % 3);
      }
    }
  }
}
