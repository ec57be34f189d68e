// The layers' kernels, compiled once per instruction set and dtype: layers_{baseline,avx2,
// avx512}.cpp define DAFL_ISA and DAFL_VECTOR_BYTES and include this file. The rules at the head of
// kernels.inl hold here too: nothing from the standard library.

#include "vectors.inl"

namespace dafl {
namespace cpu {
namespace DAFL_ISA {
namespace {

#define DAFL_UNROLL _Pragma("GCC unroll 16")

// ---- Nearest x2, then 3x3 convolution ----------------------------------------------------------
// The mathematics stands in ../upsample_conv.cpp: tiles of 2x2 small pixels, which have 4x4 kinds
// of data and 5x5 products.

// The channels of a pixel, or zeros where there is none.
template <class M>
struct Pixel {
  const typename M::T* from;
  int64_t mask;

  DAFL_HD void set(bool there, const typename M::T* pixel) {
    alignas(64) static const typename M::T zeros[M::lanes] = {};
    from = there ? pixel : zeros;
    mask = there ? -1 : 0;
  }
  DAFL_HD typename M::V get(int64_t c, int64_t count) const {
    return M::get(from + (c & mask), count);
  }
};

// Where product (i, j) of a tile lies, among 16 matrices of `rows` rows and 1, 2 or 4 times C
// columns, as `tile` times `stride` elements after `start`.
struct ProductPlace {
  int64_t start, stride;

