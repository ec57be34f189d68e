// Torch-free CPU kernels of the losses: raw pointers, strides and a dtype in, one chunk of rows at
// a time. The caller cuts [0, N) into chunks that depend on the shape only and adds their partial
// sums in a fixed order, so results do not depend on the number of threads.
//
// They compile for ARM without torch, and run there: `make arm-check`.
#pragma once

#include <cstdint>

#include "../losses/generator_terms.h"
#include "../matrix.h"

namespace dafl {
namespace cpu {

// Up to here a vector lane is a row; above, a column.
constexpr int64_t kTileClasses = 32;

// Kernels need this many values of the compute type as scratch, per call.
inline int64_t scratch_size(int64_t classes) {
  return classes > kTileClasses ? 5 * (classes + 16) : 0;
}

// row_stats is [rows of statistics, N] in the compute type: float, or double for fp64 logits.
struct GeneratorForward {
  int64_t N, C;
  Matrix logits;    // [N, C]
  void* row_stats;  // [3, N]: m, d', y
};

struct GeneratorBackward {
  int64_t N, C;
  Matrix logits;          // [N, C]
  const void* row_stats;  // [3, N]
  const void* slope;      // [C], compute type: see row_math.h
  GeneratorFactors factors;
  void* grad;  // [N, C] contiguous, dtype of logits
};

struct DistillForward {
  int64_t N, C;
  Matrix student, teacher;  // [N, C]
  double inverse_temperature;
  void* row_stats;  // [4, N]: m_s, log d_s, m_t, log d_t
};

struct DistillBackward {
  int64_t N, C;
  Matrix student, teacher;  // [N, C]
  double inverse_temperature;
  const void* row_stats;  // [4, N]
  double factor;          // of (q_s - q_t)
  void* grad;             // [N, C] contiguous, dtype of student
};

// One set per instruction set and compute type. Rows [begin, end) of each argument are handled.
struct LossKernels {
  // Adds to sums[0..C) those of p, and to sums[C + i] the sum i of generator_terms.h, but for kAbs.
  void (*generator_forward)(const GeneratorForward&, int64_t begin, int64_t end, double* sums,
                            void* scratch);
  void (*generator_backward)(const GeneratorBackward&, int64_t begin, int64_t end, void* scratch);
  // sums[0] = sum of KL, sums[1] = rows whose argmax agrees
  void (*distill_forward)(const DistillForward&, int64_t begin, int64_t end, double* sums,
                          void* scratch);
  void (*distill_backward)(const DistillBackward&, int64_t begin, int64_t end, void* scratch);
  // sum of |f| over the rows, F columns wide
  double (*abs_sum)(const Matrix& f, int64_t F, int64_t begin, int64_t end);
  // grad [N, F] contiguous, dtype of f: value * sign(f)
  void (*sign_gradient)(const Matrix& f, int64_t F, int64_t begin, int64_t end, double value,
                        void* grad);
};

// The kernels of the chosen instruction set; fp64 always runs on the baseline's. Throws
// std::runtime_error, once and for every call, when DAFL_FAST_ISA names none that can run here.
const LossKernels& loss_kernels(bool f64);

}  // namespace cpu
}  // namespace dafl
