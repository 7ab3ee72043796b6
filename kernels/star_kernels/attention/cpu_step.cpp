// One new token's attention to a cache: each key and value is read once, for all the query heads that share it.
#include "attention/cpu_tiles.h"

namespace star {
namespace {

using namespace tiles;

// Keys of a part that is finished by itself, so that a long cache is shared out; the parts are joined in order.
constexpr int64_t kPart = 512;
// Keys whose values pass through the first-level cache once for all query heads.
constexpr int64_t kStrip = 32;

template <class T> struct Step {
  using W = Wide<T>;
  using V = Vec<T>;
  // Query heads that share a pass over their keys and values.
  static constexpr int kShared = V::N < 4 ? 1 : 4;
  // Where heads share a pass: tokens from the rows that are read to those that are asked for meanwhile, 0 for none. With
  // eight lanes a tenth of the pass is waiting for the second-level cache. A line is asked for between the multiply-adds;
  // a block's lines at once, rows that one head reads alone, or bfloat16 cost more than they gain.
  static constexpr int64_t kAhead = V::N == 8 && sizeof(T) == sizeof(float) ? 8 : 0;
  // Elements and vectors in a cache line.
  static constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T)), kTurns = kLine / V::N;

  Scores<W> scores;
  const T* q;  // (B, H, D)
  int64_t q_batch, q_head;
  Heads<T> k, v;
  const W* sinks;
  int64_t group, width, value_width;

  // The queries of key heads [head, end) against keys [first, last). Each head's result: acc (group, E), then tops and
  // sums. Tokens outside, heads inside: the cache is read in the order in which it lies.
  void part(int64_t b, int64_t head, int64_t end, int64_t first, int64_t last, W* results) const {
    constexpr int64_t kRoom = kPart + V::N;
    const int64_t count = last - first, queries = (end - head) * group, stride = group * (value_width + 2);
    Scratch scratch;
    W* own_q = scratch.get<W>(queries * width);
    W* weights = scratch.get<W>(queries * kRoom);
    pack_rows(q + b * q_batch + head * group * q_head, q_head, queries, width, own_q);
    for (int64_t j = 0; j < count; j += V::N) {
      const int64_t here = smaller(V::N, count - j);
      each_head(head, end, [&](auto some, int64_t key_head, int64_t r) {
        const T* keys = k.at(b, first + j, key_head);
        const W* query = own_q + r * width;
        W* row = weights + r * kRoom + j;
        if (some > 1 && here == V::N) return shared_products<some>(keys, query, row, kRoom);
        for (int g = 0; g < some; ++g) products(keys, here, query + g * width).store(row + g * kRoom);
      });
    }
    for (int64_t r = 0; r < queries; ++r) {
      W* row = weights + r * kRoom;
      W* result = results + r / group * stride;
      W* state = result + group * value_width + r % group;
      state[0] = -static_cast<W>(__builtin_inf()), state[group] = 0;
      if (scores.transform) scores.template apply<V>(row, count);
      softmax_row<V>(row, 0, count, 0, count, scores.c, state[0], state[group]);
      for (int64_t x = 0; x < value_width; ++x) result[r % group * value_width + x] = 0;
    }
    for (int64_t j = 0; j < count; j += kStrip) {
      const int64_t here = smaller(kStrip, count - j);
      each_head(head, end, [&](auto some, int64_t key_head, int64_t r) {
        const T* values = v.at(b, first + j, key_head);
        const W* row = weights + r * kRoom + j;
        W* acc = results + (key_head - head) * stride + r % group * value_width;
        if (some > 1) return shared_sums<some>(row, kRoom, values, here, acc);
        accumulate(row, values, here, acc);
      });
    }
  }

  // Call function(number of queries, key head, index of the first) for the queries of key heads [head, end), as many as
  // share a pass over their keys and values at a time.
  template <class F> void each_head(int64_t head, int64_t end, F&& function) const {
    for (int64_t h = head; h < end; ++h) {
      int64_t r = (h - head) * group;
      const int64_t stop = r + group;
      for (; r + kShared <= stop; r += kShared) function(std::integral_constant<int, kShared>{}, h, r);
      if constexpr (kShared > 2) {
        for (; r + 2 <= stop; r += 2) function(std::integral_constant<int, 2>{}, h, r);
      }
      for (; r < stop; ++r) function(std::integral_constant<int, 1>{}, h, r);
    }
  }

