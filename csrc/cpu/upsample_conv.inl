// Nearest x2, then 3x3 convolution. The mathematics stands in ../layers/upsample_conv.cpp: tiles of
// 2x2 small pixels, which have 4x4 kinds of data and 5x5 products.

// Where product (i, j) of a tile is among all, which lie in order of their kind of data: the first
// `before` are of other kinds, and it is the one with number `index` of the `count` of its kind.
struct ProductPlace {
  int64_t before, index, count;

  DAFL_HD ProductPlace(int i, int j) {
    const int kind = i < 3 ? i : 3, column_kind = j < 3 ? j : 3;
    const int heights = i < 3 ? 1 : 2, widths = j < 3 ? 1 : 2;
    before = 5 * kind + heights * column_kind;
    index = (i - kind) * widths + (j - column_kind);
    count = heights * widths;
  }
};

// How data and products lie in memory. As whole rows: 16 matrices of `tiles` rows, with C columns
// for data and 1, 2 or 4 times C for products.
template <class M>
struct InRows {
  static constexpr bool far = false;  // values of a tile from one another
  int64_t tiles, C;

  DAFL_HD int64_t channels() const { return C; }       // of a tile, with those that pad it
  DAFL_HD int64_t plane() const { return tiles * C; }  // of a kind of data
  DAFL_HD int64_t row() const { return C; }
  DAFL_HD int64_t start(const ProductPlace& at) const {
    return at.before * tiles * C + at.index * C;
  }
  DAFL_HD int64_t row(const ProductPlace& at) const { return at.count * C; }
  DAFL_HD int64_t channel(int64_t c) const { return c; }
  DAFL_HD int64_t room(int64_t c) const { return C - c; }  // for values from there on
};

// In panels, see products.inl: 16 times those of the data, or 25 times those of a product.
template <class M>
struct InPanels {
  static constexpr bool far = true;
  int64_t tiles, C;

  DAFL_HD int64_t panels() const { return panels_of<M>(C); }
  DAFL_HD int64_t channels() const { return panels() * kWidth<M>; }
  DAFL_HD int64_t plane() const { return panels() * panel_of<M>(tiles); }
  DAFL_HD int64_t row() const { return kWidth<M>; }
  DAFL_HD int64_t start(const ProductPlace& at) const { return (at.before + at.index) * plane(); }
  DAFL_HD int64_t row(const ProductPlace&) const { return kWidth<M>; }
  DAFL_HD int64_t channel(int64_t c) const {
    return c / kWidth<M> * panel_of<M>(tiles) + c % kWidth<M>;
  }
  DAFL_HD int64_t room(int64_t) const { return M::lanes; }
};

// Asks for the 4x4 pixels of the next tile, `tile` being the first of them. Where a tile's products
// are far apart, the processor has too much to follow to foresee them by itself.
template <class M>
DAFL_HD void prefetch_tile(const typename M::T* tile, int64_t W, int64_t C, bool write) {
  DAFL_UNROLL
  for (int i = 0; i < 4; ++i) {
    DAFL_UNROLL
    for (int j = 0; j < 4; ++j) {
      if (write) {
        __builtin_prefetch(tile + (i * W + j) * C, 1);
      } else {
        __builtin_prefetch(tile + (i * W + j) * C);
      }
    }
  }
}

template <class M, template <class> class Layout>
void differences(const Upsample& a, const void* x_, void* data_) {
  using T = typename M::T;
  using V = typename M::V;
  const Layout<M> layout{a.tiles(), a.C};
  const int64_t H = a.H, W = a.W, C = a.C, plane = layout.plane();
  T* data = static_cast<T*>(data_);
  for (int64_t n = 0; n < a.images; ++n) {
    const T* x = static_cast<const T*>(x_) + n * H * W * C;
    for (int64_t t = 0; t < a.tile_rows(); ++t) {
      for (int64_t u = 0; u < a.tile_columns(); ++u, data += layout.row()) {
        Pixel<M> patch[4][4];
        Pixel<M>::patch(x, 2 * t - 1, 2 * u - 1, H, W, C, patch);
        for (int64_t c = 0; c < layout.channels(); c += M::lanes) {
          const int64_t count = C - c, room = layout.room(c);
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
            T* to = data + k * plane + layout.channel(c);
            M::put(to, columns[1][k], room);
            M::put(to + 4 * plane, columns[0][k] - columns[1][k], room);
            M::put(to + 8 * plane, columns[2][k] - columns[3][k], room);
            M::put(to + 12 * plane, columns[2][k] - columns[1][k], room);
          }
        }
      }
    }
  }
}

