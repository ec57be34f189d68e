// 3x3 convolution to few channels: see ../layers/norm_image_conv.cpp.

template <class M>
void sum_shifted(const ImageConv& a, const void* planes_, const void* bias_, void* y_,
                 void* scratch) {
  using T = typename M::T;
  using V = typename M::V;
  using S = typename M::S;
  const int64_t H = a.H, W = a.W, plane = a.images * H * W, width = W + 32;
  // One row per column of taps, each with a zero before its first element and after its last, and
  // room for the rest of a vector that begins within it.
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