  // Ask for kRows of the rows that come kAhead tokens after `rows`, where columns x to x + N are read: every row's line
  // once in the course of reading one.
  template <int kRows> static void ask(const T* rows, int64_t token, int64_t x) {
    if constexpr (kAhead > 0) {
      constexpr int64_t kEach = kRows > kTurns ? kRows / kTurns : 1;
      const T* row = rows + (kAhead + (x & (kLine - 1)) / V::N * kEach) * token + x;
      STAR_UNROLL for (int64_t r = 0; r < kEach; ++r) __builtin_prefetch(row + r * token);
    }
  }
  // Ask for kVectors adjacent vectors of the row that comes kAhead tokens after `row`.
  template <int kVectors> static void ask_columns(const T* row, int64_t token) {
    if constexpr (kAhead > 0) {
      STAR_UNROLL for (int64_t u = 0; u < kVectors; u += kTurns) __builtin_prefetch(row + kAhead * token + u * V::N);
    }
  }

  // `products` of kQueries queries, a row of `out` each: a key is read once for all of them. Their sums fill one vector.
  template <int kQueries> void shared_products(const T* keys, const W* queries, W* out, int64_t stride) const {
    constexpr int kKeys = V::N / kQueries;
    for (int j = 0; j < V::N; j += kKeys) {
      V sums[V::N];
      STAR_UNROLL for (int i = 0; i < V::N; ++i) sums[i] = V(0);
      sweep<V>(width, [&](int64_t x, auto lanes) {
        V query[kQueries];
        STAR_UNROLL for (int g = 0; g < kQueries; ++g) query[g] = V::load(queries + g * width + x, lanes);
        ask<kKeys>(keys + j * k.token, k.token, x);
        STAR_UNROLL for (int i = 0; i < kKeys; ++i) {
          const V key = V::load(keys + (j + i) * k.token + x, lanes);
          STAR_UNROLL for (int g = 0; g < kQueries; ++g) sums[g * kKeys + i] = fma(query[g], key, sums[g * kKeys + i]);
        }
      });
      W found[V::N];
      lane_sums(sums).store(found);
      STAR_UNROLL for (int g = 0; g < kQueries; ++g) {
        STAR_UNROLL for (int i = 0; i < kKeys; ++i) out[g * stride + j + i] = found[g * kKeys + i];
      }
    }
  }

  // `accumulate` for kQueries queries, whose weights are `stride` apart and whose sums follow each other: a value is read
  // once for all of them.
  template <int kQueries>
  void shared_sums(const W* weights, int64_t stride, const T* values, int64_t count, W* acc) const {
    constexpr int kVectors = V::N < 16 ? 2 : 4;  // 4 x 4 sums fit 32 registers, 4 x 2 fit 16
    int64_t x = 0;
    for (; x + kVectors * V::N <= value_width; x += kVectors * V::N) {
      shared_columns<kQueries, kVectors>(weights, stride, values + x, count, acc + x);
    }
    sweep<V>(value_width - x, [&](int64_t y, auto lanes) {
      shared_columns<kQueries, 1>(weights, stride, values + x + y, count, acc + x + y, lanes);
    });
  }

  template <int kQueries, int kVectors, class L = Full>
  void shared_columns(const W* weights, int64_t stride, const T* values, int64_t count, W* acc, L lanes = {}) const {
    V sums[kQueries][kVectors];
    STAR_UNROLL for (int g = 0; g < kQueries; ++g) {
      STAR_UNROLL for (int u = 0; u < kVectors; ++u) sums[g][u] = V::load(acc + g * value_width + u * V::N, lanes);
    }
    for (int64_t j = 0; j < count; ++j, values += v.token) {
      ask_columns<kVectors>(values, v.token);
      V value[kVectors];
      STAR_UNROLL for (int u = 0; u < kVectors; ++u) value[u] = V::load(values + u * V::N, lanes);
      STAR_UNROLL for (int g = 0; g < kQueries; ++g) {
        const V weight(weights[g * stride + j]);
        STAR_UNROLL for (int u = 0; u < kVectors; ++u) sums[g][u] = fma(weight, value[u], sums[g][u]);
      }
    }
    STAR_UNROLL for (int g = 0; g < kQueries; ++g) {
      STAR_UNROLL for (int u = 0; u < kVectors; ++u) sums[g][u].store(acc + g * value_width + u * V::N, lanes);
    }
  }

