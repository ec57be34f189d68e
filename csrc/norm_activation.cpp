// BatchNorm with the batch's statistics followed by LeakyReLU, as one operator.
//
// Forward: one pass for the statistics, one that normalises, activates and writes. Backward: one
// pass for the two sums over the batch, one that writes. The normalised values are never stored:
// the backward pass computes the activation's sign again from x. Sums are taken over pieces cut by
// shape alone, in fp32 (fp64 for fp64), and added in fp64, so they are the same for any number of
// threads; variances are centred within each piece, so nothing cancels.
#include <cmath>

#include "layers_shared.h"

namespace dafl {
namespace {

constexpr int64_t kValues = 32768;  // of a piece: small enough to be read twice from the caches

void check(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps) {
  check_activations(x);
  check_channels("weight", x, weight, x.sym_size(1));
  check_channels("bias", x, bias, x.sym_size(1));
  TORCH_CHECK_VALUE(std::isfinite(eps) && eps >= 0, "eps must be finite and >= 0, got ", eps);
}

struct Shape {
  int64_t rows, C, piece, pieces;

  explicit Shape(const Tensor& x)
      : rows(x.size(0) * x.size(2) * x.size(3)),
        C(x.size(1)),
        piece(std::max<int64_t>(kValues / std::max<int64_t>(C, 1), 16)),
        pieces((rows + piece - 1) / piece) {}

  std::vector<double> sums() const { return std::vector<double>(pieces * 2 * C); }
};

// Per channel: the normalised value is scale * x + shift.
struct Affine {
  Tensor mean, scale, shift;  // [C], mean and scale also in fp64
  std::vector<double> exact_mean, exact_scale, inverse_deviation;

  Affine(const Tensor& weight, const Tensor& bias, const Tensor& mean, const Tensor& variance,
         double eps)
      : mean(mean) {
    const int64_t C = mean.numel();
    const Tensor parameters = at::stack({weight.to(at::kDouble), bias.to(at::kDouble),
                                         mean.to(at::kDouble), variance.to(at::kDouble)});
    const double* p = parameters.const_data_ptr<double>();
    Tensor both = at::empty({2, C}, parameters.options());
    double* out = both.mutable_data_ptr<double>();
    for (int64_t c = 0; c < C; ++c) {
      exact_mean.push_back(p[2 * C + c]);
      inverse_deviation.push_back(1 / std::sqrt(p[3 * C + c] + eps));
      exact_scale.push_back(p[c] * inverse_deviation[c]);
      out[c] = exact_scale[c];
      out[C + c] = p[C + c] - p[2 * C + c] * exact_scale[c];
    }
    both = both.to(mean.scalar_type());
    scale = both[0];
    shift = both[1];
  }

