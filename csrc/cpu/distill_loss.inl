// The distillation loss: the formulas stand in ../row_math.h.

template <class M>
void distill_forward_tiles(const DistillForward& a, int64_t begin, int64_t end, double* sums) {
  using O = Ops<M>;
  using S = typename M::Scalar;
  using V = typename M::Value;
  constexpr int L = M::lanes;
  S* stats = static_cast<S*>(a.row_stats);
  const S scale = static_cast<S>(a.inverse_temperature);
  V s[kTileClasses], t[kTileClasses], exp_s[kTileClasses], exp_t[kTileClasses];

  for (int64_t block = begin; block < end; block += kBlockRows) {
    int64_t block_end = min_of(block + kBlockRows, end);
    V loss{}, agreeing{};
    for (int64_t row = block; row < block_end; row += L) {
      int64_t rows = min_of(L, block_end - row);
      O::load_tile(a.student, row, rows, a.N, a.C, s);
      O::load_tile(a.teacher, row, rows, a.N, a.C, t);
      V best_s, best_t, y_s, y_t, others_s{}, others_t{};
      O::tile_argmax(s, a.C, best_s, y_s);
      O::tile_argmax(t, a.C, best_t, y_t);
      for (int64_t k = 0; k < a.C; ++k) {
        V shifted_s = (s[k] - best_s) * scale, shifted_t = (t[k] - best_t) * scale;
        exp_s[k] = M::exp(shifted_s);
        exp_t[k] = M::exp(shifted_t);
        others_s += row_math::others_term(y_s == static_cast<S>(k), shifted_s, exp_s[k]);
        others_t += row_math::others_term(y_t == static_cast<S>(k), shifted_t, exp_t[k]);
      }
      V sum_s = others_s + S(1), sum_t = others_t + S(1);
      V log_s = row_math::log1p_corrected<S>(others_s, sum_s, M::log(sum_s));
      V log_t = row_math::log1p_corrected<S>(others_t, sum_t, M::log(sum_t));
      V inverse_s = S(1) / sum_s, inverse_t = S(1) / sum_t;
      V shift = best_t - best_s, log_sum_ratio = log_t - log_s, kl{};
      for (int64_t k = 0; k < a.C; ++k) {
        V log_q_ratio = row_math::log_ratio<S>(t[k], s[k], shift, log_sum_ratio, scale);
        kl += row_math::kl_term<S>(exp_t[k] * inverse_t, exp_s[k] * inverse_s, log_q_ratio);
      }
      auto present = O::iota() < static_cast<S>(rows);
      loss += present ? kl : V{};
      agreeing += (present & (y_s == y_t)) ? O::splat(S(1)) : V{};
      O::store(stats + row, rows, best_s);
      O::store(stats + a.N + row, rows, log_s);
      O::store(stats + 2 * a.N + row, rows, best_t);
      O::store(stats + 3 * a.N + row, rows, log_t);
    }
    sums[0] += O::sum(loss);
    sums[1] += O::sum(agreeing);
  }
}

template <class M>
void distill_backward_tiles(const DistillBackward& a, int64_t begin, int64_t end) {
  using O = Ops<M>;
  using S = typename M::Scalar;
  using V = typename M::Value;
  constexpr int L = M::lanes;
  const S* stats = static_cast<const S*>(a.row_stats);
  const S scale = static_cast<S>(a.inverse_temperature), factor = static_cast<S>(a.factor);
  V s[kTileClasses] = {}, t[kTileClasses];

  for (int64_t row = begin; row < end; row += L) {
    int64_t rows = min_of(L, end - row);
    O::load_tile(a.student, row, rows, a.N, a.C, s);
    O::load_tile(a.teacher, row, rows, a.N, a.C, t);
    V best_s = O::load(stats + row, rows, S(0)), log_s = O::load(stats + a.N + row, rows, S(0));
    V best_t = O::load(stats + 2 * a.N + row, rows, S(0));
    V log_t = O::load(stats + 3 * a.N + row, rows, S(0));
    V shift = best_t - best_s, log_sum_ratio = log_t - log_s;
    for (int64_t k = 0; k < a.C; ++k) {
      V q_s = M::exp((s[k] - best_s) * scale - log_s);
      V q_t = M::exp((t[k] - best_t) * scale - log_t);
      V log_q_ratio = row_math::log_ratio<S>(t[k], s[k], shift, log_sum_ratio, scale);
      s[k] = row_math::kl_gradient<S>(q_t, q_s, log_q_ratio) * factor;
    }
    O::store_tile(s, row, rows, a.C, a.student.dtype, a.grad);
  }
}

