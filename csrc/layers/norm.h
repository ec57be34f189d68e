// BatchNorm with the batch's statistics, as the operators share it: moments over pieces of a batch,
// the affine map of each channel, and what the backward pass adds to it.
//
// Sums are taken over pieces cut by shape alone, in fp32 (fp64 for fp64), and added in fp64, so
// they are the same for any number of threads. Variances are centred within each piece, so nothing
// cancels.
#pragma once

#include <array>
#include <cmath>

#include "gpu.h"
#include "shared.h"

namespace dafl {

inline int64_t rows_of(const Tensor& x) { return x.size(0) * x.size(2) * x.size(3); }

constexpr int64_t kNormValues = 32768;  // of a piece: small enough to be read twice from the caches

inline int64_t norm_rows(int64_t C) {
  return std::max<int64_t>(kNormValues / std::max<int64_t>(C, 1), 16);
}

// `parameters` are the operator's names for the norm's weight and bias.
inline void check_norm(const Tensor& x, const Tensor& mean, const Tensor& variance,
                       const Tensor& weight, const Tensor& bias, double eps,
                       const std::array<const char*, 2>& parameters) {
  check_activations(x);
  check_argument("mean", mean, {x.sym_size(1)}, stats_dtype(x), x);
  check_argument("variance", variance, {x.sym_size(1)}, stats_dtype(x), x);
  check_channels(parameters[0], x, weight, x.sym_size(1));
  check_channels(parameters[1], x, bias, x.sym_size(1));
  TORCH_CHECK_VALUE(std::isfinite(eps) && eps >= 0, "eps must be finite and >= 0, got ", eps);
}

// The gradient to x goes through the moments: they are taken to be its own, and constants here.
inline void refuse_moments_gradient(const Tensor& mean, const Tensor& variance) {
  refuse_gradient("mean", mean);
  refuse_gradient("variance", variance);
}

// Mean and biased variance of [rows, C], of which `part` rows are given at a time.
class Moments {
 public:
  Moments(int64_t rows, int64_t part, int64_t C)
      : C_(C),
        pieces_((part + norm_rows(C) - 1) / norm_rows(C)),
        rows_((rows + part - 1) / part * pieces_),
        sums_(rows_.size() * 2 * C) {}

  void take(int64_t part, const char* x, int64_t rows, const cpu::LayerKernels& kernels,
            int64_t element_size) {
    const int64_t most = norm_rows(C_);
    for (int64_t begin = 0, piece = part * pieces_; begin < rows; begin += most, ++piece) {
      rows_[piece] = std::min(most, rows - begin);
      kernels.moments(x + begin * C_ * element_size, rows_[piece], C_,
                      sums_.data() + piece * 2 * C_);
    }
  }

  void write(const Tensor& mean, const Tensor& variance) const {
    Tensor both = at::zeros({2, C_}, mean.options().dtype(at::kDouble));
    double* m = both.mutable_data_ptr<double>();
    double before = 0;
    for (size_t piece = 0; piece < rows_.size(); ++piece) {
      if (rows_[piece] == 0) continue;
      // Chan et al.: means and squared deviations of two sets to those of their union.
      const double rows = rows_[piece], share = rows / (before + rows);
      const double* part = sums_.data() + piece * 2 * C_;
      for (int64_t c = 0; c < C_; ++c) {
        const double delta = part[c] - m[c];
        m[c] += delta * share;
        m[C_ + c] += part[C_ + c] + delta * delta * before * share;
      }
      before += rows;
    }
    mean.copy_(both[0]);
    variance.copy_(both[1].div_(before));
  }

 private:
  int64_t C_, pieces_;
  std::vector<int64_t> rows_;
  std::vector<double> sums_;
};

// One BatchNorm: the normalised value of a channel is scale * x + shift.
class Norm {
 public:
  Norm(const Tensor& mean, const Tensor& variance, const Tensor& weight, const Tensor& bias,
       double eps, double slope)
      : mean_(mean.contiguous()), slope_(slope) {
    const int64_t C = mean.numel();
    const Tensor given = at::stack({weight.to(at::kDouble), bias.to(at::kDouble),
                                    mean.to(at::kDouble), variance.to(at::kDouble)});
    const double* p = given.const_data_ptr<double>();
    Tensor both = at::empty({2, C}, given.options());
    double* out = both.mutable_data_ptr<double>();
    for (int64_t c = 0; c < C; ++c) {
      exact_mean_.push_back(p[2 * C + c]);
      inverse_.push_back(1 / std::sqrt(p[3 * C + c] + eps));
      exact_scale_.push_back(p[c] * inverse_[c]);
      out[c] = exact_scale_[c];
      out[C + c] = p[C + c] - p[2 * C + c] * exact_scale_[c];
    }
    affine_ = both.to(mean.scalar_type());
  }

