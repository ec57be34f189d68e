// 5x5 convolution without padding, 2x2 max pooling and ReLU as one operator, for images with so few
// channels (1 to some tens) that a convolution over channels leaves most of a vector empty.
//
// A vector lane is an image. The convolution's own outputs, four times the pooled ones, exist only
// in registers; which of four won is kept in a byte, and 4 where ReLU gave zero. Everything is
// computed in fp32 (fp64 for fp64), also for 16-bit activations.
#include <array>

#include "gpu.h"
#include "shared.h"

namespace dafl {
namespace {

constexpr int64_t kGroup = cpu::kConvPoolImages;  // whose index lies together
constexpr int64_t kImages = 2 * kGroup;           // of a piece

void check(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  check_weight(x, weight, 5);
  check_channels("bias", x, bias, weight.sym_size(0));
  TORCH_CHECK_VALUE(x.sym_size(2) >= 6 && x.sym_size(3) >= 6,
                    "x must have at least 6 rows and columns", got(x));
}

// The kernels for a GPU hold one image's channel in shared memory.
void check_fits([[maybe_unused]] const Tensor& x, [[maybe_unused]] const Tensor& weight) {
#ifdef DAFL_FAST_CUDA
  if (!x.is_cuda()) return;
  const int most = cuda::kConvPoolChannels, side = cuda::kConvPoolSide;
  TORCH_CHECK_VALUE(weight.sym_size(0) <= most && weight.sym_size(1) <= most &&
                        x.sym_size(2) <= side && x.sym_size(3) <= side,
                    "on a GPU conv_pool is for at most ", most, " channels and images of ", side,
                    "x", side, got(x));
#endif
}

// Of the results.
struct Sizes {
  c10::SymInt N, out, height, width;

  Sizes(const Tensor& x, const Tensor& weight)
      : N(x.sym_size(0)),
        out(weight.sym_size(0)),
        height((x.sym_size(2) - 4) / 2),
        width((x.sym_size(3) - 4) / 2) {}

  std::array<c10::SymInt, 4> y() const { return {N, out, height, width}; }
  c10::SymInt index() const {
    const c10::SymInt groups = (N + (kGroup - 1)) / kGroup;
    return groups * kGroup * out * height * width;
  }
};

std::tuple<Tensor, Tensor> allocate(const Tensor& x, const Tensor& weight) {
  const Sizes sizes(x, weight);
  return {empty_activations(x, sizes.y(), at::MemoryFormat::Contiguous),
          empty(x, {sizes.index()}, at::kByte)};
}

// What the backward pass reads besides.
void check_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& bias,
                    const Tensor& index) {
  check(x, weight, bias);
  const Sizes sizes(x, weight);
  check_gradient("conv_pool_backward's grad", grad, sizes.y(), x);
  check_argument("conv_pool_backward's index", index, {sizes.index()}, at::kByte, x);
}

void check_index(const uint8_t* index, int64_t count) {
  const uint8_t* end = index + count;
  TORCH_CHECK_VALUE(std::all_of(index, end, [](uint8_t which) { return which <= 4; }),
                    "conv_pool_backward's index must be of 0 to 4");
}

// Operands as the kernels read them; holds what `arguments` points to.
struct Operands {
  Tensor x, weight, bias;
  cpu::ConvPool arguments;

  // `index` is contiguous, and outlives this.
  Operands(const Tensor& x_, const Tensor& weight_, const Tensor& bias_, const Tensor& index)
      : x(x_.contiguous()),
        weight(weight_.to(stats_dtype(x_)).permute({1, 2, 3, 0}).contiguous()),
        bias(bias_.to(stats_dtype(x_)).contiguous()),
        arguments{x.size(0),
                  x.size(1),
                  x.size(2),
                  x.size(3),
                  weight.size(3),
                  x.const_data_ptr(),
                  weight.const_data_ptr(),
                  bias.const_data_ptr(),
                  static_cast<uint8_t*>(index.data_ptr())} {}

