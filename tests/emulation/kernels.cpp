// The launchers, compiled with the emulation, behind functions that ctypes can call.
#include "cuda_runtime.h"

#include "../../csrc/cuda/launch.h"

namespace dafl::cuda {
char dafl_shared[kMostShared + kGuard];
}

using namespace dafl;
using namespace dafl::cuda;

namespace {

GeneratorTerms terms(int64_t N, const Matrix* features, int64_t F, const double* weights) {
  GeneratorWeights all;
  memcpy(&all, weights, sizeof all);
  return {all, N, *features, F};
}

// What went wrong, or null.
const char* said(cudaError_t error) { return error == cudaSuccess ? nullptr : emulation::message; }

}  // namespace

extern "C" {

void set_order(uint64_t seed) { emulation::set_order(seed); }

// Launches run only these blocks of their grids, where a whole grid would take too long.
void set_blocks(int64_t first, int64_t last) {
  emulation::first_block_run = first;
  emulation::last_block_run = last;
}

int64_t scratch_bytes(int64_t N, int64_t C, bool f64, int sms, int capability) {
  return make_plan(N, C, f64, {sms, capability}).scratch;
}

int64_t backward_blocks(int64_t N, int64_t C, bool f64, int sms, int capability) {
  return make_plan(N, C, f64, {sms, capability}).backward_blocks;
}

const char* generator_forward(int64_t N, int64_t C, int64_t F, const Matrix* logits,
                              const Matrix* features, const double* weights, bool f64, int sms,
                              int capability, void** losses, void* row_stats, void* class_mean,
                              double* scratch) {
  GeneratorForward args{N,          C,       *logits, terms(N, features, F, weights), {}, row_stats,
                        class_mean, scratch, f64};
  for (int i = 0; i < kGeneratorLosses; ++i) args.losses[i] = losses[i];
  return said(launch_generator_forward(args, make_plan(N, C, f64, {sms, capability}), nullptr));
}

const char* generator_backward(int64_t N, int64_t C, int64_t F, const Matrix* logits,
                               const Matrix* features, const double* weights, const void* upstream,
                               int upstream_dtype, bool f64, int sms, int capability,
                               const void* row_stats, const void* class_mean, void* grad_logits,
                               void* grad_features) {
  return said(launch_generator_backward(
      {N, C, *logits, terms(N, features, F, weights), row_stats, class_mean, upstream,
       static_cast<Dtype>(upstream_dtype), grad_logits, grad_features, f64},
      make_plan(N, C, f64, {sms, capability}), nullptr));
}

const char* distill_forward(int64_t N, int64_t C, const Matrix* student, const Matrix* teacher,
                            double temperature, bool f64, int sms, int capability, void** losses,
                            void* row_stats, double* scratch) {
  return said(launch_distill_forward({N,
                                      C,
                                      *student,
                                      *teacher,
                                      1 / temperature,
                                      temperature * temperature,
                                      {losses[0], losses[1], losses[2]},
                                      row_stats,
                                      scratch,
                                      f64},
                                     make_plan(N, C, f64, {sms, capability}), nullptr));
}

const char* distill_backward(int64_t N, int64_t C, const Matrix* student, const Matrix* teacher,
                             double temperature, const void* upstream, int upstream_dtype, bool f64,
                             int sms, int capability, const void* row_stats, void* grad) {
  return said(
      launch_distill_backward({N, C, *student, *teacher, 1 / temperature, 1.0 / N, temperature,
                               row_stats, upstream, static_cast<Dtype>(upstream_dtype), grad, f64},
                              make_plan(N, C, f64, {sms, capability}), nullptr));
}

const char* joint(int64_t N, int64_t C, int64_t F, const Matrix* teacher, const Matrix* student,
                  const Matrix* features, const double* weights, double temperature, int sms,
                  int capability, void** losses, double* scratch, void* grad_teacher,
                  void* grad_features, void* grad_student) {
  JointLosses args{N,
                   C,
                   *teacher,
                   *student,
                   terms(N, features, F, weights),
                   1 / temperature,
                   temperature * temperature,
                   temperature,
                   {},
                   scratch,
                   grad_teacher,
                   grad_features,
                   grad_student};
  for (int i = 0; i < kGeneratorLosses + 3; ++i) args.losses[i] = losses[i];
  return said(launch_joint_losses(args, make_plan(N, C, false, {sms, capability}), nullptr));
}

// Strides of weight and bias, in elements, are five numbers.
const char* conv_pool(int64_t N, int in, int H, int W, int out, int dtype, void* x, void* weight,
                      void* bias, const int64_t* strides, int weight_dtype, void* y, uint8_t* index,
                      int64_t images, const void* grad, void* grad_x, double* parts,
                      void* grad_weight, void* grad_bias) {
  const auto parameter = [&](void* data, const int64_t* strides, int dim) {
    Parameter result{data, Dtype(weight_dtype), {}};
    memcpy(result.strides, strides, dim * sizeof(int64_t));
    return result;
  };
  const ConvPool args{N,
                      in,
                      H,
                      W,
                      out,
                      Dtype(dtype),
                      x,
                      parameter(weight, strides, 4),
                      parameter(bias, strides + 4, 1)};
  const char* wrong = said(launch_conv_pool(args, y, index, images, nullptr));
  if (!wrong) wrong = said(launch_conv_pool_inputs(args, grad, index, grad_x, nullptr));
  if (wrong) return wrong;
  return said(launch_conv_pool_weights(args, grad, index, parts, parameter(grad_weight, strides, 4),
                                       parameter(grad_bias, strides + 4, 1), nullptr));
}

int64_t conv_pool_scratch(int64_t N, int64_t gradients) {
  return conv_pool_parts(N, gradients) * gradients;
}

int64_t norm_parts(int64_t rows, int C) {
  return (rows + norm_part(rows, C) - 1) / norm_part(rows, C);
}

// All contiguous; weight and bias, and their gradients, of dtype parameters.
const char* norm(int64_t rows, int C, int dtype, void* x, float eps, float slope, void* weight,
                 void* bias, int parameters, double* parts, float* mean, float* variance, void* y,
                 const void* grad, float* factors, void* grad_x, void* grad_weight,
                 void* grad_bias) {
  const auto parameter = [&](void* data) { return Parameter{data, Dtype(parameters), {1}}; };
  const char* wrong =
      said(launch_moments(x, Dtype(dtype), rows, C, parts, mean, variance, nullptr));
  const Norm args{rows, C,    Dtype(dtype), x, mean, variance, parameter(weight), parameter(bias),
                  eps,  slope};
  if (!wrong) wrong = said(launch_norm(args, y, nullptr));
  if (wrong) return wrong;
  return said(launch_norm_backward(args, grad, parts, factors, grad_x, parameter(grad_weight),
                                   parameter(grad_bias), nullptr));
}

int64_t image_conv_scratch(int64_t N, int C, int H, int W) {
  ImageConv args{};
  args.norm.C = C;
  args.N = N;
  args.H = H;
  args.W = W;
  return (args.parts() + 1) * args.sums();
}

// Parameters are weight and bias of the norm, then of the convolution; all are contiguous but the
// convolution's weight.
const char* image_conv(int64_t N, int C, int H, int W, int dtype, void* x, float eps, float slope,
                       const float* mean, const float* variance, void** parameters,
                       const int64_t* strides, void* y, const void* grad, double* parts,
                       float* factors, void* grad_x, void** grads) {
  const auto parameter = [](void* data) { return Parameter{data, Dtype::f32, {1}}; };
  const auto kernel = [&](void* data) {
    return Parameter{data, Dtype::f32, {strides[0], strides[1], strides[2], strides[3]}};
  };
  const Norm norm{N * H * W,
                  C,
                  Dtype(dtype),
                  x,
                  mean,
                  variance,
                  parameter(parameters[0]),
                  parameter(parameters[1]),
                  eps,
                  slope};
  const ImageConv args{norm, N, H, W, kernel(parameters[2]), parameter(parameters[3])};
  if (const char* wrong = said(launch_image_conv(args, y, nullptr))) return wrong;
  return said(launch_image_conv_backward(args, grad, parts, factors, grad_x, parameter(grads[0]),
                                         parameter(grads[1]), kernel(grads[2]), parameter(grads[3]),
                                         nullptr));
}
}