  // Lane j: one query's product with key j, for up to N keys.
  V products(const T* keys, int64_t count, const W* query) const {
    V sums[V::N];
    STAR_UNROLL for (int j = 0; j < V::N; ++j) sums[j] = V(0);
    if (count == V::N) {
      sweep<V>(width, [&](int64_t x, auto lanes) {
        const V value = V::load(query + x, lanes);
        STAR_UNROLL for (int j = 0; j < V::N; ++j) sums[j] = fma(value, V::load(keys + j * k.token + x, lanes), sums[j]);
      });
    } else {
      for (int64_t j = 0; j < count; ++j) {
        sweep<V>(width, [&](int64_t x, auto lanes) {
          sums[j] = fma(V::load(query + x, lanes), V::load(keys + j * k.token + x, lanes), sums[j]);
        });
      }
    }
    return lane_sums(sums);
  }

  // acc += weights (count) values (count, E), four sums side by side: an addition waits four cycles for the one before.
  void accumulate(const W* weights, const T* values, int64_t count, W* acc) const {
    int64_t x = 0;
    for (; x + 4 * V::N <= value_width; x += 4 * V::N) accumulate_columns<4, 1>(weights, values + x, count, acc + x);
    if (x + 2 * V::N <= value_width) {
      accumulate_columns<2, 2>(weights, values + x, count, acc + x);
      x += 2 * V::N;
    }
    sweep<V>(value_width - x, [&](int64_t y, auto lanes) {
      accumulate_columns<1, 4>(weights, values + x + y, count, acc + x + y, lanes);
    });
  }

  // kVectors adjacent vectors, each as the sum of kParts: those of tokens 0, kParts, 2 kParts, ... and so on.
  template <int kVectors, int kParts, class L = Full>
  void accumulate_columns(const W* weights, const T* values, int64_t count, W* acc, L lanes = {}) const {
    V sums[kParts][kVectors];
    STAR_UNROLL for (int p = 0; p < kParts; ++p) {
      STAR_UNROLL for (int u = 0; u < kVectors; ++u) sums[p][u] = p == 0 ? V::load(acc + u * V::N, lanes) : V(0);
    }
    int64_t j = 0;
    for (; j + kParts <= count; j += kParts, values += kParts * v.token) {
      STAR_UNROLL for (int p = 0; p < kParts; ++p) {
        const V weight(weights[j + p]);
        STAR_UNROLL for (int u = 0; u < kVectors; ++u) {
          sums[p][u] = fma(weight, V::load(values + p * v.token + u * V::N, lanes), sums[p][u]);
        }
      }
    }
    for (; j < count; ++j, values += v.token) {
      STAR_UNROLL for (int u = 0; u < kVectors; ++u) {
        sums[0][u] = fma(V(weights[j]), V::load(values + u * V::N, lanes), sums[0][u]);
      }
    }
    STAR_UNROLL for (int p = kParts / 2; p > 0; p /= 2) {
      STAR_UNROLL for (int r = 0; r < p; ++r) {
        STAR_UNROLL for (int u = 0; u < kVectors; ++u) sums[r][u] = sums[r][u] + sums[r + p][u];
      }
    }
    STAR_UNROLL for (int u = 0; u < kVectors; ++u) sums[0][u].store(acc + u * V::N, lanes);
  }

  // One query head's output from its parts, `stride` apart.
  void join(const W* results, int64_t parts, int64_t stride, int64_t head, int64_t g, T* out) const {
    constexpr W kLowest = -static_cast<W>(__builtin_inf());
    const W sink = sinks != nullptr ? sinks[head] : kLowest;
    W top = sink;
    for (int64_t p = 0; p < parts; ++p) {
      const W one = results[p * stride + group * value_width + g];
      if (one > top) top = one;
    }
    const W shift = finite_top(top);
    W sum = sinks != nullptr ? power_of_2_of<V>(scores.c * (sink - shift)) : W(0);
    Scratch scratch;
    W* factors = scratch.get<W>(parts);
    for (int64_t p = 0; p < parts; ++p) {
      const W* state = results + p * stride + group * value_width + g;
      factors[p] = state[0] == kLowest ? W(0) : power_of_2_of<V>(scores.c * (state[0] - shift));
      sum += factors[p] * state[group];
    }
    const V inverse(sum == 0 ? W(0) : 1 / sum);
    sweep<V>(value_width, [&](int64_t x, auto lanes) {
      V acc(0);
      for (int64_t p = 0; p < parts; ++p) {
        acc = fma(V(factors[p]), V::load(results + p * stride + g * value_width + x, lanes), acc);
      }
      (acc * inverse).store(out + x, lanes);
    });
  }
};