  DAFL_HD ProductPlace(int i, int j, int64_t rows, int64_t C) {
    const int kind = i < 3 ? i : 3, column_kind = j < 3 ? j : 3;
    const int heights = i < 3 ? 1 : 2, widths = j < 3 ? 1 : 2;
    stride = heights * widths * C;
    start = (5 * kind + heights * column_kind) * rows * C +
            ((i - kind) * widths + (j - column_kind)) * C;
  }
};

template <class M>
void differences(const Upsample& a, const void* x_, void* data_) {
  using T = typename M::T;
  using V = typename M::V;
  const int64_t H = a.H, W = a.W, C = a.C, plane = a.tiles() * C;
  T* data = static_cast<T*>(data_);
  for (int64_t n = 0; n < a.images; ++n) {
    const T* x = static_cast<const T*>(x_) + n * H * W * C;
    for (int64_t t = 0; t < a.tile_rows(); ++t) {
      for (int64_t u = 0; u < a.tile_columns(); ++u, data += C) {
        Pixel<M> patch[4][4];
        for (int i = 0; i < 4; ++i) {
          for (int j = 0; j < 4; ++j) {
            const int64_t row = 2 * t + i - 1, column = 2 * u + j - 1;
            const bool there = row >= 0 && row < H && column >= 0 && column < W;
            patch[i][j].set(there, x + (row * W + column) * C);
          }
        }
        for (int64_t c = 0; c < C; c += M::lanes) {
          const int64_t count = C - c;
          V columns[4][4];  // [row of the patch][kind along the width]
          DAFL_UNROLL
          for (int i = 0; i < 4; ++i) {
            V in[4];
            DAFL_UNROLL
            for (int j = 0; j < 4; ++j) in[j] = patch[i][j].get(c, count);
            columns[i][0] = in[1];
            columns[i][1] = in[0] - in[1];
            columns[i][2] = in[2] - in[3];
            columns[i][3] = in[2] - in[1];
          }
          DAFL_UNROLL
          for (int k = 0; k < 4; ++k) {
            T* to = data + k * plane + c;
            M::put(to, columns[1][k], count);
            M::put(to + 4 * plane, columns[0][k] - columns[1][k], count);
            M::put(to + 8 * plane, columns[2][k] - columns[3][k], count);
            M::put(to + 12 * plane, columns[2][k] - columns[1][k], count);
          }
        }
      }
    }
  }
}

template <class M>
void differences_adjoint(const Upsample& a, const void* data_, void* x_) {
  using T = typename M::T;
  using V = typename M::V;
  const int64_t H = a.H, W = a.W, C = a.C, plane = a.tiles() * C;
  const int64_t rows = a.tile_rows(), columns = a.tile_columns();
  const T* data = static_cast<const T*>(data_);
  // What a pixel gets, by kind and by tile: the even one A_t - B_t - C_t - B'_{t-1}, the odd one
  // B'_t + C_t + B_{t+1}.
  constexpr int kinds[6] = {0, 1, 3, 2, 2, 1};
  constexpr int shifts[6] = {0, 0, 0, -1, 0, 1};
  for (int64_t n = 0; n < a.images; ++n) {
    T* x = static_cast<T*>(x_) + n * H * W * C;
    for (int64_t t = 0; t < rows; ++t) {
      for (int64_t u = 0; u < columns; ++u, data += C) {
        Pixel<M> parts[6][6];
        for (int i = 0; i < 6; ++i) {
          for (int j = 0; j < 6; ++j) {
            const int64_t row = t + shifts[i], column = u + shifts[j];
            const bool there = row >= 0 && row < rows && column >= 0 && column < columns;
            parts[i][j].set(there, data + (kinds[i] * 4 + kinds[j]) * plane +
                                       (shifts[i] * columns + shifts[j]) * C);
          }
        }
        for (int64_t c = 0; c < C; c += M::lanes) {
          const int64_t count = C - c;
          V even[6], odd[6];
          DAFL_UNROLL
          for (int i = 0; i < 6; ++i) {
            V in[6];
            DAFL_UNROLL
            for (int j = 0; j < 6; ++j) in[j] = parts[i][j].get(c, count);
            even[i] = (in[0] - in[1]) - (in[2] + in[3]);
            odd[i] = (in[4] + in[2]) + in[5];
          }
          T* to = x + (2 * t * W + 2 * u) * C + c;
          const bool right = 2 * u + 1 < W;
          M::put(to, (even[0] - even[1]) - (even[2] + even[3]), count);
          if (right) M::put(to + C, (odd[0] - odd[1]) - (odd[2] + odd[3]), count);
          if (2 * t + 1 == H) continue;
          M::put(to + W * C, (even[4] + even[2]) + even[5], count);
          if (right) M::put(to + (W + 1) * C, (odd[4] + odd[2]) + odd[5], count);
        }
      }
    }
  }
}

template <class M>
void interleave(const Upsample& a, const void* products_, void* y_) {
  using T = typename M::T;
  using V = typename M::V;
  const int64_t H = 2 * a.H, W = 2 * a.W, C = a.C, tiles = a.tiles();
  const int64_t rows = a.tile_rows(), columns = a.tile_columns();
  const T* products = static_cast<const T*>(products_);
  // Output 4t + k is product kFirst[k] plus kSecond[k]; product 5 is product 0 of the next tile.
  constexpr int first[4] = {0, 0, 0, 5}, second[4] = {1, 4, 3, 2};
  int64_t tile = 0;
  for (int64_t n = 0; n < a.images; ++n) {
    T* y = static_cast<T*>(y_) + n * H * W * C;
    for (int64_t t = 0; t < rows; ++t) {
      for (int64_t u = 0; u < columns; ++u, ++tile) {
        Pixel<M> parts[6][6];
        for (int i = 0; i < 6; ++i) {
          for (int j = 0; j < 6; ++j) {
            const bool there = (i < 5 || t + 1 < rows) && (j < 5 || u + 1 < columns);
            const ProductPlace place(i % 5, j % 5, tiles, C);
            const int64_t from = tile + (i < 5 ? 0 : columns) + (j < 5 ? 0 : 1);
            parts[i][j].set(there, products + place.start + from * place.stride);
          }
        }
        for (int64_t c = 0; c < C; c += M::lanes) {
          const int64_t count = C - c;
          V across[6][4];  // [product along the height][output along the width]
          DAFL_UNROLL
          for (int i = 0; i < 6; ++i) {
            V in[6];
            DAFL_UNROLL
            for (int j = 0; j < 6; ++j) in[j] = parts[i][j].get(c, count);
            DAFL_UNROLL
            for (int k = 0; k < 4; ++k) across[i][k] = in[first[k]] + in[second[k]];
          }
          DAFL_UNROLL
          for (int k = 0; k < 4; ++k) {
            if (4 * t + k >= H) break;
            DAFL_UNROLL
            for (int l = 0; l < 4; ++l) {
              if (4 * u + l >= W) break;
              M::put(y + ((4 * t + k) * W + 4 * u + l) * C + c,
                     across[first[k]][l] + across[second[k]][l], count);
            }
          }
        }
      }
    }
  }
}

template <class M>
void interleave_adjoint(const Upsample& a, const void* y_, void* products_) {
  using T = typename M::T;
  using V = typename M::V;
  const int64_t H = 2 * a.H, W = 2 * a.W, C = a.C, tiles = a.tiles();
  T* products = static_cast<T*>(products_);
  int64_t tile = 0;
  for (int64_t n = 0; n < a.images; ++n) {
    const T* y = static_cast<const T*>(y_) + n * H * W * C;
    for (int64_t t = 0; t < a.tile_rows(); ++t) {
      for (int64_t u = 0; u < a.tile_columns(); ++u, ++tile) {
        Pixel<M> patch[5][5];
        T* to[5][5];
        for (int i = 0; i < 5; ++i) {
          for (int j = 0; j < 5; ++j) {
            const int64_t row = 4 * t + i - 1, column = 4 * u + j - 1;
            const bool there = row >= 0 && row < H && column >= 0 && column < W;
            patch[i][j].set(there, y + (row * W + column) * C);
            const ProductPlace place(i, j, tiles, C);
            to[i][j] = products + place.start + tile * place.stride;
          }
        }
        for (int64_t c = 0; c < C; c += M::lanes) {
          const int64_t count = C - c;
          V across[5][5];  // [output 4t - 1 + i along the height][product along the width]
          DAFL_UNROLL
          for (int i = 0; i < 5; ++i) {
            V in[5];
            DAFL_UNROLL
            for (int j = 0; j < 5; ++j) in[j] = patch[i][j].get(c, count);
            across[i][0] = (in[0] + in[1]) + (in[2] + in[3]);
            across[i][1] = in[1];
            across[i][2] = in[4];
            across[i][3] = in[3];
            across[i][4] = in[2];
          }
          DAFL_UNROLL
          for (int j = 0; j < 5; ++j) {
            const V sums[5] = {(across[0][j] + across[1][j]) + (across[2][j] + across[3][j]),
                               across[1][j], across[4][j], across[3][j], across[2][j]};
            DAFL_UNROLL
            for (int i = 0; i < 5; ++i) M::put(to[i][j] + c, sums[i], count);
          }
        }
      }
    }
  }
}

// ---- BatchNorm with batch statistics, then LeakyReLU -------------------------------------------

// Additions in flight at a time: they wait for one another, rows do not.
constexpr int kChains = 4;

template <class M, class V>
DAFL_HD void write_sums(const V& sum, int64_t count, double* to) {
  for (int64_t i = 0; i < min_of(count, M::lanes); ++i) to[i] = sum[i];
}

template <class M>
void moments(const void* x_, int64_t rows, int64_t C, double* sums) {
  using T = typename M::T;
  using V = typename M::V;
  for (int64_t c = 0; c < C; c += M::lanes) {
    const T* x = static_cast<const T*>(x_) + c;
    const int64_t count = C - c;
    V mean{};
    for (int centred = 0; centred < 2; ++centred) {
      V sum[kChains] = {};
      int64_t r = 0;
      for (; r + kChains <= rows; r += kChains) {
        DAFL_UNROLL
        for (int k = 0; k < kChains; ++k) {
          const V value = M::get(x + (r + k) * C, count) - mean;
          sum[k] += centred ? value * value : value;
        }
      }
      for (; r < rows; ++r) {
        const V value = M::get(x + r * C, count) - mean;
        sum[0] += centred ? value * value : value;
      }
      const V total = (sum[0] + sum[1]) + (sum[2] + sum[3]);
      if (!centred) mean = total / static_cast<typename M::S>(rows);
      write_sums<M>(centred ? total : mean, count, sums + centred * C + c);
    }
  }
}

// The vectors of per-channel values that the kernels below need.
template <class M>
DAFL_HD typename M::V channel(const void* values, int64_t c, int64_t count) {
  using S = typename M::S;
  S part[M::lanes] = {};
  const S* from = static_cast<const S*>(values) + c;
  if (count >= M::lanes) return load<typename M::V>(from);
  for (int64_t i = 0; i < count; ++i) part[i] = from[i];
  return load<typename M::V>(part);
}

template <class M>
void norm_activation(const NormActivation& a, const void* x_, void* y_) {
  using T = typename M::T;
  using V = typename M::V;
  using S = typename M::S;
  const S slope = static_cast<S>(a.slope);
  for (int64_t c = 0; c < a.C; c += M::lanes) {
    const int64_t count = a.C - c;
    const V scale = channel<M>(a.scale, c, count), shift = channel<M>(a.shift, c, count);
    const T* x = static_cast<const T*>(x_) + c;
    T* y = static_cast<T*>(y_) + c;
    for (int64_t r = 0; r < a.rows; ++r) {
      const V z = M::get(x + r * a.C, count) * scale + shift;
      M::put(y + r * a.C, z > 0 ? z : z * slope, count);
    }
  }
}

template <class M>
void norm_sums(const NormActivation& a, const void* x_, const void* grad_, const void* mean_,
               double* sums) {
  using T = typename M::T;
  using V = typename M::V;
  using S = typename M::S;
  const S slope = static_cast<S>(a.slope);
  for (int64_t c = 0; c < a.C; c += M::lanes) {
    const int64_t count = a.C - c;
    const V scale = channel<M>(a.scale, c, count), shift = channel<M>(a.shift, c, count);
    const V mean = channel<M>(mean_, c, count);
    const T* x = static_cast<const T*>(x_) + c;
    const T* grad = static_cast<const T*>(grad_) + c;
    V sum[kChains] = {}, product[kChains] = {};
    for (int64_t r = 0; r < a.rows; r += kChains) {
      const int rows = static_cast<int>(min_of(kChains, a.rows - r));
      DAFL_UNROLL
      for (int k = 0; k < kChains; ++k) {
        if (k >= rows) break;
        const V value = M::get(x + (r + k) * a.C, count);
        const V g = M::get(grad + (r + k) * a.C, count);
        const V before = value * scale + shift > 0 ? g : g * slope;
        sum[k] += before;
        product[k] += before * (value - mean);
      }
    }
    write_sums<M>((sum[0] + sum[1]) + (sum[2] + sum[3]), count, sums + c);
    write_sums<M>((product[0] + product[1]) + (product[2] + product[3]), count, sums + a.C + c);
  }
}

template <class M>
void norm_gradient(const NormActivation& a, const void* x_, const void* grad_, const void* by_x_,
                   const void* constant_, void* grad_x_) {
  using T = typename M::T;
  using V = typename M::V;
  using S = typename M::S;
  const S slope = static_cast<S>(a.slope);
  for (int64_t c = 0; c < a.C; c += M::lanes) {
    const int64_t count = a.C - c;
    const V scale = channel<M>(a.scale, c, count), shift = channel<M>(a.shift, c, count);
    const V by_x = channel<M>(by_x_, c, count), constant = channel<M>(constant_, c, count);
    const T* x = static_cast<const T*>(x_) + c;
    const T* grad = static_cast<const T*>(grad_) + c;
    T* grad_x = static_cast<T*>(grad_x_) + c;
    for (int64_t r = 0; r < a.rows; ++r) {
      const V value = M::get(x + r * a.C, count);
      const V g = M::get(grad + r * a.C, count);
      const V before = value * scale + shift > 0 ? g : g * slope;
      M::put(grad_x + r * a.C, before * scale + (value * by_x + constant), count);
    }
  }
}

// ---- 3x3 convolution to few channels -----------------------------------------------------------

template <class M>
void sum_shifted(const ImageConv& a, const void* planes_, const void* bias_, void* y_,
                 void* scratch) {
  using T = typename M::T;
  using V = typename M::V;
  using S = typename M::S;
  const int64_t H = a.H, W = a.W, plane = a.images * H * W, width = W + 32;
  // One row per column of taps, each with a zero before its first element and after its last.
  S* rows = static_cast<S*>(scratch);
  for (int64_t n = 0; n < a.images; ++n) {
    for (int64_t o = 0; o < a.C; ++o) {
      const T* planes = static_cast<const T*>(planes_) + o * 9 * plane + n * H * W;
      T* y = static_cast<T*>(y_) + (n * a.C + o) * H * W;
      const S bias = static_cast<const S*>(bias_)[o];
      for (int64_t i = 0; i < H; ++i) {
        const int first = i == 0 ? 1 : 0, last = i == H - 1 ? 1 : 2;
        for (int kx = 0; kx < 3; ++kx) {
          S* row = rows + kx * width + 1;
          for (int64_t j = 0; j < W; j += M::lanes) {
            V sum{};
            for (int ky = first; ky <= last; ++ky) {
              sum += M::get(planes + (ky * 3 + kx) * plane + (i + ky - 1) * W + j, W - j);
            }
            store(row + j, sum);
          }
          row[-1] = 0;
          row[W] = 0;
        }
        for (int64_t j = 0; j < W; j += M::lanes) {
          const V sum =
              load<V>(rows + j) + load<V>(rows + width + 1 + j) + load<V>(rows + 2 * width + 2 + j);
          M::put(y + i * W + j, sum + bias, W - j);
        }
      }
    }
  }
}

template <class M>
void shift_apart(const ImageConv& a, const void* y_, void* planes_) {
  using T = typename M::T;
  const int64_t H = a.H, W = a.W, plane = a.images * H * W;
  for (int64_t o = 0; o < a.C; ++o) {
    for (int ky = 0; ky < 3; ++ky) {
      for (int kx = 0; kx < 3; ++kx) {
        T* to = static_cast<T*>(planes_) + ((o * 3 + ky) * 3 + kx) * plane;
        // Row i, column j of the plane is row i + 1 - ky, column j + 1 - kx of y.
        const int64_t begin = kx == 2 ? 1 : 0, end = kx == 0 ? W - 1 : W;
        for (int64_t n = 0; n < a.images; ++n) {
          const T* y = static_cast<const T*>(y_) + (n * a.C + o) * H * W;
          for (int64_t i = 0; i < H; ++i, to += W) {
            const int64_t row = i + 1 - ky;
            if (row < 0 || row >= H) {
              __builtin_memset(to, 0, W * sizeof(T));
              continue;
            }
            to[0] = to[W - 1] = 0;
            __builtin_memcpy(to + begin, y + row * W + begin + 1 - kx, (end - begin) * sizeof(T));
          }
        }
      }
    }
  }
}

// ---- Valid 5x5 convolution, 2x2 max pooling, ReLU ----------------------------------------------
// A lane is an image: the images of a block are transposed to [in, H, W][lanes] in scratch, after
// which no operation crosses lanes and any number of channels is as good as any other.

// [lanes images, size] of the activations' dtype to [size][lanes]; absent images become zeros.
template <class M>
void block_in(const typename M::T* from, int64_t images, int64_t size, typename M::V* to) {
  using V = typename M::V;
  for (int64_t f = 0; f < size; f += M::lanes) {
    V block[M::lanes];
    for (int k = 0; k < M::lanes; ++k) {
      block[k] = k < images ? M::get(from + k * size + f, size - f) : V{};
    }
    transpose(block);
    for (int64_t k = 0; k < min_of(M::lanes, size - f); ++k) to[f + k] = block[k];
  }
}

template <class M>
void block_out(const typename M::V* from, int64_t images, int64_t size, typename M::T* to) {
  using V = typename M::V;
  for (int64_t f = 0; f < size; f += M::lanes) {
    V block[M::lanes];
    for (int k = 0; k < M::lanes; ++k) block[k] = f + k < size ? from[f + k] : V{};
    transpose(block);
    for (int64_t k = 0; k < min_of(M::lanes, images); ++k) {
      M::put(to + k * size + f, block[k], size - f);
    }
  }
}

template <class M>
struct ConvPoolBlock {
  using T = typename M::T;
  using S = typename M::S;
  using V = typename M::V;
  using I = typename M::I;
  typedef uint8_t Bytes __attribute__((vector_size(M::lanes)));
  static constexpr int kMargin = 4;

