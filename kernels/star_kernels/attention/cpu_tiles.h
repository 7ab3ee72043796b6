// What the forward, the backward and the step of attention share: masks, packed tiles, and the softmax of one row.
//
// Axes: B batch, T tokens, H query heads, D width of queries and keys, E width of values. The softmax's weights are
// 2^(c (s - top)) with c >= 0, where s is the product q . k or, where that needs a transform, the scaled and capped
// score, and `top` the largest s of the row: a row that sees one key has the weight 1 exactly.
#pragma once

#include <cstring>
#include <vector>

#include "native/star.h"

namespace star {
namespace tiles {

// Queries and keys of a tile: a map of 64 x 128 and one tile of each operand stay in the second-level cache; wider
// tiles gain nothing (see bench/LOG.md).
constexpr int64_t kQueries = 64;
constexpr int64_t kKeys = 128;
// Where the mask's edge crosses a tile, its rows are taken in strips this high, each cut to the keys that it sees.
constexpr int64_t kEdge = 16;
// Distance of a map's rows, and of the columns of a transposed tile: not a multiple of 128, whose rows would share the
// same few sets of the first-level cache.
constexpr int64_t kRow = kKeys + 16;

constexpr double kLog2E = 1.442695040888963407;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// 2^x for x <= 0 or little above it: 1.5 ULP, 0 below -149.5, NaN for NaN.
#ifndef STAR_PLAIN
inline VecF power_of_2(VecF x) {
  x = max(VecF(-151.0f), x);
  const VecF n = round_even(x);
  const VecF r = x - n;
  // 2^r = 1 + r q(r) for |r| <= 1/2, relative error 2^-28.5 before rounding.
  VecF q(0.00015594678f);
  q = fma(q, r, VecF(0.0013406643f));
  q = fma(q, r, VecF(0.009617693f));
  q = fma(q, r, VecF(0.055503104f));
  q = fma(q, r, VecF(0.24022652f));
  q = fma(q, r, VecF(0.69314724f));
  return scale_by_power_of_2(fma(q, r, VecF(1.0f)), n);
}
#endif
template <class T> inline VecS<T> power_of_2(VecS<T> x) { return std::exp2(x.v); }
template <class V> inline typename V::Scalar power_of_2_of(typename V::Scalar x) {
  return reduce_max(power_of_2(V(x)));
}

// One sequence's tokens: those of a row of the batch, or a part of the one packed row.
struct Sequence {
  int64_t batch, query, queries, key, keys;
};

// Which keys a query sees: a range that moves right with the query.
struct Mask {
  int64_t queries, keys;
  bool causal;
  int64_t window;  // 0: none

  Mask(const Sequence& one, bool is_causal, int64_t window_size)
      : queries(one.queries), keys(one.keys), causal(is_causal),
        window(window_size > 0 && window_size < one.keys ? window_size : 0) {}

