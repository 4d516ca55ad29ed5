// The CPU's loops for any processor: the compiler's default instruction set (SSE2, NEON).
#define FASTGRPO_ISA cpu_plain
#include "kernels_cpu.h"
