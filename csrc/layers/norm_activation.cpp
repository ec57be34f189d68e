// BatchNorm with the batch's statistics followed by LeakyReLU, as one operator.
//
// Forward: one pass that normalises, activates and writes, after one for the statistics (or none:
// upsample_conv brings its output's along). Backward: one pass for the two sums over the batch, one
// that writes. The normalised values are never stored: the backward pass computes the activation's
// sign again from x.
#include "norm.h"

namespace dafl {
namespace {

using Gradients = std::tuple<Tensor, Tensor, Tensor>;

constexpr std::array<const char*, 2> kParameters = {"weight", "bias"};

std::tuple<Tensor, Tensor> moments_meta(const Tensor& x) {
  check_activations(x);
  TORCH_CHECK_VALUE(x.sym_numel() > 0, "x must have at least one value per channel", got(x));
  return {empty(x, {x.sym_size(1)}, stats_dtype(x)), empty(x, {x.sym_size(1)}, stats_dtype(x))};
}

std::tuple<Tensor, Tensor> moments_cpu(const Tensor& x_) {
  auto [mean, variance] = moments_meta(x_);
  const Tensor x = x_.contiguous(kChannelsLast);
  const int64_t C = x.size(1), rows = rows_of(x), part = norm_rows(C);
  const cpu::LayerKernels& kernels = cpu::layer_kernels(dtype_of(x));
  Moments moments(rows, part, C);
  for_pieces(rows, part, [&](int64_t piece, int64_t begin, int64_t count) {
    moments.take(piece, offset<const char>(x, begin * C), count, kernels, x.element_size());
  });
  moments.write(mean, variance);
  return {mean, variance};
}

Tensor forward_meta(const Tensor& x, const Tensor& mean, const Tensor& variance,
                    const Tensor& weight, const Tensor& bias, double eps, double) {
  check_norm(x, mean, variance, weight, bias, eps, kParameters);
  return empty_activations(x, x.sym_sizes(), kChannelsLast);
}

Tensor forward_cpu(const Tensor& x_, const Tensor& mean, const Tensor& variance,
                   const Tensor& weight, const Tensor& bias, double eps, double slope) {
  Tensor y = forward_meta(x_, mean, variance, weight, bias, eps, slope);
  if (y.numel() == 0) return y;
  const Tensor x = x_.contiguous(kChannelsLast);
  const int64_t C = x.size(1);
  const Norm norm(mean, variance, weight, bias, eps, slope);
  const cpu::LayerKernels& kernels = cpu::layer_kernels(dtype_of(x));
  for_pieces(rows_of(x), norm_rows(C), [&](int64_t, int64_t begin, int64_t rows) {
    norm.forward(kernels, offset<const char>(x, begin * C), rows, offset<char>(y, begin * C));
  });
  return y;
}

void check_backward(const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& variance,
                    const Tensor& weight, const Tensor& bias, double eps) {
  check_norm(x, mean, variance, weight, bias, eps, kParameters);
  check_gradient("norm_activation_backward's grad", grad, x.sym_sizes(), x);
}

Gradients backward_cpu(const Tensor& grad_, const Tensor& x_, const Tensor& mean,
                       const Tensor& variance, const Tensor& weight, const Tensor& bias, double eps,
                       double slope) {
  check_backward(grad_, x_, mean, variance, weight, bias, eps);
  const Tensor x = x_.contiguous(kChannelsLast);
  const Tensor grad = dense(grad_, x.scalar_type(), kChannelsLast);
  Tensor grad_x = at::empty_like(x, x.options(), kChannelsLast);
  if (x.numel() == 0) return {grad_x, at::zeros_like(weight), at::zeros_like(bias)};
  const int64_t C = x.size(1), rows = rows_of(x), piece_rows = norm_rows(C);
  const Norm norm(mean, variance, weight, bias, eps, slope);
  const cpu::LayerKernels& kernels = cpu::layer_kernels(dtype_of(x));
  std::vector<double> sums((rows + piece_rows - 1) / piece_rows * 2 * C);
  for_pieces(rows, piece_rows, [&](int64_t piece, int64_t begin, int64_t count) {
    norm.add_sums(kernels, offset<const char>(x, begin * C), offset<const char>(grad, begin * C),
                  count, x.element_size(), sums.data() + piece * 2 * C);
  });
  const Norm::Gradient gradient(norm, add_pieces(sums, 2 * C), rows);
  for_pieces(rows, piece_rows, [&](int64_t, int64_t begin, int64_t count) {
    gradient.to_x(kernels, offset<const char>(x, begin * C), offset<const char>(grad, begin * C),
                  count, offset<char>(grad_x, begin * C));
  });
  return {grad_x, like_parameter(gradient.weight, weight), like_parameter(gradient.bias, bias)};
}

Gradients backward_meta(const Tensor& grad, const Tensor& x, const Tensor& mean,
                        const Tensor& variance, const Tensor& weight, const Tensor& bias,
                        double eps, double) {
  check_backward(grad, x, mean, variance, weight, bias, eps);
  return {empty_activations(x, x.sym_sizes(), kChannelsLast), at::empty_like(weight),
          at::empty_like(bias)};
}

#ifdef DAFL_FAST_CUDA

Tensor norm_scratch(const Tensor& x, int64_t C) {
  const int64_t part = cuda::norm_part(rows_of(x), static_cast<int>(C));
  return at::empty({(rows_of(x) + part - 1) / part, 2, C}, x.options().dtype(at::kDouble));
}

std::tuple<Tensor, Tensor> moments_cuda(const Tensor& x_) {
  auto [mean, variance] = moments_meta(x_);
  check_gpu_dtype(x_);
  const Gpu gpu(x_);
  const Tensor x = x_.contiguous(kChannelsLast);
  const int64_t C = x.size(1);
  const Tensor parts = norm_scratch(x, C);
  check_launch(
      cuda::launch_moments(x.const_data_ptr(), dtype_of(x), rows_of(x), static_cast<int>(C),
                           parts.mutable_data_ptr<double>(), mean.mutable_data_ptr<float>(),
                           variance.mutable_data_ptr<float>(), gpu.stream),
      "moments");
  return {mean, variance};
}

Tensor forward_cuda(const Tensor& x_, const Tensor& mean_, const Tensor& variance_,
                    const Tensor& weight, const Tensor& bias, double eps, double slope) {
  Tensor y = forward_meta(x_, mean_, variance_, weight, bias, eps, slope);
  check_gpu_dtype(x_);
  const Gpu gpu(x_);
  if (y.numel() == 0) return y;
  const Tensor x = x_.contiguous(kChannelsLast);
  const Tensor mean = mean_.contiguous(), variance = variance_.contiguous();
  check_launch(cuda::launch_norm(norm_of(x, mean, variance, weight, bias, eps, slope),
                                 y.mutable_data_ptr(), gpu.stream),
               "norm_activation");
  return y;
}

Gradients backward_cuda(const Tensor& grad_, const Tensor& x_, const Tensor& mean_,
                        const Tensor& variance_, const Tensor& weight, const Tensor& bias,
                        double eps, double slope) {
  check_backward(grad_, x_, mean_, variance_, weight, bias, eps);
  check_gpu_dtype(x_);
  const Gpu gpu(x_);
  const Tensor x = x_.contiguous(kChannelsLast);
  const Tensor grad = dense(grad_, x.scalar_type(), kChannelsLast);
  const Tensor mean = mean_.contiguous(), variance = variance_.contiguous();
  Tensor grad_x = at::empty_like(x, x.options(), kChannelsLast);
  if (x.numel() == 0) return {grad_x, at::zeros_like(weight), at::zeros_like(bias)};
  Tensor grad_weight = at::empty_like(weight), grad_bias = at::empty_like(bias);
  const Tensor parts = norm_scratch(x, x.size(1));
  const Tensor factors = at::empty({2, x.size(1)}, mean.options());
  check_launch(
      cuda::launch_norm_backward(norm_of(x, mean, variance, weight, bias, eps, slope),
                                 grad.const_data_ptr(), parts.mutable_data_ptr<double>(),
                                 factors.mutable_data_ptr<float>(), grad_x.mutable_data_ptr(),
                                 parameter(grad_weight), parameter(grad_bias), gpu.stream),
      "norm_activation_backward");
  return {grad_x, grad_weight, grad_bias};
}

#endif  // DAFL_FAST_CUDA

struct Function : torch::autograd::Function<Function> {
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& x,
                        const Tensor& mean, const Tensor& variance, const Tensor& weight,
                        const Tensor& bias, double eps, double slope) {
    at::AutoDispatchBelowADInplaceOrView below;
    context->save_for_backward({x, mean, variance, weight, bias});
    context->saved_data["eps"] = eps;
    context->saved_data["slope"] = slope;
    static const auto op = find_operator<decltype(forward_cpu)>("norm_activation");
    return op.call(x, mean, variance, weight, bias, eps, slope);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list grads) {
    auto saved = context->get_saved_variables();
    static const auto op = find_operator<decltype(backward_cpu)>("norm_activation_backward");
    auto [grad_x, grad_weight, grad_bias] =
        op.call(grads[0], saved[0], saved[1], saved[2], saved[3], saved[4],
                context->saved_data["eps"].toDouble(), context->saved_data["slope"].toDouble());
    return {grad_x, Tensor(), Tensor(), grad_weight, grad_bias, Tensor(), Tensor()};
  }
};

Tensor forward_autograd(const Tensor& x, const Tensor& mean, const Tensor& variance,
                        const Tensor& weight, const Tensor& bias, double eps, double slope) {
  refuse_tangents("norm_activation", x, mean, variance, weight, bias);
  refuse_moments_gradient(mean, variance);
  check_norm(x, mean, variance, weight, bias, eps, kParameters);
  return Function::apply(x, mean, variance, weight, bias, eps, slope);
}

// Moments are the mean [C] and biased variance [C] of x [N, C, H, W], in statistics dtype. The norm
// takes them from here or from upsample_conv, its gradient to x goes through them, and its result
// is channels_last. slope 1: no activation.
TORCH_LIBRARY_FRAGMENT(dafl_fast, m) {
  const std::string moments = "moments(Tensor x) -> (Tensor mean, Tensor variance)";
  const std::string forward =
      "norm_activation(Tensor x, Tensor mean, Tensor variance, Tensor weight, Tensor bias, "
      "float eps, float slope) -> Tensor";
  const std::string backward =
      "norm_activation_backward(Tensor grad, Tensor x, Tensor mean, Tensor variance, "
      "Tensor weight, Tensor bias, float eps, float slope) -> "
      "(Tensor grad_x, Tensor grad_weight, Tensor grad_bias)";
  define(m, moments, moments_cpu, moments_meta);
  define(m, forward, forward_cpu, forward_meta, torch::CppFunction(forward_autograd));
  define(m, backward, backward_cpu, backward_meta);
#ifdef DAFL_FAST_CUDA
  add_kernel(m, moments, c10::DispatchKey::CUDA, moments_cuda);
  add_kernel(m, forward, c10::DispatchKey::CUDA, forward_cuda);
  add_kernel(m, backward, c10::DispatchKey::CUDA, backward_cuda);
#endif
}

}  // namespace
}  // namespace dafl