  Tensor scratch(const cpu::LayerKernels& kernels) const {
    return at::empty({kernels.conv_pool_scratch(arguments)}, weight.options());
  }
};

std::tuple<Tensor, Tensor> forward_cpu(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  check(x, weight, bias);
  auto [y, index] = allocate(x, weight);
  if (y.numel() == 0) return {y, index};
  const Operands operands(x, weight, bias, index);
  const cpu::LayerKernels& kernels = cpu::layer_kernels(dtype_of(x));
  void* to = y.data_ptr();
  for_pieces(x.size(0), kImages, [&](int64_t, int64_t begin, int64_t count) {
    Tensor scratch = operands.scratch(kernels);
    kernels.conv_pool(operands.arguments, begin, begin + count, to, scratch.data_ptr());
  });
  return {y, index};
}

std::tuple<Tensor, Tensor, Tensor> backward_cpu(const Tensor& grad_, const Tensor& x,
                                                const Tensor& weight, const Tensor& bias,
                                                const Tensor& index_, bool want_input,
                                                bool want_weight) {
  check_backward(grad_, x, weight, bias, index_);
  if (grad_.numel() == 0) {
    const auto zeros = [](const Tensor& like, bool wanted) {
      return wanted ? at::zeros_like(like) : at::empty({0}, like.options());
    };
    return {zeros(x, want_input), zeros(weight, want_weight), zeros(bias, want_weight)};
  }
  const Tensor index = index_.contiguous();
  const Operands operands(x, weight, bias, index);
  const Tensor grad = dense(grad_, x.scalar_type(), at::MemoryFormat::Contiguous);
  Tensor grad_x = want_input ? at::empty(x.sizes(), x.options()) : at::empty({0}, x.options());
  const int64_t N = x.size(0), taps = weight.numel(), width = taps + bias.numel();
  std::vector<double> sums(want_weight ? std::max<int64_t>((N + kImages - 1) / kImages, 1) * width
                                       : 0);
  const cpu::LayerKernels& kernels = cpu::layer_kernels(dtype_of(x));
  const int64_t per_group = index.numel() / ((N + kGroup - 1) / kGroup);
  for_pieces(N, kImages, [&](int64_t piece, int64_t begin, int64_t count) {
    check_index(operands.arguments.index + begin / kGroup * per_group,
                (count + kGroup - 1) / kGroup * per_group);
    Tensor scratch = operands.scratch(kernels);
    kernels.conv_pool_gradient(operands.arguments, begin, begin + count, grad.const_data_ptr(),
                               want_input ? grad_x.data_ptr() : nullptr,
                               want_weight ? sums.data() + piece * width : nullptr,
                               scratch.data_ptr());
  });
  if (!want_weight)
    return {grad_x, at::empty({0}, weight.options()), at::empty({0}, bias.options())};
  Tensor total = at::empty({width}, x.options().dtype(at::kDouble));
  double* to = total.mutable_data_ptr<double>();
  for (int64_t k = 0; k < width; ++k) {
    to[k] = 0;
    for (size_t at = k; at < sums.size(); at += width) to[k] += sums[at];
  }
  return {grad_x, like_parameter(total.narrow(0, 0, taps).view(weight.sizes()), weight),
          like_parameter(total.narrow(0, taps, bias.numel()), bias)};
}

#ifdef DAFL_FAST_CUDA

// x is contiguous, and outlives this.
cuda::ConvPool arguments_of(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  const auto size = [](const Tensor& tensor, int64_t dim) {
    return static_cast<int>(tensor.size(dim));
  };
  return {x.size(0),   size(x, 1),         size(x, 2),        size(x, 3),     size(weight, 0),
          dtype_of(x), x.const_data_ptr(), parameter(weight), parameter(bias)};
}

std::tuple<Tensor, Tensor> forward_cuda(const Tensor& x_, const Tensor& weight,
                                        const Tensor& bias) {
  check(x_, weight, bias);
  check_fits(x_, weight);
  const Gpu gpu(x_);
  auto [y, index] = allocate(x_, weight);
  const Tensor x = x_.contiguous();
  if (index.numel() > 0) {
    const cuda::ConvPool arguments = arguments_of(x, weight, bias);
    const int64_t images = index.numel() / (arguments.out * arguments.pooled());
    check_launch(cuda::launch_conv_pool(arguments, y.mutable_data_ptr(),
                                        index.mutable_data_ptr<uint8_t>(), images, gpu.stream),
                 "conv_pool");
  }
  return {y, index};
}

std::tuple<Tensor, Tensor, Tensor> backward_cuda(const Tensor& grad_, const Tensor& x_,
                                                 const Tensor& weight, const Tensor& bias,
                                                 const Tensor& index_, bool want_input,
                                                 bool want_weight) {
  check_backward(grad_, x_, weight, bias, index_);
  check_fits(x_, weight);
  const Gpu gpu(x_);
  const Tensor index = index_.contiguous(), x = x_.contiguous();
  const Tensor grad = dense(grad_, x.scalar_type(), at::MemoryFormat::Contiguous);
  const cuda::ConvPool arguments = arguments_of(x, weight, bias);
  const bool some = grad.numel() > 0;
  // With x's own strides where there are several that are contiguous: those of channels_last for
  // one channel are what torch's kernels go by.
  Tensor grad_x = want_input ? at::empty_like(x) : at::empty({0}, x.options());
  if (want_input && x.numel() > 0) {
    if (some) {
      check_launch(cuda::launch_conv_pool_inputs(arguments, grad.const_data_ptr(),
                                                 index.const_data_ptr<uint8_t>(),
                                                 grad_x.mutable_data_ptr(), gpu.stream),
                   "conv_pool_backward");
    } else {
      grad_x.zero_();
    }
  }
  if (!want_weight)
    return {grad_x, at::empty({0}, weight.options()), at::empty({0}, bias.options())};
  if (!some || weight.numel() == 0) return {grad_x, at::zeros_like(weight), at::zeros_like(bias)};
  Tensor grad_weight = at::empty_like(weight), grad_bias = at::empty_like(bias);
  const int64_t width = weight.numel() + bias.numel();
  const Tensor parts =
      at::empty({cuda::conv_pool_parts(arguments.N, width), width}, x.options().dtype(at::kDouble));
  check_launch(cuda::launch_conv_pool_weights(
                   arguments, grad.const_data_ptr(), index.const_data_ptr<uint8_t>(),
                   parts.mutable_data_ptr<double>(), parameter(grad_weight), parameter(grad_bias),
                   gpu.stream),
               "conv_pool_backward");
  return {grad_x, grad_weight, grad_bias};
}

#endif  // DAFL_FAST_CUDA

std::tuple<Tensor, Tensor> forward_meta(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  check(x, weight, bias);
  return allocate(x, weight);
}

std::tuple<Tensor, Tensor, Tensor> backward_meta(const Tensor& grad, const Tensor& x,
                                                 const Tensor& weight, const Tensor& bias,
                                                 const Tensor& index, bool want_input,
                                                 bool want_weight) {
  check_backward(grad, x, weight, bias, index);
  auto unwanted = [](const Tensor& like) { return empty(like, {0}, like.scalar_type()); };
  return {want_input ? empty_grad(x) : unwanted(x),
          want_weight ? at::empty_like(weight) : unwanted(weight),
          want_weight ? at::empty_like(bias) : unwanted(bias)};
}

struct Function : torch::autograd::Function<Function> {
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* context,
                                                const Tensor& x, const Tensor& weight,
                                                const Tensor& bias) {
    at::AutoDispatchBelowADInplaceOrView below;
    static const auto op = find_operator<decltype(forward_cpu)>("conv_pool");
    auto [y, index] = op.call(x, weight, bias);
    context->save_for_backward({x, weight, bias, index});
    context->mark_non_differentiable({index});
    return {y, index};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list grads) {
    auto saved = context->get_saved_variables();
    const bool want_input = context->needs_input_grad(0);
    const bool want_weight = context->needs_input_grad(1) || context->needs_input_grad(2);
    static const auto op = find_operator<decltype(backward_cpu)>("conv_pool_backward");
    auto [grad_x, grad_weight, grad_bias] =
        op.call(grads[0], saved[0], saved[1], saved[2], saved[3], want_input, want_weight);
    return {want_input ? grad_x : Tensor(), want_weight ? grad_weight : Tensor(),
            want_weight ? grad_bias : Tensor()};
  }
};

