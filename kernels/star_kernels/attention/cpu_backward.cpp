// The backward of attention and differential attention. Maps are recomputed tile by tile from the saved row statistics:
//
//   P = 2^(c (S - top)) / sum   dP = dO V^T     dZ = P (dP - delta)     delta = dO . O, row by row
//   dV = P^T dO                 dK = scale dZ^T Q                       dQ = scale dZ K
//
// and for differential attention, with one dP for both maps, dV = (P1 - lam P2)^T dO and dZ2 = -lam P2 (dP - delta2).
//
// Tiles of keys outside: dK and dV are summed in the cache while dQ is summed in memory, key tile after key tile. With
// fewer heads than threads the keys' gradients and the queries' are made in two passes, which form the maps twice (7
// products in the place of 5). Every sum runs in the same order in both, so the bits do not depend on the threads.
#include "attention/cpu_tiles.h"

namespace star {
namespace {

using namespace tiles;

// Operands and sums of one key tile and one query tile, adjacent rows unless said.
template <class W> struct Buffers {
  W *keys_t[2], *values_t;  // transposed, columns of keys
  W *keys[2];
  W *dkeys[2], *dvalues;
  W *q[2], *dout;
  W *map[2], *dmap;
  bool finite_keys[2], finite_q[2], finite_dout;
};

// The rows of one head that a query tile covers.
template <class W> struct QueryRows {
  const W *top[2], *inverse[2], *delta[2];
  W* dq[2];
  int64_t dq_row;
  W lam;
};

// One row, one map: scores to P (in `s`) and dP to scale dZ (in `d`).
template <class V, bool kCap>
void gradient_row(typename V::Scalar* s, typename V::Scalar* d, int64_t a, int64_t b, int64_t begin,
                  int64_t end, const Scores<typename V::Scalar>& scores, typename V::Scalar top, typename V::Scalar inverse,
                  typename V::Scalar delta) {
  using W = typename V::Scalar;
  clear_hidden<V>(s, a, b, begin, end);
  clear_hidden<V>(d, a, b, begin, end);
  const V slope(scores.c), shift(finite_top(top)), factor(inverse), mean(delta);
  const V scale(scores.scale), per_cap(kCap ? 1 / scores.cap : W(0));
  visible<V>(a, b, [&](int64_t x, auto lanes) {
    const V z = V::load(s + x);
    const V weight = lanes.keep(power_of_2((z - shift) * slope) * factor, V(0));
    V gradient = weight * scale * (V::load(d + x) - mean);
    if constexpr (kCap) {
      const V bend = z * per_cap;  // tanh; its slope is 1 - tanh^2
      gradient = fnma(gradient * bend, bend, gradient);
    }
    weight.store(s + x);
    lanes.keep(gradient, V(0)).store(d + x);
  });
}

// One row, both maps: the scores to scale dZ1 and scale dZ2, dP to P1 - lam P2.
template <class W>
void gradient_rows(W* s1, W* s2, W* d, int64_t a, int64_t b, int64_t begin, int64_t end, const Scores<W>& scores,
                   const QueryRows<W>& rows, int64_t r) {
  using V = Vec<W>;
  for (W* row : {s1, s2, d}) clear_hidden<V>(row, a, b, begin, end);
  const V slope(scores.c), scale(scores.scale), lam(rows.lam);
  const V shift1(finite_top(rows.top[0][r])), factor1(rows.inverse[0][r]);
  const V shift2(finite_top(rows.top[1][r])), factor2(rows.inverse[1][r]);
  const V mean1(rows.delta[0][r]), mean2(rows.delta[1][r]);
  visible<V>(a, b, [&](int64_t x, auto lanes) {
    const V first = power_of_2((V::load(s1 + x) - shift1) * slope) * factor1;
    const V second = power_of_2((V::load(s2 + x) - shift2) * slope) * factor2 * lam;
    const V grad = V::load(d + x);
    lanes.keep(first * scale * (grad - mean1), V(0)).store(s1 + x);
    lanes.keep(second * scale * (mean2 - grad), V(0)).store(s2 + x);
    lanes.keep(first - second, V(0)).store(d + x);
  });
}

// Queries [first, last) of one head against one key tile.
template <class W>
void differentiate(const Problem& problem, const Mask& mask, const Scores<W>& scores, int maps, const Buffers<W>& own,
                   const QueryRows<W>& rows, int64_t key, int64_t keys, int64_t first, int64_t last, bool for_keys,
                   bool for_queries) {
  using V = Vec<W>;
  const Pieces<V> pieces(mask, first, last, key, keys);
  const int64_t width = problem.width, value_width = problem.value_width;
  for (const auto* p = pieces.first_piece(); p != pieces.last_piece(); ++p) {
    const int64_t place = p->row * kRow + p->column;
    for (int m = 0; m < maps; ++m) {
      gemm<W, W>(p->rows, p->columns, width, {own.q[m] + p->row * width, width, 1},
                 {own.keys_t[m] + p->column, kRow, 1}, own.map[m] + place, kRow, false);
    }
    gemm<W, W>(p->rows, p->columns, value_width, {own.dout + p->row * value_width, value_width, 1},
               {own.values_t + p->column, kRow, 1}, own.dmap + place, kRow, false);
  }
  const auto key_begin = [&](int64_t r) { return larger(0, mask.begin(first + r) - key); };
  const auto key_end = [&](int64_t r) { return smaller(keys, mask.end(first + r) - key); };
  for (int64_t r = 0; r < last - first; ++r) {
    const int64_t from = pieces.begin[r / kEdge], to = pieces.end[r / kEdge];
    if (from >= to) continue;
    const int64_t a = key_begin(r), b = key_end(r);
    W *s = own.map[0] + r * kRow, *d = own.dmap + r * kRow;
    for (int m = 0; m < maps && scores.transform; ++m) {
      scores.template apply<V>(own.map[m] + r * kRow + from, to - from);
    }
    if (maps == 2) {
      gradient_rows<W>(s, own.map[1] + r * kRow, d, a, b, from, to, scores, rows, r);
      continue;
    }
    const auto row = scores.cap > 0 ? gradient_row<V, true> : gradient_row<V, false>;
    row(s, d, a, b, from, to, scores, rows.top[0][r], rows.inverse[0][r], rows.delta[0][r]);
  }
  // What the gradients are taken from: `weights` for the values, gradients[m] for queries and keys.
  const W* weights = maps == 2 ? own.dmap : own.map[0];
  const W* gradients[2] = {maps == 2 ? own.map[0] : own.dmap, own.map[1]};
  for (const auto* p = pieces.first_piece(); p != pieces.last_piece(); ++p) {
    const int64_t place = p->row * kRow + p->column;
    const bool whole = !p->crossed;
    if (for_keys) {
      const auto begin = [&](int64_t j) { return mask.first_query(key + p->column + j) - first - p->row; };
      const auto end = [&](int64_t j) { return mask.last_query(key + p->column + j) - first - p->row; };
      multiply_visible<W>(whole || own.finite_dout, p->columns, value_width, p->rows, {weights + place, 1, kRow},
                          own.dout + p->row * value_width, own.dvalues + p->column * value_width, value_width, begin,
                          end);
      for (int m = 0; m < maps; ++m) {
        multiply_visible<W>(whole || own.finite_q[m], p->columns, width, p->rows, {gradients[m] + place, 1, kRow},
                            own.q[m] + p->row * width, own.dkeys[m] + p->column * width, width, begin, end);
      }
    }
    if (for_queries) {
      const auto begin = [&](int64_t r) { return key_begin(p->row + r) - p->column; };
      const auto end = [&](int64_t r) { return key_end(p->row + r) - p->column; };
      for (int m = 0; m < maps; ++m) {
        multiply_visible<W>(whole || own.finite_keys[m], p->rows, width, p->columns, {gradients[m] + place, kRow, 1},
                            own.keys[m] + p->column * width, rows.dq[m] + p->row * rows.dq_row, rows.dq_row, begin,
                            end);
      }
    }
  }
}

template <class T> struct Backward {
  using W = Wide<T>;
  using V = Vec<T>;

  const Problem& problem;
  Scores<W> scores;
  int maps;
  Heads<T> q[2], k[2], v, dout;
  const W *stats, *delta, *lam;  // (maps, 2, B, H, T), (maps, B, H, T), (H,) or null
  int64_t batch, queries, keys;  // of the tensors
  W* dq[2];                      // zeros
  T *dk[2], *dv;

  // Gradients of keys [key_first, key_last) and of queries [first, last) through the pairs of the two.
  void range(const Sequence& sequence, int64_t key_head, int64_t key_first, int64_t key_last, int64_t first,
             int64_t last, bool for_keys, bool for_queries) const {
    const Mask mask = problem.mask(sequence);
    const int64_t width = problem.width, value_width = problem.value_width;
    Scratch scratch;
    Buffers<W> own{};
    for (int m = 0; m < maps; ++m) {
      own.keys_t[m] = scratch.get<W>(width * kRow);
      own.keys[m] = scratch.get<W>(kKeys * width);
      own.dkeys[m] = scratch.get<W>(kKeys * width);
      own.q[m] = scratch.get<W>(kQueries * width);
      own.map[m] = scratch.get<W>(kQueries * kRow);
    }
    own.values_t = scratch.get<W>(value_width * kRow);
    own.dvalues = scratch.get<W>(kKeys * value_width);
    own.dout = scratch.get<W>(kQueries * value_width);
    own.dmap = scratch.get<W>(kQueries * kRow);

    for (int64_t j = key_first; j < key_last; j += kKeys) {
      const int64_t count = smaller(kKeys, key_last - j), key = sequence.key + j;
      const int64_t i0 = larger(first, mask.first_query(j)), i1 = smaller(last, mask.last_query(j + count - 1));
      if (for_keys) {
        for (int m = 0; m < maps; ++m) clear(own.dkeys[m], count * width);
        clear(own.dvalues, count * value_width);
      }
      if (i0 < i1) {
        for (int m = 0; m < maps; ++m) {
          const T* from = k[m].at(sequence.batch, key, key_head);
          pack_columns(from, k[m].token, count, width, own.keys_t[m]);
          if (for_queries) own.finite_keys[m] = pack_rows(from, k[m].token, count, width, own.keys[m]);
        }
        pack_columns(v.at(sequence.batch, key, key_head), v.token, count, value_width, own.values_t);
      }
      for (int64_t g = 0; g < problem.group; ++g) {
        for (int64_t i = i0; i < i1; i += kQueries) {
          query_tile(sequence, mask, own, key_head * problem.group + g, j, count, i, smaller(i + kQueries, i1),
                     for_keys, for_queries);
        }
      }
      if (for_keys) {
        for (int m = 0; m < maps; ++m) write(own.dkeys[m], dk[m], sequence.batch, key, key_head, count, width);
        write(own.dvalues, dv, sequence.batch, key, key_head, count, value_width);
      }
    }
  }

  void query_tile(const Sequence& sequence, const Mask& mask, Buffers<W>& own, int64_t head, int64_t key, int64_t count,
                  int64_t first, int64_t last, bool for_keys, bool for_queries) const {
    const int64_t width = problem.width, value_width = problem.value_width, b = sequence.batch;
    const int64_t t = sequence.query + first, rows = batch * problem.heads * queries;
    const int64_t row = (b * problem.heads + head) * queries + t;
    QueryRows<W> now{};
    for (int m = 0; m < maps; ++m) {
      own.finite_q[m] = pack_rows(q[m].at(b, t, head), q[m].token, last - first, width, own.q[m]);
      now.top[m] = stats + 2 * m * rows + row;
      now.inverse[m] = now.top[m] + rows;
      now.delta[m] = delta + m * rows + row;
      now.dq[m] = dq[m] + ((b * queries + t) * problem.heads + head) * width;
    }
    own.finite_dout = pack_rows(dout.at(b, t, head), dout.token, last - first, value_width, own.dout);
    now.dq_row = problem.heads * width;
    now.lam = lam != nullptr ? lam[head] : W(0);
    differentiate<W>(problem, mask, scores, maps, own, now, key, count, first, last, for_keys, for_queries);
  }

  void write(const W* from, T* to, int64_t b, int64_t t, int64_t head, int64_t rows, int64_t width) const {
    to += ((b * keys + t) * problem.key_heads + head) * width;
    for (int64_t r = 0; r < rows; ++r) {
      sweep<V>(width, [=](int64_t x, auto lanes) {
        V::load(from + r * width + x, lanes).store(to + r * problem.key_heads * width + x, lanes);
      });
    }
  }

  void run() const {
    const int64_t heads = problem.key_heads;
    int64_t total = 0, largest = 0;
    for (const Sequence& one : problem.sequences) {
      const int64_t pairs = one.queries * one.keys;
      total += pairs * heads;
      largest = larger(largest, pairs);
    }
    const int64_t work = total * problem.group * (problem.width + problem.value_width) * 5 / 2;
    const int64_t threads = num_threads();
    const int64_t rounds = (total + threads * largest - 1) / larger(1, threads * largest);
    if (threads == 1 || 5 * rounds * largest * threads <= 7 * total) {
      run_tasks(static_cast<int64_t>(problem.sequences.size()) * heads, work, [&](int64_t task) {
        const Sequence& one = problem.sequences[static_cast<size_t>(task / heads)];
        range(one, task % heads, 0, one.keys, 0, one.queries, true, true);
      });
      return;
    }
    struct Part {
      const Sequence* sequence;
      int64_t first, length;
      bool for_keys;
    };
    // The longest first: under a causal mask the first keys and the last queries see most.
    std::vector<Part> parts;
    for (const Sequence& one : problem.sequences) {
      for (int64_t j = 0; j < one.keys; j += kKeys) parts.push_back({&one, j, smaller(kKeys, one.keys - j), true});
      for (int64_t i = (one.queries - 1) / kKeys * kKeys; i >= 0 && one.queries > 0; i -= kKeys) {
        parts.push_back({&one, i, smaller(kKeys, one.queries - i), false});
      }
    }
    run_tasks(static_cast<int64_t>(parts.size()) * heads, work, [&](int64_t task) {
      const Part& part = parts[static_cast<size_t>(task / heads)];
      const Sequence& one = *part.sequence;
      const int64_t last = part.first + part.length;
      if (part.for_keys) {
        range(one, task % heads, part.first, last, 0, one.queries, true, false);
      } else {
        const Mask mask = problem.mask(one);
        const int64_t begin = mask.begin(part.first) / kKeys * kKeys;
        range(one, task % heads, begin, mask.end(last - 1), part.first, last, false, true);
      }
    });
  }
};

// delta (maps, B, H, T) = dO . O for each map's output (maps, B, T, H, E), summed in the order of dP, to which it is
// equal where a row sees one key: dZ is then 0 exactly.
template <class T> void row_products(const Heads<T>& dout, const Wide<T>* outputs, int64_t maps, int64_t batch,
                                     int64_t tokens, int64_t heads, int64_t width, Wide<T>* delta) {
  using V = Vec<T>;
  parallel_for(maps * batch * heads, grain_rows(tokens * width), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t h = row % heads, b = row / heads % batch, m = row / heads / batch;
      for (int64_t t = 0; t < tokens; t += V::N) {
        const T* grad = dout.at(b, t, h);
        const Wide<T>* out = outputs + (((m * batch + b) * tokens + t) * heads + h) * width;
        const int64_t count = smaller(V::N, tokens - t);
        V sum(0);
        sweep<V>(width, [&](int64_t x, auto lanes) {
          V left[V::N], right[V::N];
          load_columns(grad + x, dout.token, count, lanes, left);
          load_columns(out + x, heads * width, count, lanes, right);
          STAR_UNROLL for (int e = 0; e < V::N; ++e) {
            if (x + e < width) sum = fma(left[e], right[e], sum);
          }
        });
        if (count == V::N) {
          sum.store(delta + row * tokens + t);
        } else {
          sum.store(delta + row * tokens + t, Lanes{static_cast<int>(count)});
        }
      }
    }
  });
}

