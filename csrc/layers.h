// Layers of the networks as operators of dafl_fast, computed on the CPU with less work and fewer
// passes over memory than layer by layer; the same values up to rounding.
//
// Activations x are fp32, bf16, fp16 or fp64. Parameters are of any of these types: they are
// rounded to the activations' dtype where matrices are multiplied, and their gradients have their
// own dtype. "Statistics dtype" is fp32, or fp64 where x is. There is no second derivative. Results
// do not depend on the number of threads.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace dafl {

using at::Tensor;

// Nearest x2 upsampling, then convolution with padding 1: y [N, Co, 2H, 2W] as channels_last, and
// the mean [Co] and biased variance [Co] of y in statistics dtype, which have no gradient.
std::tuple<Tensor, Tensor, Tensor> upsample_conv(const Tensor& x,        // [N, Ci, H, W]
                                                 const Tensor& weight);  // [Co, Ci, 3, 3]
// grad_x, grad_weight
std::tuple<Tensor, Tensor> upsample_conv_backward(const Tensor& grad,  // [N, Co, 2H, 2W]
                                                  const Tensor& x, const Tensor& weight);

// BatchNorm with the batch's statistics, then LeakyReLU (none with slope 1): y as channels_last.
// Mean and variance are those of x (operator `moments`, or what upsample_conv returned), and the
// gradient to x is that through them, too.
Tensor norm_activation(const Tensor& x,                             // [N, C, H, W]
                       const Tensor& mean, const Tensor& variance,  // [C], statistics dtype
                       const Tensor& weight, const Tensor& bias,    // [C]
                       double eps, double slope);
// grad_x, grad_weight, grad_bias
std::tuple<Tensor, Tensor, Tensor> norm_activation_backward(
    const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& variance,
    const Tensor& weight, const Tensor& bias, double eps, double slope);

// The same, then convolution with padding 1 to few channels: [N, Co, H, W].
Tensor norm_image_conv(const Tensor& x,                                     // [N, Ci, H, W]
                       const Tensor& mean, const Tensor& variance,          // [Ci]
                       const Tensor& norm_weight, const Tensor& norm_bias,  // [Ci]
                       double eps, double slope, const Tensor& weight,      // [Co, Ci, 3, 3]
                       const Tensor& bias);                                 // [Co]
// grad_x, grad_norm_weight, grad_norm_bias, grad_weight, grad_bias
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> norm_image_conv_backward(
    const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& variance,
    const Tensor& norm_weight, const Tensor& norm_bias, double eps, double slope,
    const Tensor& weight, const Tensor& bias);

// Convolution without padding, 2x2 max pooling, ReLU: [N, Co, (H - 4) / 2, (W - 4) / 2], and where
// each maximum came from (uint8, in an order of the kernels' own).
std::tuple<Tensor, Tensor> conv_pool(const Tensor& x,       // [N, Ci, H, W]
                                     const Tensor& weight,  // [Co, Ci, 5, 5]
                                     const Tensor& bias);   // [Co]
// grad_x, grad_weight, grad_bias: [0] where not wanted
std::tuple<Tensor, Tensor, Tensor> conv_pool_backward(const Tensor& grad, const Tensor& x,
                                                      const Tensor& weight, const Tensor& bias,
                                                      const Tensor& index, bool want_input,
                                                      bool want_weight);

// 3x3 convolution with padding 1, with 16 multiplications for 4 outputs instead of 36:
// [N, Co, H, W] as channels_last. The factors are those of the weight for x's dtype where they are
// known already, and computed otherwise.
Tensor conv3x3(const Tensor& x,                    // [N, Ci, H, W]
               const Tensor& weight,               // [Co, Ci, 3, 3]
               const std::optional<Tensor>& bias,  // [Co]
               const std::optional<Tensor>& forward_factors,
               const std::optional<Tensor>& backward_factors);
// What the operator multiplies with for x of `dtype`, and what its gradient does ([0] if not
// wanted), in an order of the kernels' own.
std::tuple<Tensor, Tensor> conv3x3_factors(const Tensor& weight, at::ScalarType dtype,
                                           bool backward);
Tensor conv3x3_outputs(const Tensor& x, const Tensor& factors, const std::optional<Tensor>& bias,
                       c10::SymInt channels);
Tensor conv3x3_weight_grad(const Tensor& grad, const Tensor& x, const Tensor& weight);
// Whether conv3x3 is faster on this processor, for many channels, than torch's convolution.
bool conv3x3_pays(at::ScalarType dtype);

}  // namespace dafl