  int64_t begin(int64_t i) const { return window > 0 ? larger(0, i + 1 + keys - queries - window) : 0; }
  int64_t end(int64_t i) const { return causal ? larger(0, i + 1 + keys - queries) : keys; }
  // The queries that see key j or a later one begin here; those that see it or an earlier one end here.
  int64_t first_query(int64_t j) const { return causal ? larger(0, j - (keys - queries)) : 0; }
  int64_t last_query(int64_t j) const { return window > 0 ? smaller(queries, j + window - (keys - queries)) : queries; }
};

// The tokens of a tensor (B, T, H, D) whose last axis is contiguous, by head.
template <class T> struct Heads {
  const T* data;
  int64_t batch, token, head;

  explicit Heads(const Tensor& x)
      : data(x.data<T>()), batch(x.stride(0)), token(x.stride(1)), head(x.stride(2)) {}
  const T* at(int64_t b, int64_t t, int64_t h) const { return data + b * batch + t * token + h * head; }
};

// From a product q . k to the exponent of 2.
template <class W> struct Scores {
  W scale, cap;    // cap 0: none
  W c;             // natural scores to log2 units, and `scale` where the products are left as they are
  bool transform;  // the products are replaced by the scores: a sink, a cap or a sign cannot wait until later

  Scores(double scale_, double cap_, bool has_sinks)
      : scale(static_cast<W>(scale_)), cap(static_cast<W>(cap_)), transform(has_sinks || cap_ > 0 || scale_ < 0) {
    c = static_cast<W>(transform ? kLog2E : scale_ * kLog2E);
  }
  // Scores for products, in place.
  template <class V> void apply(W* s, int64_t width) const {
    const V factor(scale), bound(cap), inverse(cap > 0 ? scale / cap : W(0));
    if (cap > 0) {
      sweep<V>(width, [=](int64_t x, auto lanes) { (bound * tanh(V::load(s + x, lanes) * inverse)).store(s + x, lanes); });
    } else {
      sweep<V>(width, [=](int64_t x, auto lanes) { (factor * V::load(s + x, lanes)).store(s + x, lanes); });
    }
  }
};

// What a row's scores are counted from: 0 where all were -inf, whose weights are then 0 and not NaN.
template <class W> inline W finite_top(W top) { return top == -static_cast<W>(__builtin_inf()) ? W(0) : top; }

struct AllLanes {
  template <class V> V keep(V value, V) const { return value; }
};
struct SomeLanes {
  int64_t from, to;  // visible lanes
  template <class V> V keep(V value, V other) const {
    using W = typename V::Scalar;
    const V lane = V::iota();
    return select((lane >= V(static_cast<W>(from))) & (lane < V(static_cast<W>(to))), value, other);
  }
};

// Call body(x, lanes) for the vectors that hold columns [a, b) of a row. Vectors begin at multiples of V::N whatever a
// is, so that a row's sums do not depend on where its tile was cut; whole vectors are read and written.
template <class V, class F> inline __attribute__((always_inline)) void visible(int64_t a, int64_t b, F&& body) {
  for (int64_t x = a / V::N * V::N; x < b; x += V::N) {
    if (x >= a && x + V::N <= b) {
      body(x, AllLanes{});
    } else {
      body(x, SomeLanes{a - x, b - x});
    }
  }
}

// Zeros in the vectors of columns [begin, end) that `visible(a, b)` does not reach; `begin` is a whole vector's.
template <class V> inline void clear_hidden(typename V::Scalar* row, int64_t a, int64_t b, int64_t begin, int64_t end) {
  const int64_t first = a < b ? a / V::N * V::N : end;
  for (int64_t x = begin; x < first; x += V::N) V(0).store(row + x);
  if (a >= b) return;
  for (int64_t x = (b + V::N - 1) / V::N * V::N; x < end; x += V::N) V(0).store(row + x);
}

// Replace a row's scores by weights 2^(c (s - top)), 0 where hidden, and bring `top` and `sum` up to date. Returns the
// factor that what was summed before must be multiplied with (1 where nothing was).
template <class V>
inline typename V::Scalar softmax_row(typename V::Scalar* s, int64_t a, int64_t b, int64_t begin, int64_t end,
                                      typename V::Scalar c, typename V::Scalar& top, typename V::Scalar& sum) {
  using W = typename V::Scalar;
  constexpr W kLowest = -static_cast<W>(__builtin_inf());
  clear_hidden<V>(s, a, b, begin, end);
  if (a >= b) return 1;
  V most(kLowest);
  visible<V>(a, b, [&](int64_t x, auto lanes) { most = max(lanes.keep(V::load(s + x), V(kLowest)), most); });
  const W best = reduce_max(most);
  W factor = 1;
  if (best > top) {
    if (top > kLowest) factor = power_of_2_of<V>(c * (top - best));
    top = best;
  }
  const V slope(c), shift(finite_top(top));
  V total(0);
  visible<V>(a, b, [&](int64_t x, auto lanes) {
    const V weight = lanes.keep(power_of_2((V::load(s + x) - shift) * slope), V(0));
    weight.store(s + x);
    total = total + weight;
  });
  sum = fma(VecS<W>(sum), VecS<W>(factor), VecS<W>(reduce_add(total))).v;
  return factor;
}

// rows x width of `in`, `stride` apart, to adjacent rows. Returns whether every number is finite.
template <class T> bool pack_rows(const T* in, int64_t stride, int64_t rows, int64_t width, Wide<T>* out) {
  using V = Vec<T>;
  const V bound(static_cast<Wide<T>>(__builtin_inf()));
  auto finite = V(0) < bound;  // a mask's & takes one cycle from one vector to the next, where a sum takes four
  for (int64_t r = 0; r < rows; ++r) {
    sweep<V>(width, [&](int64_t x, auto lanes) {
      const V value = V::load(in + r * stride + x, lanes);
      finite = finite & (abs(value) < bound);
      value.store(out + r * width + x, lanes);
    });
  }
  return !any(~finite);
}

// block[x] lane r: element x of row r, for up to N rows, `stride` apart, of up to N elements.
template <class T, class V, class L>
inline __attribute__((always_inline)) void load_columns(const T* in, int64_t stride, int64_t rows, L lanes,
                                                        V (&block)[V::N]) {
  STAR_UNROLL for (int t = 0; t < V::N; ++t) block[t] = t < rows ? V::load(in + t * stride, lanes) : V(0);
  transpose(block);
}

// The transpose of the same, width x rows with its rows kRow apart.
template <class T> void pack_columns(const T* in, int64_t stride, int64_t rows, int64_t width, Wide<T>* out) {
  using V = Vec<T>;
  constexpr int N = V::N;
  for (int64_t r = 0; r < rows; r += N) {
    sweep<V>(width, [&](int64_t x, auto lanes) {
      V block[N];
      load_columns(in + r * stride + x, stride, rows - r, lanes, block);
      STAR_UNROLL for (int t = 0; t < N; ++t) {
        if (x + t < width) block[t].store(out + (x + t) * kRow + r);
      }
    });
  }
}

// The part of a map tile that some query sees, as rectangles: the columns that every row sees as one, those beside them
// in strips. A row's rectangles follow one another from left to right, and a column's from top to bottom, so that every
// sum over a row or a column is taken in order. Rows count from the tile's first query, columns from its first key.
template <class V> struct Pieces {
  static constexpr int64_t kStrips = kQueries / kEdge;
  struct Piece {
    int64_t row, rows, column, columns;
    bool crossed;  // some of its pairs are hidden
  };
  Piece piece[2 * kStrips + 1];
  int count = 0;
  int64_t begin[kStrips], end[kStrips];  // the columns of each strip, from a whole vector on

  Pieces(const Mask& mask, int64_t first, int64_t last, int64_t key, int64_t keys) {
    const int64_t rows = last - first;
    int64_t from = (larger(0, mask.begin(last - 1) - key) + V::N - 1) / V::N * V::N;
    int64_t to = smaller(keys, mask.end(first) - key);
    if (to < keys) to = to / V::N * V::N;
    if (from >= to) from = to = 0;
    for (int64_t i = 0; i < rows; i += kEdge) {
      begin[i / kEdge] = larger(0, mask.begin(first + i) - key) / V::N * V::N;
      end[i / kEdge] = smaller(keys, mask.end(first + smaller(i + kEdge, rows) - 1) - key);
    }
    for (int64_t i = 0; i < rows; i += kEdge) {
      add(i, smaller(kEdge, rows - i), begin[i / kEdge], smaller(from, end[i / kEdge]), true);
    }
    add(0, rows, from, to, false);
    for (int64_t i = 0; i < rows; i += kEdge) {
      add(i, smaller(kEdge, rows - i), larger(to, begin[i / kEdge]), end[i / kEdge], true);
    }
  }
  const Piece* first_piece() const { return piece; }
  const Piece* last_piece() const { return piece + count; }

 private:
  void add(int64_t row, int64_t rows, int64_t column, int64_t stop, bool crossed) {
    if (column < stop) piece[count++] = {row, rows, column, stop - column, crossed};
  }
};

// C += A B where A (m x k) is 0 wherever the mask hides and `finite` says that B (rows n apart) holds no NaN or
// infinity. Where it does, zero times those is not zero, so each row of C takes the rows [begin(row), end(row)) of B
// that it sees alone. The bits are the same, since adding 0 changes no number.
template <class W, class Begin, class End>
void multiply_visible(bool finite, int64_t m, int64_t n, int64_t k, Matrix<W> a, const W* b, W* c, int64_t c_row,
                      Begin&& begin, End&& end) {
  if (finite) return gemm<W, W>(m, n, k, a, {b, n, 1}, c, c_row, true);
  for (int64_t i = 0; i < m; ++i) {
    const int64_t from = larger(0, begin(i)), to = smaller(k, end(i));
    if (from >= to) continue;
    gemm<W, W>(1, n, to - from, {a.data + i * a.row + from * a.column, a.row, a.column}, {b + from * n, n, 1},
               c + i * c_row, c_row, true);
  }
}

template <class W> inline void clear(W* data, int64_t count) {
  if (count > 0) std::memset(data, 0, static_cast<size_t>(count) * sizeof(W));
}

// What the operators take, checked.
struct Problem {
  std::vector<Sequence> sequences;
  int64_t heads, key_heads, group, width, value_width;
  bool causal;
  int64_t window;

  Problem(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& ends_q, const Tensor& ends_k, bool is_causal,
          int64_t window_size);
  Mask mask(const Sequence& one) const { return Mask(one, causal, window); }
};

// The dtype of sums for a tensor's activations.
inline DType wide_of(const Tensor& x) { return x.dtype() == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

// A parameter of one number a head, or one for all, as (H,) in the dtype of sums; nothing for nothing.
Tensor wide_heads(const Tensor& parameter, const Tensor& q, const char* message);

void check_second_map(const Tensor& q1, const Tensor& k1, const Tensor& q2, const Tensor& k2);

// body(task) for all tasks, on the threads if the multiply-adds are worth it: one core makes 2.5e5 while another wakes.
template <class F> void run_tasks(int64_t count, int64_t multiply_adds, F&& body) {
  if (count > 1 && multiply_adds > 500000) return parallel_tasks(count, body);
  for (int64_t task = 0; task < count; ++task) body(task);
}

}  // namespace tiles
}  // namespace star