  const ConvPool& a;
  const int64_t height = a.pooled_height(), width = a.pooled_width();
  const int64_t size = a.in * a.H * a.W, pooled = a.out * height * width;
  const int64_t row = 2 * width + 2 * kMargin;  // of a row of gradients with margins
  const S* weight = static_cast<const S*>(a.weight);
  // Scratch, one vector a value.
  V* x;          // [in, H, W]
  V* y;          // [out, height, width]: outputs or their gradients
  V* grad_x;     // [in, H, W]
  V* grad_w;     // [in, 5, out, 5]
  V* grad_b;     // [out]
  V* gradients;  // [2, out, row]: of the convolution's outputs for one row of pooled ones

  static int64_t scratch(const ConvPool& a) {
    const ConvPoolBlock block(a, nullptr);
    const int64_t gradients = 2 * a.out * block.row;
    return (2 * block.size + block.pooled + a.in * a.out * 25 + a.out + gradients) * M::lanes;
  }

  ConvPoolBlock(const ConvPool& a, void* scratch) : a(a) {
    x = static_cast<V*>(scratch);
    y = x + size;
    grad_x = y + pooled;
    grad_w = grad_x + size;
    grad_b = grad_w + a.in * a.out * 25;
    gradients = grad_b + a.out;
  }

