// Philox, normals, storage dtypes and the exact sum, against published values, libm and each other.
#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "../formulas.h"
#include "../normals.h"
#include "../philox.h"
#include "expect.h"

using namespace fastgrpo;

namespace {

// Random123's kat_vectors, philox4x32 with 10 rounds.
void test_philox() {
  const struct {
    Words counter;
    uint32_t k0, k1;
    Words expected;
  } vectors[] = {
      {{0, 0, 0, 0}, 0, 0, {0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8}},
      {{~0u, ~0u, ~0u, ~0u}, ~0u, ~0u, {0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD}},
      {{0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344}, 0xA4093822, 0x299F31D0, {0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1}},
  };
  for (const auto& v : vectors) {
    const Words w = philox_4x32_10(v.counter, v.k0, v.k1);
    EXPECT(w.w0 == v.expected.w0 && w.w1 == v.expected.w1 && w.w2 == v.expected.w2 && w.w3 == v.expected.w3, "%08x %08x %08x %08x", w.w0, w.w1, w.w2, w.w3);
  }
  // The words of seed and quad go where philox.py puts them; a negative seed is its 64 bits.
  const Words here = noise_words(-2, 7, (int64_t{5} << 32) + 9), there = philox_4x32_10({9, 5, 7, 0}, 0xFFFFFFFEu, 0xFFFFFFFFu);
  EXPECT(here.w0 == there.w0 && here.w3 == there.w3, "%08x %08x", here.w0, here.w3);
}

int64_t steps_apart(float x, float y) { return std::llabs(int64_t{bit_cast<int32_t>(x)} - int64_t{bit_cast<int32_t>(y)}); }

// Every `stride`-th of the 2^23 arguments. float64: the bits of libm's; fp32: the same or a neighbour.
void test_normals(int stride) {
  int64_t apart[3] = {};
  for (int32_t n = 0; n < (1 << 23); n += stride) {
    const double u = (n + 0.5) / (1 << 23), angle = u * (2.0 * M_PI);
    const float expected[3] = {static_cast<float>(std::sqrt(-2.0 * std::log(u))), static_cast<float>(std::cos(angle)), static_cast<float>(std::sin(angle))};
    float cpu[3] = {radius64(n)}, gpu[3] = {radius32(n)};
    cos_sin64(n, cpu[1], cpu[2]);
    cos_sin32(n, gpu[1], gpu[2]);
    for (int i = 0; i < 3; ++i) {
      EXPECT(cpu[i] == expected[i], "float64 path, n %d, %s: %a, expected %a", n, i == 0 ? "radius" : i == 1 ? "cos" : "sin", cpu[i], expected[i]);
      apart[i] = std::max(apart[i], steps_apart(gpu[i], expected[i]));
    }
  }
  for (int i = 0; i < 3; ++i) EXPECT(apart[i] <= 1, "fp32 path, %s: %lld fp32 ulps", i == 0 ? "radius" : i == 1 ? "cos" : "sin", static_cast<long long>(apart[i]));
  std::printf("fp32 normals against float64: radius %lld, cos %lld, sin %lld ulp at most, every %d-th of 2^23\n", static_cast<long long>(apart[0]),
              static_cast<long long>(apart[1]), static_cast<long long>(apart[2]), stride);

  // Their product: each factor may be one ulp off, so up to 5 in all.
  int64_t worst = 0;
  for (int64_t quad = 0; quad < 500'000 / stride; ++quad) {
    const Words w = noise_words(11, 3, quad);
    float c, s, c32, s32;
    cos_sin64(static_cast<int32_t>(w.w1 >> 9), c, s);
    cos_sin32(static_cast<int32_t>(w.w1 >> 9), c32, s32);
    const float r = radius64(static_cast<int32_t>(w.w0 >> 9)), r32 = radius32(static_cast<int32_t>(w.w0 >> 9));
    worst = std::max({worst, steps_apart(r * c, r32 * c32), steps_apart(r * s, r32 * s32)});
  }
  EXPECT(worst <= 5, "normals: %lld fp32 ulps", static_cast<long long>(worst));
  std::printf("fp32 normals: %lld ulp at most over %d samples\n", static_cast<long long>(worst), 1'000'000 / stride);
}

// Rounding from fp32, by its definition: the middle between neighbours goes to the even one, all else to the nearer.
template <typename From, typename To>
void test_storage(const char* name, uint16_t infinity, From from, To to) {
  for (uint32_t sign : {0u, 0x8000u}) {
    for (uint32_t magnitude = 0; magnitude < infinity; ++magnitude) {
      const uint16_t bits = static_cast<uint16_t>(sign | magnitude), next = static_cast<uint16_t>(bits + 1), even = magnitude & 1 ? next : bits;
      const float value = from(bits);
      EXPECT(to(value) == bits, "%s %04x does not come back", name, bits);
      // Above the largest finite value the neighbour is where the next would be, had the exponent one more.
      const double above = magnitude + 1 == infinity ? 2.0 * value - from(static_cast<uint16_t>(bits - 1)) : from(next);
      const float middle = static_cast<float>(0.5 * (value + above));
      EXPECT(to(middle) == even, "%s: the middle above %04x gives %04x", name, bits, to(middle));
      EXPECT(to(std::nextafterf(middle, value)) == bits, "%s: below the middle above %04x", name, bits);
      EXPECT(to(std::nextafterf(middle, sign ? -INFINITY : INFINITY)) == next, "%s: beyond the middle above %04x", name, bits);
    }
    EXPECT(to(sign ? -INFINITY : INFINITY) == (sign | infinity), "%s: infinity", name);
    EXPECT(to(sign ? -3.4e38f : 3.4e38f) == (sign | (infinity == 0x7C00 ? infinity : 0x7F80)), "%s: %04x", name, to(3.4e38f));
  }
  EXPECT(std::isnan(from(to(NAN))) && std::isnan(from(to(-NAN))), "%s: NaN", name);
}

double sum_of(const std::vector<float>& terms, double rounder) {
  double sum = 0.0;
  for (float term : terms) sum += quantised(term, rounder);
  return sum;
}

// Any order, any split: one sum, close to the true one. For a std of every size that fp32 has.
void test_exact_sum() {
  std::mt19937_64 random(1);
  for (float std : {1e-44f, 3e-39f, 1.1754944e-38f, 1e-18f, 0.01f, 0.0999f, 0.125f, 1.0f, 1.9999999f, 77.0f, 1e18f}) {
    std::normal_distribution<double> normal(0.0, std);
    std::vector<float> terms(3001);
    for (float& term : terms) {
      const float error = static_cast<float>(normal(random));
      term = error * error;
    }
    const double rounder = rounder_of(std), forward = sum_of(terms, rounder);
    int exponent;
    std::frexp(std, &exponent);
    const double q = std::ldexp(1.0, 2 * (exponent - 1) - 24);
    EXPECT(rounder == 1.5 * std::ldexp(1.0, 2 * (exponent - 1) + 28), "std %g: rounder %a", std, rounder);
    long double exact = 0.0L;
    for (float term : terms) exact += term;
    EXPECT(std::fabs(static_cast<double>(exact - static_cast<long double>(forward))) <= 0.5 * q * terms.size(), "std %g: %a", std, forward);
    EXPECT(std::fmod(forward, q) == 0.0, "std %g: not a multiple of q", std);
    for (int trial = 0; trial < 20; ++trial) {
      std::shuffle(terms.begin(), terms.end(), random);
      EXPECT(sum_of(terms, rounder) == forward, "std %g: another order, another sum", std);
      const auto cut = terms.begin() + static_cast<int64_t>(random() % terms.size());
      EXPECT(sum_of({terms.begin(), cut}, rounder) + sum_of({cut, terms.end()}, rounder) == forward, "std %g: another split, another sum", std);
    }
  }
  EXPECT(rounder_of(0.0f) == 0.0 && rounder_of(NAN) == 0.0 && rounder_of(INFINITY) == 0.0, "%a", rounder_of(INFINITY));
}

void test_log_prob_and_scale() {
  EXPECT(std::isnan(log_prob_of(1.0, 4, 0.0f, 0.0, true)) && std::isnan(log_prob_of(1.0, 4, 0.0f, 0.0, false)), "std 0");
  EXPECT(log_prob_of(8.0, 4, 0.5f, std::log(0.5), false) == -2.0f, "cps");
  const double expected = -2.0 / (2 * 0.25) - std::log(0.5) - 0.5 * std::log(2 * M_PI);
  EXPECT(log_prob_of(8.0, 4, 0.5f, std::log(0.5), true) == static_cast<float>(expected), "%a", expected);
  EXPECT(gradient_scale(3.0f, 0.5f, 4, true) == -1.5f && gradient_scale(3.0f, 0.5f, 4, false) == -0.75f, "scale");
  EXPECT(gradient_scale(NAN, 0.0f, 4, true) == 0.0f, "std 0");
  EXPECT(std::isfinite(gradient_scale(1.0f, 1e-15f, 4, true)), "a small std");
}

void test_clip_term() {
  const Bounds bounds = bounds_of(0.25, 5.0);
  const auto is = [](ClipTerm t, float objective, float gradient, bool clipped) {
    return t.objective == objective && t.gradient == gradient && t.clipped == clipped;
  };
  EXPECT(is(clip_term(1.0f, 2.0f, bounds, 4), 2.0f, -0.5f, false), "on policy");
  EXPECT(is(clip_term(1.25f, 2.0f, bounds, 4), 2.5f, -0.625f, false), "on the edge");
  EXPECT(is(clip_term(1.5f, 2.0f, bounds, 4), 2.5f, 0.0f, true), "above, A > 0");
  EXPECT(is(clip_term(1.5f, -2.0f, bounds, 4), -3.0f, 0.75f, false), "above, A < 0");
  EXPECT(is(clip_term(0.5f, -2.0f, bounds, 4), -1.5f, 0.0f, true), "below, A < 0");
  EXPECT(is(clip_term(1.0f, 9.0f, bounds, 1), 5.0f, -5.0f, false), "clamped advantage");
  EXPECT(is(clip_term(1.0f, -INFINITY, bounds, 1), -5.0f, 5.0f, false), "clamped advantage");
  EXPECT(std::isnan(clip_term(1.0f, NAN, bounds, 1).objective), "NaN advantage");
}

}  // namespace

void test_numbers(int stride) {
  test_philox();
  test_normals(stride);
  test_storage("bfloat16", 0x7F80, float_from_bfloat16, bfloat16_from_float);
  test_storage("float16", 0x7C00, float_from_float16, float16_from_float);
  test_exact_sum();
  test_log_prob_and_scale();
  test_clip_term();
}