  int64_t C() const { return mean_.numel(); }
  const void* mean() const { return mean_.const_data_ptr(); }

  // For kernels. They point into this object.
  cpu::NormActivation arguments(int64_t rows) const {
    const char* affine = static_cast<const char*>(affine_.const_data_ptr());
    return {rows, C(), affine, affine + C() * affine_.element_size(), slope_};
  }

  void forward(const cpu::LayerKernels& kernels, const char* x, int64_t rows, void* y) const {
    kernels.norm_activation(arguments(rows), x, y);
  }

  // Adds to sums [2, C] those of the gradient before the activation and of that times (x - mean).
  void add_sums(const cpu::LayerKernels& kernels, const char* x, const char* grad, int64_t rows,
                int64_t element_size, double* sums) const {
    std::vector<double> part(2 * C());
    for (int64_t begin = 0; begin < rows; begin += norm_rows(C())) {
      const int64_t at = begin * C() * element_size;
      kernels.norm_sums(arguments(std::min(norm_rows(C()), rows - begin)), x + at, grad + at,
                        mean_.const_data_ptr(), part.data());
      for (int64_t k = 0; k < 2 * C(); ++k) sums[k] += part[k];
    }
  }

  // The gradient to x, once the sums over all `rows` are known. With g the gradient before the
  // activation and n = x normalised without weight and bias:
  //   grad_x = scale (g - mean g - n mean(g n)) = scale g + by_x x + constant
  class Gradient {
   public:
    Gradient(const Norm& norm, const std::vector<double>& sums, int64_t rows) : norm_(norm) {
      const int64_t C = norm.C();
      Tensor all = at::empty({4, C}, norm.mean_.options().dtype(at::kDouble));
      double* r = all.mutable_data_ptr<double>();
      for (int64_t c = 0; c < C; ++c) {
        const double scale = norm.exact_scale_[c], inverse = norm.inverse_[c];
        const double by_x = -scale * inverse * inverse * sums[C + c] / rows;
        r[c] = by_x;
        r[C + c] = -scale * sums[c] / rows - by_x * norm.exact_mean_[c];
        r[2 * C + c] = sums[C + c] * inverse;
        r[3 * C + c] = sums[c];
      }
      factors_ = all.narrow(0, 0, 2).to(norm.mean_.scalar_type());
      weight = all[2];
      bias = all[3];
    }

    void to_x(const cpu::LayerKernels& kernels, const char* x, const char* grad, int64_t rows,
              void* grad_x) const {
      kernels.norm_gradient(norm_.arguments(rows), x, grad, by_x().const_data_ptr(),
                            constant().const_data_ptr(), grad_x);
    }

    Tensor by_x() const { return factors_[0]; }
    Tensor constant() const { return factors_[1]; }

    Tensor weight, bias;  // gradients of the parameters

   private:
    const Norm& norm_;
    Tensor factors_;  // [2, C]: by_x, constant
  };

 private:
  Tensor mean_, affine_;  // affine_ [2, C]: scale, shift
  double slope_;
  std::vector<double> exact_mean_, exact_scale_, inverse_;
};

// The sums of all pieces, each [width], added in order.
inline std::vector<double> add_pieces(const std::vector<double>& sums, int64_t width) {
  std::vector<double> total(width);
  for (size_t k = 0; k < sums.size(); ++k) total[k % width] += sums[k];
  return total;
}

#ifdef DAFL_FAST_CUDA

inline void check_gpu_dtype(const Tensor& x) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      x.scalar_type() != at::kDouble,
      "on a GPU the operators with a norm are not for float64: use BatchNorm itself");
}

// What is given is contiguous, and outlives the result.
inline cuda::Norm norm_of(const Tensor& x, const Tensor& mean, const Tensor& variance,
                          const Tensor& weight, const Tensor& bias, double eps, double slope) {
  return {rows_of(x),
          static_cast<int>(x.size(1)),
          dtype_of(x),
          x.const_data_ptr(),
          mean.const_data_ptr<float>(),
          variance.const_data_ptr<float>(),
          parameter(weight),
          parameter(bias),
          static_cast<float>(eps),
          static_cast<float>(slope)};
}

#endif  // DAFL_FAST_CUDA

}  // namespace dafl