  // Output channels [o, o + B) at pooled position (i, j), all images of the block.
  template <int B>
  DAFL_HD void window(int64_t i, int64_t j, int64_t o, uint8_t* index) {
    V sum[B][2][2];
    DAFL_UNROLL
    for (int b = 0; b < B; ++b) {
      const V bias = V{} + static_cast<const S*>(a.bias)[o + b];
      sum[b][0][0] = sum[b][0][1] = sum[b][1][0] = sum[b][1][1] = bias;
    }
    for (int64_t c = 0; c < a.in; ++c) {
      const V* patch = x + (c * a.H + 2 * i) * a.W + 2 * j;
      const S* taps = weight + c * 25 * a.out + o;
      DAFL_UNROLL
      for (int r = 0; r < 6; ++r) {
        V in[6];
        DAFL_UNROLL
        for (int k = 0; k < 6; ++k) in[k] = patch[r * a.W + k];
        DAFL_UNROLL
        for (int dy = 0; dy < 2; ++dy) {
          if (r - dy < 0 || r - dy > 4) continue;
          DAFL_UNROLL
          for (int kx = 0; kx < 5; ++kx) {
            DAFL_UNROLL
            for (int b = 0; b < B; ++b) {
              const V tap = V{} + taps[((r - dy) * 5 + kx) * a.out + b];
              sum[b][dy][0] += in[kx] * tap;
              sum[b][dy][1] += in[kx + 1] * tap;
            }
          }
        }
      }
    }
    DAFL_UNROLL
    for (int b = 0; b < B; ++b) {
      V best = sum[b][0][0];
      I which{};
      DAFL_UNROLL
      for (int k = 1; k < 4; ++k) {  // the first of equals wins, NaN wins over all
        const V value = sum[b][k / 2][k % 2];
        const I better = (value > best) | (value != value);
        best = better ? value : best;
        which = better ? I{} + k : which;
      }
      const I off = best <= 0;
      const int64_t at = ((o + b) * height + i) * width + j;
      y[at] = off ? V{} : best;
      store(index + at * M::lanes, __builtin_convertvector((off ? I{} + 4 : which), Bytes));
    }
  }