// dsinks[h] = -sum over rows of the sink's weight times delta; for differential attention dlam[h] = -sum of delta2.
template <class W>
void sum_heads(const W* top, const W* inverse, const W* delta, const W* sinks, int64_t batch, int64_t heads,
               int64_t tokens, W* out) {
  using V = Vec<W>;
  for (int64_t h = 0; h < heads; ++h) {
    W sum = 0;
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t row = (b * heads + h) * tokens;
      sum -= sum_row<V>(tokens, [=](int64_t x, auto lanes, V total) {
        const V own = V::load(delta + row + x, lanes);
        if (sinks == nullptr) return total + own;
        const V score = (V(sinks[h]) - V::load(top + row + x, lanes)) * V(static_cast<W>(kLog2E));
        // Lanes past the end hold no row: their weight may be anything finite, their delta is 0.
        return fma(min(V(1), power_of_2(score)) * V::load(inverse + row + x, lanes), own, total);
      });
    }
    out[h] = sum;
  }
}

// Everything both operators do once their inputs are packed up; `d_parameter` is the gradient of sinks or lam, (H,).
template <class T>
void backward(const Problem& problem, int maps, const Tensor& dout, const Tensor& q1, const Tensor& k1,
              const Tensor& q2, const Tensor& k2, const Tensor& v, const Tensor& sinks, const Tensor& lam,
              const Tensor& outputs, const Tensor& stats, double scale, double cap, Tensor& dq1, Tensor& dk1,
              Tensor& dq2, Tensor& dk2, Tensor& dv, Tensor& d_parameter) {
  using W = Wide<T>;
  const int64_t batch = q1.size(0), tokens = q1.size(1), heads = problem.heads, rows = batch * heads * tokens;
  Tensor delta = empty({maps, batch, heads, tokens}, dtype_of<W>());
  const Heads<T> gradient(dout);
  row_products<T>(gradient, outputs.data<W>(), maps, batch, tokens, heads, problem.value_width,
                  delta.mutable_data<W>());
  const W *saved = stats.data<W>(), *products = delta.data<W>();
  if (sinks.defined()) {
    sum_heads<W>(saved, saved + rows, products, sinks.data<W>(), batch, heads, tokens, d_parameter.mutable_data<W>());
  } else if (maps == 2) {
    sum_heads<W>(nullptr, nullptr, products + rows, nullptr, batch, heads, tokens, d_parameter.mutable_data<W>());
  }
  Tensor sums1 = zeros({batch, tokens, heads, problem.width}, dtype_of<W>());
  Tensor sums2 = maps == 2 ? zeros({batch, tokens, heads, problem.width}, dtype_of<W>()) : Tensor();
  dk1 = empty_like(k1);
  dv = empty_like(v);
  if (maps == 2) dk2 = empty_like(k2);
  Backward<T>{problem,
              Scores<W>(scale, cap, sinks.defined()),
              maps,
              {Heads<T>(q1), Heads<T>(q2)},
              {Heads<T>(k1), Heads<T>(k2)},
              Heads<T>(v),
              gradient,
              saved,
              products,
              lam.defined() ? lam.data<W>() : nullptr,
              batch,
              tokens,
              k1.size(1),
              {sums1.mutable_data<W>(), maps == 2 ? sums2.mutable_data<W>() : nullptr},
              {dk1.mutable_data<T>(), maps == 2 ? dk2.mutable_data<T>() : nullptr},
              dv.mutable_data<T>()}
      .run();
  dq1 = cast(sums1, q1.dtype());
  if (maps == 2) dq2 = cast(sums2, q1.dtype());
}

