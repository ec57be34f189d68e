// The generator's loss: the formulas stand in ../row_math.h, its terms in
// ../losses/generator_terms.h.

// ---- Rows of logits ----------------------------------------------------------------------------

template <class M>
void generator_forward_tiles(const GeneratorForward& a, int64_t begin, int64_t end, double* sums) {
  using O = Ops<M>;
  using S = typename M::Scalar;
  using V = typename M::Value;
  constexpr int L = M::lanes;
  S* stats = static_cast<S*>(a.row_stats);
  V tile[kTileClasses], mean[kTileClasses];

  for (int64_t block = begin; block < end; block += kBlockRows) {
    int64_t block_end = min_of(block + kBlockRows, end);
    for (int64_t k = 0; k < a.C; ++k) mean[k] = V{};
    for (int64_t row = block; row < block_end; row += L) {
      int64_t rows = min_of(L, block_end - row);
      O::load_tile(a.logits, row, rows, a.N, a.C, tile);
      V best, y, others{};
      O::tile_argmax(tile, a.C, best, y);
      for (int64_t k = 0; k < a.C; ++k) {
        V shifted = tile[k] - best;
        tile[k] = M::exp(shifted);
        others += row_math::others_term(y == static_cast<S>(k), shifted, tile[k]);
      }
      V inverse = O::iota() < static_cast<S>(rows) ? S(1) / (others + S(1)) : V{};
      for (int64_t k = 0; k < a.C; ++k) mean[k] += tile[k] * inverse;
      O::store(stats + row, rows, best);
      O::store(stats + a.N + row, rows, others);
      O::store(stats + 2 * a.N + row, rows, y);
    }
    V loss{};
    for (int64_t row = block; row < block_end; row += L) {
      V others = O::load(stats + a.N + row, block_end - row, S(0));
      V total = others + S(1);
      loss += row_math::log1p_corrected<S>(others, total, M::log(total));
    }
    for (int64_t k = 0; k < a.C; ++k) sums[k] += O::sum(mean[k]);
    sums[a.C + kOneHot] += O::sum(loss);
  }
}

template <class M>
void generator_backward_tiles(const GeneratorBackward& a, int64_t begin, int64_t end) {
  using O = Ops<M>;
  using S = typename M::Scalar;
  using V = typename M::Value;
  constexpr int L = M::lanes;
  const S* stats = static_cast<const S*>(a.row_stats);
  const S* slope = static_cast<const S*>(a.slope);
  const S one_hot = static_cast<S>(a.factors.one_hot);
  V tile[kTileClasses] = {};

  for (int64_t row = begin; row < end; row += L) {
    int64_t rows = min_of(L, end - row);
    O::load_tile(a.logits, row, rows, a.N, a.C, tile);
    V best = O::load(stats + row, rows, S(0));
    V others = O::load(stats + a.N + row, rows, S(0));
    V y = O::load(stats + 2 * a.N + row, rows, S(0));
    V inverse = S(1) / (others + S(1));
    V slope_y{}, mean_slope{};
    for (int64_t k = 0; k < a.C; ++k) {
      slope_y = y == static_cast<S>(k) ? O::splat(slope[k]) : slope_y;
    }
    for (int64_t k = 0; k < a.C; ++k) {
      tile[k] = M::exp(tile[k] - best) * inverse;
      mean_slope += tile[k] * (slope[k] - slope_y);
    }
    for (int64_t k = 0; k < a.C; ++k) {
      tile[k] = row_math::generator_gradient(y == static_cast<S>(k), tile[k], slope[k] - slope_y,
                                             mean_slope, others, inverse, one_hot);
    }
    O::store_tile(tile, row, rows, a.C, a.logits.dtype, a.grad);
  }
}

template <class M>
void generator_forward_rows(const GeneratorForward& a, int64_t begin, int64_t end, double* sums,
                            typename M::Scalar* scratch) {
  using O = Ops<M>;
  using S = typename M::Scalar;
  using V = typename M::Value;
  constexpr int L = M::lanes;
  S* stats = static_cast<S*>(a.row_stats);
  const int64_t padded = (a.C + L - 1) / L * L;
  S* mean = scratch;
  S* exps[2] = {scratch + padded, scratch + 2 * padded};
  S* converted = scratch + 3 * padded;

  for (int64_t block = begin; block < end; block += kBlockRows) {
    int64_t block_end = min_of(block + kBlockRows, end);
    for (int64_t k = 0; k < padded; k += L) O::store(mean + k, V{});
    for (int64_t row = block; row < block_end; row += 2) {  // in pairs, to touch means less often
      S inverse[2] = {};
      const int64_t rows = min_of(2, block_end - row);
      for (int64_t r = 0; r < rows; ++r) {
        const S* t = O::load_row(a.logits, row + r, a.C, converted);
        S best, y;
        O::row_argmax(t, a.C, best, y);
        const S others = O::row_exps(t, a.C, best, y, S(1), exps[r]);
        inverse[r] = S(1) / (others + S(1));
        stats[row + r] = best;
        stats[a.N + row + r] = others;
        stats[2 * a.N + row + r] = y;
      }
      const S* last = exps[rows - 1];
      for (int64_t k = 0; k < padded; k += L) {
        O::store(mean + k, O::load(mean + k) + O::load(exps[0] + k) * inverse[0] +
                               O::load(last + k) * inverse[1]);
      }
    }
    for (int64_t k = 0; k < a.C; ++k) sums[k] += static_cast<double>(mean[k]);
    V loss{};
    for (int64_t row = block; row < block_end; row += L) {
      V others = O::load(stats + a.N + row, block_end - row, S(0));
      V total = others + S(1);
      loss += row_math::log1p_corrected<S>(others, total, M::log(total));
    }
    sums[a.C + kOneHot] += O::sum(loss);
  }
}

