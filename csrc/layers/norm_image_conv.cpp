// BatchNorm with the batch's statistics, LeakyReLU, and a 3x3 convolution with padding 1 from many
// channels to the few of an image, as one operator.
//
// That convolution has too few output channels to fill vectors. Here one matrix product gives, for
// each output channel and tap, a plane of products, [9 Co, Ci] x [Ci, pixels], and each output is a
// sum of nine planes, shifted. Backward, the shifted gradients are such planes, and two matrix
// products give the gradients of the convolution's input and weight.
//
// The activations between norm and convolution are the largest tensor of a generator. They and
// their gradients are held for some thousand pixels at a time, and computed again from x when
// needed. Where the kernels multiply (cpu/norm_image_conv.inl), only the forward pass has them, for
// some ten pixels.
#include <ATen/ops/sum.h>

#include "norm.h"

namespace dafl {
namespace {

// About as many activations exist at a time, or a fourth of them where the kernels multiply.
constexpr int64_t kValues = 1 << 18;

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// The sizes of one call, and its operands as the kernels read them.
struct Call {
  Tensor x, taps;  // taps [9 Co, Ci], output channel first, in the dtype of x
  int64_t N, Ci, H, W, Co, images;
  const cpu::LayerKernels& kernels;

  Call(const Tensor& x_, const Tensor& weight)
      : x(x_.contiguous(kChannelsLast)),
        taps(weight.permute({0, 2, 3, 1})
                 .reshape({9 * weight.size(0), weight.size(1)})
                 .to(x_.scalar_type())
                 .contiguous()),  // with one output channel it is still a view
        N(x.size(0)),
        Ci(x.size(1)),
        H(x.size(2)),
        W(x.size(3)),
        Co(weight.size(0)),
        kernels(cpu::layer_kernels(dtype_of(x))) {
    const int64_t most = kernels.image ? kValues / 4 : kValues;
    const int64_t pieces = std::max<int64_t>((x.numel() + most - 1) / most, 1);
    images = (N + pieces - 1) / pieces;
  }

  const char* pixels(int64_t image) const { return offset<const char>(x, image * H * W * Ci); }

  Tensor activations(int64_t count) const { return at::empty({count * H * W, Ci}, x.options()); }

