// The seam between torch and CUDA: launchers take raw device pointers and a stream, return the
// launch's error, never synchronise and never allocate. Neither this header nor any .cu file
// includes torch, so they compile in seconds and wherever there is an nvcc.
//
// Pointers are to device memory. "S" is the statistics' dtype: float, or double where `f64`.
// N >= 1 and C >= 1; nothing is launched for empty batches.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../losses/generator_terms.h"
#include "plan.h"

namespace dafl {
namespace cuda {

// What the planner needs to know about a GPU. Its capability is that of the code in this build
// which the GPU runs: a build for 8.0 has no cluster kernels, even on a 9.0 GPU.
// cudaErrorNoKernelImageForDevice means that the build has nothing for this GPU.
cudaError_t device_traits(int index, Device* device);

struct GeneratorForward {
  int64_t N, C;
  Matrix logits;  // [N, C]
  GeneratorTerms terms;
  void* losses[kGeneratorLosses];  // S
  void* row_stats;                 // S [3, N]: m, d', y
  void* class_mean;                // S [C]
  double* scratch;                 // Plan::scratch bytes
  bool f64;                        // S
};

struct GeneratorBackward {
  int64_t N, C;
  Matrix logits;  // [N, C]
  GeneratorTerms terms;
  const void* row_stats;   // S [3, N]
  const void* class_mean;  // S [C]
  const void* upstream;    // one number of any dtype; null: 1
  Dtype upstream_dtype;
  void* grad_logits;    // [N, C] contiguous, dtype of logits
  void* grad_features;  // [N, F] contiguous, dtype of features
  bool f64;
};

struct DistillForward {
  int64_t N, C;
  Matrix student, teacher;  // [N, C]
  double inverse_temperature;
  double scale;     // total = scale * KL
  void* losses[3];  // S: total, kl, agreement
  void* row_stats;  // S [4, N]: m_s, log d_s, m_t, log d_t
  double* scratch;
  bool f64;
};

struct DistillBackward {
  int64_t N, C;
  Matrix student, teacher;  // [N, C]
  double inverse_temperature;
  double per_row;         // 1 / N
  double scale;           // gradient = upstream * scale / N * (q_s - q_t)
  const void* row_stats;  // S [4, N]
  const void* upstream;   // one number of any dtype; null: 1
  Dtype upstream_dtype;
  void* grad_student;  // [N, C] contiguous, dtype of student
  bool f64;
};

// Both losses of a training step and all gradients for an upstream gradient of 1, C <= 32, fp32
// statistics: what the four above would write, but for the row statistics.
struct JointLosses {
  int64_t N, C;
  Matrix teacher, student;  // [N, C]
  GeneratorTerms terms;
  double inverse_temperature;
  double distill_scale;                // total = distill_scale * KL
  double distill_grad_scale;           // gradient = distill_grad_scale / N * (q_s - q_t)
  void* losses[kGeneratorLosses + 3];  // float: those of both forward passes
  double* scratch;
  void *grad_teacher, *grad_features, *grad_student;  // contiguous, in their inputs' dtypes
};

cudaError_t launch_generator_forward(const GeneratorForward& args, const Plan& plan,
                                     cudaStream_t stream);
cudaError_t launch_generator_backward(const GeneratorBackward& args, const Plan& plan,
                                      cudaStream_t stream);
cudaError_t launch_distill_forward(const DistillForward& args, const Plan& plan,
                                   cudaStream_t stream);
cudaError_t launch_distill_backward(const DistillBackward& args, const Plan& plan,
                                    cudaStream_t stream);
cudaError_t launch_joint_losses(const JointLosses& args, const Plan& plan, cudaStream_t stream);

}  // namespace cuda
}  // namespace dafl
