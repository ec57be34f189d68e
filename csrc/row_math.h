// The mathematics of one row, shared by the CPU and the CUDA kernels.
//
// Every function is a template over a scalar type S (float or double) and a value type V, which is
// S itself on a GPU thread and a vector of S on the CPU. `c ? a : b` selects lane by lane on a
// vector, so one text serves both. Include matrix.h first, for DAFL_HD. Nothing here includes
// anything or calls libm: the CPU files compile this header with wide instructions and must not
// emit such code for shared functions.
//
// Notation (one row): t, s teacher and student logits, m = max_k t_k, y = lowest-index argmax,
// e_k = exp(t_k - m), d' = sum_{k != y} e_k, p_k = e_k / (1 + d'), p_bar = batch mean of p.
#pragma once

namespace dafl {
namespace row_math {

// log(1 + x) from u = fl(1 + x) and log(u). The correction restores what rounding u lost, so the
// result keeps its relative accuracy when x is far below the epsilon (a confident teacher).
template <class S, class V = S>
DAFL_HD V log1p_corrected(V x, V u, V log_u) {
  return log_u + (x - (u - S(1))) / u;
}

// What class k adds to d': e_k, except for k = y. There it is t_y - m, which is 0 for finite
// logits and NaN for +inf or NaN ones, so that those are not lost with the excluded term.
template <class V, class Mask>
DAFL_HD V others_term(Mask is_argmax, V shifted, V exp_shifted) {
  return is_argmax ? shifted : exp_shifted;
}

// d total / d t_k = one_hot (p_k - [k = y]) + p_k (slope_k - sum_c p_c slope_c), with
//   one_hot = w_oh / N * upstream,   slope_k = w_ie / (N ln b) * upstream * (log p_bar_k - const).
// The y-th one-hot term is taken as -d' / (1 + d'): p_y - 1 would cancel. Slopes come
// less slope_y, which changes no gradient: else the y-th difference would cancel, too, for p_y
// close to 1.
template <class V, class Mask, class S>
DAFL_HD V generator_gradient(Mask is_argmax, V p, V slope, V mean_slope, V others, V inverse,
                             S one_hot) {
  V pull = is_argmax ? -(others * inverse) : p;
  return pull * one_hot + p * (slope - mean_slope);
}

// The same where it is the argmax's: p_y (slope_y - sum_c p_c slope_c) is -p_y gap, with
//   gap = sum_c p_c (slope_c - slope_y),   p_y = inverse
// A saturated row's gap is tiny, and the difference of the two sums that it is would cancel.
template <class V, class S>
DAFL_HD V argmax_gradient(V others, V inverse, V gap, S one_hot) {
  return -(others * inverse) * one_hot - inverse * gap;
}

// f(a) = a + exp(-a) - 1 >= 0 for |a| < 1/2, from its series (8e-7 in fp32): no cancellation.
template <class S, class V = S>
DAFL_HD V kl_excess(V a) {
  V series = a * S(-1.0 / 5040) + S(1.0 / 720);
  if (sizeof(S) == 8) {
    series = a * S(-1.0 / 1307674368000.0) + S(1.0 / 87178291200.0);
    series = series * a + S(-1.0 / 6227020800.0);
    series = series * a + S(1.0 / 479001600);
    series = series * a + S(-1.0 / 39916800);
    series = series * a + S(1.0 / 3628800);
    series = series * a + S(-1.0 / 362880);
    series = series * a + S(1.0 / 40320);
    series = series * a + S(-1.0 / 5040);
    series = series * a + S(1.0 / 720);
  }
  series = series * a + S(-1.0 / 120);
  series = series * a + S(1.0 / 24);
  series = series * a + S(-1.0 / 6);
  series = series * a + S(1.0 / 2);
  return series * a * a;
}

// a_k = log q_t - log q_s. The logits are subtracted first, so equal ones give exactly 0 and close
// ones a small exact number; what is left of the log-sums' rounding enters KL in second order only.
//   shift = m_t - m_s,   log_ratio = log d_t - log d_s
template <class S, class V = S>
DAFL_HD V log_ratio(V t, V s, V shift, V log_sum_ratio, S inverse_temperature) {
  return ((t - s) - shift) * inverse_temperature - log_sum_ratio;
}

// One class's share of KL(q_t || q_s) = sum_k q_t f(a) (the sums of q_t and q_s are equal).
// Where q_t = 0 that is q_s, whatever a is.
template <class S, class V = S>
DAFL_HD V kl_term(V q_t, V q_s, V a) {
  V near = q_t * kl_excess<S, V>(a);
  V far = (q_t * a - q_t) + q_s;
  V term = ((a < S(0.5)) & (a > S(-0.5))) ? near : far;
  return q_t == S(0) ? q_s : term;
}

// q_s - q_t, as q_t (exp(-a) - 1) where the two are close.
template <class S, class V = S>
DAFL_HD V kl_gradient(V q_t, V q_s, V a) {
  V near = q_t * (kl_excess<S, V>(a) - a);
  V far = q_s - q_t;
  return ((a < S(0.5)) & (a > S(-0.5))) ? near : far;
}

}  // namespace row_math
}  // namespace dafl
