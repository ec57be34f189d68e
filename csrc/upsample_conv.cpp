// Nearest x2 upsampling followed by a 3x3 convolution with padding 1, with 9 multiplications per
// small pixel and channel pair instead of 36 (or of 16, as a transposed convolution).
//
// Along one axis, with taps (w0, w1, w2), s = w0 + w1 + w2 and d_i = x_i - x_{i-1} (x zero
// outside):
//   y_{2i} = s x_i - w0 d_i        y_{2i+1} = s x_i + w2 d_{i+1}
// that is 3 products for 2 outputs. In two dimensions the tensor product of this: the image and its
// differences along width, height and both are multiplied with matrices [Ci, Co], [Ci, 2 Co],
// [Ci, 2 Co] and [Ci, 4 Co], and each output is a sum of four of the products.
//
// Neither the upsampled image nor, for more than a few images at a time, the differences and
// products exist: the work is cut into pieces that stay in the caches. Differences are computed
// again in the backward pass.
#include "layers_shared.h"

namespace dafl {
namespace {

constexpr int64_t kPixels = 2048;  // about as many small pixels are worked on at a time

// [s, -first, last] of the three slices of a dimension, and the adjoint.
Tensor combine_taps(const Tensor& w, int64_t dim) {
  return at::stack({w.sum(dim), -w.select(dim, 0), w.select(dim, 2)}, dim);
}

Tensor combine_taps_adjoint(const Tensor& grad, int64_t dim) {
  Tensor sum = grad.select(dim, 0);
  return at::stack({sum - grad.select(dim, 1), sum, sum + grad.select(dim, 2)}, dim);
}

// The four factors [Ci, k Co] in one dtype.
struct Factors {
  Tensor ss, sd, ds, dd;

  Factors(const Tensor& weight, ScalarType compute, ScalarType dtype) {
    const int64_t Co = weight.size(0), Ci = weight.size(1);
    // [3, 3, Ci, Co]
    Tensor u = combine_taps(combine_taps(weight.to(compute).permute({2, 3, 1, 0}), 0), 1);
    auto factor = [&](const Tensor& part, int64_t outputs) {
      return part.reshape({outputs, Ci, Co}).transpose(0, 1).reshape({Ci, outputs * Co}).to(dtype);
    };
    ss = factor(u[0][0], 1);
    sd = factor(u[0].narrow(0, 1, 2), 2);
    ds = factor(u.select(1, 0).narrow(0, 1, 2), 2);
    dd = factor(u.narrow(0, 1, 2).narrow(1, 1, 2), 4);
  }
};

Tensor weight_gradient(const Tensor& ss, const Tensor& sd, const Tensor& ds, const Tensor& dd,
                       const Tensor& weight) {
  const int64_t Co = weight.size(0), Ci = weight.size(1);
  Tensor u = at::empty({3, 3, Ci, Co}, ss.options());
  auto part = [&](const Tensor& factor, int64_t outputs) {
    return factor.view({Ci, outputs, Co}).transpose(0, 1);
  };
  u[0][0].copy_(ss);
  u[0].narrow(0, 1, 2).copy_(part(sd, 2));
  u.select(1, 0).narrow(0, 1, 2).copy_(part(ds, 2));
  u.narrow(0, 1, 2).narrow(1, 1, 2).copy_(part(dd, 4).view({2, 2, Ci, Co}));
  Tensor w = combine_taps_adjoint(combine_taps_adjoint(u, 1), 0);
  return like_parameter(w.permute({3, 2, 0, 1}), weight);
}

// Four matrices for up to `images` images: [images * pixels, k * C] where k counts the outputs of
// each part (1, 2, 2, 4 for products and their gradients, 1 for the image and its differences).
struct Parts {
  int64_t H, W;
  Tensor ss, sd, ds, dd;

  Parts(const Tensor& like, int64_t images, int64_t H, int64_t W, int64_t C, bool outputs)
      : H(H), W(W) {
    const int64_t two = outputs ? 2 : 1;
    ss = at::empty({images * H * W, C}, like.options());
    sd = at::empty({images * H * (W + 1), two * C}, like.options());
    ds = at::empty({images * (H + 1) * W, two * C}, like.options());
    dd = at::empty({images * (H + 1) * (W + 1), two * two * C}, like.options());
  }

