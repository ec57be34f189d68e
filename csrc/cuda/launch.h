// The seam between torch and CUDA: launchers take raw device pointers and a stream, return the
// launch's error, never synchronise and never allocate. Neither this header nor any .cu file
// includes torch, so they compile in seconds and wherever there is an nvcc.
#pragma once

#include <cuda_runtime_api.h>

namespace dafl {
namespace cuda {

// Writes the architecture that the running device code was compiled for (800 for sm_80) to
// arch, one int on the device. For a GPU newer than the build this tells which PTX it runs;
// cudaErrorNoKernelImageForDevice means that the build has nothing for this GPU.
cudaError_t launch_probe(int* arch, cudaStream_t stream);

}  // namespace cuda
}  // namespace dafl