// How many tokens each row of the batch holds, and where those that its query sees begin.
struct Held {
  Tensor lengths;  // (B,) or nothing
  int64_t length, window, capacity;

  Held(const Tensor& lengths_any, int64_t length_, int64_t window_, int64_t batch, int64_t capacity_)
      : lengths(lengths_any.defined() ? contiguous(lengths_any) : Tensor()), length(length_), window(window_),
        capacity(capacity_) {
    require(!lengths.defined() || (lengths.dim() == 1 && lengths.size(0) == batch),
            "attention_step: length must be a number or (B,)");
    require(length <= capacity, "attention_step: length must be at most the cache's size");
  }
  int64_t end(int64_t b) const {
    if (!lengths.defined()) return length < 0 ? capacity : length;
    const int64_t held =
        lengths.dtype() == DType::kInt32 ? lengths.data<int32_t>()[b] : lengths.data<int64_t>()[b];
    require(held >= 0 && held <= capacity, "attention_step: length must be from 0 to the cache's size");
    return held;
  }
  int64_t begin(int64_t b) const {
    const int64_t last = end(b);
    return window > 0 && window < last ? last - window : 0;
  }
};

void check_step(const Tensor& q, const Tensor& k, const Tensor& v) {
  require(q.dim() == 3 && k.dim() == 4 && v.dim() == 4, "attention_step: q must be (B, H, D), k and v (B, S, Hk, D)");
  require(k.size(0) == q.size(0) && v.size(0) == q.size(0) && v.size(1) == k.size(1) && v.size(2) == k.size(2) &&
              k.size(3) == q.size(2) && k.dtype() == q.dtype() && v.dtype() == q.dtype(),
          "attention_step: q, k and v do not fit");
  require(k.size(2) > 0 && q.size(1) % k.size(2) == 0, "attention_step: the heads of k must divide those of q");
}

template <class T>
Step<T> make_step(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& sinks, double scale, double cap) {
  return {Scores<Wide<T>>(scale, cap, sinks.defined()),
          q.data<T>(),
          q.stride(0),
          q.stride(1),
          Heads<T>(k),
          Heads<T>(v),
          sinks.defined() ? sinks.data<Wide<T>>() : nullptr,
          q.size(1) / k.size(2),
          q.size(2),
          v.size(3)};
}

Tensor attention_step(const Tensor& q_any, const Tensor& k_any, const Tensor& v_any, const OptionalTensor& sinks_any,
                      const OptionalTensor& lengths, int64_t length, int64_t window, double scale, double softcap) {
  check_step(q_any, k_any, v_any);
  const Tensor q = last_contiguous(q_any), k = last_contiguous(k_any), v = last_contiguous(v_any);
  const int64_t batch = q.size(0), heads = q.size(1), key_heads = k.size(2), value_width = v.size(3);
  const Held held(lengths, length, window, batch, k.size(1));
  const Tensor sinks = wide_heads(sinks_any, q, "attention_step: sinks must be (Hq,)");
  Tensor o = empty({batch, heads, value_width}, q.dtype());
  int64_t parts = 1;
  for (int64_t b = 0; b < batch; ++b) parts = larger(parts, (held.end(b) - held.begin(b) + kPart - 1) / kPart);
  dispatch_dtype(q.dtype(), [&](auto element) {
    using T = decltype(element);
    using W = Wide<T>;
    const Step<T> step = make_step<T>(q, k, v, sinks, scale, softcap);
    T* out = o.mutable_data<T>();
    const int64_t stride = step.group * (value_width + 2);
    Scratch scratch;
    W* results = scratch.get<W>(batch * key_heads * parts * stride);
    // A part holds all heads, unless the threads would then have too little to share.
    const int64_t reach = smaller(kPart, window > 0 ? smaller(window, k.size(1)) : k.size(1));
    const int64_t cost = key_heads * reach * (step.width + value_width);
    int64_t shares = 1;
    if (batch * parts * cost > 2 * kGrainElements) {
      shares = smaller(key_heads, larger(1, 2 * num_threads() / larger(1, batch * parts)));
    }
    parallel_for(batch * parts * shares, grain_rows(cost / shares), [&](int64_t i, int64_t n) {
      for (; i < n; ++i) {
        const int64_t share = i % shares, p = i / shares % parts, b = i / shares / parts;
        const int64_t first = held.begin(b) + p * kPart, last = smaller(first + kPart, held.end(b));
        const int64_t head = key_heads * share / shares, end = key_heads * (share + 1) / shares;
        if (first < last) step.part(b, head, end, first, last, results + ((b * parts + p) * key_heads + head) * stride);
      }
    });
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t own = (held.end(b) - held.begin(b) + kPart - 1) / kPart;
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t key_head = h / step.group;
        step.join(results + (b * parts * key_heads + key_head) * stride, own, key_heads * stride, h, h % step.group,
                  out + (b * heads + h) * value_width);
      }
    }
  });
  return o;
}

