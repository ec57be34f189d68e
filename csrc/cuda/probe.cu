#include "launch.h"

namespace dafl {
namespace cuda {
namespace {

__global__ void probe_kernel(int* arch) {
#ifdef __CUDA_ARCH__  // undefined where the host's half of this file is compiled
  *arch = __CUDA_ARCH__;
#endif
}

}  // namespace

cudaError_t launch_probe(int* arch, cudaStream_t stream) {
  probe_kernel<<<1, 1, 0, stream>>>(arch);
  return cudaGetLastError();
}

}  // namespace cuda
}  // namespace dafl