  template <int B>
  void forward(int64_t o, uint8_t* index) {
    for (int64_t i = 0; i < height; ++i) {
      for (int64_t j = 0; j < width; ++j) window<B>(i, j, o, index);
    }
  }

  // Gradients of the convolution's outputs in rows 2i and 2i + 1: nonzero where a pixel won.
  void spread(int64_t i, const uint8_t* index) {
    for (int64_t o = 0; o < a.out; ++o) {
      V* rows[2] = {gradients + o * row + kMargin, gradients + (a.out + o) * row + kMargin};
      V sum = grad_b[o];
      for (int64_t j = 0; j < width; ++j) {
        const int64_t at = (o * height + i) * width + j;
        const I which = __builtin_convertvector(load<Bytes>(index + at * M::lanes), I);
        const V g = y[at];
        for (int k = 0; k < 4; ++k) rows[k / 2][2 * j + k % 2] = which == k ? g : V{};
        sum += which < 4 ? g : V{};
      }
      grad_b[o] = sum;
    }
  }

  // Adds what rows 2i and 2i + 1 give to the weights of output channels [o, o + B).
  template <int B>
  void weights(int64_t i, int64_t o) {
    for (int64_t c = 0; c < a.in; ++c) {
      for (int ky = 0; ky < 5; ++ky) {
        V* to = grad_w + ((c * 5 + ky) * a.out + o) * 5;
        V sum[B][5];
        DAFL_UNROLL
        for (int b = 0; b < B; ++b) {
          DAFL_UNROLL
          for (int kx = 0; kx < 5; ++kx) sum[b][kx] = to[b * 5 + kx];
        }
        for (int dy = 0; dy < 2; ++dy) {
          const V* in = x + (c * a.H + 2 * i + dy + ky) * a.W;
          const V* g = gradients + (dy * a.out + o) * row + kMargin;
          for (int64_t j = 0; j < 2 * width; ++j) {
            DAFL_UNROLL
            for (int b = 0; b < B; ++b) {
              const V value = g[b * row + j];
              DAFL_UNROLL
              for (int kx = 0; kx < 5; ++kx) sum[b][kx] += value * in[j + kx];
            }
          }
        }
        DAFL_UNROLL
        for (int b = 0; b < B; ++b) {
          DAFL_UNROLL
          for (int kx = 0; kx < 5; ++kx) to[b * 5 + kx] = sum[b][kx];
        }
      }
    }
  }

