// Torch-free CPU kernels of the layers: raw pointers in, one piece of the work at a time. The
// caller allocates, multiplies matrices and cuts the work by shape alone, as for the losses
// (losses.h).
//
// Activations are of the table's dtype, dense, and channels_last ([H, W, C] per image) unless said
// otherwise. "Compute type" is float, or double for fp64 activations.
#pragma once

#include <cstdint>

#include "../matrix.h"

namespace dafl {
namespace cpu {

// Nearest x2, then 3x3 convolution with padding 1: see ../layers/upsample_conv.cpp.
struct Upsample {
  int64_t images, H, W, C;  // of the small images

  int64_t tile_rows() const { return (H + 1) / 2; }
  int64_t tile_columns() const { return (W + 1) / 2; }
  int64_t tiles() const { return images * tile_rows() * tile_columns(); }
};

// BatchNorm with batch statistics, then LeakyReLU, over [rows, C]: see ../layers/norm.h.
// Per channel, in the compute type: the normalised value is scale * x + shift.
struct NormActivation {
  int64_t rows, C;
  const void* scale;
  const void* shift;
  double slope;
};

// 3x3 convolution with padding 1 to few channels: see ../layers/norm_image_conv.cpp.
struct ImageConv {
  int64_t images, H, W, C;  // C: output channels
};

// Valid 5x5 convolution, 2x2 max pooling, ReLU: see ../layers/conv_pool.cpp. NCHW here.
struct ConvPool {
  int64_t N, in, H, W, out;
  const void* x;       // [N, in, H, W]
  const void* weight;  // [in, 5, 5, out], compute type
  const void* bias;    // [out], compute type
  uint8_t* index;      // which of the four won, or 4 where ReLU gave zero; private order

  int64_t pooled_height() const { return (H - 4) / 2; }
  int64_t pooled_width() const { return (W - 4) / 2; }
};

// Work is cut at multiples of this many images, at least the lanes of any vector.
constexpr int64_t kConvPoolImages = 16;

// The same with products of our own, where they are faster than the caller's. Matrices are in
// panels, [panels][rows][width]; rows and columns are padded with zeros to multiples of `width`.
struct UpsamplePanels {
  int64_t width;
  int64_t (*scratch)(const Upsample&, int64_t Co, bool backward);  // in values

  // taps [9, rows, columns] to the 25 factors, and the gradients of `pieces` times the factors to
  // that of the taps. For rows [begin, end), of the factors with those that pad them. The factors
  // of the outputs have rows of Ci and columns of Co; those of x's gradient, which are `by_panel`,
  // the reverse.
  void (*factors)(const void* taps, int64_t rows, int64_t columns, bool by_panel, int64_t begin,
                  int64_t end, void* factors);
  void (*factors_adjoint)(const void* grads, int64_t pieces, int64_t rows, int64_t columns,
                          int64_t begin, int64_t end, void* taps);

  // x [images, H, W, C] to y [images, 2H, 2W, Co]
  void (*outputs)(const Upsample&, int64_t Co, const void* x, const void* factors, void* scratch,
                  void* y);
  // grad [images, 2H, 2W, Co] to grad_x, and to those of the factors, to which it is added unless
  // these images are the first
  void (*gradients)(const Upsample&, int64_t Co, const void* x, const void* grad,
                    const void* factors, bool first, void* scratch, void* factor_grads,
                    void* grad_x);
};

// BatchNorm, LeakyReLU and that convolution, with the products of our own; taps [9 Co, Ci] of the
// compute type, output channel first, and the norm's C is Ci. Scratch in values of compute type.
struct ImageKernels {
  int64_t (*scratch)(const ImageConv&, int64_t Ci);
  // activations [pixels, Ci] to `count` planes [count, pixels] by as many taps
  void (*planes)(const void* activations, const void* taps, int64_t pixels, int64_t Ci,
                 int64_t count, void* planes);
  // sums [2 + 9 Co, Ci], to which is added: what `norm_sums` gives, and the gradients of the taps
  void (*sums)(const NormActivation&, const ImageConv&, const void* x, const void* grad,
               const void* taps, const void* mean, double* sums, void* scratch);
  // as norm_gradient
  void (*gradients)(const NormActivation&, const ImageConv&, const void* x, const void* grad,
                    const void* taps, const void* by_x, const void* constant, void* grad_x,
                    void* scratch);
};

// One set per instruction set and dtype.
struct LayerKernels {
  // Null where the caller multiplies matrices, with the kernels that follow.
  const UpsamplePanels* upsample;
  const ImageKernels* image;

  // x [images, H, W, C] to data [4, 4, tiles, C]; and the adjoint.
  void (*differences)(const Upsample&, const void* x, void* data);
  void (*differences_adjoint)(const Upsample&, const void* data, void* x);
  // products, 16 matrices of all tiles, in order of their data, with the factors' number times C
  // columns, to y [images, 2H, 2W, C]; and the adjoint.
  void (*interleave)(const Upsample&, const void* products, void* y);
  void (*interleave_adjoint)(const Upsample&, const void* y, void* products);

  // sums [2, C]: mean and sum of squared deviations from it
  void (*moments)(const void* x, int64_t rows, int64_t C, double* sums);
  void (*norm_activation)(const NormActivation&, const void* x, void* y);
  // sums [2, C]: of the gradient before the activation, and of that times (x - mean)
  void (*norm_sums)(const NormActivation&, const void* x, const void* grad, const void* mean,
                    double* sums);
  // grad_x = scale * gradient before the activation + by_x * x + constant
  void (*norm_gradient)(const NormActivation&, const void* x, const void* grad, const void* by_x,
                        const void* constant, void* grad_x);

  // planes [C, 3, 3, images * H * W] to y [images, C, H, W], plus bias [C] of the compute type; and
  // the adjoint without bias. scratch: 3 * (W + 32) of the compute type.
  void (*sum_shifted)(const ImageConv&, const void* planes, const void* bias, void* y,
                      void* scratch);
  void (*shift_apart)(const ImageConv&, const void* y, void* planes);

  // Images [begin, end), begin a multiple of kConvPoolImages. Scratch in values of compute type.
  int64_t (*conv_pool_scratch)(const ConvPool&);
  void (*conv_pool)(const ConvPool&, int64_t begin, int64_t end, void* y, void* scratch);
  // grad_x [N, in, H, W] or null; sums [out * in * 25 + out] (gradients of weight and bias) or null
  void (*conv_pool_gradient)(const ConvPool&, int64_t begin, int64_t end, const void* grad,
                             void* grad_x, double* sums, void* scratch);
};

// The kernels of the chosen instruction set; fp64 always runs on the baseline's.
const LayerKernels& layer_kernels(Dtype dtype);

}  // namespace cpu
}  // namespace dafl
