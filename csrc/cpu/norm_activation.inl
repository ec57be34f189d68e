// BatchNorm with batch statistics, then LeakyReLU: see ../layers/norm.h.

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

// What writes goes row by row, since memory is read and written fastest in one piece; so values of
// many channels are needed at a time, with whole vectors of them.
constexpr int64_t kRowChannels = 256;

template <class M>
struct ChannelValues {
  alignas(64) typename M::S values[kRowChannels];

  ChannelValues(const void* from, int64_t c, int64_t C) {
    for (int64_t k = 0; k < kRowChannels && c + k < C; k += M::lanes) {
      store(values + k, channel<M>(from, c + k, C - c - k));
    }
  }
  DAFL_HD typename M::V at(int64_t k) const { return load<typename M::V>(values + k); }
};

template <class M>
void norm_activation(const NormActivation& a, const void* x_, void* y_) {
  using T = typename M::T;
  using V = typename M::V;
  using S = typename M::S;
  const S slope = static_cast<S>(a.slope);
  for (int64_t c = 0; c < a.C; c += kRowChannels) {
    const int64_t channels = min_of(kRowChannels, a.C - c);
    const ChannelValues<M> scale(a.scale, c, a.C), shift(a.shift, c, a.C);
    const T* x = static_cast<const T*>(x_) + c;
    T* y = static_cast<T*>(y_) + c;
    for (int64_t r = 0; r < a.rows; ++r, x += a.C, y += a.C) {
      for (int64_t k = 0; k < channels; k += M::lanes) {
        const V z = M::get(x + k, channels - k) * scale.at(k) + shift.at(k);
        M::put(y + k, z > 0 ? z : z * slope, channels - k);
      }
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
  for (int64_t c = 0; c < a.C; c += kRowChannels) {
    const int64_t channels = min_of(kRowChannels, a.C - c);
    const ChannelValues<M> scale(a.scale, c, a.C), shift(a.shift, c, a.C);
    const ChannelValues<M> by_x(by_x_, c, a.C), constant(constant_, c, a.C);
    const T* x = static_cast<const T*>(x_) + c;
    const T* grad = static_cast<const T*>(grad_) + c;
    T* grad_x = static_cast<T*>(grad_x_) + c;
    for (int64_t r = 0; r < a.rows; ++r, x += a.C, grad += a.C, grad_x += a.C) {
      for (int64_t k = 0; k < channels; k += M::lanes) {
        const int64_t count = channels - k;
        const V value = M::get(x + k, count), g = M::get(grad + k, count);
        const V before = value * scale.at(k) + shift.at(k) > 0 ? g : g * slope;
        M::put(grad_x + k, before * scale.at(k) + (value * by_x.at(k) + constant.at(k)), count);
      }
    }
  }
}