  // Adds what rows 2i and 2i + 1 give to columns [j, j + P) of the input, channels [c, c + B).
  template <int B, int P>
  DAFL_HD void inputs(int64_t i, int64_t c, int64_t j) {
    for (int r = 0; r < 6; ++r) {
      V* to = grad_x + (c * a.H + 2 * i + r) * a.W + j;
      const int64_t channel = a.H * a.W;
      V sum[B][P];
      DAFL_UNROLL
      for (int b = 0; b < B; ++b) {
        DAFL_UNROLL
        for (int p = 0; p < P; ++p) sum[b][p] = to[b * channel + p];
      }
      for (int dy = 0; dy < 2; ++dy) {
        const int ky = r - dy;
        if (ky < 0 || ky > 4) continue;
        for (int64_t o = 0; o < a.out; ++o) {
          const V* g = gradients + (dy * a.out + o) * row + kMargin + j;
          const S* taps = weight + (c * 25 + ky * 5) * a.out + o;
          V near[P + 4];
          DAFL_UNROLL
          for (int k = 0; k < P + 4; ++k) near[k] = g[k - 4];
          DAFL_UNROLL
          for (int b = 0; b < B; ++b) {
            DAFL_UNROLL
            for (int kx = 0; kx < 5; ++kx) {
              const V tap = V{} + taps[(b * 25 + kx) * a.out];
              DAFL_UNROLL
              for (int p = 0; p < P; ++p) sum[b][p] += near[p + 4 - kx] * tap;
            }
          }
        }
      }
      DAFL_UNROLL
      for (int b = 0; b < B; ++b) {
        DAFL_UNROLL
        for (int p = 0; p < P; ++p) to[b * channel + p] = sum[b][p];
      }
    }
  }

