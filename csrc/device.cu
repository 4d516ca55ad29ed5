// What the host asks of the CUDA runtime beyond launching.
#include <cuda_runtime_api.h>

#include "launch.h"

#define FASTGRPO_WORDS(x) #x
#define FASTGRPO_TEXT(x) FASTGRPO_WORDS(x)

namespace fastgrpo {

// This library has a CUDA runtime of its own, linked in: torch's device guard sets the driver's context, this one's device follows.
const char* cuda_set_device(int device) {
  const cudaError_t error = cudaSetDevice(device);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

const char* cuda_version() { return FASTGRPO_TEXT(__CUDACC_VER_MAJOR__) "." FASTGRPO_TEXT(__CUDACC_VER_MINOR__) " for sm_90a, sm_80 and, by its PTX, later"; }

}  // namespace fastgrpo