template <class M>
void distill_forward_rows(const DistillForward& a, int64_t begin, int64_t end, double* sums,
                          typename M::Scalar* scratch) {
  using O = Ops<M>;
  using S = typename M::Scalar;
  using V = typename M::Value;
  constexpr int L = M::lanes;
  S* stats = static_cast<S*>(a.row_stats);
  const S scale = static_cast<S>(a.inverse_temperature);
  const int64_t padded = (a.C + L - 1) / L * L;
  S* exp_s = scratch;
  S* exp_t = exp_s + padded;

  for (int64_t row = begin; row < end; ++row) {
    const S* s = O::load_row(a.student, row, a.C, exp_t + padded);
    const S* t = O::load_row(a.teacher, row, a.C, exp_t + 2 * padded);
    S best_s, best_t, y_s, y_t;
    O::row_argmax(s, a.C, best_s, y_s);
    O::row_argmax(t, a.C, best_t, y_t);
    S others_s = O::row_exps(s, a.C, best_s, y_s, scale, exp_s);
    S others_t = O::row_exps(t, a.C, best_t, y_t, scale, exp_t);
    S sum_s = others_s + S(1), sum_t = others_t + S(1);
    S log_s = row_math::log1p_corrected<S>(others_s, sum_s, M::log(O::splat(sum_s))[0]);
    S log_t = row_math::log1p_corrected<S>(others_t, sum_t, M::log(O::splat(sum_t))[0]);
    S inverse_s = S(1) / sum_s, inverse_t = S(1) / sum_t;
    V shift = O::splat(best_t - best_s), log_sum_ratio = O::splat(log_t - log_s);
    sums[0] += O::row_sum(a.C, [&](int64_t k, int64_t count) {
      V log_q_ratio = row_math::log_ratio<S>(
          O::load(t + k, count, S(0)), O::load(s + k, count, S(0)), shift, log_sum_ratio, scale);
      return row_math::kl_term<S>(O::load(exp_t + k) * inverse_t, O::load(exp_s + k) * inverse_s,
                                  log_q_ratio);
    });
    sums[1] += y_s == y_t ? 1.0 : 0.0;
    stats[row] = best_s;
    stats[a.N + row] = log_s;
    stats[2 * a.N + row] = best_t;
    stats[3 * a.N + row] = log_t;
  }
}

template <class M>
void distill_backward_rows(const DistillBackward& a, int64_t begin, int64_t end,
                           typename M::Scalar* scratch) {
  using O = Ops<M>;
  using S = typename M::Scalar;
  using V = typename M::Value;
  constexpr int L = M::lanes;
  const S* stats = static_cast<const S*>(a.row_stats);
  const S scale = static_cast<S>(a.inverse_temperature), factor = static_cast<S>(a.factor);
  const int64_t padded = (a.C + L - 1) / L * L;

  for (int64_t row = begin; row < end; ++row) {
    const S* s = O::load_row(a.student, row, a.C, scratch);
    const S* t = O::load_row(a.teacher, row, a.C, scratch + padded);
    S best_s = stats[row], log_s = stats[a.N + row];
    S best_t = stats[2 * a.N + row], log_t = stats[3 * a.N + row];
    V shift = O::splat(best_t - best_s), log_sum_ratio = O::splat(log_t - log_s);
    S* out = O::output_row(a.student.dtype, a.grad, row, a.C, scratch + 2 * padded);
    for (int64_t k = 0; k < a.C; k += L) {
      V student = O::load(s + k, a.C - k, S(0)), teacher = O::load(t + k, a.C - k, S(0));
      V q_s = M::exp((student - best_s) * scale - log_s);
      V q_t = M::exp((teacher - best_t) * scale - log_t);
      V log_q_ratio = row_math::log_ratio<S>(teacher, student, shift, log_sum_ratio, scale);
      O::store(out + k, a.C - k, row_math::kl_gradient<S>(q_t, q_s, log_q_ratio) * factor);
    }
    if (out == scratch + 2 * padded) O::store_row(out, row, a.C, a.student.dtype, a.grad);
  }
}

template <class M>
void distill_forward(const DistillForward& a, int64_t begin, int64_t end, double* sums,
                     void* scratch) {
  if (a.C <= kTileClasses) return distill_forward_tiles<M>(a, begin, end, sums);
  distill_forward_rows<M>(a, begin, end, sums, static_cast<typename M::Scalar*>(scratch));
}

template <class M>
void distill_backward(const DistillBackward& a, int64_t begin, int64_t end, void* scratch) {
  if (a.C <= kTileClasses) return distill_backward_tiles<M>(a, begin, end);
  distill_backward_rows<M>(a, begin, end, static_cast<typename M::Scalar*>(scratch));
}
