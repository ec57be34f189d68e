// The fused losses on CUDA: tensors in, launches of cuda/launch.h out. Everything runs on the
// current stream of the tensors' device, nothing is read back, and no memory needs to be cleared.
#ifdef DAFL_FAST_CUDA

#include <cmath>

#include "gpu.h"
#include "shared.h"

namespace dafl {
namespace {

// Partial sums. Given back to torch's allocator at once, which hands it out again only to work
// that this stream runs later.
double* scratch(const Tensor& like, const cuda::Plan& plan, Tensor& holder) {
  holder = empty(like, {plan.scratch / 8}, at::kDouble);
  return holder.mutable_data_ptr<double>();
}

GeneratorTerms terms(const Tensor& teacher_logits, const std::optional<Tensor>& features,
                     const GeneratorWeights& weights) {
  return {weights, teacher_logits.size(0),
          features ? matrix(*features) : Matrix{nullptr, 0, 0, Dtype::f32},
          features ? features->size(1) : 0};
}

template <size_t n>
void put_pointers(const std::array<Tensor, n>& tensors, void** to) {
  for (const Tensor& tensor : tensors) *to++ = tensor.mutable_data_ptr();
}

struct Upstream {
  const void* data;
  Dtype dtype;

  explicit Upstream(const Tensor& grad_total)
      : data(grad_total.const_data_ptr()), dtype(dtype_of(grad_total)) {}
};

GeneratorOutputs generator(const Tensor& teacher_logits, const std::optional<Tensor>& features,
                           const GeneratorWeights& weights) {
  check_generator(teacher_logits, features, weights);
  Gpu gpu(teacher_logits);
  GeneratorOutputs outputs = allocate_generator(teacher_logits);
  auto& [losses, row_stats, class_mean] = outputs;
  const int64_t N = teacher_logits.size(0), C = teacher_logits.size(1);
  if (N == 0) {
    for (const Tensor& loss : losses) loss.zero_();
    class_mean.zero_();
    return outputs;
  }
  const bool f64 = is_f64(row_stats);
  const cuda::Plan plan = cuda::make_plan(N, C, f64, gpu.traits);
  Tensor holder;
  cuda::GeneratorForward args{N,
                              C,
                              matrix(teacher_logits),
                              terms(teacher_logits, features, weights),
                              {},
                              row_stats.mutable_data_ptr(),
                              class_mean.mutable_data_ptr(),
                              scratch(teacher_logits, plan, holder),
                              f64};
  put_pointers(losses, args.losses);
  check_launch(cuda::launch_generator_forward(args, plan, gpu.stream), "generator_loss");
  return outputs;
}

GeneratorGradients generator_backward(const Tensor& grad_total, const Tensor& teacher_logits,
                                      const std::optional<Tensor>& features,
                                      const Tensor& row_stats_, const Tensor& class_mean_,
                                      const GeneratorWeights& weights) {
  check_generator_backward(grad_total, teacher_logits, features, row_stats_, class_mean_, weights);
  const Tensor row_stats = row_stats_.contiguous(), class_mean = class_mean_.contiguous();
  Gpu gpu(teacher_logits);
  GeneratorGradients grads = allocate_generator_grads(teacher_logits, features);
  const int64_t N = teacher_logits.size(0), C = teacher_logits.size(1);
  if (N == 0) return grads;
  const Upstream upstream(grad_total);
  const bool f64 = is_f64(row_stats);
  const cuda::Plan plan = cuda::make_plan(N, C, f64, gpu.traits);
  const cuda::GeneratorBackward args{N,
                                     C,
                                     matrix(teacher_logits),
                                     terms(teacher_logits, features, weights),
                                     row_stats.const_data_ptr(),
                                     class_mean.const_data_ptr(),
                                     upstream.data,
                                     upstream.dtype,
                                     grads.logits.mutable_data_ptr(),
                                     grads.features.mutable_data_ptr(),
                                     f64};
  check_launch(cuda::launch_generator_backward(args, plan, gpu.stream), "generator_loss_backward");
  return grads;
}

DistillOutputs distill(const Tensor& student_logits, const Tensor& teacher_logits,
                       double temperature, bool scale_by_t2) {
  check_distill(student_logits, teacher_logits, temperature);
  Gpu gpu(student_logits);
  DistillOutputs outputs = allocate_distill(student_logits, teacher_logits);
  auto& [losses, row_stats] = outputs;
  const int64_t N = student_logits.size(0), C = student_logits.size(1);
  if (N == 0) {
    for (const Tensor& loss : losses) loss.zero_();
    return outputs;
  }
  const bool f64 = is_f64(row_stats);
  const cuda::Plan plan = cuda::make_plan(N, C, f64, gpu.traits);
  Tensor holder;
  cuda::DistillForward args{N,
                            C,
                            matrix(student_logits),
                            matrix(teacher_logits),
                            1 / temperature,
                            scale_by_t2 ? temperature * temperature : 1.0,
                            {},
                            row_stats.mutable_data_ptr(),
                            scratch(student_logits, plan, holder),
                            f64};
  put_pointers(losses, args.losses);
  check_launch(cuda::launch_distill_forward(args, plan, gpu.stream), "distill_loss");
  return outputs;
}

Tensor distill_backward(const Tensor& grad_total, const Tensor& student_logits,
                        const Tensor& teacher_logits, const Tensor& row_stats_, double temperature,
                        bool scale_by_t2) {
  check_distill_backward(grad_total, student_logits, teacher_logits, row_stats_, temperature);
  const Tensor row_stats = row_stats_.contiguous();
  Gpu gpu(student_logits);
  Tensor grad = empty_grad(student_logits);
  const int64_t N = student_logits.size(0), C = student_logits.size(1);
  if (N == 0) return grad;
  const Upstream upstream(grad_total);
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
  check_launch(cuda::launch_distill_backward(args, plan, gpu.stream), "distill_loss_backward");
  return grad;
}

JointOutputs joint(const Tensor& teacher_logits, const std::optional<Tensor>& features,
                   const Tensor& student_logits, const GeneratorWeights& weights,
                   double temperature, bool scale_by_t2) {
  check_generator(teacher_logits, features, weights);
  check_distill(student_logits, teacher_logits, temperature);
  Gpu gpu(teacher_logits);
  const int64_t N = teacher_logits.size(0), C = teacher_logits.size(1);
  const bool f64 =
      teacher_logits.scalar_type() == at::kDouble || student_logits.scalar_type() == at::kDouble;
  if (N == 0 || C > cuda::kTileClasses || f64) {
    return compose_joint(cuda_losses, teacher_logits, features, student_logits, weights,
                         temperature, scale_by_t2);
  }
  const JointOutputs outputs = allocate_joint(teacher_logits, features, student_logits);
  const cuda::Plan plan = cuda::make_plan(N, C, false, gpu.traits);
  Tensor holder;
  cuda::JointLosses args{N,
                         C,
                         matrix(teacher_logits),
                         matrix(student_logits),
                         terms(teacher_logits, features, weights),
                         1 / temperature,
                         scale_by_t2 ? temperature * temperature : 1.0,
                         scale_by_t2 ? temperature : 1 / temperature,
                         {},
                         scratch(teacher_logits, plan, holder),
                         outputs.teacher.logits.mutable_data_ptr(),
                         outputs.teacher.features.mutable_data_ptr(),
                         outputs.grad_student.mutable_data_ptr()};
  put_pointers(outputs.generator, args.losses);
  put_pointers(outputs.distill, args.losses + kGeneratorLosses);
  check_launch(cuda::launch_joint_losses(args, plan, gpu.stream), "dafl_losses");
  return outputs;
}

}  // namespace

const DeviceLosses cuda_losses = {generator, generator_backward, distill, distill_backward, joint};

}  // namespace dafl

#endif  // DAFL_FAST_CUDA