template <class M, template <class> class Layout>
void differences_adjoint(const Upsample& a, const void* data_, void* x_) {
  using T = typename M::T;
  using V = typename M::V;
  const Layout<M> layout{a.tiles(), a.C};
  const int64_t H = a.H, W = a.W, C = a.C, plane = layout.plane();
  const int64_t rows = a.tile_rows(), columns = a.tile_columns();
  const T* data = static_cast<const T*>(data_);
  // What a pixel gets, by kind and by tile: the even one A_t - B_t - C_t - B'_{t-1}, the odd one
  // B'_t + C_t + B_{t+1}.
  constexpr int kinds[6] = {0, 1, 3, 2, 2, 1};
  constexpr int shifts[6] = {0, 0, 0, -1, 0, 1};
  for (int64_t n = 0; n < a.images; ++n) {
    T* x = static_cast<T*>(x_) + n * H * W * C;
    for (int64_t t = 0; t < rows; ++t) {
      for (int64_t u = 0; u < columns; ++u, data += layout.row()) {
        Pixel<M> parts[6][6];
        DAFL_UNROLL
        for (int i = 0; i < 6; ++i) {
          DAFL_UNROLL
          for (int j = 0; j < 6; ++j) {
            const int64_t row = t + shifts[i], column = u + shifts[j];
            const bool there = row >= 0 && row < rows && column >= 0 && column < columns;
            parts[i][j].set(there, data + (kinds[i] * 4 + kinds[j]) * plane +
                                       (shifts[i] * columns + shifts[j]) * layout.row());
          }
        }
        for (int64_t c = 0; c < C; c += M::lanes) {
          const int64_t count = C - c, at = layout.channel(c), room = layout.room(c);
          V even[6], odd[6];
          DAFL_UNROLL
          for (int i = 0; i < 6; ++i) {
            V in[6];
            DAFL_UNROLL
            for (int j = 0; j < 6; ++j) in[j] = parts[i][j].get(at, room);
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

// Channels [begin, end) of y from their products.
template <class M, template <class> class Layout>
DAFL_HD void interleave_channels(const Upsample& a, const void* products_, int64_t begin,
                                 int64_t end, void* y_) {
  using T = typename M::T;
  using V = typename M::V;
  const Layout<M> layout{a.tiles(), end - begin};
  const int64_t H = 2 * a.H, W = 2 * a.W, C = a.C;
  const int64_t rows = a.tile_rows(), columns = a.tile_columns();
  const T* products = static_cast<const T*>(products_);
  // Output 4t + k is product first[k] plus second[k]; product 5 is product 0 of the next tile.
  constexpr int64_t line = 64 / sizeof(T);  // of a cache
  constexpr int first[4] = {0, 0, 0, 5}, second[4] = {1, 4, 3, 2};
  int64_t tile = 0;
  for (int64_t n = 0; n < a.images; ++n) {
    T* y = static_cast<T*>(y_) + n * H * W * C + begin;
    for (int64_t t = 0; t < rows; ++t) {
      for (int64_t u = 0; u < columns; ++u, ++tile) {
        Pixel<M> parts[6][6];
        DAFL_UNROLL
        for (int i = 0; i < 6; ++i) {
          DAFL_UNROLL
          for (int j = 0; j < 6; ++j) {
            const bool there = (i < 5 || t + 1 < rows) && (j < 5 || u + 1 < columns);
            const ProductPlace place(i % 5, j % 5);
            const int64_t from = tile + (i < 5 ? 0 : columns) + (j < 5 ? 0 : 1);
            parts[i][j].set(there, products + layout.start(place) + from * layout.row(place));
          }
        }
        for (int64_t c = 0; c < end - begin; c += M::lanes) {
          if (layout.far && c % line == 0)
            prefetch_tile<M>(y + (4 * t * W + 4 * u + 4) * C + c, W, C, true);
          const int64_t count = end - begin - c, at = layout.channel(c), room = layout.room(c);
          V across[6][4];  // [product along the height][output along the width]
          DAFL_UNROLL
          for (int i = 0; i < 6; ++i) {
            V in[6];
            DAFL_UNROLL
            for (int j = 0; j < 6; ++j) in[j] = parts[i][j].get(at, room);
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
void interleave(const Upsample& a, const void* products, void* y) {
  interleave_channels<M, InRows>(a, products, 0, a.C, y);
}

template <class M, template <class> class Layout>
void interleave_adjoint(const Upsample& a, const void* y_, void* products_) {
  using T = typename M::T;
  using V = typename M::V;
  const Layout<M> layout{a.tiles(), a.C};
  const int64_t H = 2 * a.H, W = 2 * a.W, C = a.C;
  constexpr int64_t line = 64 / sizeof(T);  // of a cache
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
            const ProductPlace place(i, j);
            to[i][j] = products + layout.start(place) + tile * layout.row(place);
          }
        }
        for (int64_t c = 0; c < layout.channels(); c += M::lanes) {
          const int64_t count = C - c, at = layout.channel(c), room = layout.room(c);
          if (layout.far && c % line == 0)
            prefetch_tile<M>(y + (4 * t * W + 4 * u + 4) * C + c, W, C, false);
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
            for (int i = 0; i < 5; ++i) M::put(to[i][j] + at, sums[i], room);
          }
        }
      }
    }
  }
}

// ---- With products of our own, in panels -------------------------------------------------------

template <class M>
struct Panels {
  using S = typename M::S;
  static constexpr int64_t width = kWidth<M>;

  static int64_t channels(int64_t C) { return panels_of<M>(C) * width; }

  static int64_t scratch(const Upsample& a, int64_t Co, bool backward) {
    return panel_of<M>(a.tiles()) *
           (16 * panels_of<M>(a.C) + 25 * (backward ? panels_of<M>(Co) : 1));
  }

  // taps [9, rows, columns] to 25 factors of panels [rows, width], those of a kind of data in order
  // of the panels with `by_panel`, else in order of the factors; rows are padded to `padded`.
  static void factors(const void* taps_, int64_t rows, int64_t columns, bool by_panel,
                      int64_t begin, int64_t end, void* factors_) {
    using V = typename M::V;
    const S* taps = static_cast<const S*>(taps_);
    S* factors = static_cast<S*>(factors_);
    const int64_t panels = panels_of<M>(columns), padded = channels(rows);
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t c = 0; c < panels * width; c += M::lanes) {
        V w[9], across[3][5];
        DAFL_UNROLL
        for (int k = 0; k < 9; ++k) {
          w[k] = r < rows ? M::get(taps + (k * rows + r) * columns + c, columns - c) : V{};
        }
        DAFL_UNROLL
        for (int i = 0; i < 3; ++i) combine(w[3 * i], w[3 * i + 1], w[3 * i + 2], across[i]);
        DAFL_UNROLL
        for (int j = 0; j < 5; ++j) {
          V all[5];
          combine(across[0][j], across[1][j], across[2][j], all);
          DAFL_UNROLL
          for (int i = 0; i < 5; ++i) {
            const ProductPlace place(i, j);
            const int64_t panel =
                by_panel ? place.before * panels + c / width * place.count + place.index
                         : (place.before + place.index) * panels + c / width;
            store(factors + (panel * padded + r) * width + c % width, all[i]);
          }
        }
      }
    }
  }

  // Gradients of the factors [pieces, 25, panels of columns, rows, width], added up, to those of
  // the taps [9, rows, columns].
  static void factors_adjoint(const void* factors_, int64_t pieces, int64_t rows, int64_t columns,
                              int64_t begin, int64_t end, void* taps_) {
    using V = typename M::V;
    const S* factors = static_cast<const S*>(factors_);
    S* taps = static_cast<S*>(taps_);
    const int64_t panels = panels_of<M>(columns), padded = channels(rows);
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t c = 0; c < columns; c += M::lanes) {
        V across[3][5], w[3];
        DAFL_UNROLL
        for (int j = 0; j < 5; ++j) {
          V all[5];
          DAFL_UNROLL
          for (int i = 0; i < 5; ++i) {
            const ProductPlace place(i, j);
            const S* from =
                factors +
                (((place.before + place.index) * panels + c / width) * padded + r) * width;
            all[i] = V{};
            for (int64_t piece = 0; piece < pieces; ++piece) {
              all[i] += load<V>(from + piece * 25 * panels * padded * width + c % width);
            }
          }
          across[0][j] = (all[0] + all[1]) + all[2];
          across[1][j] = (all[0] + all[2]) + all[3];
          across[2][j] = (all[0] + all[3]) + all[4];
        }
        DAFL_UNROLL
        for (int i = 0; i < 3; ++i) {
          const V* all = across[i];
          w[0] = (all[0] + all[1]) + all[2];
          w[1] = (all[0] + all[2]) + all[3];
          w[2] = (all[0] + all[3]) + all[4];
          DAFL_UNROLL
          for (int j = 0; j < 3; ++j) {
            M::put(taps + ((3 * i + j) * rows + r) * columns + c, w[j], columns - c);
          }
        }
      }
    }
  }

  // y of a few images from x and factors.
  static void outputs(const Upsample& a, int64_t Co, const void* x, const void* factors_,
                      void* scratch, void* y) {
    const Upsample out{a.images, a.H, a.W, Co};
    const InPanels<M> in{a.tiles(), a.C};
    const int64_t panel = panel_of<M>(in.tiles), panels = panels_of<M>(Co);
    const S* factors = static_cast<const S*>(factors_);
    S* data = static_cast<S*>(scratch);
    S* products = data + 16 * in.plane();
    differences<M, InPanels>(a, x, data);
    for (int64_t p = 0; p < panels; ++p) {
      for (int i = 0; i < 5; ++i) {
        for (int j = 0; j < 5; ++j) {
          const ProductPlace place(i, j);
          const int64_t at = place.before + place.index, kind = min_of(i, 3) * 4 + min_of(j, 3);
          product<M>(data + kind * in.plane(), panel, in.panels(),
                     factors + (at * panels + p) * in.channels() * width, in.tiles, false,
                     products + at * panel);
        }
      }
      interleave_channels<M, InPanels>(out, products, p * width, min_of((p + 1) * width, Co), y);
    }
  }

  // Of a few images: the gradient of x, and that of the factors [25, panels of Co, C, width], which
  // is added unless these are the `first` images. Here factors are [25, panels of C, Co, width].
  static void gradients(const Upsample& a, int64_t Co, const void* x, const void* grad,
                        const void* factors_, bool first, void* scratch, void* factor_grads,
                        void* grad_x) {
    const InPanels<M> in{a.tiles(), a.C}, out{a.tiles(), Co};
    const int64_t panel = panel_of<M>(in.tiles), tiles = in.tiles;
    const S* factors = static_cast<const S*>(factors_);
    S* data = static_cast<S*>(scratch);
    S* products = data + 16 * in.plane();
    S* sums = static_cast<S*>(factor_grads);
    differences<M, InPanels>(a, x, data);
    interleave_adjoint<M, InPanels>({a.images, a.H, a.W, Co}, grad, products);
    for (int kind = 0; kind < 16; ++kind, data += in.plane()) {
      const int64_t count = (kind < 12 ? 1 : 2) * (kind % 4 < 3 ? 1 : 2) * out.panels();
      for (int64_t q = 0; q < count; ++q) {
        for (int64_t p = 0; p < in.panels(); ++p, sums += width * width) {
          product_transposed<M>(data + p * panel, products + q * panel, tiles, !first, sums);
        }
      }
      // The data are not read again, so their gradients overwrite them.
      for (int64_t p = 0; p < in.panels(); ++p, factors += count * width * width) {
        product<M>(products, panel, count, factors, tiles, false, data + p * panel);
      }
      products += count * panel;
    }
    differences_adjoint<M, InPanels>(a, scratch, grad_x);
  }

 private:
  template <class V>
  static DAFL_HD void combine(V first, V middle, V last, V* factors) {
    factors[0] = (first + middle) + last;
    factors[1] = first;
    factors[2] = first + middle;
    factors[3] = middle + last;
    factors[4] = last;
  }
};
