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

// A parameter of a layer, of any strides (in elements) and of the dtype in which it is trained.
struct Parameter {
  void* data;
  Dtype dtype;
  int64_t strides[4];
};

// Valid 5x5 convolution, 2x2 max pooling, ReLU: see ../layers/conv_pool.cpp. Activations and their
// gradients are contiguous, [N, in, H, W] and [N, out, (H - 4) / 2, (W - 4) / 2], and of one dtype.
// S is float, or double for fp64.
struct ConvPool {
  int64_t N;
  int in, H, W, out;
  Dtype dtype;
  const void* x;
  Parameter weight, bias;  // [out, in, 5, 5], [out]

  DAFL_HD int height() const { return (H - 4) / 2; }
  DAFL_HD int width() const { return (W - 4) / 2; }
  DAFL_HD int pooled() const { return height() * width(); }
};

// What fits a block's shared memory, one channel at a time.
constexpr int kConvPoolChannels = 32;  // at most, in and out
constexpr int kConvPoolSide = 64;      // pixels of an image, at most, in height and width

// Work is cut by shape alone: into so many parts, each with gradients [out * in * 25 + out] of its
// own for weight and bias.
constexpr int64_t conv_pool_parts(int64_t N, int64_t gradients) {
  const int64_t most = (int64_t{4} << 20) / gradients;
  const int64_t wanted = most < 1 ? 1 : most < 512 ? most : 512;
  const int64_t images = (N + wanted - 1) / wanted;
  return (N + images - 1) / images;
}

// BatchNorm with given moments, then LeakyReLU, of [rows, C]: see ../layers/norm_activation.cpp.
// fp32, bf16 or fp16.
struct Norm {
  int64_t rows;
  int C;
  Dtype dtype;
  const void* x;
  const float *mean, *variance;  // [C]
  Parameter weight, bias;        // [C]
  float eps, slope;
};

// Rows whose sums are formed apart, and then added in order.
DAFL_HD int64_t norm_part(int64_t rows, int C) {
  const int64_t wanted = 32768 / C, least = (rows + 4095) / 4096;
  return wanted > least ? wanted : least;
}

// A norm, its activation, and a 3x3 convolution with padding 1 to one channel: see
// ../layers/norm_image_conv.cpp. A block has a tile of whole rows of an image at a time.
struct ImageConv {
  Norm norm;  // of [N * H * W, C]
  int64_t N;
  int H, W;
  Parameter weight, bias;  // [1, C, 3, 3], [1]

  DAFL_HD int tile() const { return H * W <= kPixels ? H : kPixels / W - 2; }  // rows
  DAFL_HD int tiles() const { return (H + tile() - 1) / tile(); }
  DAFL_HD int64_t units() const { return N * tiles(); }
  DAFL_HD int64_t units_per_part() const { return (units() + 1023) / 1024; }
  DAFL_HD int64_t parts() const { return (units() + units_per_part() - 1) / units_per_part(); }
  DAFL_HD int sums() const { return 11 * norm.C + 1; }  // of a part

  // What fits a block's shared memory: pixels with those around them, channels, and a row.
  static constexpr int kPixels = 1137, kChannels = 128, kRow = kPixels / 3;
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

// index: which of the four won, or 4 where ReLU gave zero; [images, out, ...], of which those from
// N on are zeros.
cudaError_t launch_conv_pool(const ConvPool& args, void* y, uint8_t* index, int64_t images,
                             cudaStream_t stream);
cudaError_t launch_conv_pool_inputs(const ConvPool& args, const void* grad, const uint8_t* index,
                                    void* grad_x, cudaStream_t stream);
// parts [conv_pool_parts(), out * in * 25 + out]
cudaError_t launch_conv_pool_weights(const ConvPool& args, const void* grad, const uint8_t* index,
                                     double* parts, const Parameter& grad_weight,
                                     const Parameter& grad_bias, cudaStream_t stream);

// All contiguous. parts [parts, 2, C]; factors [2, C].
cudaError_t launch_moments(const void* x, Dtype dtype, int64_t rows, int C, double* parts,
                           float* mean, float* variance, cudaStream_t stream);
cudaError_t launch_norm(const Norm& args, void* y, cudaStream_t stream);
cudaError_t launch_norm_backward(const Norm& args, const void* grad, double* parts, float* factors,
                                 void* grad_x, const Parameter& grad_weight,
                                 const Parameter& grad_bias, cudaStream_t stream);
cudaError_t launch_image_conv(const ImageConv& args, void* y, cudaStream_t stream);
// parts [ImageConv::parts() + 1, ImageConv::sums()]
cudaError_t launch_image_conv_backward(const ImageConv& args, const void* grad, double* parts,
                                       float* factors, void* grad_x,
                                       const Parameter& grad_norm_weight,
                                       const Parameter& grad_norm_bias,
                                       const Parameter& grad_weight, const Parameter& grad_bias,
                                       cudaStream_t stream);

}  // namespace cuda
}  // namespace dafl