void check_saved(const Problem& problem, int64_t maps, const Tensor& q, const Tensor& dout, const Tensor& outputs,
                 const Tensor& stats) {
  const int64_t batch = q.size(0), tokens = q.size(1);
  const int64_t rows = batch * tokens * problem.heads;
  require(dout.dim() == 4 && dout.dtype() == q.dtype() && dout.size(0) == batch && dout.size(1) == tokens &&
              dout.size(2) == problem.heads && dout.size(3) == problem.value_width,
          "attention: the output's gradient must be (B, Tq, Hq, Dv) in q's dtype");
  require(stats.dtype() == wide_of(q) && stats.numel() == 2 * maps * rows && stats.is_contiguous() &&
              outputs.dtype() == wide_of(q) && outputs.numel() == maps * rows * problem.value_width,
          "attention: the saved outputs and statistics must be those of the forward");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& dout_any, const Tensor& q_any, const Tensor& k_any, const Tensor& v_any,
    const OptionalTensor& sinks_any, const OptionalTensor& ends_q, const OptionalTensor& ends_k, const Tensor& o,
    const Tensor& stats_any, const Tensor& wide, bool causal, int64_t window, double scale, double softcap) {
  const Problem problem(q_any, k_any, v_any, ends_q, ends_k, causal, window);
  const Tensor dout = last_contiguous(dout_any);
  const Tensor q = last_contiguous(q_any), k = last_contiguous(k_any), v = last_contiguous(v_any);
  const Tensor sinks = wide_heads(sinks_any, q, "attention: sinks must be (Hq,)");
  const Tensor outputs = contiguous(q.dtype() == DType::kBFloat16 ? wide : o), stats = contiguous(stats_any);
  check_saved(problem, 1, q, dout, outputs, stats);
  Tensor dq, dk, dv, none, dsinks = empty({sinks.defined() ? problem.heads : 0}, wide_of(q));
  dispatch_dtype(q.dtype(), [&](auto element) {
    backward<decltype(element)>(problem, 1, dout, q, k, q, k, v, sinks, Tensor(), outputs, stats, scale, softcap, dq,
                                dk, none, none, dv, dsinks);
  });
  if (sinks.defined()) dsinks = cast(dsinks, sinks_any.dtype());
  return {std::move(dq), std::move(dk), std::move(dv), std::move(dsinks)};
}

