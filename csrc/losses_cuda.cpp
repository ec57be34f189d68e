// The fused losses on CUDA: tensors in, launches of cuda/launch.h out. Everything runs on the
// current stream of the tensors' device, nothing is read back, and no memory needs to be cleared.
#ifdef DAFL_FAST_CUDA

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <cmath>
#include <mutex>
#include <unordered_map>

#include "cuda/launch.h"
#include "losses_shared.h"

namespace dafl {
namespace {

void check(cudaError_t error, const char* operation) {
  if (error == cudaSuccess) return;
  TORCH_CHECK_NOT_IMPLEMENTED(
      error != cudaErrorNoKernelImageForDevice && error != cudaErrorInvalidDeviceFunction,
      "this build of dafl_fast has no code for this GPU: build it again with TORCH_CUDA_ARCH_LIST "
      "naming the GPU's architecture");
  TORCH_CHECK(false, "CUDA failed in ", operation, ": ", cudaGetErrorString(error));
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
      check(cuda::device_traits(index, &device), "device_traits");
      at = known.emplace(index, device).first;
    }
    return at->second;
  }
};

// Partial sums. Given back to torch's allocator at once, which hands it out again only to work
// that this stream runs later.
double* scratch(const Tensor& like, const cuda::Plan& plan, Tensor& holder) {
  holder = empty(like, {plan.scratch / 8}, at::kDouble);
  return holder.mutable_data_ptr<double>();
}

cuda::GeneratorTerms terms(int64_t N, const std::optional<Tensor>& features, double one_hot,
                           double entropy, double activation, double log_base) {
  const int64_t F = features ? features->size(1) : 0;
  return {one_hot,
          entropy,
          activation,
          1.0 / static_cast<double>(N),
          1 / std::log(log_base),
          F > 0 ? 1.0 / (static_cast<double>(N) * static_cast<double>(F)) : 0.0,
          features ? matrix(*features) : Matrix{nullptr, 0, 0, Dtype::f32},
          F};
}

struct Upstream {
  const void* data;
  Dtype dtype;

  Upstream(const Tensor& grad_total, const Tensor& like) {
    TORCH_CHECK_VALUE(grad_total.numel() == 1 && grad_total.device() == like.device(),
                      "grad_total must be one number on ", like.device(), got(grad_total));
    check_dtype("grad_total", grad_total);
    data = grad_total.const_data_ptr();
    dtype = dtype_of(grad_total);
  }
};

}  // namespace

GeneratorOutputs generator_loss_cuda(const Tensor& teacher_logits,
                                     const std::optional<Tensor>& features, double one_hot,
                                     double entropy, double activation, double log_base) {
  check_generator(teacher_logits, features, one_hot, entropy, activation, log_base);
  Gpu gpu(teacher_logits);
  GeneratorOutputs outputs = allocate_generator(teacher_logits);
  auto& [total, one_hot_part, entropy_part, activation_part, row_stats, class_mean] = outputs;
  const int64_t N = teacher_logits.size(0), C = teacher_logits.size(1);
  if (N == 0) {
    for (const Tensor& x : {total, one_hot_part, entropy_part, activation_part, class_mean}) {
      x.zero_();
    }
    return outputs;
  }
  const bool f64 = is_f64(row_stats);
  const cuda::Plan plan = cuda::make_plan(N, C, f64, gpu.traits);
  Tensor holder;
  const cuda::GeneratorForward args{
      N,
      C,
      matrix(teacher_logits),
      terms(N, features, one_hot, entropy, activation, log_base),
      {total.mutable_data_ptr(), one_hot_part.mutable_data_ptr(), entropy_part.mutable_data_ptr(),
       activation_part.mutable_data_ptr()},
      row_stats.mutable_data_ptr(),
      class_mean.mutable_data_ptr(),
      scratch(teacher_logits, plan, holder),
      f64};
  check(cuda::launch_generator_forward(args, plan, gpu.stream), "generator_loss");
  return outputs;
}

GeneratorGradients generator_loss_backward_cuda(const Tensor& grad_total,
                                                const Tensor& teacher_logits,
                                                const std::optional<Tensor>& features,
                                                const Tensor& row_stats, const Tensor& class_mean,
                                                double one_hot, double entropy, double activation,
                                                double log_base) {
  check_generator(teacher_logits, features, one_hot, entropy, activation, log_base);
  Gpu gpu(teacher_logits);
  GeneratorGradients grads = allocate_generator_grads(teacher_logits, features);
  auto& [grad_logits, grad_features] = grads;
  const int64_t N = teacher_logits.size(0), C = teacher_logits.size(1);
  if (N == 0) return grads;
  const Upstream upstream(grad_total, teacher_logits);
  const bool f64 = is_f64(row_stats);
  const cuda::Plan plan = cuda::make_plan(N, C, f64, gpu.traits);
  const cuda::GeneratorBackward args{N,
                                     C,
                                     matrix(teacher_logits),
                                     terms(N, features, one_hot, entropy, activation, log_base),
                                     row_stats.const_data_ptr(),
                                     class_mean.const_data_ptr(),
                                     upstream.data,
                                     upstream.dtype,
                                     grad_logits.mutable_data_ptr(),
                                     grad_features.mutable_data_ptr(),
                                     f64};
  check(cuda::launch_generator_backward(args, plan, gpu.stream), "generator_loss_backward");
  return grads;
}

