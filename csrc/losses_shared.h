// What the operators' implementations for every device share: checks of what the caller passed,
// allocation of what they return, and tensors as the kernels see them.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>

#include <cmath>
#include <optional>
#include <string>
#include <tuple>

#include "losses.h"
#include "matrix.h"

namespace dafl {

using at::ScalarType;

// ---- Checks ------------------------------------------------------------------------------------

inline std::string got(const Tensor& tensor) {
  return c10::str(", got ", tensor.sym_sizes(), " on ", tensor.device());
}

inline void check_dtype(const char* name, const Tensor& tensor) {
  ScalarType type = tensor.scalar_type();
  TORCH_CHECK_TYPE(
      type == at::kFloat || type == at::kBFloat16 || type == at::kHalf || type == at::kDouble, name,
      " must be float32, bfloat16, float16 or float64, got ", type);
}

inline void check_logits(const char* name, const Tensor& logits) {
  // Class indices are kept in the statistics' fp32, which counts to 2^24.
  TORCH_CHECK_VALUE(logits.dim() == 2 && logits.sym_size(1) >= 1 && logits.sym_size(1) <= (1 << 24),
                    name, " must be [N, C] with 1 to 16777216 classes", got(logits));
  check_dtype(name, logits);
}

inline void check_generator(const Tensor& teacher_logits, const std::optional<Tensor>& features,
                            double one_hot, double entropy, double activation, double log_base) {
  check_logits("teacher_logits", teacher_logits);
  if (features) {
    TORCH_CHECK_VALUE(features->dim() == 2 && features->sym_size(0) == teacher_logits.sym_size(0) &&
                          features->device() == teacher_logits.device(),
                      "features must be [N, F] with the N and the device of teacher_logits (",
                      teacher_logits.sym_sizes(), " on ", teacher_logits.device(), ")",
                      got(*features));
    check_dtype("features", *features);
  }
  TORCH_CHECK_VALUE(std::isfinite(one_hot) && std::isfinite(entropy) && std::isfinite(activation),
                    "one_hot, entropy and activation must be finite weights, got ", one_hot, ", ",
                    entropy, " and ", activation);
  TORCH_CHECK_VALUE(std::isfinite(log_base) && log_base > 1,
                    "log_base must be a finite number greater than 1, got ", log_base);
}

inline void check_distill(const Tensor& student_logits, const Tensor& teacher_logits,
                          double temperature) {
  check_logits("teacher_logits", teacher_logits);
  TORCH_CHECK_VALUE(student_logits.dim() == 2 && student_logits.device() == teacher_logits.device(),
                    "student_logits must be [N, C] on the same device as teacher_logits",
                    got(student_logits));
  TORCH_CHECK_VALUE(student_logits.sym_sizes() == teacher_logits.sym_sizes(),
                    "student_logits must be [N, C] like teacher_logits, which is ",
                    teacher_logits.sym_sizes(), got(student_logits));
  check_dtype("student_logits", student_logits);
  TORCH_CHECK_VALUE(std::isfinite(temperature) && temperature > 0,
                    "temperature must be a finite number greater than 0, got ", temperature);
}

// ---- Allocation, the same for every device -----------------------------------------------------

inline ScalarType stats_dtype(const Tensor& logits) {
  return logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline Tensor empty(const Tensor& like, c10::SymIntArrayRef size, ScalarType dtype) {
  return at::empty_symint(size, like.options().dtype(dtype));
}

inline Tensor empty_grad(const Tensor& input) {
  return empty(input, input.sym_sizes(), input.scalar_type());
}

inline GeneratorOutputs allocate_generator(const Tensor& teacher_logits) {
  ScalarType type = stats_dtype(teacher_logits);
  return {empty(teacher_logits, {}, type),
          empty(teacher_logits, {}, type),
          empty(teacher_logits, {}, type),
          empty(teacher_logits, {}, type),
          empty(teacher_logits, {3, teacher_logits.sym_size(0)}, type),
          empty(teacher_logits, {teacher_logits.sym_size(1)}, type)};
}

inline GeneratorGradients allocate_generator_grads(const Tensor& teacher_logits,
                                                   const std::optional<Tensor>& features) {
  return {
      empty_grad(teacher_logits),
      features ? empty_grad(*features) : empty(teacher_logits, {0}, teacher_logits.scalar_type())};
}

inline DistillOutputs allocate_distill(const Tensor& student_logits, const Tensor& teacher_logits) {
  ScalarType type =
      stats_dtype(student_logits) == at::kDouble ? at::kDouble : stats_dtype(teacher_logits);
  return {empty(student_logits, {}, type), empty(student_logits, {}, type),
          empty(student_logits, {}, type),
          empty(student_logits, {4, student_logits.sym_size(0)}, type)};
}

inline Dtype dtype_of(ScalarType type) {
  switch (type) {
    case at::kDouble:
      return Dtype::f64;
    case at::kFloat:
      return Dtype::f32;
    case at::kBFloat16:
      return Dtype::bf16;
    default:
      return Dtype::f16;
  }
}

inline Dtype dtype_of(const Tensor& tensor) { return dtype_of(tensor.scalar_type()); }

inline Matrix matrix(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), dtype_of(tensor)};
}

inline bool is_f64(const Tensor& stats) { return stats.scalar_type() == at::kDouble; }

// ---- Both losses from the four operators of one device -----------------------------------------

template <auto generator, auto generator_backward, auto distill, auto distill_backward>
JointOutputs compose_joint(const Tensor& teacher_logits, const std::optional<Tensor>& features,
                           const Tensor& student_logits, double one_hot, double entropy,
                           double activation, double log_base, double temperature,
                           bool scale_by_t2) {
  auto [total, one_hot_part, entropy_part, activation_part, teacher_stats, class_mean] =
      generator(teacher_logits, features, one_hot, entropy, activation, log_base);
  auto [distill_total, kl, agreement, student_stats] =
      distill(student_logits, teacher_logits, temperature, scale_by_t2);
  Tensor one = at::ones({}, total.options());
  auto [grad_teacher, grad_features] =
      generator_backward(one, teacher_logits, features, teacher_stats, class_mean, one_hot, entropy,
                         activation, log_base);
  Tensor grad_student = distill_backward(one, student_logits, teacher_logits, student_stats,
                                         temperature, scale_by_t2);
  return {total, one_hot_part, entropy_part, activation_part, distill_total,
          kl,    agreement,    grad_teacher, grad_features,   grad_student};
}

}  // namespace dafl