  // The shifted gradients of `count` images from `begin`, [9 Co, pixels].
  Tensor planes(const Tensor& grad, int64_t begin, int64_t count) const {
    Tensor planes = at::empty({9 * Co, count * H * W}, x.options());
    kernels.shift_apart({count, H, W, Co}, offset<const char>(grad, begin * H * W * Co),
                        planes.data_ptr());
    return planes;
  }
};

void check(const Tensor& x, const Tensor& mean, const Tensor& variance, const Tensor& norm_weight,
           const Tensor& norm_bias, double eps, const Tensor& weight, const Tensor& bias) {
  check_norm(x, mean, variance, norm_weight, norm_bias, eps, {"norm_weight", "norm_bias"});
  check_weight(x, weight, 3);
  check_channels("bias", x, bias, weight.sym_size(0));
}

void check_backward(const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& variance,
                    const Tensor& norm_weight, const Tensor& norm_bias, double eps,
                    const Tensor& weight, const Tensor& bias) {
  check(x, mean, variance, norm_weight, norm_bias, eps, weight, bias);
  check_gradient("norm_image_conv_backward's grad", grad,
                 {x.sym_size(0), weight.sym_size(0), x.sym_size(2), x.sym_size(3)}, x);
}

Tensor forward_meta(const Tensor& x, const Tensor& mean, const Tensor& variance,
                    const Tensor& norm_weight, const Tensor& norm_bias, double eps, double,
                    const Tensor& weight, const Tensor& bias) {
  check(x, mean, variance, norm_weight, norm_bias, eps, weight, bias);
  return empty_activations(x, {x.sym_size(0), weight.sym_size(0), x.sym_size(2), x.sym_size(3)},
                           at::MemoryFormat::Contiguous);
}

Tensor forward_cpu(const Tensor& x, const Tensor& mean, const Tensor& variance,
                   const Tensor& norm_weight, const Tensor& norm_bias, double eps, double slope,
                   const Tensor& weight, const Tensor& bias_) {
  Tensor y = forward_meta(x, mean, variance, norm_weight, norm_bias, eps, slope, weight, bias_);
  if (y.numel() == 0) return y;
  const Call call(x, weight);
  const Norm norm(mean, variance, norm_weight, norm_bias, eps, slope);
  const Tensor bias = bias_.to(mean.scalar_type()).contiguous();
  for_pieces(call.N, call.images, [&](int64_t, int64_t begin, int64_t count) {
    const int64_t pixels = count * call.H * call.W;
    Tensor activations = call.activations(count);
    Tensor planes = at::empty({9 * call.Co, pixels}, x.options());
    Tensor scratch = at::empty({3 * (call.W + 32)}, mean.options());
    norm.forward(call.kernels, call.pixels(begin), pixels, activations.data_ptr());
    if (const cpu::ImageKernels* image = call.kernels.image) {
      image->planes(activations.const_data_ptr(), call.taps.const_data_ptr(), pixels, call.Ci,
                    9 * call.Co, planes.data_ptr());
    } else {
      at::mm_out(planes, call.taps, activations.t());
    }
    call.kernels.sum_shifted(
        {count, call.H, call.W, call.Co}, planes.const_data_ptr(), bias.const_data_ptr(),
        offset<char>(y, begin * call.Co * call.H * call.W), scratch.data_ptr());
  });
  return y;
}

// Where the kernels multiply. grad and grad_x are dense, the latter is written.
Gradients backward_without_matrices(const Call& call, const Norm& norm, const Tensor& grad,
                                    const Tensor& grad_x, const Tensor& norm_weight,
                                    const Tensor& norm_bias, const Tensor& weight,
                                    const Tensor& bias) {
  const cpu::ImageKernels& kernels = *call.kernels.image;
  const int64_t Ci = call.Ci, size = call.H * call.W, width = (2 + 9 * call.Co) * Ci;
  const int64_t summed = images_per_sum(call.N, call.images);
  auto scratch = [&](const cpu::ImageConv& a) {
    return at::empty({kernels.scratch(a, Ci)}, call.taps.options());
  };
  std::vector<double> sums((call.N + summed - 1) / summed * width);
  for_pieces(call.N, summed, [&](int64_t piece, int64_t begin, int64_t images) {
    const cpu::ImageConv a{images, call.H, call.W, call.Co};
    kernels.sums(norm.arguments(images * size), a, call.pixels(begin),
                 offset<const char>(grad, begin * call.Co * size), call.taps.const_data_ptr(),
                 norm.mean(), sums.data() + piece * width, scratch(a).data_ptr());
  });
  const std::vector<double> total = add_pieces(sums, width);
  const Norm::Gradient gradient(norm, total, call.N * size);
  const Tensor by_x = gradient.by_x(), constant = gradient.constant();
  for_pieces(call.N, call.images, [&](int64_t, int64_t begin, int64_t images) {
    const cpu::ImageConv a{images, call.H, call.W, call.Co};
    kernels.gradients(norm.arguments(images * size), a, call.pixels(begin),
                      offset<const char>(grad, begin * call.Co * size), call.taps.const_data_ptr(),
                      by_x.const_data_ptr(), constant.const_data_ptr(),
                      offset<char>(grad_x, begin * size * Ci), scratch(a).data_ptr());
  });
  Tensor grad_weight = at::empty({call.Co, 3, 3, Ci}, grad.options().dtype(at::kDouble));
  std::copy(total.begin() + 2 * Ci, total.end(), grad_weight.mutable_data_ptr<double>());
  return {grad_x, like_parameter(gradient.weight, norm_weight),
          like_parameter(gradient.bias, norm_bias),
          like_parameter(grad_weight.permute({0, 3, 1, 2}), weight),
          like_parameter(at::sum(grad, {0, 2, 3}, false, stats_dtype(grad)), bias)};
}

Gradients backward_cpu(const Tensor& grad_, const Tensor& x, const Tensor& mean,
                       const Tensor& variance, const Tensor& norm_weight, const Tensor& norm_bias,
                       double eps, double slope, const Tensor& weight, const Tensor& bias) {
  check_backward(grad_, x, mean, variance, norm_weight, norm_bias, eps, weight, bias);
  const Call call(x, weight);
  const Tensor grad = dense(grad_, x.scalar_type(), at::MemoryFormat::Contiguous);
  Tensor grad_x = at::empty_like(call.x, x.options(), kChannelsLast);
  if (grad.numel() == 0) {
    return {grad_x.zero_(), at::zeros_like(norm_weight), at::zeros_like(norm_bias),
            at::zeros_like(weight), at::zeros_like(bias)};
  }
  const Norm norm(mean, variance, norm_weight, norm_bias, eps, slope);
  if (call.kernels.image) {
    return backward_without_matrices(call, norm, grad, grad_x, norm_weight, norm_bias, weight,
                                     bias);
  }
  const int64_t Ci = call.Ci, size = call.H * call.W, images = call.images;
  const int64_t summed = images_per_sum(call.N, images), pieces = (call.N + summed - 1) / summed;
  const Tensor products = at::zeros({pieces, 9 * call.Co, Ci}, mean.options());
  std::vector<double> sums(pieces * 2 * Ci);
  for_pieces(call.N, summed, [&](int64_t piece, int64_t from, int64_t all) {
    Tensor product = at::empty({9 * call.Co, Ci}, x.options());
    for (int64_t done = 0; done < all; done += images) {
      const int64_t begin = from + done, count = std::min(images, all - done);
      const Tensor planes = call.planes(grad, begin, count);
      Tensor activations = call.activations(count);
      norm.forward(call.kernels, call.pixels(begin), count * size, activations.data_ptr());
      at::mm_out(product, planes, activations);
      products[piece].add_(product);
      at::mm_out(activations, planes.t(), call.taps);  // their gradients in their place
      norm.add_sums(call.kernels, call.pixels(begin), offset<const char>(activations, 0),
                    count * size, x.element_size(), sums.data() + piece * 2 * Ci);
    }
  });
  const Norm::Gradient gradient(norm, add_pieces(sums, 2 * Ci), call.N * size);
  for_pieces(call.N, images, [&](int64_t, int64_t begin, int64_t count) {
    Tensor grads = call.activations(count);
    at::mm_out(grads, call.planes(grad, begin, count).t(), call.taps);
    gradient.to_x(call.kernels, call.pixels(begin), offset<const char>(grads, 0), count * size,
                  offset<char>(grad_x, begin * size * Ci));
  });
  const Tensor grad_weight = products.sum(0).view({call.Co, 3, 3, Ci}).permute({0, 3, 1, 2});
  return {grad_x, like_parameter(gradient.weight, norm_weight),
          like_parameter(gradient.bias, norm_bias), like_parameter(grad_weight, weight),
          like_parameter(at::sum(grad, {0, 2, 3}, false, mean.scalar_type()), bias)};
}

#ifdef DAFL_FAST_CUDA

void check_fits(const Tensor& x, const Tensor& weight) {
  check_gpu_dtype(x);
  const int channels = cuda::ImageConv::kChannels, row = cuda::ImageConv::kRow;
  TORCH_CHECK_VALUE(weight.size(0) == 1 && x.size(1) <= channels && x.size(3) <= row,
                    "on a GPU norm_image_conv is from at most ", channels,
                    " channels to one, and for rows of at most ", row, " pixels", got(x));
}

// What is given is contiguous, and outlives the result.
cuda::ImageConv arguments_of(const Tensor& x, const cuda::Norm& norm, const Tensor& weight,
                             const Tensor& bias) {
  return {norm,
          x.size(0),
          static_cast<int>(x.size(2)),
          static_cast<int>(x.size(3)),
          parameter(weight),
          parameter(bias)};
}

Tensor forward_cuda(const Tensor& x_, const Tensor& mean_, const Tensor& variance_,
                    const Tensor& norm_weight, const Tensor& norm_bias, double eps, double slope,
                    const Tensor& weight, const Tensor& bias) {
  Tensor y = forward_meta(x_, mean_, variance_, norm_weight, norm_bias, eps, slope, weight, bias);
  check_fits(x_, weight);
  const Gpu gpu(x_);
  if (y.numel() == 0) return y;
  const Tensor x = x_.contiguous(kChannelsLast);
  const Tensor mean = mean_.contiguous(), variance = variance_.contiguous();
  const cuda::Norm norm = norm_of(x, mean, variance, norm_weight, norm_bias, eps, slope);
  check_launch(cuda::launch_image_conv(arguments_of(x, norm, weight, bias), y.mutable_data_ptr(),
                                       gpu.stream),
               "norm_image_conv");
  return y;
}

Gradients backward_cuda(const Tensor& grad_, const Tensor& x_, const Tensor& mean_,
                        const Tensor& variance_, const Tensor& norm_weight, const Tensor& norm_bias,
                        double eps, double slope, const Tensor& weight, const Tensor& bias) {
  check_backward(grad_, x_, mean_, variance_, norm_weight, norm_bias, eps, weight, bias);
  check_fits(x_, weight);
  const Gpu gpu(x_);
  const Tensor x = x_.contiguous(kChannelsLast);
  const Tensor grad = dense(grad_, x.scalar_type(), at::MemoryFormat::Contiguous);
  const Tensor mean = mean_.contiguous(), variance = variance_.contiguous();
  Tensor grad_x = at::empty_like(x, x.options(), kChannelsLast);
  if (x.numel() == 0) {
    return {grad_x, at::zeros_like(norm_weight), at::zeros_like(norm_bias), at::zeros_like(weight),
            at::zeros_like(bias)};
  }
  Tensor grad_norm_weight = at::empty_like(norm_weight), grad_norm_bias = at::empty_like(norm_bias);
  Tensor grad_weight = at::empty_like(weight), grad_bias = at::empty_like(bias);
  const cuda::Norm norm = norm_of(x, mean, variance, norm_weight, norm_bias, eps, slope);
  const cuda::ImageConv arguments = arguments_of(x, norm, weight, bias);
  const Tensor parts =
      at::empty({arguments.parts() + 1, arguments.sums()}, x.options().dtype(at::kDouble));
  const Tensor factors = at::empty({2, x.size(1)}, mean.options());
  check_launch(
      cuda::launch_image_conv_backward(
          arguments, grad.const_data_ptr(), parts.mutable_data_ptr<double>(),
          factors.mutable_data_ptr<float>(), grad_x.mutable_data_ptr(), parameter(grad_norm_weight),
          parameter(grad_norm_bias), parameter(grad_weight), parameter(grad_bias), gpu.stream),
      "norm_image_conv_backward");
  return {grad_x, grad_norm_weight, grad_norm_bias, grad_weight, grad_bias};
}

#endif  // DAFL_FAST_CUDA

Gradients backward_meta(const Tensor& grad, const Tensor& x, const Tensor& mean,
                        const Tensor& variance, const Tensor& norm_weight, const Tensor& norm_bias,
                        double eps, double, const Tensor& weight, const Tensor& bias) {
  check_backward(grad, x, mean, variance, norm_weight, norm_bias, eps, weight, bias);
  return {empty_activations(x, x.sym_sizes(), kChannelsLast), at::empty_like(norm_weight),
          at::empty_like(norm_bias), at::empty_like(weight), at::empty_like(bias)};
}

struct Function : torch::autograd::Function<Function> {
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& x,
                        const Tensor& mean, const Tensor& variance, const Tensor& norm_weight,
                        const Tensor& norm_bias, double eps, double slope, const Tensor& weight,
                        const Tensor& bias) {
    at::AutoDispatchBelowADInplaceOrView below;
    context->save_for_backward({x, mean, variance, norm_weight, norm_bias, weight, bias});
    context->saved_data["eps"] = eps;
    context->saved_data["slope"] = slope;
    static const auto op = find_operator<decltype(forward_cpu)>("norm_image_conv");
    return op.call(x, mean, variance, norm_weight, norm_bias, eps, slope, weight, bias);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list grads) {
    auto saved = context->get_saved_variables();
    static const auto op = find_operator<decltype(backward_cpu)>("norm_image_conv_backward");
    auto [grad_x, grad_norm_weight, grad_norm_bias, grad_weight, grad_bias] =
        op.call(grads[0], saved[0], saved[1], saved[2], saved[3], saved[4],
                context->saved_data["eps"].toDouble(), context->saved_data["slope"].toDouble(),
                saved[5], saved[6]);
    return {grad_x,   Tensor(), Tensor(),    grad_norm_weight, grad_norm_bias,
            Tensor(), Tensor(), grad_weight, grad_bias};
  }
};

Tensor forward_autograd(const Tensor& x, const Tensor& mean, const Tensor& variance,
                        const Tensor& norm_weight, const Tensor& norm_bias, double eps,
                        double slope, const Tensor& weight, const Tensor& bias) {
  refuse_tangents("norm_image_conv", x, mean, variance, norm_weight, norm_bias, weight, bias);
  refuse_moments_gradient(mean, variance);
  check(x, mean, variance, norm_weight, norm_bias, eps, weight, bias);
  return Function::apply(x, mean, variance, norm_weight, norm_bias, eps, slope, weight, bias);
}

// x [N, Ci, H, W], the norm's values [Ci], weight [Co, Ci, 3, 3], bias [Co]: [N, Co, H, W].
TORCH_LIBRARY_FRAGMENT(dafl_fast, m) {
  const std::string forward =
      "norm_image_conv(Tensor x, Tensor mean, Tensor variance, Tensor norm_weight, "
      "Tensor norm_bias, float eps, float slope, Tensor weight, Tensor bias) -> Tensor";
  const std::string backward =
      "norm_image_conv_backward(Tensor grad, Tensor x, Tensor mean, Tensor variance, "
      "Tensor norm_weight, Tensor norm_bias, float eps, float slope, Tensor weight, "
      "Tensor bias) -> (Tensor grad_x, Tensor grad_norm_weight, Tensor grad_norm_bias, "
      "Tensor grad_weight, Tensor grad_bias)";
  define(m, forward, forward_cpu, forward_meta, torch::CppFunction(forward_autograd));
  define(m, backward, backward_cpu, backward_meta);
#ifdef DAFL_FAST_CUDA
  add_kernel(m, forward, c10::DispatchKey::CUDA, forward_cuda);
  add_kernel(m, backward, c10::DispatchKey::CUDA, backward_cuda);
#endif
}

}  // namespace
}  // namespace dafl
