// The fused losses on the CPU: rows in chunks to the kernels, their sums to losses.
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "cpu/losses.h"
#include "shared.h"

namespace dafl {
namespace {

void set(const Tensor& scalar, double value) {
  if (is_f64(scalar)) {
    *scalar.mutable_data_ptr<double>() = value;
  } else {
    *scalar.mutable_data_ptr<float>() = static_cast<float>(value);
  }
}

// A cache line, so that no vector of an array of them lies across two.
struct alignas(64) Line {
  double values[8];
};

// Rows are cut by shape alone, never by the number of threads: about 32K elements a chunk, so that
// small batches stay on one thread, and at most 64 chunks, so that partial sums stay few. Whole
// multiples of the widest vector.
struct Chunks {
  int64_t N, rows, count;

  Chunks(int64_t N, int64_t width) : N(N) {
    int64_t wanted = std::max(32768 / std::max<int64_t>(width, 1), (N + 63) / 64);
    rows = std::max<int64_t>(wanted + 15, 16) / 16 * 16;
    count = (N + rows - 1) / rows;
  }

  // body(chunk, begin, end, scratch)
  template <class Body>
  void run(int64_t scratch_values, Body body) const {
    at::parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
      std::unique_ptr<Line[]> scratch(scratch_values > 0 ? new Line[scratch_values / 8 + 1]
                                                         : nullptr);
      for (int64_t chunk = first; chunk < last; ++chunk) {
        body(chunk, chunk * rows, std::min(N, (chunk + 1) * rows), scratch.get());
      }
    });
  }

  // Adds the chunks' sums into the first one's, in order.
  void reduce(std::vector<double>& sums, int64_t width) const {
    for (int64_t chunk = 1; chunk < count; ++chunk) {
      const double* from = sums.data() + chunk * width;
      for (int64_t k = 0; k < width; ++k) sums[k] += from[k];
    }
  }
};

double log_or_zero(double p) { return p == 0 ? 0 : std::log(p); }

// The sum of p_bar log p_bar, in nats, from the classes' sums over `rows` rows. A mean close to 1
// has lost the digits of its logarithm, but the other classes' means still have them.
double mean_log_mean(const double* sums, int64_t C, int64_t rows) {
  double result = 0;
  int64_t top = -1;
  for (int64_t k = 0; k < C; ++k) {
    const double p = sums[k] / rows;
    result += p * log_or_zero(p);
    if (p > 0.75) top = k;
  }
  if (top < 0) return result;
  const double p = sums[top] / rows;
  double others = 0;
  for (int64_t k = 0; k < C; ++k) others += k == top ? 0 : sums[k] / rows;
  return result + p * (std::log1p(-others) - std::log(p));
}

template <class S>
void write_class_mean(const Tensor& class_mean, const std::vector<double>& sums, int64_t N) {
  S* mean = class_mean.mutable_data_ptr<S>();
  for (int64_t k = 0; k < class_mean.size(0); ++k) mean[k] = static_cast<S>(sums[k] / N);
}

// The kernels write to the column that the statistics call a row's argmax.
template <class S>
void check_argmax(const Tensor& row_stats, int64_t begin, int64_t end, int64_t C) {
  const S* y = row_stats.const_data_ptr<S>() + 2 * row_stats.size(1);
  bool within = true;
  for (int64_t row = begin; row < end; ++row) {
    within &= y[row] >= 0 && y[row] <= static_cast<S>(C - 1);
  }
  TORCH_CHECK_VALUE(within, "generator_loss_backward's row_stats must have in its last row the ",
                    "indices of classes, 0 to ", C - 1);
}

// What row_math.h calls slope_k. Subtracting L_ie (sum p_bar log p_bar) from every log p_bar_k
// changes no gradient, since a row's p sum to 1, and spares fp32 a cancellation.
template <class S>
std::vector<S> entropy_slope(const Tensor& class_mean, double factor) {
  const S* mean = class_mean.const_data_ptr<S>();
  int64_t C = class_mean.size(0);
  std::vector<double> logs(C);
  double centre = 0;
  for (int64_t k = 0; k < C; ++k) {
    logs[k] = log_or_zero(mean[k]);
    centre += mean[k] * logs[k];
  }
  std::vector<S> slope(C);
  for (int64_t k = 0; k < C; ++k) slope[k] = static_cast<S>(factor * (logs[k] - centre));
  return slope;
}

GeneratorOutputs generator(const Tensor& teacher_logits, const std::optional<Tensor>& features,
                           const GeneratorWeights& weights) {
  check_generator(teacher_logits, features, weights);
  GeneratorOutputs outputs = allocate_generator(teacher_logits);
  auto& [losses, row_stats, class_mean] = outputs;

  int64_t N = teacher_logits.size(0), C = teacher_logits.size(1);
  int64_t F = features ? features->size(1) : 0;
  Chunks chunks(N, C + F);
  int64_t width = C + kGeneratorSums;
  std::vector<double> sums(std::max<int64_t>(chunks.count, 1) * width);
  const cpu::LossKernels& kernels = cpu::loss_kernels(is_f64(row_stats));
  const cpu::LossKernels& feature_kernels = cpu::loss_kernels(features && is_f64(*features));
  cpu::GeneratorForward args{N, C, matrix(teacher_logits), row_stats.mutable_data_ptr()};

  chunks.run(cpu::scratch_size(C), [&](int64_t chunk, int64_t begin, int64_t end, void* scratch) {
    double* out = sums.data() + chunk * width;
    kernels.generator_forward(args, begin, end, out, scratch);
    if (F > 0) out[C + kAbs] = feature_kernels.abs_sum(matrix(*features), F, begin, end);
  });
  chunks.reduce(sums, width);

  int64_t rows = std::max<int64_t>(N, 1);  // the sums of no rows are 0
  const double p_log_p = mean_log_mean(sums.data(), C, rows);
  if (is_f64(class_mean)) {
    write_class_mean<double>(class_mean, sums, rows);
  } else {
    write_class_mean<float>(class_mean, sums, rows);
  }
  const GeneratorLosses values = generator_losses(weights, sums.data() + C, p_log_p, rows, F);
  for (int i = 0; i < kGeneratorLosses; ++i) set(losses[i], values.values[i]);
  return outputs;
}

