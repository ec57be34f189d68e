// Products of bf16 units (pairs) by ARM's bfmmla, which multiplies 2 x 4 values with 4 x 2: two
// rows, two columns, and two steps of the sum at a time. Included by winograd.inl.

template <class M, int R>
DAFL_HD void multiply_rows(Operand<M> a, Operand<M> b, int64_t steps, bool add, float* sums) {
  constexpr int64_t width = Panel<M>::width;
  constexpr int kPairs = (R + 1) / 2;  // of rows; an odd last row is taken twice
  // [rows 2p and 2p + 1][of two columns each: row 2p's sums, row 2p + 1's]
  F32 sum[kPairs][2 * kVectors];
  const auto zip = [](F32 x, F32 y, F32& lower, F32& upper) {  // halves, 2 x 2
    const auto p = bit_cast<float64x2_t>(x), q = bit_cast<float64x2_t>(y);
    lower = bit_cast<F32>(vzip1q_f64(p, q));
    upper = bit_cast<F32>(vzip2q_f64(p, q));
  };
  DAFL_UNROLL
  for (int p = 0; p < kPairs; ++p) {
    const float* rows[2] = {sums + 2 * p * width,
                            sums + (2 * p + 1 < R ? 2 * p + 1 : 2 * p) * width};
    DAFL_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const F32 first = add ? load<F32>(rows[0] + v * M::lanes) : F32{};
      const F32 second = add ? load<F32>(rows[1] + v * M::lanes) : F32{};
      zip(first, second, sum[p][2 * v], sum[p][2 * v + 1]);
    }
  }
  for (int64_t step = 0; step < steps; step += 2, a.at += 2 * a.step, b.at += 2 * b.step) {
    const bool both = step + 1 < steps;
    bfloat16x8_t left[kPairs];
    DAFL_UNROLL
    for (int p = 0; p < kPairs; ++p) {
      const uint32_t* first = a.at + 2 * p * a.apart;
      const uint32_t* second = 2 * p + 1 < R ? first + a.apart : first;
      left[p] = bit_cast<bfloat16x8_t>(
          U32{*first, both ? first[a.step] : 0, *second, both ? second[a.step] : 0});
    }
    DAFL_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const uint32_t* columns = b.at + v * b.apart;
      const auto now = load<uint32x4_t>(columns);
      const auto next = both ? load<uint32x4_t>(columns + b.step) : uint32x4_t{};
      const auto lower = bit_cast<bfloat16x8_t>(vzip1q_u32(now, next));
      const auto upper = bit_cast<bfloat16x8_t>(vzip2q_u32(now, next));
      DAFL_UNROLL
      for (int p = 0; p < kPairs; ++p) {
        F32* to = sum[p] + 2 * v;
        to[0] = bit_cast<F32>(vbfmmlaq_f32(bit_cast<float32x4_t>(to[0]), left[p], lower));
        to[1] = bit_cast<F32>(vbfmmlaq_f32(bit_cast<float32x4_t>(to[1]), left[p], upper));
      }
    }
  }
  DAFL_UNROLL
  for (int p = 0; p < kPairs; ++p) {
    DAFL_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      F32 first, second;
      zip(sum[p][2 * v], sum[p][2 * v + 1], first, second);
      store(sums + 2 * p * width + v * M::lanes, first);
      if (2 * p + 1 < R) store(sums + (2 * p + 1) * width + v * M::lanes, second);
    }
  }
}
