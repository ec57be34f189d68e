// What the layers' operators share: checks, memory formats, and sums of partial results.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "cpu/layers.h"
#include "layers.h"
#include "operator.h"
#include "tensor.h"

namespace dafl {

constexpr auto kChannelsLast = at::MemoryFormat::ChannelsLast;

inline void check_activations(const Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() == 4, "x must be [N, C, H, W]", got(x));
  check_dtype("x", x);
}

inline void check_weight(const Tensor& x, const Tensor& weight, int64_t taps) {
  check_activations(x);
  TORCH_CHECK_VALUE(weight.dim() == 4 && weight.sym_size(1) == x.sym_size(1) &&
                        weight.sym_size(2) == taps && weight.sym_size(3) == taps &&
                        weight.device() == x.device(),
                    "weight must be [Co, ", text(x.sym_size(1)), ", ", taps, ", ", taps,
                    "] on the device of x, ", x.device(), got(weight));
  check_dtype("weight", weight);
}

inline void check_channels(const char* name, const Tensor& x, const Tensor& values,
                           const c10::SymInt& channels) {
  TORCH_CHECK_VALUE(
      values.dim() == 1 && values.sym_size(0) == channels && values.device() == x.device(), name,
      " must be [", text(channels), "] on the device of x, ", x.device(), got(values));
  check_dtype(name, values);
}

inline Tensor empty_activations(const Tensor& x, c10::SymIntArrayRef size,
                                at::MemoryFormat format) {
  return at::empty_symint(size, x.options(), format);
}

// A dense tensor in dtype and format; the tensor itself where it is one already.
inline Tensor dense(const Tensor& x, ScalarType dtype, at::MemoryFormat format) {
  return x.to(dtype).contiguous(format);
}

// Work cut by shape alone into pieces of `images`; each thread takes whole pieces. Within a team of
// threads a matrix product runs on one of them, so its rounding does not depend on their number.
// That is why even a single piece gets a team of two, of which one has nothing to do.
template <class Body>
void for_pieces(int64_t N, int64_t images, Body body) {
  const int64_t count = (N + images - 1) / images;
  at::parallel_for(0, std::max<int64_t>(count, 2), 1, [&](int64_t first, int64_t last) {
    at::AutoDispatchBelowADInplaceOrView below;  // threads of the pool do not inherit it
    for (int64_t piece = first; piece < std::min(last, count); ++piece) {
      body(piece, piece * images, std::min(images, N - piece * images));
    }
  });
}

// Pieces whose sums are kept apart until the end, of whole multiples of `images`: at most 16, which
// bounds the memory for them and still gives as many threads work.
inline int64_t images_per_sum(int64_t N, int64_t images) {
  const int64_t pieces = (N + images - 1) / images;
  return std::max<int64_t>((pieces + 15) / 16, 1) * images;
}

template <class T>
T* offset(const Tensor& tensor, int64_t elements) {
  return static_cast<T*>(tensor.data_ptr()) + elements * tensor.element_size();
}

// The gradient of a parameter, in the parameter's own dtype and strides.
inline Tensor like_parameter(const Tensor& grad, const Tensor& parameter) {
  return at::empty_like(parameter).copy_(grad);
}

}  // namespace dafl
