// Nearest x2 upsampling followed by a 3x3 convolution with padding 1, with 6.25 multiplications per
// small pixel and channel pair instead of 36 (or of 16, as a transposed convolution).
//
// Along one axis, with taps (w0, w1, w2) and x zero outside, even outputs are y_2i =
// w0 x_{i-1} + (w1 + w2) x_i and odd ones y_2i+1 = (w0 + w1) x_i + w2 x_{i+1}: two filters of two
// taps with the same sum. Fast filtering of two outputs takes three products, one of them by that
// sum, and the two filters share it when their outputs are paired around the same pixel. So a tile
// of two pixels takes 5 products where 4 outputs have 8. In tile t, from four kinds of data,
//   A = x_2t        B = x_2t-1 - x_2t        B' = x_2t+1 - x_2t+2        C = x_2t+1 - x_2t
//   P0 = A (w0 + w1 + w2)   P1 = B w0   P2 = B' (w0 + w1)   P3 = C (w1 + w2)   P4 = C w2
//   y_4t = P0 + P1   y_4t+1 = P0 + P4   y_4t+2 = P0 + P3   y_4t+3 = P2 + P0 of tile t + 1
// All factors are sums of taps and all data differences of pixels: nothing is amplified. In two
// dimensions the tensor product of this: 4x4 kinds of data, each multiplied with a matrix
// [Ci, k Co] of k = 1, 2 or 4 factors, and each output is the sum of four of the 25 products.
//
// The upsampled image is never formed. Data and products exist for a few images at a time: the work
// is cut into pieces that stay in the caches, and the backward pass computes the data again.
#include "norm.h"

namespace dafl {
namespace {

constexpr int64_t kValues = 1 << 18;  // about as many data and outputs are worked on at a time

// The five factors of the three slices of a dimension, and the adjoint.
Tensor combine_taps(const Tensor& w, int64_t dim) {
  const Tensor first = w.select(dim, 0), middle = w.select(dim, 1), last = w.select(dim, 2);
  return at::stack({first + middle + last, first, first + middle, middle + last, last}, dim);
}

Tensor combine_taps_adjoint(const Tensor& grad, int64_t dim) {
  auto of = [&](int64_t factor) { return grad.select(dim, factor); };
  return at::stack({of(0) + of(1) + of(2), of(0) + of(2) + of(3), of(0) + of(3) + of(4)}, dim);
}

// One of the 16 kinds of data, by kind along the height and the width (A, B, B', C), and the
// matrices that belong to it.
struct Kind {
  int64_t row, column;

  int64_t rows() const { return row < 3 ? 1 : 2; }
  int64_t columns() const { return column < 3 ? 1 : 2; }

  // [tiles, C] of data
  Tensor data(const Tensor& all, int64_t tiles, int64_t C) const {
    return all.narrow(0, (row * 4 + column) * tiles * C, tiles * C).view({tiles, C});
  }

  // [height, k C] of what there is 25 times: products of all tiles, factors
  Tensor among(const Tensor& all, int64_t height, int64_t C) const {
    const int64_t before = 5 * row + rows() * column, width = rows() * columns() * C;
    return all.narrow(0, before * height * C, height * width).view({height, width});
  }