  template <int B>
  void input_rows(int64_t i, int64_t c) {
    int64_t j = 0;
    for (; j + 4 <= 2 * width + 4; j += 4) inputs<B, 4>(i, c, j);
    if (j < 2 * width + 4) inputs<B, 2>(i, c, j);
  }
};

// Calls step(first channel, number) with numbers of at most `largest`, as equal as they can be.
#define DAFL_BY_CHANNELS(channels, largest, first, call)                            \
  for (int64_t pieces_ = (channels + largest - 1) / largest, piece_ = 0, first = 0; \
       piece_ < pieces_; ++piece_) {                                                \
    const int64_t next_ = (piece_ + 1) * channels / pieces_;                        \
    switch (next_ - first) {                                                        \
      case 1:                                                                       \
        call(1);                                                                    \
        break;                                                                      \
      case 2:                                                                       \
        call(2);                                                                    \
        break;                                                                      \
      case 3:                                                                       \
        call(3);                                                                    \
        break;                                                                      \
      default:                                                                      \
        call(4);                                                                    \
    }                                                                               \
    first = next_;                                                                  \
  }

template <class M>
void conv_pool(const ConvPool& a, int64_t begin, int64_t end, void* y, void* scratch) {
  using T = typename M::T;
  ConvPoolBlock<M> block(a, scratch);
  for (int64_t n = begin; n < end; n += M::lanes) {
    const int64_t images = min_of(M::lanes, end - n);
    uint8_t* index = a.index + n * block.pooled;
    block_in<M>(static_cast<const T*>(a.x) + n * block.size, images, block.size, block.x);
#define DAFL_CALL(B) block.template forward<B>(o, index)
    DAFL_BY_CHANNELS(a.out, 4, o, DAFL_CALL)
#undef DAFL_CALL
    block_out<M>(block.y, images, block.pooled, static_cast<T*>(y) + n * block.pooled);
  }
}

template <class M>
void conv_pool_gradient(const ConvPool& a, int64_t begin, int64_t end, const void* grad,
                        void* grad_x, double* sums, void* scratch) {
  using T = typename M::T;
  using V = typename M::V;
  ConvPoolBlock<M> block(a, scratch);
  const int64_t weights = a.in * a.out * 25;
  // The margins of `gradients` stay zero from here on.
  const int64_t zeros = weights + a.out + 2 * a.out * block.row;
  for (int64_t k = 0; k < zeros; ++k) block.grad_w[k] = V{};
  for (int64_t n = begin; n < end; n += M::lanes) {
    const int64_t images = min_of(M::lanes, end - n);
    const uint8_t* index = a.index + n * block.pooled;
    block_in<M>(static_cast<const T*>(grad) + n * block.pooled, images, block.pooled, block.y);
    if (sums != nullptr) {
      block_in<M>(static_cast<const T*>(a.x) + n * block.size, images, block.size, block.x);
    }
    if (grad_x != nullptr) {
      for (int64_t k = 0; k < block.size; ++k) block.grad_x[k] = V{};
    }
    for (int64_t i = 0; i < block.height; ++i) {
      block.spread(i, index);
      if (sums != nullptr) {
#define DAFL_CALL(B) block.template weights<B>(i, o)
        DAFL_BY_CHANNELS(a.out, 4, o, DAFL_CALL)
#undef DAFL_CALL
      }
      if (grad_x != nullptr) {
#define DAFL_CALL(B) block.template input_rows<B>(i, c)
        DAFL_BY_CHANNELS(a.in, 4, c, DAFL_CALL)
#undef DAFL_CALL
      }
    }
    if (grad_x != nullptr) {
      block_out<M>(block.grad_x, images, block.size, static_cast<T*>(grad_x) + n * block.size);
    }
  }
  if (sums == nullptr) return;
  for (int64_t o = 0; o < a.out; ++o) {
    for (int64_t c = 0; c < a.in; ++c) {
      for (int k = 0; k < 25; ++k) {
        const V& lanes = block.grad_w[((c * 5 + k / 5) * a.out + o) * 5 + k % 5];
        double sum = 0;
        for (int l = 0; l < M::lanes; ++l) sum += lanes[l];
        sums[(o * a.in + c) * 25 + k] = sum;
      }
    }
    double sum = 0;
    for (int l = 0; l < M::lanes; ++l) sum += block.grad_b[o][l];
    sums[weights + o] = sum;
  }
}

template <class M>
int64_t conv_pool_scratch(const ConvPool& a) {
  return ConvPoolBlock<M>::scratch(a);
}

template <class M>
constexpr LayerKernels table_of() {
  return {differences<M>,       differences_adjoint<M>, interleave<M>,        interleave_adjoint<M>,
          moments<M>,           norm_activation<M>,     norm_sums<M>,         norm_gradient<M>,
          sum_shifted<M>,       shift_apart<M>,         conv_pool_scratch<M>, conv_pool<M>,
          conv_pool_gradient<M>};
}

template <class Memory>
constexpr LayerKernels table() {
  return table_of<Access<Memory>>();
}

}  // namespace

extern const LayerKernels f32_layers, bf16_layers, f16_layers, f64_layers;
const LayerKernels bf16_layers = table<MemoryBf16>();
#ifndef DAFL_AVX512_BF16  // which has nothing for others
const LayerKernels f32_layers = table<MemoryF32>();
const LayerKernels f16_layers = table<MemoryF16>();
#endif
#ifdef DAFL_WITH_F64
const LayerKernels f64_layers = table<MemoryF64>();
#endif

}  // namespace DAFL_ISA
}  // namespace cpu
}  // namespace dafl