GeneratorGradients generator_backward(const Tensor& grad_total, const Tensor& teacher_logits,
                                      const std::optional<Tensor>& features,
                                      const Tensor& row_stats_, const Tensor& class_mean_,
                                      const GeneratorWeights& weights) {
  check_generator_backward(grad_total, teacher_logits, features, row_stats_, class_mean_, weights);
  const Tensor row_stats = row_stats_.contiguous(), class_mean = class_mean_.contiguous();
  GeneratorGradients grads = allocate_generator_grads(teacher_logits, features);

  int64_t N = teacher_logits.size(0), C = teacher_logits.size(1);
  int64_t F = features ? features->size(1) : 0;
  if (N == 0) return grads;
  const GeneratorFactors factors = generator_factors(weights, grad_total.item<double>(), N, F);
  bool f64 = is_f64(row_stats);
  std::vector<double> slope64;
  std::vector<float> slope32;
  if (f64) {
    slope64 = entropy_slope<double>(class_mean, factors.slope);
  } else {
    slope32 = entropy_slope<float>(class_mean, factors.slope);
  }
  const cpu::LossKernels& kernels = cpu::loss_kernels(f64);
  const cpu::LossKernels& feature_kernels = cpu::loss_kernels(features && is_f64(*features));
  cpu::GeneratorBackward args{N,
                              C,
                              matrix(teacher_logits),
                              row_stats.const_data_ptr(),
                              f64 ? static_cast<const void*>(slope64.data()) : slope32.data(),
                              factors,
                              grads.logits.mutable_data_ptr()};

  Chunks(N, C + F).run(
      cpu::scratch_size(C), [&](int64_t, int64_t begin, int64_t end, void* scratch) {
        f64 ? check_argmax<double>(row_stats, begin, end, C)
            : check_argmax<float>(row_stats, begin, end, C);
        kernels.generator_backward(args, begin, end, scratch);
        if (F > 0) {
          feature_kernels.sign_gradient(matrix(*features), F, begin, end, factors.sign,
                                        grads.features.mutable_data_ptr());
        }
      });
  return grads;
}

DistillOutputs distill(const Tensor& student_logits, const Tensor& teacher_logits,
                       double temperature, bool scale_by_t2) {
  check_distill(student_logits, teacher_logits, temperature);
  DistillOutputs outputs = allocate_distill(student_logits, teacher_logits);
  auto& [losses, row_stats] = outputs;

  int64_t N = student_logits.size(0), C = student_logits.size(1);
  Chunks chunks(N, C);
  std::vector<double> sums(std::max<int64_t>(chunks.count, 1) * 2);  // of KL, of agreeing rows
  const cpu::LossKernels& kernels = cpu::loss_kernels(is_f64(row_stats));
  cpu::DistillForward args{N,
                           C,
                           matrix(student_logits),
                           matrix(teacher_logits),
                           1 / temperature,
                           row_stats.mutable_data_ptr()};

  chunks.run(cpu::scratch_size(C), [&](int64_t chunk, int64_t begin, int64_t end, void* scratch) {
    kernels.distill_forward(args, begin, end, sums.data() + chunk * 2, scratch);
  });
  chunks.reduce(sums, 2);

  int64_t rows = std::max<int64_t>(N, 1);
  set(losses[0], sums[0] / rows * (scale_by_t2 ? temperature * temperature : 1));
  set(losses[1], sums[0] / rows);
  set(losses[2], sums[1] / rows);
  return outputs;
}

Tensor distill_backward(const Tensor& grad_total, const Tensor& student_logits,
                        const Tensor& teacher_logits, const Tensor& row_stats_, double temperature,
                        bool scale_by_t2) {
  check_distill_backward(grad_total, student_logits, teacher_logits, row_stats_, temperature);
  const Tensor row_stats = row_stats_.contiguous();
  Tensor grad = empty_grad(student_logits);
  int64_t N = student_logits.size(0), C = student_logits.size(1);
  if (N == 0) return grad;
  const cpu::LossKernels& kernels = cpu::loss_kernels(is_f64(row_stats));
  cpu::DistillBackward args{
      N,
      C,
      matrix(student_logits),
      matrix(teacher_logits),
      1 / temperature,
      row_stats.const_data_ptr(),
      grad_total.item<double>() / N * (scale_by_t2 ? temperature : 1 / temperature),
      grad.mutable_data_ptr()};
  Chunks(N, C).run(cpu::scratch_size(C), [&](int64_t, int64_t begin, int64_t end, void* scratch) {
    kernels.distill_backward(args, begin, end, scratch);
  });
  return grad;
}

JointOutputs joint(const Tensor& teacher_logits, const std::optional<Tensor>& features,
                   const Tensor& student_logits, const GeneratorWeights& weights,
                   double temperature, bool scale_by_t2) {
  check_generator(teacher_logits, features, weights);
  check_distill(student_logits, teacher_logits, temperature);
  return compose_joint(cpu_losses, teacher_logits, features, student_logits, weights, temperature,
                       scale_by_t2);
}

}  // namespace

const DeviceLosses cpu_losses = {generator, generator_backward, distill, distill_backward, joint};

}  // namespace dafl
