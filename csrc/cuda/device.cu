#include "launch.h"

namespace dafl {
namespace cuda {
namespace {

// Only looked at, never launched: its attributes say which of the build's code the GPU runs.
__global__ void witness_kernel() {}

}  // namespace

cudaError_t device_traits(int index, Device* device) {
  int major = 0, minor = 0;
  cudaFuncAttributes attributes{};
  cudaError_t error = cudaFuncGetAttributes(&attributes, witness_kernel);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&device->multiprocessors, cudaDevAttrMultiProcessorCount, index);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index);
  }
  // Or PyTorch's next look at it would report this error again.
  if (error != cudaSuccess) cudaGetLastError();
  const int gpu = 10 * major + minor;
  device->capability = attributes.ptxVersion < gpu ? attributes.ptxVersion : gpu;
  return error;
}

}  // namespace cuda
}  // namespace dafl