// The gradients of one key head's queries and cache, through the whole map of the group.
template <class T>
void step_backward(const Step<T>& step, int64_t b, int64_t key_head, int64_t first, int64_t last, const T* dout,
                   int64_t dout_head, T* dq, T* dk, T* dv, int64_t key_heads, int64_t heads, Wide<T>* dsinks) {
  using W = Wide<T>;
  using V = Vec<T>;
  const int64_t count = last - first, group = step.group, width = step.width, value_width = step.value_width;
  const int64_t row = (count + V::N - 1) / V::N * V::N;
  Scratch scratch;
  W *q = scratch.get<W>(group * width), *grad = scratch.get<W>(group * value_width);
  W *keys = scratch.get<W>(count * width), *values = scratch.get<W>(count * value_width);
  W *map = scratch.get<W>(group * row), *dmap = scratch.get<W>(group * row), *dz = scratch.get<W>(group * row);
  W *dkeys = scratch.get<W>(count * width), *dvalues = scratch.get<W>(count * value_width);
  W* dqueries = scratch.get<W>(group * width);
  pack_rows(step.q + b * step.q_batch + key_head * group * step.q_head, step.q_head, group, width, q);
  pack_rows(dout, dout_head, group, value_width, grad);
  pack_rows(step.k.at(b, first, key_head), step.k.token, count, width, keys);
  pack_rows(step.v.at(b, first, key_head), step.v.token, count, value_width, values);
  gemm<W, W>(group, count, width, {q, width, 1}, {keys, 1, width}, map, row, false);
  gemm<W, W>(group, count, value_width, {grad, value_width, 1}, {values, 1, value_width}, dmap, row, false);
  for (int64_t g = 0; g < group; ++g) {
    W *s = map + g * row, *d = dmap + g * row, *out = dz + g * row;
    if (step.scores.transform) step.scores.template apply<V>(s, count);
    for (int64_t j = 0; j < count; ++j) out[j] = s[j];
    const bool has_sink = step.sinks != nullptr;
    const int64_t head = key_head * group + g;
    const W sink = has_sink ? step.sinks[head] : -static_cast<W>(__builtin_inf());
    W top = sink, sum = has_sink ? 1 : 0;
    softmax_row<V>(s, 0, count, 0, count, step.scores.c, top, sum);
    const W inverse = sum == 0 ? W(0) : 1 / sum;
    const W delta = inverse * sum_row<V>(count, [=](int64_t j, auto lanes, V part) {
      return fma(V::load(s + j, lanes), V::load(d + j, lanes), part);
    });
    const W cap = step.scores.cap, bend = cap > 0 ? 1 / cap : W(0);
    for (int64_t j = 0; j < count; ++j) {
      s[j] *= inverse;
      const W slope = 1 - (out[j] * bend) * (out[j] * bend);  // of the softcap
      out[j] = s[j] * (d[j] - delta) * step.scores.scale * (cap > 0 ? slope : W(1));
    }
    if (has_sink) dsinks[b * heads + head] = -power_of_2_of<V>(step.scores.c * (sink - top)) * inverse * delta;
  }
  gemm<W, W>(count, value_width, group, {map, 1, row}, {grad, value_width, 1}, dvalues, value_width, false);
  gemm<W, W>(count, width, group, {dz, 1, row}, {q, width, 1}, dkeys, width, false);
  gemm<W, W>(group, width, count, {dz, row, 1}, {keys, width, 1}, dqueries, width, false);
  const auto store = [](const W* from, T* to, int64_t n) {
    sweep<V>(n, [=](int64_t x, auto lanes) { V::load(from + x, lanes).store(to + x, lanes); });
  };
  for (int64_t j = 0; j < count; ++j) {
    store(dkeys + j * width, dk + ((first + j) * key_heads + key_head) * width, width);
    store(dvalues + j * value_width, dv + ((first + j) * key_heads + key_head) * value_width, value_width);
  }
  store(dqueries, dq + key_head * group * width, group * width);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_step_backward(
    const Tensor& dout_any, const Tensor& q_any, const Tensor& k_any, const Tensor& v_any,
    const OptionalTensor& sinks_any, const OptionalTensor& lengths, int64_t length, int64_t window, double scale,
    double softcap) {
  check_step(q_any, k_any, v_any);
  require(dout_any.dim() == 3 && dout_any.dtype() == q_any.dtype() && dout_any.size(0) == q_any.size(0) &&
              dout_any.size(1) == q_any.size(1) && dout_any.size(2) == v_any.size(3),
          "attention_step: the output's gradient must be (B, H, Dv) in q's dtype");
  const Tensor dout = last_contiguous(dout_any);
  const Tensor q = last_contiguous(q_any), k = last_contiguous(k_any), v = last_contiguous(v_any);
  const int64_t batch = q.size(0), heads = q.size(1), capacity = k.size(1), key_heads = k.size(2);
  const int64_t width = q.size(2), value_width = v.size(3);
  const Held held(lengths, length, window, batch, capacity);
  const Tensor sinks = wide_heads(sinks_any, q, "attention_step: sinks must be (Hq,)");
  Tensor dq = empty({batch, heads, width}, q.dtype());
  // Tokens that the query does not see have no gradient.
  Tensor dk = zeros({batch, capacity, key_heads, width}, q.dtype());
  Tensor dv = zeros({batch, capacity, key_heads, value_width}, q.dtype());
  Tensor dsinks = empty({sinks.defined() ? heads : 0}, wide_of(q));
  dispatch_dtype(q.dtype(), [&](auto element) {
    using T = decltype(element);
    using W = Wide<T>;
    const Step<T> step = make_step<T>(q, k, v, sinks, scale, softcap);
    const T* gradient = dout.data<T>();
    T *dq_data = dq.mutable_data<T>(), *dk_data = dk.mutable_data<T>(), *dv_data = dv.mutable_data<T>();
    Tensor per_row = empty({batch, heads}, dtype_of<W>());
    W* rows = per_row.mutable_data<W>();
    parallel_for(batch * key_heads, 1, [&](int64_t i, int64_t n) {
      for (; i < n; ++i) {
        const int64_t b = i / key_heads, key_head = i % key_heads;
        step_backward<T>(step, b, key_head, held.begin(b), held.end(b),
                         gradient + b * dout.stride(0) + key_head * step.group * dout.stride(1), dout.stride(1),
                         dq_data + b * heads * width, dk_data + b * capacity * key_heads * width,
                         dv_data + b * capacity * key_heads * value_width, key_heads, heads, rows);
      }
    });
    for (int64_t h = 0; h < dsinks.size(0); ++h) {
      W sum = 0;
      for (int64_t b = 0; b < batch; ++b) sum += rows[b * heads + h];
      dsinks.mutable_data<W>()[h] = sum;
    }
  });
  if (sinks.defined()) dsinks = cast(dsinks, sinks_any.dtype());
  return {std::move(dq), std::move(dk), std::move(dv), std::move(dsinks)};
}

STAR_OPERATOR("attention_step(Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? lengths, SymInt length, int window, "
              "float scale, float softcap) -> Tensor",
              attention_step);
STAR_OPERATOR("attention_step_backward(Tensor do, Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? lengths, "
              "SymInt length, int window, float scale, float softcap) -> (Tensor, Tensor, Tensor, Tensor)",
              attention_step_backward);

}  // namespace
}  // namespace star
