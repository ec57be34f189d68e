// Nearest x2, then 3x3 convolution. The mathematics stands in ../layers/upsample_conv.cpp: tiles of
// 2x2 small pixels, which have 4x4 kinds of data and 5x5 products.

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
        Pixel<M>::patch(x, 2 * t - 1, 2 * u - 1, H, W, C, patch);
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
        DAFL_UNROLL
        for (int i = 0; i < 6; ++i) {
          DAFL_UNROLL
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
  // Output 4t + k is product first[k] plus second[k]; product 5 is product 0 of the next tile.
  constexpr int first[4] = {0, 0, 0, 5}, second[4] = {1, 4, 3, 2};
  int64_t tile = 0;
  for (int64_t n = 0; n < a.images; ++n) {
    T* y = static_cast<T*>(y_) + n * H * W * C;
    for (int64_t t = 0; t < rows; ++t) {
      for (int64_t u = 0; u < columns; ++u, ++tile) {
        Pixel<M> parts[6][6];
        DAFL_UNROLL
        for (int i = 0; i < 6; ++i) {
          DAFL_UNROLL
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
        Pixel<M>::patch(y, 4 * t - 1, 4 * u - 1, H, W, C, patch);
        T* to[5][5];
        DAFL_UNROLL
        for (int i = 0; i < 5; ++i) {
          DAFL_UNROLL
          for (int j = 0; j < 5; ++j) {
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
