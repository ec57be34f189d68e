// 3x3 convolution with padding 1, with 16 multiplications for 2x2 outputs and channel pair instead
// of 36 (Lavin and Gray 2016, F(2x2, 3x3)).
//
// Along one axis two outputs of three taps w see four inputs x, and take four products:
//   data  x0 - x2, x1 + x2, x2 - x1, x1 - x3
//   times w0, (w0 + w1 + w2) / 2, (w0 - w1 + w2) / 2, w2
//   give  y0 = m0 + m1 + m2, y1 = m1 - m2 - m3
// In two dimensions the tensor product of this: in each of 16 products, data of all tiles [tiles,
// Ci] times factors [Ci, Co]. The gradient of x is the same convolution of the output's gradient,
// with the taps reversed; that of the factors is the product of data and the adjoint of the last
// line. Data and factors are computed in fp32 and rounded once to the dtype of x, products are
// summed in fp32: for 16-bit dtypes the error is about twice that of a direct convolution, which
// rounds its result alone.
//
// Work is cut by shape into pieces whose data and products stay in the caches.
#include <ATen/ops/sum.h>

#include <limits>

#include "cpu/winograd.h"
#include "shared.h"

namespace dafl {
namespace {

// Tiles that the weight's gradient is summed over at a time: few enough that their data and
// gradients stay in the L2 cache, many enough that sums are seldom loaded and stored again.
constexpr int64_t kTilesPerSum = 512;

// Tiles computed at a time: many, so that a factor once loaded is used often, and a multiple of the
// rows that the kernels multiply at once; but fewer for small batches, so that every thread has
// some.
int64_t tiles_at_a_time(int64_t tiles) { return tiles >= 1024 ? 72 : 24; }

template <class Int>
Int padded(const cpu::WinogradKernels& kernels, const Int& channels) {
  return (channels + (kernels.panel - 1)) / kernels.panel * kernels.panel;
}

void check_factors(const char* name, const Tensor& factors, const Tensor& x,
                   const c10::SymInt& channels) {
  const cpu::WinogradKernels& kernels = cpu::winograd_kernels(dtype_of(x));
  const c10::SymInt size = 16 * padded(kernels, x.sym_size(1)) * padded(kernels, channels);
  TORCH_CHECK_VALUE(factors.dim() == 1 && factors.sym_size(0) == size &&
                        factors.scalar_type() == x.scalar_type() && factors.device() == x.device(),
                    name, " must be those of conv3x3_factors for ", x.scalar_type(), ", ",
                    text(x.sym_size(1)), " and ", text(channels), " channels, [", text(size), "]",
                    got(factors), " of ", factors.scalar_type());
  check_memory(name, factors);
}

// Scratch of the kernels, whose vectors are aligned.
Tensor scratch(int64_t size, const Tensor& x, ScalarType dtype) {
  return at::empty({size}, x.options().dtype(dtype));
}

const void* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr() : nullptr;
}

std::tuple<Tensor, Tensor> factors_meta(const Tensor& weight, ScalarType dtype, bool backward) {
  TORCH_CHECK_VALUE(weight.dim() == 4 && weight.sym_size(2) == 3 && weight.sym_size(3) == 3,
                    "weight must be [Co, Ci, 3, 3]", got(weight));
  check_dtype("weight", weight);
  check_dtype("dtype", dtype);
  const cpu::WinogradKernels& kernels = cpu::winograd_kernels(dtype_of(dtype));
  const c10::SymInt Co = weight.sym_size(0), Ci = weight.sym_size(1);
  const c10::SymInt size =
      weight.sym_numel() == 0 ? c10::SymInt(0) : padded(kernels, Co) * padded(kernels, Ci) * 16;
  return {empty(weight, {size}, dtype), empty(weight, {backward ? size : c10::SymInt(0)}, dtype)};
}

std::tuple<Tensor, Tensor> factors_cpu(const Tensor& weight, ScalarType dtype, bool backward) {
  auto factors = factors_meta(weight, dtype, backward);
  if (weight.numel() == 0) return factors;
  void* to_outputs = std::get<0>(factors).data_ptr();
  void* to_inputs = backward ? std::get<1>(factors).data_ptr() : nullptr;
  const Tensor w = weight.to(stats_dtype(dtype)).permute({0, 2, 3, 1}).contiguous();
  const int64_t Co = weight.size(0), Ci = weight.size(1);
  const cpu::WinogradKernels& kernels = cpu::winograd_kernels(dtype_of(dtype));
  at::parallel_for(0, padded(kernels, Co) / kernels.panel, 1, [&](int64_t first, int64_t last) {
    kernels.factors(Co, Ci, w.const_data_ptr(), first * kernels.panel, last * kernels.panel,
                    to_outputs, to_inputs);
  });
  return factors;
}

Tensor outputs_meta(const Tensor& x, const Tensor& factors, const std::optional<Tensor>& bias,
                    c10::SymInt channels) {
  check_activations(x);
  TORCH_CHECK_VALUE(channels >= 0 && channels <= std::numeric_limits<int32_t>::max(),
                    "channels must be 0 to ", std::numeric_limits<int32_t>::max(), ", got ",
                    text(channels));
  check_factors("factors", factors, x, channels);
  if (bias) check_channels("bias", x, *bias, channels);
  return empty_activations(x, {x.sym_size(0), channels, x.sym_size(2), x.sym_size(3)},
                           kChannelsLast);
}

Tensor outputs_cpu(const Tensor& x_, const Tensor& factors_, const std::optional<Tensor>& bias_,
                   c10::SymInt channels) {
  Tensor y = outputs_meta(x_, factors_, bias_, channels);
  if (y.numel() == 0) return y;
  const Tensor x = x_.contiguous(kChannelsLast), factors = factors_.contiguous();
  const ScalarType dtype = x.scalar_type(), compute = stats_dtype(dtype);
  const int64_t Ci = x.size(1), Co = y.size(1);
  const cpu::Tiles tiles{x.size(0), x.size(2), x.size(3)};
  const cpu::WinogradKernels& kernels = cpu::winograd_kernels(dtype_of(dtype));
  std::optional<Tensor> bias;
  if (bias_) bias = bias_->to(compute).contiguous();
  const int64_t count = tiles.count(), size = std::min(tiles_at_a_time(count), count);
  at::parallel_for(
      0, size == 0 ? 0 : (count + size - 1) / size, 1, [&](int64_t piece, int64_t last) {
        at::AutoDispatchBelowADInplaceOrView below;  // threads of the pool do not inherit it
        const Tensor data = scratch(16 * cpu::plane_of(size, padded(kernels, Ci)), x, dtype);
        const Tensor products = scratch(16 * cpu::plane_of(size, kernels.panel), x, compute);
        for (; piece < last; ++piece) {
          const int64_t begin = piece * size, end = std::min(begin + size, count);
          kernels.inputs(tiles, Ci, x.const_data_ptr(), begin, end, data.data_ptr());
          kernels.outputs(tiles, Ci, Co, data.const_data_ptr(), factors.const_data_ptr(),
                          data_or_null(bias), begin, end, products.data_ptr(), y.data_ptr());
        }
      });
  return y;
}

void check_weight_grad(const Tensor& grad, const Tensor& x, const Tensor& weight) {
  check_weight(x, weight, 3);
  check_gradient("conv3x3_weight_grad's grad", grad,
                 {x.sym_size(0), weight.sym_size(0), x.sym_size(2), x.sym_size(3)}, x);
}

Tensor weight_grad_meta(const Tensor& grad, const Tensor& x, const Tensor& weight) {
  check_weight_grad(grad, x, weight);
  return at::empty_like(weight);
}

Tensor weight_grad_cpu(const Tensor& grad_, const Tensor& x_, const Tensor& weight) {
  check_weight_grad(grad_, x_, weight);
  const ScalarType dtype = x_.scalar_type(), compute = stats_dtype(dtype);
  const Tensor x = x_.contiguous(kChannelsLast), grad = dense(grad_, dtype, kChannelsLast);
  const int64_t Ci = x.size(1), Co = grad.size(1);
  const cpu::Tiles tiles{x.size(0), x.size(2), x.size(3)};
  const int64_t count = tiles.count(), size = std::min(kTilesPerSum, count);
  if (count == 0 || weight.numel() == 0) return at::zeros_like(weight);
  const cpu::WinogradKernels& kernels = cpu::winograd_kernels(dtype_of(dtype));
  const int64_t in = padded(kernels, Ci), out = padded(kernels, Co);
  const int64_t items = in / kernels.panel * ((Co + kernels.lanes - 1) / kernels.lanes);
  const int64_t item_size = 16 * kernels.lanes * kernels.panel;
  const int64_t row = cpu::row_of_steps(size, kernels.unit) * kernels.unit;
  const Tensor data = scratch(16 * row * in, x, dtype), grads = scratch(16 * row * out, x, dtype);
  const bool one_sum = count <= size;
  const Tensor all_sums = scratch(one_sum ? 0 : items * item_size, x, compute);
  // [Co, 3, 3, Ci] in memory, and no view: autograd takes it over without a copy.
  const Tensor result =
      at::empty({Co, Ci, 3, 3}, x.options().dtype(compute).memory_format(kChannelsLast));
  for (int64_t first = 0; first < count; first += size) {
    const int64_t last = std::min(first + size, count);
    at::parallel_for(0, (last - first + 1) / 2, 1, [&](int64_t begin, int64_t end) {
      const cpu::TileRange range{first, last, first + 2 * begin, std::min(first + 2 * end, last)};
      kernels.inputs_by_tile(tiles, Ci, x.const_data_ptr(), range, data.data_ptr());
      kernels.output_grads(tiles, Co, grad.const_data_ptr(), range, grads.data_ptr());
    });
    at::parallel_for(0, items, 1, [&](int64_t begin, int64_t end) {
      at::AutoDispatchBelowADInplaceOrView below;
      const Tensor sums = one_sum ? scratch(item_size, x, compute) : all_sums;
      const cpu::WeightGradient sum{last - first,
                                    Co,
                                    Ci,
                                    first == 0,
                                    last == count,
                                    grads.const_data_ptr(),
                                    data.const_data_ptr(),
                                    sums.data_ptr(),
                                    result.data_ptr()};
      kernels.weight_gradient(sum, begin, end);
    });
  }
  const bool same = weight.scalar_type() == compute && weight.strides() == result.strides();
  return same ? result : like_parameter(result, weight);
}

void check(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
           const std::optional<Tensor>& forward_factors,
           const std::optional<Tensor>& backward_factors, bool differentiated) {
  check_weight(x, weight, 3);
  const c10::SymInt Co = weight.sym_size(0);
  if (bias) check_channels("bias", x, *bias, Co);
  if (forward_factors) check_factors("forward_factors", *forward_factors, x, Co);
  if (backward_factors && (differentiated || backward_factors->sym_numel() != 0)) {
    check_factors("backward_factors", *backward_factors, x, Co);
  }
}

// ---- Through the dispatcher --------------------------------------------------------------------

std::tuple<Tensor, Tensor> factors_of(const Tensor& weight, ScalarType dtype, bool backward) {
  static const auto op = find_operator<decltype(factors_cpu)>("conv3x3_factors");
  return op.call(weight, dtype, backward);
}

Tensor outputs_of(const Tensor& x, const Tensor& factors, const std::optional<Tensor>& bias,
                  c10::SymInt channels) {
  static const auto op = find_operator<decltype(outputs_cpu)>("conv3x3_outputs");
  return op.call(x, factors, bias, channels);
}

// Also where no gradient is wanted; on the meta device it allocates only.
Tensor compute(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
               const std::optional<Tensor>& forward_factors,
               const std::optional<Tensor>& backward_factors) {
  check(x, weight, bias, forward_factors, backward_factors, false);
  const Tensor factors =
      forward_factors ? *forward_factors : std::get<0>(factors_of(weight, x.scalar_type(), false));
  return outputs_of(x, factors, bias, weight.sym_size(0));
}

struct Function : torch::autograd::Function<Function> {
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& x,
                        const Tensor& weight, const std::optional<Tensor>& bias,
                        const std::optional<Tensor>& forward_factors,
                        const std::optional<Tensor>& backward_factors) {
    at::AutoDispatchBelowADInplaceOrView below;
    Tensor to_outputs, to_inputs;
    if (forward_factors && backward_factors) {
      to_outputs = *forward_factors;
      to_inputs = *backward_factors;
    } else {
      std::tie(to_outputs, to_inputs) = factors_of(weight, x.scalar_type(), x.requires_grad());
    }
    const Tensor kept = weight.requires_grad() ? x : Tensor();
    context->save_for_backward({kept, weight, bias.value_or(Tensor()), to_inputs});
    context->saved_data["channels"] = x.sym_size(1);
    return outputs_of(x, to_outputs, bias, weight.sym_size(0));
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list grads) {
    auto saved = context->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1], &bias = saved[2], &to_inputs = saved[3];
    Tensor grad_x, grad_weight, grad_bias;
    if (context->needs_input_grad(0)) {
      // In a graph of the backward pass the factors hang on the weight, and refuse to say how.
      const bool graph = at::GradMode::is_enabled() && weight.requires_grad();
      const Tensor factors =
          graph ? std::get<1>(factors_of(weight, to_inputs.scalar_type(), true)) : to_inputs;
      grad_x =
          outputs_of(grads[0], factors, std::nullopt, context->saved_data["channels"].toSymInt());
    }
    if (context->needs_input_grad(1)) {
      static const auto op = find_operator<decltype(weight_grad_cpu)>("conv3x3_weight_grad");
      grad_weight = op.call(grads[0], x, weight);
    }
    // A bias that is not there is not counted among the inputs.
    if (bias.defined() && context->needs_input_grad(2)) {
      const ScalarType compute = stats_dtype(grads[0].scalar_type());
      grad_bias = grads[0].sum({0, 2, 3}, false, compute).to(bias.scalar_type());
    }
    return {grad_x, grad_weight, grad_bias, Tensor(), Tensor()};
  }
};

