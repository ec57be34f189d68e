// Calls of the launchers in cuda/: the GPU made current, its stream, and errors as exceptions.
#pragma once

#ifdef DAFL_FAST_CUDA

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <mutex>
#include <unordered_map>

#include "cuda/launch.h"
#include "tensor.h"

namespace dafl {

inline void check_launch(cudaError_t error, const char* operation) {
  if (error == cudaSuccess) return;
  TORCH_CHECK_NOT_IMPLEMENTED(
      error != cudaErrorNoKernelImageForDevice && error != cudaErrorInvalidDeviceFunction,
      "this build of dafl_fast has no code for this GPU: build it again with TORCH_CUDA_ARCH_LIST "
      "naming the GPU's architecture");
  TORCH_CHECK(false, "CUDA failed in ", operation, ": ", cudaGetErrorString(error));
}

inline cuda::Parameter parameter(const Tensor& tensor) {
  cuda::Parameter result{tensor.data_ptr(), dtype_of(tensor), {}};
  std::copy(tensor.strides().begin(), tensor.strides().end(), result.strides);
  return result;
}

// The GPU of a call made current, its planning data and its stream.
struct Gpu {
  c10::cuda::CUDAGuard guard;
  cudaStream_t stream;
  cuda::Device traits;

  explicit Gpu(const Tensor& tensor) : guard(checked(tensor)) {
    stream = c10::cuda::getCurrentCUDAStream(tensor.get_device());
    traits = of_device(tensor.get_device());
  }

  static c10::Device checked(const Tensor& tensor) {
    TORCH_CHECK_VALUE(tensor.is_cuda(), "the CUDA kernels need tensors on a GPU", got(tensor));
    return tensor.device();
  }

  static cuda::Device of_device(int index) {
    static std::mutex mutex;
    static std::unordered_map<int, cuda::Device> known;
    std::lock_guard<std::mutex> lock(mutex);
    auto at = known.find(index);
    if (at == known.end()) {
      cuda::Device device{};
      check_launch(cuda::device_traits(index, &device), "device_traits");
      at = known.emplace(index, device).first;
    }
    return at->second;
  }
};

}  // namespace dafl

#endif  // DAFL_FAST_CUDA
