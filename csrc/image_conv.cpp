// 3x3 convolution with padding 1 from many channels to the few of an image.
//
// As a convolution it has too few outputs to fill vectors. Here one matrix product gives, for each
// output channel and tap, a plane of the whole image's products, [9 Co, Ci] x [Ci, pixels], and
// each output is a sum of nine planes, shifted. Backward, the shifted gradients are such planes,
// and two matrix products give the gradients of x and weight. Planes exist for some thousand
// pixels at a time.
#include <ATen/ops/sum.h>

#include "layers_shared.h"

namespace dafl {
namespace {

constexpr int64_t kPixels = 8192;  // about as many are worked on at a time

void check(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  check_weight(x, weight, 3);
  check_channels("bias", x, bias, weight.sym_size(0));
}

Tensor allocate(const Tensor& x, const Tensor& weight) {
  return empty_activations(x, {x.sym_size(0), weight.sym_size(0), x.sym_size(2), x.sym_size(3)},
                           at::MemoryFormat::Contiguous);
}

// [9 Co, Ci], output channel first
Tensor taps_of(const Tensor& weight, ScalarType dtype) {
  return weight.permute({0, 2, 3, 1}).reshape({9 * weight.size(0), weight.size(1)}).to(dtype);
}

int64_t images_at_a_time(int64_t H, int64_t W) {
  return std::max<int64_t>(kPixels / std::max<int64_t>(H * W, 1), 1);
}

Tensor forward_cpu(const Tensor& x_, const Tensor& weight, const Tensor& bias_) {
  check(x_, weight, bias_);
  Tensor x = x_.contiguous(kChannelsLast), y = allocate(x, weight);
  const int64_t N = x.size(0), Ci = x.size(1), H = x.size(2), W = x.size(3), Co = weight.size(0);
  if (y.numel() == 0) return y;
  const ScalarType compute = stats_dtype(x);
  const Tensor taps = taps_of(weight, x.scalar_type()), bias = bias_.to(compute).contiguous();
  const Tensor pixels = x.permute({0, 2, 3, 1}).view({N * H * W, Ci});
  const cpu::LayerKernels& kernels = cpu::layer_kernels(dtype_of(x));
  for_pieces(N, images_at_a_time(H, W), [&](int64_t, int64_t begin, int64_t count) {
    Tensor planes = at::empty({9 * Co, count * H * W}, x.options());
    Tensor scratch = at::empty({3 * (W + 32)}, x.options().dtype(compute));
    at::mm_out(planes, taps, pixels.narrow(0, begin * H * W, count * H * W).t());
    kernels.sum_shifted({count, H, W, Co}, planes.const_data_ptr(), bias.const_data_ptr(),
                        offset<char>(y, begin * Co * H * W), scratch.data_ptr());
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> backward_cpu(const Tensor& grad_, const Tensor& x_,
                                                const Tensor& weight, const Tensor& bias) {
  check(x_, weight, bias);
  Tensor x = x_.contiguous(kChannelsLast);
  Tensor grad = dense(grad_, x.scalar_type(), at::MemoryFormat::Contiguous);
  Tensor grad_x = at::empty_like(x, x.options(), kChannelsLast);
  const int64_t N = x.size(0), Ci = x.size(1), H = x.size(2), W = x.size(3), Co = weight.size(0);
  if (grad.numel() == 0) {
    return {grad_x.zero_(), at::zeros_like(weight), at::zeros_like(bias)};
  }
  const ScalarType compute = stats_dtype(x);
  const Tensor taps = taps_of(weight, x.scalar_type());
  const Tensor pixels = x.permute({0, 2, 3, 1}).view({N * H * W, Ci});
  const Tensor grad_pixels = grad_x.permute({0, 2, 3, 1}).view({N * H * W, Ci});
  const cpu::LayerKernels& kernels = cpu::layer_kernels(dtype_of(x));
  const int64_t images = images_at_a_time(H, W), summed = images_per_sum(N, images);
  const Tensor total =
      at::zeros({(N + summed - 1) / summed, 9 * Co, Ci}, x.options().dtype(compute));
  for_pieces(N, summed, [&](int64_t piece, int64_t from, int64_t all) {
    Tensor product = at::empty({9 * Co, Ci}, x.options());
    for (int64_t done = 0; done < all; done += images) {
      const int64_t begin = from + done, count = std::min(images, all - done);
      const int64_t first = begin * H * W, size = count * H * W;
      Tensor planes = at::empty({9 * Co, size}, x.options());
      kernels.shift_apart({count, H, W, Co}, offset<const char>(grad, first * Co),
                          planes.data_ptr());
      Tensor part = grad_pixels.narrow(0, first, size);
      at::mm_out(part, planes.t(), taps);
      at::mm_out(product, planes, pixels.narrow(0, first, size));
      total[piece].add_(product);
    }
  });
  Tensor grad_weight = total.sum(0).view({Co, 3, 3, Ci}).permute({0, 3, 1, 2});
  return {grad_x, like_parameter(grad_weight, weight),
          like_parameter(at::sum(grad, {0, 2, 3}, false, compute), bias)};
}

Tensor forward_meta(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  check(x, weight, bias);
  return allocate(x, weight);
}

std::tuple<Tensor, Tensor, Tensor> backward_meta(const Tensor&, const Tensor& x,
                                                 const Tensor& weight, const Tensor& bias) {
  return {empty_activations(x, x.sym_sizes(), kChannelsLast), at::empty_like(weight),
          at::empty_like(bias)};
}

struct Function : torch::autograd::Function<Function> {
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& x,
                        const Tensor& weight, const Tensor& bias) {
    at::AutoDispatchBelowADInplaceOrView below;
    context->save_for_backward({x, weight, bias});
    return image_conv(x, weight, bias);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list grads) {
    auto saved = context->get_saved_variables();
    auto [grad_x, grad_weight, grad_bias] =
        image_conv_backward(grads[0], saved[0], saved[1], saved[2]);
    return {grad_x, grad_weight, grad_bias};
  }
};

Tensor forward_autograd(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  return Function::apply(x, weight, bias);
}

}  // namespace

Tensor image_conv(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  static auto op = operator_handle<decltype(image_conv)>("dafl_fast::image_conv");
  return op.call(x, weight, bias);
}

std::tuple<Tensor, Tensor, Tensor> image_conv_backward(const Tensor& grad, const Tensor& x,
                                                       const Tensor& weight, const Tensor& bias) {
  static auto op = operator_handle<decltype(image_conv_backward)>("dafl_fast::image_conv_backward");
  return op.call(grad, x, weight, bias);
}

TORCH_LIBRARY_IMPL(dafl_fast, CPU, m) {
  m.impl("image_conv", forward_cpu);
  m.impl("image_conv_backward", backward_cpu);
}
TORCH_LIBRARY_IMPL(dafl_fast, Meta, m) {
  m.impl("image_conv", forward_meta);
  m.impl("image_conv_backward", backward_meta);
}
TORCH_LIBRARY_IMPL(dafl_fast, Autograd, m) { m.impl("image_conv", forward_autograd); }

}  // namespace dafl
