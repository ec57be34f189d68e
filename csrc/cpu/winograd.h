// Torch-free CPU kernels of the 3x3 convolution with fewer multiplications: the mathematics stands
// in ../layers/winograd.cpp. Here, unlike for the other layers, the kernels multiply the matrices
// as well, so that products never leave the caches.
//
// Activations are of the table's dtype, dense, and channels_last; "compute type" is float, or
// double for fp64. What is multiplied lies in *units*, the one value, or for 16-bit dtypes the two,
// that are multiplied and summed at a time: units of channels or of tiles. Channels are padded with
// zeros to a multiple of `panel`.
#pragma once

#include <cstdint>

#include "../matrix.h"

namespace dafl {
namespace cpu {

// Images of H x W pixels as tiles of 2x2 outputs, which see 4x4 inputs.
struct Tiles {
  int64_t images, H, W;

  int64_t rows() const { return (H + 1) / 2; }
  int64_t columns() const { return (W + 1) / 2; }
  int64_t count() const { return images * rows() * columns(); }
};

// Tiles [first, last) whose data lie together, and [begin, end) of them to work on; begin - first
// is even, and so is end - first unless end = last.
struct TileRange {
  int64_t first, last, begin, end;
};

// Planes of data and products lie a little apart, and rows of steps (`unit` tiles each) are odd,
// because powers of two would put them all into the same few sets of the caches.
constexpr int64_t plane_of(int64_t tiles, int64_t channels) { return tiles * channels + 32; }
constexpr int64_t row_of_steps(int64_t tiles, int64_t unit) {
  return ((tiles + unit - 1) / unit) | 1;
}

// The gradient of the weight from `tiles` tiles. Its items are blocks of `lanes` output channels
// and `panel` input channels; each has 16 * lanes * panel sums of compute type.
struct WeightGradient {
  int64_t tiles, Co, Ci;
  bool first, last;   // of several calls that add up
  const void* grads;  // output_grads of all tiles
  const void* data;   // inputs_by_tile of all tiles
  void* sums;         // of all items, or of one where first and last
  void* weight;       // [Co, 3, 3, Ci], compute type; written by the last call
};

// One set per instruction set and dtype.
struct WinogradKernels {
  int64_t lanes, panel;
  int64_t unit;  // values in it

  // x [images, H, W, C] to data, 16 planes of [end - begin, channels], units of channels
  void (*inputs)(const Tiles&, int64_t C, const void* x, int64_t begin, int64_t end, void* data);
  // y [images, H, W, C] from data of tiles [begin, end), factors, and bias [C] of compute type or
  // null. scratch: 16 planes of [end - begin, panel] of compute type.
  void (*outputs)(const Tiles&, int64_t Ci, int64_t C, const void* data, const void* factors,
                  const void* bias, int64_t begin, int64_t end, void* scratch, void* y);

  // The same as `inputs`, and the adjoint of what `outputs` does with products, as
  // [16, channels / lanes, row_of_steps, lanes], units of tiles.
  void (*inputs_by_tile)(const Tiles&, int64_t C, const void* x, const TileRange&, void* data);
  void (*output_grads)(const Tiles&, int64_t C, const void* grad, const TileRange&, void* data);
  void (*weight_gradient)(const WeightGradient&, int64_t begin, int64_t end);

  // weight [Co, 3, 3, Ci] of compute type to factors [16, Co / panel, Ci, panel], units of Ci; and
  // unless null to those of the input's gradient, [16, Ci / panel, Co, panel], units of Co. For
  // output channels from `begin` to `end`, multiples of `panel` of the padded number.
  void (*factors)(int64_t Co, int64_t Ci, const void* weight, int64_t begin, int64_t end,
                  void* forward, void* backward);
};

// The kernels of the chosen instruction set; fp64 always runs on the baseline's.
const WinogradKernels& winograd_kernels(Dtype dtype);

// Whether they are faster here than a convolution without them.
bool winograd_pays(Dtype dtype);

}  // namespace cpu
}  // namespace dafl