  // [rows, columns, Ci, Co] of [5, 5, Ci, Co]
  Tensor factors(const Tensor& u) const {
    return u.narrow(0, row, rows()).narrow(1, column, columns());
  }
};

template <class Body>
void for_kinds(Body body) {
  for (int64_t row = 0; row < 4; ++row) {
    for (int64_t column = 0; column < 4; ++column) body(Kind{row, column});
  }
}

// All factors, [25 Ci Co], in `dtype`.
Tensor factors_of(const Tensor& weight, ScalarType compute, ScalarType dtype) {
  const int64_t Co = weight.size(0), Ci = weight.size(1);
  const Tensor u = combine_taps(combine_taps(weight.to(compute).permute({2, 3, 1, 0}), 0), 1);
  Tensor all = at::empty({25 * Ci * Co}, weight.options().dtype(dtype));
  for_kinds([&](Kind kind) {
    kind.among(all, Ci, Co)
        .view({Ci, kind.rows(), kind.columns(), Co})
        .copy_(kind.factors(u).permute({2, 0, 1, 3}));
  });
  return all;
}

// The weight's gradient from that of all factors.
Tensor factors_adjoint(const Tensor& all, const Tensor& weight) {
  const int64_t Co = weight.size(0), Ci = weight.size(1);
  Tensor u = at::empty({5, 5, Ci, Co}, all.options());
  for_kinds([&](Kind kind) {
    kind.factors(u).copy_(
        kind.among(all, Ci, Co).view({Ci, kind.rows(), kind.columns(), Co}).permute({1, 2, 0, 3}));
  });
  const Tensor w = combine_taps_adjoint(combine_taps_adjoint(u, 1), 0);
  return like_parameter(w.permute({3, 2, 0, 1}), weight);
}

// How many images make a piece of about `most` values: pieces as equal as they can be.
int64_t images_at_a_time(int64_t N, int64_t H, int64_t W, int64_t channels, int64_t most) {
  const int64_t values = cpu::Upsample{N, H, W, 0}.tiles() * channels;
  const int64_t pieces = (values + most - 1) / most;
  return (N + pieces - 1) / pieces;
}

// ---- Where the kernels multiply ----------------------------------------------------------------

// About as many data and outputs are worked on at a time: their products stay in the L2 cache.
constexpr int64_t kPanelValues = 1 << 14;

// The weight's taps [9, Ci, Co], or [9, Co, Ci], as factors in panels.
Tensor panels_of_factors(const cpu::UpsamplePanels& panels, const Tensor& weight, bool backward) {
  const Tensor taps =
      weight.permute({2, 3, backward ? 0 : 1, backward ? 1 : 0}).to(at::kFloat).contiguous();
  const int64_t rows = taps.size(2), columns = taps.size(3);
  auto padded = [&](int64_t C) { return (C + panels.width - 1) / panels.width * panels.width; };
  Tensor factors = at::empty({25 * padded(rows) * padded(columns)}, taps.options());
  void* to = factors.data_ptr();
  at::parallel_for(0, padded(rows), panels.width, [&](int64_t begin, int64_t end) {
    panels.factors(taps.const_data_ptr(), rows, columns, backward, begin, end, to);
  });
  return factors;
}

std::tuple<Tensor, Tensor> backward_in_panels(const cpu::UpsamplePanels& panels, const Tensor& grad,
                                              const Tensor& x, const Tensor& weight) {
  const int64_t N = x.size(0), Ci = x.size(1), H = x.size(2), W = x.size(3), Co = weight.size(0);
  const Tensor factors = panels_of_factors(panels, weight, true);
  Tensor grad_x = at::empty_like(x, x.options(), kChannelsLast);
  const int64_t most = images_at_a_time(N, H, W, Ci + Co, kPanelValues);
  const int64_t summed = images_per_sum(N, most), pieces = (N + summed - 1) / summed;
  const Tensor sums = at::empty({pieces, factors.numel()}, x.options());
  for_pieces(N, summed, [&](int64_t piece, int64_t from, int64_t all) {
    const cpu::Upsample largest{std::min(most, all), H, W, Ci};
    Tensor scratch = at::empty({panels.scratch(largest, Co, true)}, x.options());
    for (int64_t done = 0; done < all; done += most) {
      const int64_t begin = from + done;
      panels.gradients({std::min(most, all - done), H, W, Ci}, Co,
                       offset<const char>(x, begin * H * W * Ci),
                       offset<const char>(grad, begin * 4 * H * W * Co), factors.const_data_ptr(),
                       done == 0, scratch.data_ptr(), offset<char>(sums, piece * factors.numel()),
                       offset<char>(grad_x, begin * H * W * Ci));
    }
  });
  Tensor taps = at::empty({3, 3, Ci, Co}, x.options());
  void* to = taps.data_ptr();
  at::parallel_for(0, Ci, 16, [&](int64_t begin, int64_t end) {
    panels.factors_adjoint(sums.const_data_ptr(), pieces, Ci, Co, begin, end, to);
  });
  return {grad_x, like_parameter(taps.permute({3, 2, 0, 1}), weight)};
}

std::tuple<Tensor, Tensor, Tensor> forward_meta(const Tensor& x, const Tensor& weight) {
  check_weight(x, weight, 3);
  const c10::SymInt Co = weight.sym_size(0);
  return {empty_activations(x, {x.sym_size(0), Co, x.sym_size(2) * 2, x.sym_size(3) * 2},
                            kChannelsLast),
          empty(x, {Co}, stats_dtype(x)), empty(x, {Co}, stats_dtype(x))};
}

std::tuple<Tensor, Tensor, Tensor> forward_cpu(const Tensor& x_, const Tensor& weight) {
  auto results = forward_meta(x_, weight);
  const auto& [y, mean, variance] = results;
  const Tensor x = x_.contiguous(kChannelsLast);
  const int64_t N = x.size(0), Ci = x.size(1), H = x.size(2), W = x.size(3), Co = weight.size(0);
  if (y.numel() == 0) {
    mean.zero_();
    variance.zero_();
    return results;
  }
  const cpu::LayerKernels& kernels = cpu::layer_kernels(dtype_of(x));
  const cpu::UpsamplePanels* panels = kernels.upsample;
  const int64_t most = images_at_a_time(N, H, W, Ci + Co, panels ? kPanelValues : kValues);
  const Tensor factors = panels ? panels_of_factors(*panels, weight, false)
                                : factors_of(weight, stats_dtype(x), x.scalar_type());
  Moments moments(N * 4 * H * W, most * 4 * H * W, Co);
  char* out_pixels = offset<char>(y, 0);

  for_pieces(N, most, [&](int64_t piece, int64_t begin, int64_t images) {
    const cpu::Upsample in{images, H, W, Ci}, out{images, H, W, Co};
    char* outputs = out_pixels + begin * 4 * H * W * Co * x.element_size();
    if (panels) {
      Tensor scratch = at::empty({panels->scratch(in, Co, false)}, x.options());
      panels->outputs(in, Co, offset<const char>(x, begin * H * W * Ci), factors.const_data_ptr(),
                      scratch.data_ptr(), outputs);
      moments.take(piece, outputs, images * 4 * H * W, kernels, x.element_size());
      return;
    }
    const int64_t tiles = in.tiles();
    Tensor data = at::empty({16 * tiles * Ci}, x.options());
    Tensor products = at::empty({25 * tiles * Co}, x.options());
    kernels.differences(in, offset<const char>(x, begin * H * W * Ci), data.data_ptr());
    for_kinds([&](Kind kind) {
      Tensor product = kind.among(products, tiles, Co);
      at::mm_out(product, kind.data(data, tiles, Ci), kind.among(factors, Ci, Co));
    });
    kernels.interleave(out, products.const_data_ptr(), outputs);
    moments.take(piece, outputs, images * 4 * H * W, kernels, x.element_size());
  });
  moments.write(mean, variance);
  return results;
}

void check_backward(const Tensor& grad, const Tensor& x, const Tensor& weight) {
  check_weight(x, weight, 3);
  check_gradient("upsample_conv_backward's grad", grad,
                 {x.sym_size(0), weight.sym_size(0), x.sym_size(2) * 2, x.sym_size(3) * 2}, x);
}

std::tuple<Tensor, Tensor> backward_cpu(const Tensor& grad_, const Tensor& x_,
                                        const Tensor& weight) {
  check_backward(grad_, x_, weight);
  const ScalarType compute = stats_dtype(x_);
  Tensor x = x_.contiguous(kChannelsLast), grad = dense(grad_, x.scalar_type(), kChannelsLast);
  Tensor grad_x = at::empty_like(x, x.options(), kChannelsLast);
  const int64_t N = x.size(0), Ci = x.size(1), H = x.size(2), W = x.size(3), Co = weight.size(0);
  if (grad.numel() == 0) return {grad_x.zero_(), at::zeros_like(weight)};
  const cpu::LayerKernels& kernels = cpu::layer_kernels(dtype_of(x));
  if (kernels.upsample) return backward_in_panels(*kernels.upsample, grad, x, weight);
  const Tensor factors = factors_of(weight, compute, x.scalar_type());
  const int64_t most = images_at_a_time(N, H, W, Ci + Co, kValues),
                summed = images_per_sum(N, most);
  const Tensor sums =
      at::zeros({(N + summed - 1) / summed, 25 * Ci * Co}, x.options().dtype(compute));

  for_pieces(N, summed, [&](int64_t piece, int64_t from, int64_t all) {
    const int64_t most_tiles = cpu::Upsample{std::min(most, all), H, W, 0}.tiles();
    Tensor data = at::empty({16 * most_tiles * Ci}, x.options());
    Tensor products = at::empty({25 * most_tiles * Co}, x.options());
    Tensor factor_grads = at::empty({25 * Ci * Co}, x.options());
    for (int64_t done = 0; done < all; done += most) {
      const int64_t begin = from + done, images = std::min(most, all - done);
      const cpu::Upsample in{images, H, W, Ci}, out{images, H, W, Co};
      const int64_t tiles = in.tiles();
      kernels.differences(in, offset<const char>(x, begin * H * W * Ci), data.data_ptr());
      kernels.interleave_adjoint(out, offset<const char>(grad, begin * 4 * H * W * Co),
                                 products.data_ptr());
      for_kinds([&](Kind kind) {
        const Tensor product = kind.among(products, tiles, Co);
        Tensor datum = kind.data(data, tiles, Ci), sum = kind.among(factor_grads, Ci, Co);
        at::mm_out(sum, datum.t(), product);
        // The data are not read again, so their gradients overwrite them.
        at::mm_out(datum, product, kind.among(factors, Ci, Co).t());
      });
      sums[piece].add_(factor_grads);
      kernels.differences_adjoint(in, data.const_data_ptr(),
                                  offset<char>(grad_x, begin * H * W * Ci));
    }
  });
  return {grad_x, factors_adjoint(sums.sum(0), weight)};
}

std::tuple<Tensor, Tensor> backward_meta(const Tensor& grad, const Tensor& x,
                                         const Tensor& weight) {
  check_backward(grad, x, weight);
  return {empty_activations(x, x.sym_sizes(), kChannelsLast), at::empty_like(weight)};
}

struct Function : torch::autograd::Function<Function> {
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* context,
                                                const Tensor& x, const Tensor& weight) {
    at::AutoDispatchBelowADInplaceOrView below;
    context->save_for_backward({x, weight});
    static const auto op = find_operator<decltype(forward_cpu)>("upsample_conv");
    auto [y, mean, variance] = op.call(x, weight);
    context->mark_non_differentiable({mean, variance});
    return {y, mean, variance};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list grads) {
    auto saved = context->get_saved_variables();
    static const auto op = find_operator<decltype(backward_cpu)>("upsample_conv_backward");
    auto [grad_x, grad_weight] = op.call(grads[0], saved[0], saved[1]);
    return {grad_x, grad_weight};
  }
};

std::tuple<Tensor, Tensor, Tensor> forward_autograd(const Tensor& x, const Tensor& weight) {
  refuse_tangents("upsample_conv", x, weight);
  check_weight(x, weight, 3);
  auto results = Function::apply(x, weight);
  return {results[0], results[1], results[2]};
}

// x [N, Ci, H, W], weight [Co, Ci, 3, 3]: y [N, Co, 2H, 2W] as channels_last, and the mean [Co] and
// biased variance [Co] of y in statistics dtype, which have no gradient.
TORCH_LIBRARY_FRAGMENT(dafl_fast, m) {
  define(m, "upsample_conv(Tensor x, Tensor weight) -> (Tensor y, Tensor mean, Tensor variance)",
         forward_cpu, forward_meta, torch::CppFunction(forward_autograd));
  define(m,
         "upsample_conv_backward(Tensor grad, Tensor x, Tensor weight) -> "
         "(Tensor grad_x, Tensor grad_weight)",
         backward_cpu, backward_meta);
}

}  // namespace
}  // namespace dafl
