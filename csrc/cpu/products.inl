// Products of matrices in panels, for layers whose products are small: [panels][rows][width], with
// `width` columns a panel. The rest of the last panel is zeros, so nothing has an end to ask for.
// The operands are read as they lie, and products may be added to what is there.

// A block of a product that has its sums in registers, rows and vectors of columns: 12 of the 16
// vector registers that AVX2 has; the rest is for the operands.
constexpr int kProductRows = 6, kProductVectors = 2;

template <class M>
constexpr int64_t kWidth = kProductVectors * M::lanes;

// From one panel to the next. An odd number of rows, because powers of two would put rows of all
// panels into the same few sets of the caches.
template <class M>
DAFL_HD int64_t panel_of(int64_t rows) {
  return (rows | 1) * kWidth<M>;
}

template <class M>
DAFL_HD int64_t panels_of(int64_t columns) {
  return (columns + kWidth<M> - 1) / kWidth<M>;
}

// R rows of sums [R, width] = a b, added to what they are where `add`. Row r and step s of a is
// a[r * apart + s * step], for `steps` steps of the sum; `next` further on there are as many again.
template <class M, int R, int apart, int step>
DAFL_HD void product_rows(const typename M::S* a, int64_t next, const typename M::S* b,
                          int64_t times, int64_t steps, bool add, typename M::S* sums) {
  using V = typename M::V;
  constexpr int64_t width = kWidth<M>;
  V sum[R][kProductVectors];
  DAFL_UNROLL
  for (int r = 0; r < R; ++r) {
    DAFL_UNROLL
    for (int v = 0; v < kProductVectors; ++v) {
      sum[r][v] = add ? load<V>(sums + r * width + v * M::lanes) : V{};
    }
  }
  for (int64_t k = 0; k < times; ++k, a += next) {
    const typename M::S* at = a;
    for (int64_t s = 0; s < steps; ++s, at += step, b += width) {
      V in[kProductVectors];
      DAFL_UNROLL
      for (int v = 0; v < kProductVectors; ++v) in[v] = load<V>(b + v * M::lanes);
      DAFL_UNROLL
      for (int r = 0; r < R; ++r) {
        const V by = at[r * apart] - V{};  // all lanes; adding to zeros is no mere broadcast
        DAFL_UNROLL
        for (int v = 0; v < kProductVectors; ++v) sum[r][v] += by * in[v];
      }
    }
  }
  DAFL_UNROLL
  for (int r = 0; r < R; ++r) {
    DAFL_UNROLL
    for (int v = 0; v < kProductVectors; ++v) store(sums + r * width + v * M::lanes, sum[r][v]);
  }
}

// One panel of a product, sums [rows, width] = a [rows, K] b [K, width], where a is `panels` panels
// that are `next` apart, and b lies in one piece.
template <class M>
__attribute__((noinline)) void product(const typename M::S* a, int64_t next, int64_t panels,
                                       const typename M::S* b, int64_t rows, bool add,
                                       typename M::S* sums) {
  constexpr int64_t width = kWidth<M>, R = kProductRows;
  for (; rows >= R; rows -= R, a += R * width, sums += R * width) {
    product_rows<M, R, width, 1>(a, next, b, panels, width, add, sums);
  }
  switch (rows) {
    case 1:
      return product_rows<M, 1, width, 1>(a, next, b, panels, width, add, sums);
    case 2:
      return product_rows<M, 2, width, 1>(a, next, b, panels, width, add, sums);
    case 3:
      return product_rows<M, 3, width, 1>(a, next, b, panels, width, add, sums);
    case 4:
      return product_rows<M, 4, width, 1>(a, next, b, panels, width, add, sums);
    case 5:
      return product_rows<M, 5, width, 1>(a, next, b, panels, width, add, sums);
  }
}

// sums [width, width] = a^T b of two panels with as many rows.
template <class M>
__attribute__((noinline)) void product_transposed(const typename M::S* a, const typename M::S* b,
                                                  int64_t rows, bool add, typename M::S* sums) {
  constexpr int64_t width = kWidth<M>, last = width % kProductRows;
  int64_t r = 0;
  for (; r + kProductRows <= width; r += kProductRows) {
    product_rows<M, kProductRows, 1, width>(a + r, 0, b, 1, rows, add, sums + r * width);
  }
  if constexpr (last > 0) {
    product_rows<M, last, 1, width>(a + r, 0, b, 1, rows, add, sums + r * width);
  }
}
