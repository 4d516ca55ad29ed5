// The CPU's loops for AVX2; setup.py gives the flags. Empty for another architecture.
#if defined(__AVX2__) && defined(__F16C__)
#define FASTGRPO_ISA cpu_avx2
#include "kernels_cpu.h"
#endif
