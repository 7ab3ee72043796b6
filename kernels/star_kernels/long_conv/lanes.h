// V::N channels side by side: how they are brought into columns of vectors, [token][lane], and the convolution there
// token by token, which costs tokens x taps but no rounding beyond the sums'.
#pragma once

#include "native/star.h"

namespace star::long_convolution {

// Rows (B, T) of a tensor (B, T, D) whose last axis is contiguous; null where the tensor is absent.
template <class T> struct Rows3 {
  T* data = nullptr;
  int64_t batch = 0, token = 0;

  Rows3() = default;
  explicit Rows3(const Tensor& tensor) {
    if (!tensor.defined()) return;
    data = const_cast<T*>(tensor.data<std::remove_const_t<T>>());
    batch = tensor.stride(0);
    token = tensor.stride(1);
  }
  // From this token and channel on; null stays null.
  Rows3 from(int64_t b, int64_t t, int64_t channel) const {
    Rows3 moved = *this;
    if (data != nullptr) moved.data += b * batch + t * token + channel;
    return moved;
  }
  T* at(int64_t t) const { return data + t * token; }

  // A block of channels takes one cache line of each row, and the rows are too far apart for the processor to see the
  // pattern: ask for the rows to come. Without it the backward at B 4, T 128, D 768 takes twice as long.
  static constexpr int64_t kAhead = 16;
  void expect(int64_t t, int64_t length) const {
    if (t + kAhead < length) __builtin_prefetch(at(t + kAhead), std::is_const_v<T> ? 0 : 1);
  }
};

// Call body(Full) or body(Lanes) for a block of `channels` <= V::N channels.
template <class V, class F> inline void with_lanes(int64_t channels, F&& body) {
  if (V::N == 1 || channels == V::N) {
    body(Full{});
  } else if constexpr (V::N > 1) {
    body(Lanes{static_cast<int>(channels)});
  }
}

// Zero in lanes where every number was finite, NaN in the others.
template <class V> struct Poison {
  V sum = V(0);
  void see(V x) { sum = fma(x, V(0), sum); }
  auto mask() const { return ~(sum == V(0)); }
  bool any_lane() const { return any(mask()); }
};

// column[t] = x_t gate_t for t < length (or with time reversed), and zero up to `padded`.
template <class T, class V>
Poison<V> stage(Rows3<const T> x, Rows3<const T> gate, int64_t length, int64_t padded, int64_t channels, bool reversed,
                typename V::Scalar* column) {
  Poison<V> poison;
  const int64_t step = reversed ? -V::N : V::N;
  typename V::Scalar* out = column + (reversed ? (length - 1) * V::N : 0);
  with_lanes<V>(channels, [&](auto lanes) {
    if (gate.data != nullptr) {
      for (int64_t t = 0; t < length; ++t, out += step) {
        x.expect(t, length);
        gate.expect(t, length);
        const V value = V::load(x.at(t), lanes) * V::load(gate.at(t), lanes);
        poison.see(value);
        value.store(out);
      }
    } else {
      for (int64_t t = 0; t < length; ++t, out += step) {
        x.expect(t, length);
        const V value = V::load(x.at(t), lanes);
        poison.see(value);
        value.store(out);
      }
    }
  });
  for (int64_t t = length; t < padded; ++t) V(0).store(column + t * V::N);
  return poison;
}

// column[j] = taps[.][j] for j < count of `channels` filters `row` apart, and zero up to `padded`.
template <class V>
Poison<V> stage_taps(const typename V::Scalar* taps, int64_t row, int64_t count, int64_t padded, int64_t channels,
                     typename V::Scalar* column) {
  Poison<V> poison;
  sweep<V>(count, [&](int64_t j, auto lanes) {
    V block[V::N];
    STAR_UNROLL for (int c = 0; c < V::N; ++c) block[c] = c < channels ? V::load(taps + c * row + j, lanes) : V(0);
    transpose(block);
    const int64_t height = count - j < V::N ? count - j : V::N;
    for (int64_t t = 0; t < height; ++t) {
      poison.see(block[t]);
      block[t].store(column + (j + t) * V::N);
    }
  });
  for (int64_t t = count; t < padded; ++t) V(0).store(column + t * V::N);
  return poison;
}

// The way back: taps[.][j] = column[j] for j < count.
template <class V>
void unstage_taps(const typename V::Scalar* column, int64_t count, int64_t channels, typename V::Scalar* taps,
                  int64_t row) {
  sweep<V>(count, [&](int64_t j, auto lanes) {
    const int64_t height = count - j < V::N ? count - j : V::N;
    V block[V::N];
    STAR_UNROLL for (int t = 0; t < V::N; ++t) block[t] = t < height ? V::load(column + (j + t) * V::N) : V(0);
    transpose(block);
    for (int64_t c = 0; c < channels; ++c) block[c].store(taps + c * row + j, lanes);
  });
}

// out[n] = sum over m of a[m] b[n - m] for begin <= n < end, a and b columns of la and lb tokens. What lies outside a
// and b is not multiplied, so that NaN moves forward only. Each sum is one chain over rising m.
template <class V>
void convolve_directly(const typename V::Scalar* a, int64_t la, const typename V::Scalar* b, int64_t lb, int64_t begin,
                       int64_t end, typename V::Scalar* out) {
  constexpr int kOutputs = V::N == 8 ? 6 : 8;  // sums in registers: as many as leave room for the window of b
  constexpr int kSteps = V::N == 8 ? 2 : 4;
  const auto edge = [&](V(&sum)[kOutputs], int64_t n, int64_t from, int64_t to) {
    for (int64_t m = from; m < to; ++m) {
      const V factor = V::load(a + m * V::N);
      STAR_UNROLL for (int r = 0; r < kOutputs; ++r) {
        const int64_t at = n + r - m;
        if (at >= 0 && at < lb) sum[r] = fma(factor, V::load(b + at * V::N), sum[r]);
      }
    }
  };
  for (int64_t n = begin; n < end; n += kOutputs) {
    V sum[kOutputs];
    STAR_UNROLL for (int r = 0; r < kOutputs; ++r) sum[r] = V(0);
    // All of a's tokens that any output sees, and those that all outputs see.
    const int64_t first = n - lb + 1 > 0 ? n - lb + 1 : 0;
    const int64_t last = n + kOutputs < la ? n + kOutputs : la;
    int64_t m = n + kOutputs - lb > 0 ? n + kOutputs - lb : 0;
    const int64_t stop = n + 1 < la ? n + 1 : la;
    if (m >= stop) {
      edge(sum, n, first, last);
    } else {
      edge(sum, n, first, m);
      for (; m + kSteps <= stop; m += kSteps) {
        V window[kOutputs + kSteps - 1];
        STAR_UNROLL for (int i = 0; i < kOutputs + kSteps - 1; ++i) {
          window[i] = V::load(b + (n - m - (kSteps - 1) + i) * V::N);
        }
        STAR_UNROLL for (int s = 0; s < kSteps; ++s) {
          const V factor = V::load(a + (m + s) * V::N);
          STAR_UNROLL for (int r = 0; r < kOutputs; ++r) sum[r] = fma(factor, window[r + kSteps - 1 - s], sum[r]);
        }
      }
      for (; m < stop; ++m) {
        const V factor = V::load(a + m * V::N);
        STAR_UNROLL for (int r = 0; r < kOutputs; ++r) {
          sum[r] = fma(factor, V::load(b + (n + r - m) * V::N), sum[r]);
        }
      }
      edge(sum, n, m, last);
    }
    const int64_t count = end - n < kOutputs ? end - n : kOutputs;
    STAR_UNROLL for (int r = 0; r < kOutputs; ++r) {
      if (r < count) sum[r].store(out + (n - begin + r) * V::N);
    }
  }
}

}  // namespace star::long_convolution
