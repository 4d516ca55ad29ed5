// The CPU's loops for any processor: the instruction set that the compiler takes of its own accord (SSE2, NEON).
#define FASTGRPO_ISA cpu_plain
#include "kernels_cpu.h"