template <class M>
void generator_backward_rows(const GeneratorBackward& a, int64_t begin, int64_t end,
                             typename M::Scalar* scratch) {
  using O = Ops<M>;
  using S = typename M::Scalar;
  using V = typename M::Value;
  constexpr int L = M::lanes;
  const S* stats = static_cast<const S*>(a.row_stats);
  const S* slope = static_cast<const S*>(a.slope);
  const S one_hot = static_cast<S>(a.factors.one_hot);
  const int64_t padded = (a.C + L - 1) / L * L;
  S* exps = scratch;
  S* converted = scratch + padded;
  const S low = -static_cast<S>(__builtin_inf());

  for (int64_t row = begin; row < end; ++row) {
    const S* t = O::load_row(a.logits, row, a.C, converted);
    S best = stats[row], others = stats[a.N + row], y = stats[2 * a.N + row];
    const int64_t at = static_cast<int64_t>(y);
    const S inverse = S(1) / (others + S(1)), slope_y = slope[at];
    S mean_slope = O::row_sum(a.C, [&](int64_t k, int64_t count) {
      V e = M::exp(O::load(t + k, count, low) - best);
      O::store(exps + k, e);
      return e * (O::load(slope + k, count, S(0)) - slope_y);
    });
    mean_slope *= inverse;
    S* out = O::output_row(a.logits.dtype, a.grad, row, a.C, converted);
    // The loop treats every class as one that is not y; then y's own is put right.
    const S constant = (one_hot - mean_slope - slope_y) * inverse;
    O::for_each_vector(a.C, [&](int64_t k, int64_t count) {
      V e = O::load(exps + k);
      O::store(out + k, count, e * (O::load(slope + k, count, S(0)) * inverse + constant));
    });
    out[at] = row_math::generator_gradient(true, exps[at] * inverse, S(0), mean_slope, others,
                                           inverse, one_hot);
    if (out == converted) O::store_row(out, row, a.C, a.logits.dtype, a.grad);
  }
}

template <class M>
void generator_forward(const GeneratorForward& a, int64_t begin, int64_t end, double* sums,
                       void* scratch) {
  if (a.C <= kTileClasses) return generator_forward_tiles<M>(a, begin, end, sums);
  generator_forward_rows<M>(a, begin, end, sums, static_cast<typename M::Scalar*>(scratch));
}

template <class M>
void generator_backward(const GeneratorBackward& a, int64_t begin, int64_t end, void* scratch) {
  if (a.C <= kTileClasses) return generator_backward_tiles<M>(a, begin, end);
  generator_backward_rows<M>(a, begin, end, static_cast<typename M::Scalar*>(scratch));
}

// ---- Activation loss ---------------------------------------------------------------------------

// Runs `body(values, count, row, column)` over the rows in pieces of at most 1024 contiguous
// values. Rows that lie back to back are one long row.
constexpr int64_t kPiece = 1024;

template <class M, class Body>
DAFL_HD void for_each_piece(const Matrix& f, int64_t F, int64_t begin, int64_t end, Body body) {
  using S = typename M::Scalar;
  int64_t width = F, rows = end - begin;
  if (f.col_stride == 1 && f.row_stride == F) {
    width = F * rows;
    rows = 1;
  }
  alignas(64) S piece[kPiece];
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t at = 0; at < width; at += kPiece) {
      int64_t count = min_of(kPiece, width - at);
      // The piece as a one-row matrix of its own.
      int64_t offset = (begin + r) * f.row_stride + at * f.col_stride;
      Matrix part{static_cast<const char*>(f.data) + offset * size_of(f.dtype), 0, f.col_stride,
                  f.dtype};
      body(Ops<M>::load_row(part, 0, count, piece), count, (begin + r) * F + at);
    }
  }
}

template <class M>
double abs_sum(const Matrix& f, int64_t F, int64_t begin, int64_t end) {
  using O = Ops<M>;
  using S = typename M::Scalar;
  using V = typename M::Value;
  constexpr int L = M::lanes;
  double total = 0;
  for_each_piece<M>(f, F, begin, end, [&](const S* values, int64_t count, int64_t) {
    V sums[4] = {};
    int64_t k = 0;
    for (; k + 4 * L <= count; k += 4 * L) {
      for (int j = 0; j < 4; ++j) {
        V x = O::load(values + k + j * L);
        sums[j] += M::abs(x);
      }
    }
    for (; k < count; k += L) {
      V x = O::load(values + k, count - k, S(0));
      sums[0] += M::abs(x);
    }
    total += O::sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  });
  return total;
}

template <class M>
void sign_gradient(const Matrix& f, int64_t F, int64_t begin, int64_t end, double value,
                   void* grad) {
  using O = Ops<M>;
  using S = typename M::Scalar;
  using V = typename M::Value;
  const V up = O::splat(static_cast<S>(value)), down = -up;
  for_each_piece<M>(f, F, begin, end, [&](const S* values, int64_t count, int64_t offset) {
    alignas(64) S converted[kPiece];
    S* out = M::in_place(f.dtype) ? static_cast<S*>(grad) + offset : converted;
    O::for_each_vector(count, [&](int64_t k, int64_t there) {
      V x = O::load(values + k, there, S(0));
      O::store(out + k, there, x > S(0) ? up : (x < S(0) ? down : V{}));
    });
    if (out == converted) {
      M::encode(f.dtype, converted, count);
      M::scatter(f.dtype, converted, 1, count, grad, offset);
    }
  });
}
