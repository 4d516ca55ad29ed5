// The CPU's loops for AVX-512; setup.py gives the flags. Empty for another architecture.
#if defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define FASTGRPO_ISA cpu_avx512
#include "kernels_cpu.h"
#endif