DistillOutputs distill_loss_cuda(const Tensor& student_logits, const Tensor& teacher_logits,
                                 double temperature, bool scale_by_t2) {
  check_distill(student_logits, teacher_logits, temperature);
  Gpu gpu(student_logits);
  DistillOutputs outputs = allocate_distill(student_logits, teacher_logits);
  auto& [total, kl, agreement, row_stats] = outputs;
  const int64_t N = student_logits.size(0), C = student_logits.size(1);
  if (N == 0) {
    for (const Tensor& x : {total, kl, agreement}) x.zero_();
    return outputs;
  }
  const bool f64 = is_f64(row_stats);
  const cuda::Plan plan = cuda::make_plan(N, C, f64, gpu.traits);
  Tensor holder;
  const cuda::DistillForward args{
      N,
      C,
      matrix(student_logits),
      matrix(teacher_logits),
      1 / temperature,
      scale_by_t2 ? temperature * temperature : 1.0,
      {total.mutable_data_ptr(), kl.mutable_data_ptr(), agreement.mutable_data_ptr()},
      row_stats.mutable_data_ptr(),
      scratch(student_logits, plan, holder),
      f64};
  check(cuda::launch_distill_forward(args, plan, gpu.stream), "distill_loss");
  return outputs;
}

Tensor distill_loss_backward_cuda(const Tensor& grad_total, const Tensor& student_logits,
                                  const Tensor& teacher_logits, const Tensor& row_stats,
                                  double temperature, bool scale_by_t2) {
  check_distill(student_logits, teacher_logits, temperature);
  Gpu gpu(student_logits);
  Tensor grad = empty_grad(student_logits);
  const int64_t N = student_logits.size(0), C = student_logits.size(1);
  if (N == 0) return grad;
  const Upstream upstream(grad_total, student_logits);
  const bool f64 = is_f64(row_stats);
  const cuda::DistillBackward args{N,
                                   C,
                                   matrix(student_logits),
                                   matrix(teacher_logits),
                                   1 / temperature,
                                   1.0 / static_cast<double>(N),
                                   scale_by_t2 ? temperature : 1 / temperature,
                                   row_stats.const_data_ptr(),
                                   upstream.data,
                                   upstream.dtype,
                                   grad.mutable_data_ptr(),
                                   f64};
  const cuda::Plan plan = cuda::make_plan(N, C, f64, gpu.traits);
  check(cuda::launch_distill_backward(args, plan, gpu.stream), "distill_loss_backward");
  return grad;
}

JointOutputs dafl_losses_cuda(const Tensor& teacher_logits, const std::optional<Tensor>& features,
                              const Tensor& student_logits, double one_hot, double entropy,
                              double activation, double log_base, double temperature,
                              bool scale_by_t2) {
  check_generator(teacher_logits, features, one_hot, entropy, activation, log_base);
  check_distill(student_logits, teacher_logits, temperature);
  Gpu gpu(teacher_logits);
  const int64_t N = teacher_logits.size(0), C = teacher_logits.size(1);
  const bool f64 =
      teacher_logits.scalar_type() == at::kDouble || student_logits.scalar_type() == at::kDouble;
  if (N == 0 || C > cuda::kTileClasses || f64) {
    return compose_joint<generator_loss_cuda, generator_loss_backward_cuda, distill_loss_cuda,
                         distill_loss_backward_cuda>(teacher_logits, features, student_logits,
                                                     one_hot, entropy, activation, log_base,
                                                     temperature, scale_by_t2);
  }
  JointOutputs outputs = dafl_losses_meta(teacher_logits, features, student_logits, one_hot,
                                          entropy, activation, log_base, temperature, scale_by_t2);
  auto& [total, one_hot_part, entropy_part, activation_part, distill_total, kl, agreement,
         grad_teacher, grad_features, grad_student] = outputs;
  const cuda::Plan plan = cuda::make_plan(N, C, false, gpu.traits);
  Tensor holder;
  const cuda::JointLosses args{
      N,
      C,
      matrix(teacher_logits),
      matrix(student_logits),
      terms(N, features, one_hot, entropy, activation, log_base),
      1 / temperature,
      scale_by_t2 ? temperature * temperature : 1.0,
      scale_by_t2 ? temperature : 1 / temperature,
      {total.mutable_data_ptr(), one_hot_part.mutable_data_ptr(), entropy_part.mutable_data_ptr(),
       activation_part.mutable_data_ptr(), distill_total.mutable_data_ptr(), kl.mutable_data_ptr(),
       agreement.mutable_data_ptr()},
      scratch(teacher_logits, plan, holder),
      grad_teacher.mutable_data_ptr(),
      grad_features.mutable_data_ptr(),
      grad_student.mutable_data_ptr()};
  check(cuda::launch_joint_losses(args, plan, gpu.stream), "dafl_losses");
  return outputs;
}

}  // namespace dafl

#endif  // DAFL_FAST_CUDA
