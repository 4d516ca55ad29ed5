// The unit test of csrc/: no torch, no framework, no GPU. tests/ops/test_csrc.py builds it twice: the CPU's half as the library is
// built, with all 2^23 arguments of Box-Muller; all of it under the address and undefined-behaviour sanitizers.
// usage: unit [every n-th argument]
#include "expect.h"

void test_numbers(int stride);
void test_cpu_kernels();
void test_norms();
void test_gelu();
void test_attention();
__attribute__((weak)) void test_gpu_kernels();  // gpu.cpp may be left out

int main(int count, char** arguments) {
  test_numbers(count > 1 ? std::atoi(arguments[1]) : 1);
  test_cpu_kernels();
  test_norms();
  test_gelu();
  test_attention();
  if (test_gpu_kernels) test_gpu_kernels();
  std::printf(failures ? "%d checks failed\n" : "all checks passed\n", failures);
  return failures != 0;
}