std::tuple<Tensor, Tensor> forward_autograd(const Tensor& x, const Tensor& weight,
                                            const Tensor& bias) {
  refuse_tangents("conv_pool", x, weight, bias);
  check(x, weight, bias);
  check_fits(x, weight);
  auto results = Function::apply(x, weight, bias);
  return {results[0], results[1]};
}

// x [N, Ci, H, W], weight [Co, Ci, 5, 5], bias [Co]: y [N, Co, (H - 4) / 2, (W - 4) / 2], and where
// each maximum came from (uint8, in an order of the kernels' own). Gradients that are not wanted
// are [0].
TORCH_LIBRARY_FRAGMENT(dafl_fast, m) {
  const std::string forward =
      "conv_pool(Tensor x, Tensor weight, Tensor bias) -> (Tensor y, Tensor index)";
  const std::string backward =
      "conv_pool_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor index, "
      "bool want_input, bool want_weight) -> "
      "(Tensor grad_x, Tensor grad_weight, Tensor grad_bias)";
  define(m, forward, forward_cpu, forward_meta, torch::CppFunction(forward_autograd));
  define(m, backward, backward_cpu, backward_meta);
#ifdef DAFL_FAST_CUDA
  add_kernel(m, forward, c10::DispatchKey::CUDA, forward_cuda);
  add_kernel(m, backward, c10::DispatchKey::CUDA, backward_cuda);
#endif
}

}  // namespace
}  // namespace dafl