Tensor autograd(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                const std::optional<Tensor>& forward_factors,
                const std::optional<Tensor>& backward_factors) {
  refuse_tangents("conv3x3", x, weight, bias, forward_factors, backward_factors);
  if (forward_factors) refuse_gradient("forward_factors", *forward_factors);
  if (backward_factors) refuse_gradient("backward_factors", *backward_factors);
  if (!at::GradMode::is_enabled()) {
    at::AutoDispatchBelowADInplaceOrView below;
    static const auto op = find_operator<decltype(compute)>("conv3x3");
    return op.call(x, weight, bias, forward_factors, backward_factors);
  }
  check(x, weight, bias, forward_factors, backward_factors, x.requires_grad());
  return Function::apply(x, weight, bias, forward_factors, backward_factors);
}

// x [N, Ci, H, W], weight [Co, Ci, 3, 3], bias [Co]: [N, Co, H, W] as channels_last. Factors are
// what the weight becomes for x's dtype, in an order of the kernels' own: for the outputs, and
// (unless [0]) for the gradient of x. They may be given to conv3x3 where they are known already.
TORCH_LIBRARY_FRAGMENT(dafl_fast, m) {
  define(m,
         "conv3x3(Tensor x, Tensor weight, Tensor? bias, Tensor? forward_factors, "
         "Tensor? backward_factors) -> Tensor",
         compute, compute, torch::CppFunction(autograd));
  define(m,
         "conv3x3_factors(Tensor weight, ScalarType dtype, bool backward) -> "
         "(Tensor forward_factors, Tensor backward_factors)",
         factors_cpu, factors_meta);
  define(m, "conv3x3_outputs(Tensor x, Tensor factors, Tensor? bias, SymInt channels) -> Tensor",
         outputs_cpu, outputs_meta);
  define(m, "conv3x3_weight_grad(Tensor grad, Tensor x, Tensor weight) -> Tensor", weight_grad_cpu,
         weight_grad_meta);
}

}  // namespace

bool conv3x3_pays(ScalarType dtype) {
  if (dtype != at::kFloat && dtype != at::kBFloat16) return false;
  return cpu::winograd_pays(dtype_of(dtype));
}

}  // namespace dafl