// The sum of (H,) as a tensor without axes, where lam was one number.
Tensor total(const Tensor& per_head) {
  Tensor sum = empty({}, per_head.dtype());
  dispatch_dtype(per_head.dtype(), [&](auto element) {
    using T = decltype(element);
    using V = Vec<T>;
    const T* in = per_head.data<T>();
    const Wide<T> value = sum_row<V>(per_head.size(0), [=](int64_t h, auto lanes, V part) {
      return part + V::load(in + h, lanes);
    });
    V(value).store(sum.mutable_data<T>(), Lanes{1});
  });
  return sum;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> differential_attention_backward(
    const Tensor& dout_any, const Tensor& q1_any, const Tensor& k1_any, const Tensor& q2_any, const Tensor& k2_any,
    const Tensor& v_any, const Tensor& lam_any, const OptionalTensor& ends_q, const OptionalTensor& ends_k,
    const Tensor& stats_any, const Tensor& wide_any, bool causal, int64_t window, double scale) {
  const Problem problem(q1_any, k1_any, v_any, ends_q, ends_k, causal, window);
  check_second_map(q1_any, k1_any, q2_any, k2_any);
  const Tensor dout = last_contiguous(dout_any);
  const Tensor q1 = last_contiguous(q1_any), k1 = last_contiguous(k1_any), v = last_contiguous(v_any);
  const Tensor q2 = last_contiguous(q2_any), k2 = last_contiguous(k2_any);
  const Tensor lam = wide_heads(lam_any, q1, "differential_attention: lam must be () or (Hq,)");
  const Tensor stats = contiguous(stats_any), wide = contiguous(wide_any);
  check_saved(problem, 2, q1, dout, wide, stats);
  Tensor dq1, dk1, dq2, dk2, dv, dlam = empty({problem.heads}, wide_of(q1));
  dispatch_dtype(q1.dtype(), [&](auto element) {
    backward<decltype(element)>(problem, 2, dout, q1, k1, q2, k2, v, Tensor(), lam, wide, stats, scale, 0.0, dq1, dk1,
                                dq2, dk2, dv, dlam);
  });
  if (lam_any.dim() == 0) dlam = total(dlam);
  return {std::move(dq1), std::move(dk1), std::move(dq2),
          std::move(dk2), std::move(dv),  cast(dlam, lam_any.dtype())};
}

STAR_OPERATOR("attention_backward(Tensor do, Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? cu_seqlens_q, "
              "Tensor? cu_seqlens_k, Tensor o, Tensor stats, Tensor wide, bool causal, int window, float scale, "
              "float softcap) -> (Tensor, Tensor, Tensor, Tensor)",
              attention_backward);
STAR_OPERATOR("differential_attention_backward(Tensor do, Tensor q1, Tensor k1, Tensor q2, Tensor k2, Tensor v, "
              "Tensor lam, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor stats, Tensor wide, bool causal, "
              "int window, float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
              differential_attention_backward);

}  // namespace
}  // namespace star