  // The first `images`.
  Parts first(int64_t images) const {
    Parts part = *this;
    part.ss = ss.narrow(0, 0, images * H * W);
    part.sd = sd.narrow(0, 0, images * H * (W + 1));
    part.ds = ds.narrow(0, 0, images * (H + 1) * W);
    part.dd = dd.narrow(0, 0, images * (H + 1) * (W + 1));
    return part;
  }
};

int64_t images_at_a_time(int64_t H, int64_t W) {
  return std::max<int64_t>(kPixels / std::max<int64_t>(H * W, 1), 1);
}

void check(const Tensor& x, const Tensor& weight) { check_weight(x, weight, 3); }

Tensor allocate(const Tensor& x, const Tensor& weight) {
  return empty_activations(
      x, {x.sym_size(0), weight.sym_size(0), x.sym_size(2) * 2, x.sym_size(3) * 2}, kChannelsLast);
}

Tensor forward_cpu(const Tensor& x_, const Tensor& weight) {
  check(x_, weight);
  const ScalarType dtype = x_.scalar_type();
  Tensor x = x_.contiguous(kChannelsLast), y = allocate(x, weight);
  const int64_t N = x.size(0), Ci = x.size(1), H = x.size(2), W = x.size(3), Co = weight.size(0);
  if (y.numel() == 0) return y;
  const Factors u(weight, stats_dtype(x), dtype);
  const cpu::LayerKernels& kernels = cpu::layer_kernels(dtype_of(x));
  const Tensor pixels = x.permute({0, 2, 3, 1}).view({N * H * W, Ci});
  const int64_t images = images_at_a_time(H, W);

  for_pieces(N, images, [&](int64_t, int64_t begin, int64_t count) {
    Parts in(x, count, H, W, Ci, false), out(x, count, H, W, Co, true);
    in.ss = pixels.narrow(0, begin * H * W, count * H * W);
    kernels.differences({count, H, W, Ci}, in.ss.const_data_ptr(), in.sd.data_ptr(),
                        in.ds.data_ptr(), in.dd.data_ptr());
    at::mm_out(out.ss, in.ss, u.ss);
    at::mm_out(out.sd, in.sd, u.sd);
    at::mm_out(out.ds, in.ds, u.ds);
    at::mm_out(out.dd, in.dd, u.dd);
    kernels.interleave({count, H, W, Co}, out.ss.const_data_ptr(), out.sd.const_data_ptr(),
                       out.ds.const_data_ptr(), out.dd.const_data_ptr(),
                       offset<char>(y, begin * 4 * H * W * Co));
  });
  return y;
}

std::tuple<Tensor, Tensor> backward_cpu(const Tensor& grad_, const Tensor& x_,
                                        const Tensor& weight) {
  check(x_, weight);
  const ScalarType dtype = x_.scalar_type(), compute = stats_dtype(x_);
  Tensor x = x_.contiguous(kChannelsLast), grad = dense(grad_, dtype, kChannelsLast);
  Tensor grad_x = at::empty_like(x, x.options(), kChannelsLast);
  const int64_t N = x.size(0), Ci = x.size(1), H = x.size(2), W = x.size(3), Co = weight.size(0);
  if (grad.numel() == 0) return {grad_x.zero_(), at::zeros_like(weight)};
  const Factors u(weight, compute, dtype);
  const cpu::LayerKernels& kernels = cpu::layer_kernels(dtype_of(x));
  const Tensor pixels = x.permute({0, 2, 3, 1}).view({N * H * W, Ci});
  const int64_t images = images_at_a_time(H, W), summed = images_per_sum(N, images);
  const int64_t sums = (N + summed - 1) / summed;
  const auto options = x.options().dtype(compute);
  const Tensor total[4] = {
      at::zeros({sums, Ci, Co}, options), at::zeros({sums, Ci, 2 * Co}, options),
      at::zeros({sums, Ci, 2 * Co}, options), at::zeros({sums, Ci, 4 * Co}, options)};

  for_pieces(N, summed, [&](int64_t piece, int64_t from, int64_t all) {
    const int64_t most = std::min(images, all);
    const Parts scratch_in(x, most, H, W, Ci, false), scratch_out(x, most, H, W, Co, true);
    Tensor product[4];
    for (int k = 0; k < 4; ++k) product[k] = at::empty({Ci, total[k].size(2)}, x.options());
    for (int64_t done = 0; done < all; done += images) {
      const int64_t begin = from + done, count = std::min(images, all - done);
      Parts in = scratch_in.first(count), out = scratch_out.first(count);
      const Tensor image = pixels.narrow(0, begin * H * W, count * H * W);
      kernels.interleave_adjoint(
          {count, H, W, Co}, offset<const char>(grad, begin * 4 * H * W * Co), out.ss.data_ptr(),
          out.sd.data_ptr(), out.ds.data_ptr(), out.dd.data_ptr());
      kernels.differences({count, H, W, Ci}, image.const_data_ptr(), in.sd.data_ptr(),
                          in.ds.data_ptr(), in.dd.data_ptr());
      at::mm_out(product[0], image.t(), out.ss);
      at::mm_out(product[1], in.sd.t(), out.sd);
      at::mm_out(product[2], in.ds.t(), out.ds);
      at::mm_out(product[3], in.dd.t(), out.dd);
      for (int k = 0; k < 4; ++k) total[k][piece].add_(product[k]);
      // The differences have served: their memory takes the gradients.
      at::mm_out(in.ss, out.ss, u.ss.t());
      at::mm_out(in.sd, out.sd, u.sd.t());
      at::mm_out(in.ds, out.ds, u.ds.t());
      at::mm_out(in.dd, out.dd, u.dd.t());
      kernels.differences_adjoint({count, H, W, Ci}, in.ss.const_data_ptr(), in.sd.const_data_ptr(),
                                  in.ds.const_data_ptr(), in.dd.const_data_ptr(),
                                  offset<char>(grad_x, begin * H * W * Ci));
    }
  });
  return {grad_x, weight_gradient(total[0].sum(0), total[1].sum(0), total[2].sum(0),
                                  total[3].sum(0), weight)};
}

Tensor forward_meta(const Tensor& x, const Tensor& weight) {
  check(x, weight);
  return allocate(x, weight);
}

std::tuple<Tensor, Tensor> backward_meta(const Tensor&, const Tensor& x, const Tensor& weight) {
  return {empty_activations(x, x.sym_sizes(), kChannelsLast), at::empty_like(weight)};
}

struct Function : torch::autograd::Function<Function> {
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& x,
                        const Tensor& weight) {
    at::AutoDispatchBelowADInplaceOrView below;
    context->save_for_backward({x, weight});
    return upsample_conv(x, weight);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list grads) {
    auto saved = context->get_saved_variables();
    auto [grad_x, grad_weight] = upsample_conv_backward(grads[0], saved[0], saved[1]);
    return {grad_x, grad_weight};
  }
};

Tensor forward_autograd(const Tensor& x, const Tensor& weight) {
  return Function::apply(x, weight);
}

}  // namespace

Tensor upsample_conv(const Tensor& x, const Tensor& weight) {
  static auto op = operator_handle<decltype(upsample_conv)>("dafl_fast::upsample_conv");
  return op.call(x, weight);
}

std::tuple<Tensor, Tensor> upsample_conv_backward(const Tensor& grad, const Tensor& x,
                                                  const Tensor& weight) {
  static auto op =
      operator_handle<decltype(upsample_conv_backward)>("dafl_fast::upsample_conv_backward");
  return op.call(grad, x, weight);
}

TORCH_LIBRARY_IMPL(dafl_fast, CPU, m) {
  m.impl("upsample_conv", forward_cpu);
  m.impl("upsample_conv_backward", backward_cpu);
}
TORCH_LIBRARY_IMPL(dafl_fast, Meta, m) {
  m.impl("upsample_conv", forward_meta);
  m.impl("upsample_conv_backward", backward_meta);
}
TORCH_LIBRARY_IMPL(dafl_fast, Autograd, m) { m.impl("upsample_conv", forward_autograd); }

}  // namespace dafl
