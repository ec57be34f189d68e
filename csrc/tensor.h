// Tensors for operators: checks of what the caller passed, allocation, and matrices as the kernels
// see them.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <optional>
#include <string>

#include "matrix.h"

namespace dafl {

using at::ScalarType;
using at::Tensor;

// Sizes in words. Torch's own library must not write numbers to a stream of ours: if the compiler
// links its C++ library statically, as some toolchains do, the process crashes.
inline std::string text(const c10::SymInt& size) {
  const std::optional<int64_t> known = size.maybe_as_int();
  return known ? std::to_string(*known) : size.toSymNode()->str();
}

inline std::string text(c10::SymIntArrayRef sizes) {
  std::string list;
  for (const c10::SymInt& size : sizes) list += (list.empty() ? "" : ", ") + text(size);
  return "[" + list + "]";
}

inline std::string got(const Tensor& tensor) {
  if (!tensor.defined()) return ", got none";
  return c10::str(", got ", text(tensor.sym_sizes()), " on ", tensor.device());
}

// A tensor keeps its shape when its storage is freed or cut, as FSDP does with those it does not
// need for now.
inline void check_memory(const char* name, const Tensor& tensor) {
  TORCH_CHECK_TYPE(tensor.layout() == at::kStrided, name,
                   " must be a dense tensor, got one that is ", tensor.layout());
  const at::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  const c10::Storage& storage = impl->unsafe_storage();
  if (!storage || tensor.is_meta() || impl->is_python_dispatch() ||
      impl->has_symbolic_sizes_strides() || impl->numel() == 0) {
    return;
  }
  const size_t needed = at::detail::computeStorageNbytes(
      impl->sizes(), impl->strides(), tensor.element_size(), impl->storage_offset());
  TORCH_CHECK_VALUE(storage.nbytes() >= needed, name, " must have all its memory, ", needed,
                    " bytes, but its storage has ", storage.nbytes());
}

inline void check_dtype(const char* name, ScalarType type) {
  TORCH_CHECK_TYPE(
      type == at::kFloat || type == at::kBFloat16 || type == at::kHalf || type == at::kDouble, name,
      " must be float32, bfloat16, float16 or float64, got ", type);
}

inline void check_dtype(const char* name, const Tensor& tensor) {
  check_dtype(name, tensor.scalar_type());
  check_memory(name, tensor);
}

// An argument that is made from others, such as statistics or a gradient, is read with sizes and
// types that come from these. So every operator checks it, whoever calls, and for meta tensors too.
// `name` begins with the operator's where the caller may not know that it runs.
inline void check_shape(const char* name, const Tensor& tensor, c10::SymIntArrayRef size,
                        const Tensor& like) {
  TORCH_CHECK_VALUE(tensor.sym_sizes() == size && tensor.device() == like.device(), name,
                    " must be ", text(size), " on ", like.device(), got(tensor));
}

inline void check_argument(const char* name, const Tensor& tensor, c10::SymIntArrayRef size,
                           ScalarType dtype, const Tensor& like) {
  check_shape(name, tensor, size, like);
  TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, name, " must be ", dtype, ", got ",
                   tensor.scalar_type());
  check_memory(name, tensor);
}

// A gradient may have any dtype that operators take: they convert it.
inline void check_gradient(const char* name, const Tensor& grad, c10::SymIntArrayRef size,
                           const Tensor& like) {
  check_shape(name, grad, size, like);
  check_dtype(name, grad);
}

// What losses, statistics and sums are in: fp32, or fp64 where the input is.
inline ScalarType stats_dtype(ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}
inline ScalarType stats_dtype(const Tensor& input) { return stats_dtype(input.scalar_type()); }

inline Tensor empty(const Tensor& like, c10::SymIntArrayRef size, ScalarType dtype) {
  return at::empty_symint(size, like.options().dtype(dtype));
}

inline Tensor empty_grad(const Tensor& input) {
  return empty(input, input.sym_sizes(), input.scalar_type());
}

inline Dtype dtype_of(ScalarType type) {
  switch (type) {
    case at::kDouble:
      return Dtype::f64;
    case at::kFloat:
      return Dtype::f32;
    case at::kBFloat16:
      return Dtype::bf16;
    default:
      return Dtype::f16;
  }
}

inline Dtype dtype_of(const Tensor& tensor) { return dtype_of(tensor.scalar_type()); }

inline Matrix matrix(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), dtype_of(tensor)};
}

}  // namespace dafl