  cpu::NormActivation arguments(int64_t rows, double slope) const {
    return {rows, mean.numel(), scale.const_data_ptr(), shift.const_data_ptr(), slope};
  }
};

std::tuple<Tensor, Tensor, Tensor> allocate(const Tensor& x) {
  return {empty_activations(x, x.sym_sizes(), kChannelsLast),
          empty(x, {x.sym_size(1)}, stats_dtype(x)), empty(x, {x.sym_size(1)}, stats_dtype(x))};
}

std::tuple<Tensor, Tensor, Tensor> forward_cpu(const Tensor& x_, const Tensor& weight,
                                               const Tensor& bias, double eps, double slope) {
  check(x_, weight, bias, eps);
  TORCH_CHECK_VALUE(x_.numel() > 0, "x must have at least one value per channel", got(x_));
  Tensor x = x_.contiguous(kChannelsLast);
  auto [y, mean, variance] = allocate(x);
  const Shape shape(x);
  const int64_t C = shape.C;
  const cpu::LayerKernels& kernels = cpu::layer_kernels(dtype_of(x));
  std::vector<double> sums = shape.sums();
  for_pieces(shape.rows, shape.piece, [&](int64_t piece, int64_t begin, int64_t rows) {
    kernels.moments(offset<const char>(x, begin * C), rows, C, sums.data() + piece * 2 * C);
  });
  // Chan et al.: means and squared deviations of pieces to those of the whole.
  Tensor both = at::zeros({2, C}, x.options().dtype(at::kDouble));
  double* m = both.mutable_data_ptr<double>();
  for (int64_t piece = 0; piece < shape.pieces; ++piece) {
    const double before = piece * shape.piece;
    const double rows = std::min<double>(shape.piece, shape.rows - before);
    const double share = rows / (before + rows);
    for (int64_t c = 0; c < C; ++c) {
      const double* part = sums.data() + piece * 2 * C;
      const double delta = part[c] - m[c];
      m[c] += delta * share;
      m[C + c] += part[C + c] + delta * delta * before * share;
    }
  }
  mean.copy_(both[0]);
  variance.copy_(both[1].div_(shape.rows));

  const Affine affine(weight, bias, mean, variance, eps);
  for_pieces(shape.rows, shape.piece, [&](int64_t, int64_t begin, int64_t rows) {
    kernels.norm_activation(affine.arguments(rows, slope), offset<const char>(x, begin * C),
                            offset<char>(y, begin * C));
  });
  return {y, mean, variance};
}

std::tuple<Tensor, Tensor, Tensor> backward_cpu(const Tensor& grad_, const Tensor& x_,
                                                const Tensor& weight, const Tensor& bias,
                                                const Tensor& mean, const Tensor& variance,
                                                double eps, double slope) {
  check(x_, weight, bias, eps);
  Tensor x = x_.contiguous(kChannelsLast), grad = dense(grad_, x.scalar_type(), kChannelsLast);
  Tensor grad_x = at::empty_like(x, x.options(), kChannelsLast);
  const Shape shape(x);
  const int64_t C = shape.C;
  const cpu::LayerKernels& kernels = cpu::layer_kernels(dtype_of(x));
  const Affine affine(weight, bias, mean, variance, eps);
  std::vector<double> sums = shape.sums();
  for_pieces(shape.rows, shape.piece, [&](int64_t piece, int64_t begin, int64_t rows) {
    kernels.norm_sums(affine.arguments(rows, slope), offset<const char>(x, begin * C),
                      offset<const char>(grad, begin * C), affine.mean.const_data_ptr(),
                      sums.data() + piece * 2 * C);
  });
  for (int64_t piece = 1; piece < shape.pieces; ++piece) {
    for (int64_t k = 0; k < 2 * C; ++k) sums[k] += sums[piece * 2 * C + k];
  }
  // With g the gradient before the activation and n = x normalised without weight and bias:
  //   grad_x = scale (g - mean g - n mean(g n)) = scale g + by_x x + constant
  Tensor results = at::empty({4, C}, x.options().dtype(at::kDouble));
  double* r = results.mutable_data_ptr<double>();
  for (int64_t c = 0; c < C; ++c) {
    const double scale = affine.exact_scale[c], inverse = affine.inverse_deviation[c];
    const double by_x = -scale * inverse * inverse * sums[C + c] / shape.rows;
    r[c] = by_x;
    r[C + c] = -scale * sums[c] / shape.rows - by_x * affine.exact_mean[c];
    r[2 * C + c] = sums[C + c] * inverse;
    r[3 * C + c] = sums[c];
  }
  const Tensor factors = results.narrow(0, 0, 2).to(mean.scalar_type());
  const Tensor by_x = factors[0], constant = factors[1];
  for_pieces(shape.rows, shape.piece, [&](int64_t, int64_t begin, int64_t rows) {
    kernels.norm_gradient(affine.arguments(rows, slope), offset<const char>(x, begin * C),
                          offset<const char>(grad, begin * C), by_x.const_data_ptr(),
                          constant.const_data_ptr(), offset<char>(grad_x, begin * C));
  });
  return {grad_x, like_parameter(results[2], weight), like_parameter(results[3], bias)};
}

std::tuple<Tensor, Tensor, Tensor> forward_meta(const Tensor& x, const Tensor& weight,
                                                const Tensor& bias, double eps, double) {
  check(x, weight, bias, eps);
  return allocate(x);
}

std::tuple<Tensor, Tensor, Tensor> backward_meta(const Tensor&, const Tensor& x,
                                                 const Tensor& weight, const Tensor& bias,
                                                 const Tensor&, const Tensor&, double, double) {
  return {empty_activations(x, x.sym_sizes(), kChannelsLast), at::empty_like(weight),
          at::empty_like(bias)};
}

struct Function : torch::autograd::Function<Function> {
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* context,
                                                const Tensor& x, const Tensor& weight,
                                                const Tensor& bias, double eps, double slope) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [y, mean, variance] = norm_activation(x, weight, bias, eps, slope);
    context->save_for_backward({x, weight, bias, mean, variance});
    context->saved_data["eps"] = eps;
    context->saved_data["slope"] = slope;
    context->mark_non_differentiable({mean, variance});
    return {y, mean, variance};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list grads) {
    auto saved = context->get_saved_variables();
    auto [grad_x, grad_weight, grad_bias] = norm_activation_backward(
        grads[0], saved[0], saved[1], saved[2], saved[3], saved[4],
        context->saved_data["eps"].toDouble(), context->saved_data["slope"].toDouble());
    return {grad_x, grad_weight, grad_bias, Tensor(), Tensor()};
  }
};

std::tuple<Tensor, Tensor, Tensor> forward_autograd(const Tensor& x, const Tensor& weight,
                                                    const Tensor& bias, double eps, double slope) {
  auto results = Function::apply(x, weight, bias, eps, slope);
  return {results[0], results[1], results[2]};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> norm_activation(const Tensor& x, const Tensor& weight,
                                                   const Tensor& bias, double eps, double slope) {
  static auto op = operator_handle<decltype(norm_activation)>("dafl_fast::norm_activation");
  return op.call(x, weight, bias, eps, slope);
}

std::tuple<Tensor, Tensor, Tensor> norm_activation_backward(const Tensor& grad, const Tensor& x,
                                                            const Tensor& weight,
                                                            const Tensor& bias, const Tensor& mean,
                                                            const Tensor& variance, double eps,
                                                            double slope) {
  static auto op =
      operator_handle<decltype(norm_activation_backward)>("dafl_fast::norm_activation_backward");
  return op.call(grad, x, weight, bias, mean, variance, eps, slope);
}

TORCH_LIBRARY_IMPL(dafl_fast, CPU, m) {
  m.impl("norm_activation", forward_cpu);
  m.impl("norm_activation_backward", backward_cpu);
}
TORCH_LIBRARY_IMPL(dafl_fast, Meta, m) {
  m.impl("norm_activation", forward_meta);
  m.impl("norm_activation_backward", backward_meta);
}
TORCH_LIBRARY_IMPL(dafl_fast, Autograd, m) { m.impl("norm_activation", forward_autograd); }

}  // namespace dafl
