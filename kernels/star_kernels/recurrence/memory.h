// What gated linear attention and the gated delta rule share: their arguments (queries, keys, values, a K x V memory for
// each head), and the rows of a one-token step.
#pragma once

#include "chunked.h"

namespace star {
namespace chunked {

inline void check_memory(const char* message, const Tensor& q, const Tensor& k, const Tensor& v, int64_t axes) {
  bool fits = q.dim() == axes && k.same_shape(q) && v.dim() == axes && k.dtype() == q.dtype() && v.dtype() == q.dtype();
  for (int64_t axis = 0; fits && axis + 1 < axes; ++axis) fits = v.size(axis) == q.size(axis);
  require(fits, message);
}

// Shapes and states of one call. Memories are held as K x V with both axes padded.
template <class W> struct Memory {
  Source<W> q, k, v;
  W scale;
  Sequences sequences;
  int64_t length, heads, keys, values, row_k, row_v;
  Tensor initial;  // (S, H, K, V), if given

  Memory(const Tensor& q_any, const Tensor& k_any, const Tensor& v_any, double factor, const Tensor& initial_state,
         const Tensor& cu_seqlens)
      : q(q_any),
        k(k_any),
        v(v_any),
        scale(static_cast<W>(factor)),
        sequences(q_any, cu_seqlens),
        length(q_any.size(1)),
        heads(q_any.size(2)),
        keys(q_any.size(3)),
        values(v_any.size(3)),
        row_k(padded(keys)),
        row_v(padded(values)) {
    if (initial_state) initial = cast(initial_state, dtype_of<W>());
  }

  int64_t elements() const { return row_k * row_v; }

  // The first memory from (S, H, K, V), zeros if there is none.
  void begin(const W* states, int64_t s, int64_t head, W* memory) const {
    zero(elements(), memory);
    if (states != nullptr) {
      copy_rows(keys, values, states + (s * heads + head) * keys * values, values, memory, row_v);
    }
  }
  void end(const W* memory, int64_t s, int64_t head, W* states) const {
    copy_rows(keys, values, memory, row_v, states + (s * heads + head) * keys * values, values);
  }
  // The memory at the start of chunk c, of those that the forward kept; the first is built in `first`, null if it is zero.
  const W* start(const W* kept, int64_t s, int64_t c, int64_t head, W* first) const {
    if (c > 0) return kept_state(kept, sequences[s], c, heads, head, elements());
    if (!initial) return nullptr;
    begin(initial_states(), s, head, first);
    return first;
  }
  void keep(const W* memory, int64_t s, int64_t c, int64_t head, W* kept) const {
    if (kept != nullptr && c > 0) copy(elements(), memory, kept_state(kept, sequences[s], c, heads, head, elements()));
  }
  const W* initial_states() const { return initial ? initial.data<W>() : nullptr; }
};

// Vectors side by side in a step's memory whose sums stay in registers over all rows: a column's sums are added in the
// same order as by rows, and eight lanes leave 8 of 16 registers for the rest. 0: by rows, as 16 lanes were measured.
template <class W> constexpr int kStepColumns = Vec<W>::N == 8 ? 4 : 0;

// body(first column, vectors as a type, lanes) for all columns, kStepColumns vectors at a time.
template <class W, class F> inline void by_columns(int64_t values, F&& body) {
  using V = Vec<W>;
  constexpr int kWide = kStepColumns<W>;
  int64_t j = 0;
  for (; j + kWide * V::N <= values; j += kWide * V::N) body(j, std::integral_constant<int, kWide>(), Full{});
  sweep<V>(values - j, [&](int64_t x, auto lanes) { body(j + x, std::integral_constant<int, 1>(), lanes); });
}

// C vectors of columns of a step's memory, all rows of it: S' = diag(decay) S + k u^T, o = S'^T q.
template <class W, int C, class L>
inline void step_columns(int64_t keys, int64_t values, const W* decay, const W* k, const W* q, const W* u,
                         const W* state, W* new_state, W* o, L lanes) {
  using V = Vec<W>;
  V value[C], sum[C];
  STAR_UNROLL for (int i = 0; i < C; ++i) value[i] = V::load(u + i * V::N), sum[i] = V(0);
  for (int64_t c = 0; c < keys; ++c, state += values, new_state += values) {
    const V kept(decay[c]), key(k[c]), query(q[c]);
    STAR_UNROLL for (int i = 0; i < C; ++i) {
      const V row = fma(kept, V::load(state + i * V::N, lanes), key * value[i]);
      row.store(new_state + i * V::N, lanes);
      sum[i] = fma(query, row, sum[i]);
    }
  }
  STAR_UNROLL for (int i = 0; i < C; ++i) sum[i].store(o + i * V::N);
}

// R rows of a step's memory at once, S' = decay_r S + k_r u^T, and what they add to the output: o += S'^T q.
template <class W, int R>
inline void step_rows(int64_t values, const W* decay, const W* k, const W* q, const W* u, const W* state, W* new_state,
                      W* o) {
  using V = Vec<W>;
  sweep<V>(values, [=](int64_t j, auto lanes) {
    const V value = V::load(u + j);
    V sum = V::load(o + j);
    STAR_UNROLL for (int r = 0; r < R; ++r) {
      const V row = fma(V(decay[r]), V::load(state + r * values + j, lanes), V(k[r]) * value);
      row.store(new_state + r * values + j, lanes);
      sum = fma(V(q[r]), row, sum);
    }
    sum.store(o + j);
  });
}

// What a step's memory holds for k and q: held_k += S^T k, held_q += S^T q.
template <class W, int R>
inline void read_rows(int64_t values, const W* k, const W* q, const W* state, W* held_k, W* held_q) {
  using V = Vec<W>;
  sweep<V>(values, [=](int64_t j, auto lanes) {
    V by_k = V::load(held_k + j), by_q = V::load(held_q + j);
    STAR_UNROLL for (int r = 0; r < R; ++r) {
      const V row = V::load(state + r * values + j, lanes);
      by_k = fma(V(k[r]), row, by_k);
      by_q = fma(V(q[r]), row, by_q);
    }
    by_k.store(held_k + j);
    by_q.store(held_q + j);
  });
}

// body(first row, rows as a type) for all rows, four at a time.
template <class F> inline void by_four_rows(int64_t count, F&& body) {
  int64_t c = 0;
  for (; c + 4 <= count; c += 4) body(c, std::integral_constant<int, 4>());
  for (; c < count; ++c) body(c, std::integral_constant<int, 1>());
}

}  // namespace chunked
}  // namespace star
