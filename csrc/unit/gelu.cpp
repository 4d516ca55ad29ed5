// The CPU's loops of gelu_cpu.h: against the formulas in float64, and every instruction set against the plain one, bit for bit.
#include "loops.h"

using namespace fastgrpo;

namespace {

// GELU of h and its derivative, from p = exp(-2 |u|), where nothing cancels; `size` is that of the derivative's terms.
struct Expected {
  double out, slope, size;
};
Expected expected_of(double h) {
  const double twice = 2.0 * std::sqrt(2.0 / 3.14159265358979323846), p = std::exp(-twice * std::abs(h) * (1.0 + 0.044715 * h * h));
  const double s = (h < 0.0 ? p : 1.0) / (1.0 + p);
  const double curved = p == 0.0 ? 0.0 : h * twice * (1.0 + 3.0 * 0.044715 * h * h) * p / ((1.0 + p) * (1.0 + p));
  return {h * s, s + curved, s + std::abs(curved)};
}

// Within `ulps` of `size` in fp32, or the same where there is no number.
bool within(float actual, double expected, double size, double ulps) {
  if (std::isnan(expected) || std::isinf(expected)) return same(actual, static_cast<float>(expected));
  int exponent = 0;
  std::frexp(std::abs(size), &exponent);
  return std::abs(actual - expected) <= ulps * std::ldexp(1.0, std::max(exponent, -125) - 24);
}

// Of every 2^15 fp32 numbers one, of either sign, and those at the ends.
void test_every_size() {
  std::vector<float> x = {INFINITY, -INFINITY, NAN, 0.0f, -0.0f, 11.6875f, -11.6875f, 3.4028235e38f, -3.4028235e38f, 1e-45f, -1e-45f};
  for (uint64_t bits = 12345; bits < (1ull << 32); bits += 1 << 15) x.push_back(bit_cast<float>(static_cast<uint32_t>(bits)));
  for (float h = -13.0f; h < 13.0f; h += 0x1p-11f) x.push_back(h);
  const int64_t n = static_cast<int64_t>(x.size());
  const std::vector<float> ones(n, 1.0f);
  std::vector<std::vector<float>> made;
  for (const Isa& isa : instruction_sets()) {
    std::vector<float> out(n, NAN), dx(n, NAN);
    const BiasGelu t{x.data(), nullptr, out.data(), Dtype::float32, Dtype::float32, 1, n};
    isa.kernels->bias_gelu(t, 0, 1);
    isa.kernels->bias_gelu_backward({t, ones.data(), dx.data(), nullptr}, 0, 1);
    for (int64_t i = 0; i < n; ++i) {
      const Expected e = expected_of(x[i]);
      EXPECT(within(out[i], e.out, e.out, 4.0), "%s: GELU of %a is %a, expected %a", isa.name, x[i], out[i], e.out);
      EXPECT(within(dx[i], e.slope, e.size, 6.0), "%s: slope of GELU at %a is %a, expected %a", isa.name, x[i], dx[i], e.slope);
    }
    made.push_back(out), made.push_back(dx);
    for (int64_t i = 0; i < n; ++i) {
      EXPECT(same(out[i], made[0][i]) && same(dx[i], made[1][i]), "%s: other bits than plain at %a: %a, %a", isa.name, x[i], out[i], dx[i]);
    }
  }
}

// More rows than one part, of n channels.
void test_rows(Numbers& numbers, Dtype dtype, Dtype bias_dtype, int64_t n, bool with_bias, int64_t shift) {
  const int64_t rows = PART_TOKENS + 3, parts = 2;
  const Stored x = numbers.stored(dtype, rows * n, shift), dout = numbers.stored(dtype, rows * n, shift), bias = numbers.stored(bias_dtype, n, shift);
  std::vector<std::vector<Stored>> made;
  for (const Isa& isa : instruction_sets()) {
    std::vector<Stored> out;
    out.emplace_back(dtype, rows * n, shift), out.emplace_back(dtype, rows * n, shift), out.emplace_back(Dtype::float32, parts * n, 0);
    const BiasGelu t{x.data(), with_bias ? bias.data() : nullptr, out[0].data(), dtype, bias_dtype, rows, n};
    isa.kernels->bias_gelu(t, 0, 5);
    isa.kernels->bias_gelu(t, 5, rows);
    isa.kernels->bias_gelu_backward({t, dout.data(), out[1].data(), with_bias ? static_cast<float*>(out[2].data()) : nullptr}, 0, parts);
    for (int i = 0; i < 3 && !made.empty(); ++i) expect_same(isa.name, "bias_gelu", out[i], made[0][i]);
    made.push_back(std::move(out));
  }

  const std::vector<Stored>& out = made[0];
  const double ulp = dtype == Dtype::float32 ? 0x1p-20 : dtype == Dtype::bfloat16 ? 0x1p-8 : 0x1p-10;
  std::vector<double> dbias(n, 0.0);
  for (int64_t i = 0; i < rows * n; ++i) {
    const float h = with_bias ? x.get(i) + bias.get(i % n) : x.get(i);
    const Expected e = expected_of(h);
    const double dx = dout.get(i) * e.slope;
    EXPECT(std::abs(out[0].get(i) - e.out) <= ulp * (std::abs(e.out) + 0x1p-14), "GELU of %a: %a, expected %a", h, out[0].get(i), e.out);
    EXPECT(std::abs(out[1].get(i) - dx) <= ulp * (std::abs(dout.get(i)) * e.size + 0x1p-14), "dx of %a: %a, expected %a", h, out[1].get(i), dx);
    dbias[i % n] += dx;
  }
  for (int64_t i = 0; i < n && with_bias; ++i) {
    const double sum = double(out[2].get(i)) + out[2].get(n + i);
    EXPECT(std::abs(sum - dbias[i]) < 1e-4, "gradient of bias %d: %a, expected %a", int(i), sum, dbias[i]);
  }
}

}  // namespace

void test_gelu() {
  test_every_size();
  Numbers numbers;
  const Dtype all[] = {Dtype::float32, Dtype::bfloat16, Dtype::float16};
  int index = 0;
  for (int64_t n : {1, 7, 16, 33, 256, 300}) {
    for (Dtype dtype : all) {
      for (Dtype bias : all) {
        ++index;
        test_rows(numbers, dtype, bias, n, index % 4 != 0, index % 3);
      }
    }
  }
}
