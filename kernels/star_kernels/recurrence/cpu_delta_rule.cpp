// The gated delta rule: S' = exp(log_decay_t) S_{t-1}, S_t = S' + k_t u_t^T with u_t = beta_t (v_t - S'^T k_t), o_t = scale
// S_t^T q_t.
//
// In a chunk that starts from S, with G_ij the decay from token j to i and g_i that from the start to i:
//   u_i = beta_i (v_i - g_i S^T k_i) + sum_{j<i} C_ij u_j,   C_ij = -beta_i G_ij (k_i . k_j),
// a unit triangular system, solved for all values at once by blocks of 16 tokens.
#include "memory.h"

namespace star {
namespace {

using namespace chunked;  // NOLINT

constexpr const char* kShapes =
    "gated_delta_rule: q and k must be (B, T, H, K), v (B, T, H, V), log_decay and beta (B, T, H) with the same B, T, H";

// u_i += sum over earlier j of the same block of c_ij u_j, first to last; or u_j += sum over later i of c_ij u_i, last to
// first. One vector of columns at a time.
template <class W, bool kTransposed> void solve_block(int64_t rows, int64_t row, const W* c, W* u) {
  using V = Vec<W>;
  each_vector<W>(row, [=](int64_t at) {
    V x[kBlock];
    STAR_UNROLL for (int i = 0; i < kBlock; ++i) x[i] = i < rows ? V::load(u + i * row + at) : V(0);
    if constexpr (kTransposed) {
      for (int64_t j = rows - 2; j >= 0; --j) {
        for (int64_t i = j + 1; i < rows; ++i) x[j] = fma(V(c[i * kChunk + j]), x[i], x[j]);
      }
    } else {
      for (int64_t i = 1; i < rows; ++i) {
        for (int64_t j = 0; j < i; ++j) x[i] = fma(V(c[i * kChunk + j]), x[j], x[i]);
      }
    }
    STAR_UNROLL for (int i = 0; i < kBlock; ++i) {
      if (i < rows) x[i].store(u + i * row + at);
    }
  });
}

// Solve (1 - C) u = r in place, for C strictly lower.
template <class W> void solve(int64_t n, int64_t row, const W* c, W* u) {
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t rows = smaller(kBlock, n - i);
    if (i > 0) gemm<W, W>(rows, row, i, {c + i * kChunk, kChunk, 1}, {u, row, 1}, u + i * row, row, true);
    solve_block<W, false>(rows, row, c + i * kChunk + i, u + i * row);
  }
}

// Solve (1 - C)^T u = r in place.
template <class W> void solve_transposed(int64_t n, int64_t row, const W* c, W* u) {
  for (int64_t i = (n - 1) / kBlock * kBlock; i >= 0; i -= kBlock) {
    const int64_t rows = smaller(kBlock, n - i), after = i + rows;
    if (after < n) {
      gemm<W, W>(rows, row, n - after, {c + after * kChunk + i, 1, kChunk}, {u + after * row, row, 1}, u + i * row, row,
                 true);
    }
    solve_block<W, true>(rows, row, c + i * kChunk + i, u + i * row);
  }
}

// body(offset, row, keep) for the vectors of the lower triangle; `keep(v)` is v below the diagonal and 0 elsewhere.
template <class W, class F> void each_strictly_lower(int64_t n, F&& body) {
  using V = Vec<W>;
  for (int64_t i = 0; i < n; ++i) {
    const V index(static_cast<W>(i));
    for (int64_t j = 0; j < i / kBlock * kBlock + kBlock; j += V::N) {
      const auto mask = V::iota() + V(static_cast<W>(j)) < index;
      body(i * kChunk + j, i, [mask](V v) { return select(mask, v, V(0)); });
    }
  }
}

// A chunk of one head: its inputs, and what it writes into the memory.
template <class W> struct Tiles {
  W *queries, *keys, *turned;      // q's rows and right behind them k's (2 n x K); k's transpose
  W *rest, *written;               // v - g S^T k; u
  W *held;                         // S^T q and S^T k, rows as in `queries`
  W *by_keys, *coupling;           // k_i . k_j; C
  W *by_queries, *scores;          // q_i . k_j; times G
  W *between, *scaled;
  W beta[kChunk], decay[kChunk], since[kChunk], until[kChunk];

  Tiles(Scratch& scratch, int64_t row_k, int64_t row_v) {
    queries = scratch.get<W>(2 * kChunk * row_k), turned = scratch.get<W>(kChunk * row_k);
    held = scratch.get<W>(2 * kChunk * row_v);
    for (W** one : {&rest, &written, &scaled}) *one = scratch.get<W>(kChunk * row_v);
    for (W** one : {&by_keys, &coupling, &by_queries, &scores, &between}) *one = scratch.get<W>(kChunk * kChunk);
  }
};

template <class W> struct DeltaRule : Memory<W> {
  using V = Vec<W>;
  using Memory<W>::q, Memory<W>::k, Memory<W>::v, Memory<W>::sequences, Memory<W>::heads;
  using Memory<W>::row_k, Memory<W>::row_v, Memory<W>::elements;
  Scalars<W> logs, strength;

  DeltaRule(const Tensor& q_any, const Tensor& k_any, const Tensor& v_any, const Tensor& log_decay, const Tensor& beta,
            double scale, const Tensor& initial_state, const Tensor& cu_seqlens)
      : Memory<W>(q_any, k_any, v_any, scale, initial_state, cu_seqlens), logs(log_decay, true), strength(beta, true) {}

  struct Finite {
    bool queries, keys;
  };

  // Load a chunk that starts from `memory` (null where it is zero), its scores, and solve for what it writes.
  Finite write(const Chunk& chunk, int64_t head, const W* memory, Lookahead& ahead, Tiles<W>& tile) const {
    const int64_t n = chunk.length, b = chunk.batch, t = chunk.begin, depth = this->keys;
    Finite finite;
    tile.keys = tile.queries + n * row_k;
    logs.load(b, t, n, head, tile.decay);
    each_vector<W>(padded(n), [&](int64_t i) { exp(V::load(tile.decay + i)).store(tile.decay + i); });
    chunk_decays(n, tile.decay, tile.between, tile.since, tile.until);
    strength.load(b, t, n, head, tile.beta);
    finite.queries = q.load(b, t, n, head, tile.queries, row_k, 0, this->scale);
    finite.keys = k.load(b, t, n, head, tile.keys, row_k);
    v.load(b, t, n, head, tile.rest, row_v);
    transpose_tile(n, row_k, tile.keys, row_k, tile.turned, kChunk, padded(n));
    lower_product(n, depth, tile.keys, row_k, tile.turned, kChunk, tile.by_keys);
    each_strictly_lower<W>(n, [&](int64_t at, int64_t i, auto keep) {
      keep(V::load(tile.between + at) * V::load(tile.by_keys + at) * V(-tile.beta[i])).store(tile.coupling + at);
    });
    lower_product(n, depth, tile.queries, row_k, tile.turned, kChunk, tile.by_queries);
    each_lower<W>(n, [&](int64_t at, auto keep) {
      keep(V::load(tile.between + at) * V::load(tile.by_queries + at)).store(tile.scores + at);
    });
    if (memory != nullptr) {
      product<W>(2 * n, row_v, depth, {tile.queries, row_k, 1}, memory, row_v, tile.held, row_v, false, ahead);
    } else {
      zero(2 * n * row_v, tile.held);
    }
    for (int64_t i = 0; i < n; ++i) {
      const V since(tile.since[i]), beta(tile.beta[i]);
      each_vector<W>(row_v, [&](int64_t j) {
        const V rest = fnma(since, V::load(tile.held + (n + i) * row_v + j), V::load(tile.rest + i * row_v + j));
        rest.store(tile.rest + i * row_v + j);
        (beta * rest).store(tile.written + i * row_v + j);
      });
    }
    solve(n, row_v, tile.coupling, tile.written);
    return finite;
  }

  // Carry the memory, which is zero where it is `blank`, to the chunk's end.
  void advance(int64_t n, Tiles<W>& tile, bool blank, W* memory, Lookahead& ahead) const {
    scale_rows(n, row_v, tile.until, tile.written, tile.scaled);
    if (!blank) chunked::scale(elements(), tile.since[n - 1], memory);
    product<W>(this->keys, row_v, n, {tile.turned, kChunk, 1}, tile.scaled, row_v, memory, row_v, !blank, ahead);
  }

  // `kept` may be null.
  void forward_head(int64_t s, int64_t head, W* final_states, W* kept, Sink<W>& o) const {
    const Sequence& sequence = sequences[s];
    Scratch scratch;
    Tiles<W> tile(scratch, row_k, row_v);
    W* memory = scratch.get<W>(elements());
    this->begin(this->initial_states(), s, head, memory);
    for (int64_t c = 0; c < sequence.chunks(); ++c) {
      const Chunk& chunk = sequences.chunk(sequence.first_chunk + c);
      const int64_t n = chunk.length;
      Lookahead ahead;
      if (c + 1 < sequence.chunks()) {
        look_ahead<W>(sequences.chunk(sequence.first_chunk + c + 1), head, {&q, &k, &v}, ahead);
      }
      this->keep(memory, s, c, head, kept);
      const bool blank = c == 0 && !this->initial;  // nothing has been written to the memory
      write(chunk, head, blank ? nullptr : memory, ahead, tile);
      scale_rows(n, row_v, tile.since, tile.held, tile.held);
      const bool finite = all_finite(n * row_v, tile.written);
      multiply_lower(n, row_v, tile.scores, tile.written, row_v, tile.held, row_v, true, finite);
      advance(n, tile, blank, memory, ahead);
      o.store(chunk.batch, chunk.begin, n, head, tile.held, row_v);
    }
    this->end(memory, s, head, final_states);
  }

  struct Gradients {
    Sink<W> q, k, v;
    W *logs, *beta;  // (B, T, H)
    W* initial;      // (S, H, K, V), or null
  };

  void backward_head(int64_t s, int64_t head, const W* kept, const Source<W>& dout, const W* dfinal,
                     Gradients& to) const {
    const Sequence& sequence = sequences[s];
    Scratch scratch;
    Tiles<W> tile(scratch, row_k, row_v);
    W *first = scratch.get<W>(elements()), *pull = scratch.get<W>(elements());
    this->begin(dfinal, s, head, pull);  // the gradient of the memory at the chunk's end
    for (int64_t c = sequence.chunks() - 1; c >= 0; --c) {
      Lookahead ahead;
      if (c > 0) look_ahead<W>(sequences.chunk(sequence.first_chunk + c - 1), head, {&q, &k, &v, &dout}, ahead);
      const bool blank = c + 1 == sequence.chunks() && dfinal == nullptr;  // no gradient has come yet
      backward_chunk(sequences.chunk(sequence.first_chunk + c), head, dout, this->start(kept, s, c, head, first), blank,
                     pull, ahead, tile, to);
    }
    if (to.initial != nullptr) this->end(pull, s, head, to.initial);
  }

  // `start` is null where the memory is zero, and `pull` is it where `blank`.
  void backward_chunk(const Chunk& chunk, int64_t head, const Source<W>& dout, const W* start, bool blank, W* pull,
                      Lookahead& ahead, Tiles<W>& tile, Gradients& to) const {
    const int64_t n = chunk.length, b = chunk.batch, t = chunk.begin, depth = this->keys;
    const int64_t tile_v = kChunk * row_v, square = kChunk * kChunk;
    Scratch scratch;
    W *dy = scratch.get<W>(tile_v), *dwritten = scratch.get<W>(tile_v), *turned = scratch.get<W>(tile_v);
    W *dheld = scratch.get<W>(2 * tile_v), *dqueries = scratch.get<W>(2 * kChunk * row_k);
    W *dscores = scratch.get<W>(square), *dcoupling = scratch.get<W>(square), *m = scratch.get<W>(square);
    W *carried = scratch.get<W>(kChunk * row_k), *dkeys = dqueries + n * row_k;
    const Finite finite = write(chunk, head, start, ahead, tile);
    bool finite_dy = true;
    if (dout.defined()) {
      finite_dy = dout.load(b, t, n, head, dy, row_v);
    } else {
      zero(n * row_v, dy);
    }

    // Through the outputs and the memory's end to what was written, and through the system to its right side.
    if (!blank) {
      gemm<W, W>(n, row_v, depth, {tile.keys, row_k, 1}, {pull, row_v, 1}, dwritten, row_v, false);
      scale_rows(n, row_v, tile.until, dwritten, dwritten);
    }
    multiply_lower_transposed(n, row_v, tile.scores, dy, row_v, dwritten, row_v, !blank, finite_dy);
    solve_transposed(n, row_v, tile.coupling, dwritten);

    // The triangles' gradients, dy u^T and dr u^T, turn into those of q_i . k_j and k_i . k_j; m is what the decays get.
    transpose_tile(n, row_v, tile.written, row_v, turned, kChunk, padded(n));
    lower_product(n, row_v, dy, row_v, turned, kChunk, dscores);
    lower_product(n, row_v, dwritten, row_v, turned, kChunk, dcoupling);
    W dbeta[kChunk];
    for (int64_t i = 0; i < n; ++i) dbeta[i] = dot(row_v, dwritten + i * row_v, tile.rest + i * row_v);
    each_lower<W>(n, [&](int64_t at, auto keep) {
      const V grad = keep(V::load(dscores + at) * V::load(tile.between + at));
      grad.store(dscores + at);
      keep(grad * V::load(tile.by_queries + at)).store(m + at);
    });
    each_strictly_lower<W>(n, [&](int64_t at, int64_t i, auto keep) {
      const V grad = keep(V::load(dcoupling + at) * V::load(tile.between + at));
      const V with_keys = keep(grad * V::load(tile.by_keys + at)), beta(tile.beta[i]);
      keep(-(beta * grad)).store(dcoupling + at);
      fnma(beta, with_keys, V::load(m + at)).store(m + at);
      dbeta[i] -= reduce_add(with_keys);
    });

    W from_start[kChunk] = {}, to_end[kChunk] = {}, dlog[kChunk], factors[kChunk], through = 0;
    for (int64_t i = 0; i < n; ++i) factors[i] = -tile.beta[i] * tile.since[i];
    scale_rows(n, row_v, tile.since, dy, dheld);
    scale_rows(n, row_v, factors, dwritten, dheld + n * row_v);
    for (int64_t i = 0; start != nullptr && i < n; ++i) {
      from_start[i] = dot(row_v, dheld + i * row_v, tile.held + i * row_v) +
                      dot(row_v, dheld + (n + i) * row_v, tile.held + (n + i) * row_v);
    }
    scale_rows(n, row_v, tile.beta, dwritten, tile.rest);
    to.v.store(b, t, n, head, tile.rest, row_v);

    if (start != nullptr) {
      gemm<W, W>(2 * n, row_k, row_v, {dheld, row_v, 1}, {start, 1, row_v}, dqueries, row_k, false);
    } else {
      zero(2 * n * row_k, dqueries);
    }
    if (!blank) {
      gemm<W, W>(n, row_k, row_v, {tile.written, row_v, 1}, {pull, 1, row_v}, carried, row_k, false);
      for (int64_t i = 0; i < n; ++i) {
        const V until(tile.until[i]);
        V sum(0);
        each_vector<W>(row_k, [&](int64_t c) {
          const V grad = until * V::load(carried + i * row_k + c);
          (V::load(dkeys + i * row_k + c) + grad).store(dkeys + i * row_k + c);
          sum = fma(grad, V::load(tile.keys + i * row_k + c), sum);
        });
        to_end[i] = reduce_add(sum);
      }
    }
    if (start != nullptr && !blank) through = tile.since[n - 1] * dot(elements(), start, pull);
    multiply_lower(n, row_k, dscores, tile.keys, row_k, dqueries, row_k, true, finite.keys);
    multiply_lower(n, row_k, dcoupling, tile.keys, row_k, dkeys, row_k, true, finite.keys);
    multiply_lower_transposed(n, row_k, dscores, tile.queries, row_k, dkeys, row_k, true, finite.queries);
    multiply_lower_transposed(n, row_k, dcoupling, tile.keys, row_k, dkeys, row_k, true, finite.keys);
    log_decay_gradient(n, m, from_start, to_end, through, dlog);

    if (!blank) chunked::scale(elements(), tile.since[n - 1], pull);
    gemm<W, W>(depth, row_v, 2 * n, {tile.queries, 1, row_k}, {dheld, row_v, 1}, pull, row_v, !blank);
    to.q.store(b, t, n, head, dqueries, row_k, this->scale);
    to.k.store(b, t, n, head, dkeys, row_k);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = (b * this->length + t + i) * heads + head;
      to.logs[at] = dlog[i], to.beta[at] = dbeta[i];
    }
  }
};

void check_delta(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& log_decay, const Tensor& beta,
                 int64_t axes) {
  check_memory(kShapes, q, k, v, axes);
  require(log_decay.dim() == axes - 1 && beta.same_shape(log_decay), kShapes);
  for (int64_t axis = 0; axis + 1 < axes; ++axis) require(log_decay.size(axis) == q.size(axis), kShapes);
}

std::tuple<Tensor, Tensor, Tensor> gated_delta_rule(const Tensor& q, const Tensor& k, const Tensor& v,
                                                    const Tensor& log_decay, const Tensor& beta, double scale,
                                                    const OptionalTensor& initial_state,
                                                    const OptionalTensor& cu_seqlens, bool keep) {
  check_delta(q, k, v, log_decay, beta, 4);
  Tensor o, final_state, kept;
  dispatch_wide(q.dtype(), [&](auto element) {
    using W = decltype(element);
    const DeltaRule<W> self(q, k, v, log_decay, beta, scale, initial_state, cu_seqlens);
    Sink<W> out(v);
    final_state = empty({self.sequences.count(), self.heads, self.keys, self.values}, dtype_of<W>());
    kept = new_kept_states(q, self.sequences, self.heads * self.elements(), keep, dtype_of<W>());
    W *states = final_state.mutable_data<W>(), *kept_data = keep ? kept.mutable_data<W>() : nullptr;
    parallel_tasks(self.sequences.count() * self.heads, [&](int64_t task) {
      self.forward_head(task / self.heads, task % self.heads, states, kept_data, out);
    });
    o = out.finish();
  });
  return {std::move(o), std::move(final_state), std::move(kept)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gated_delta_rule_backward(
    const OptionalTensor& dout, const OptionalTensor& dfinal, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& log_decay, const Tensor& beta, double scale, const OptionalTensor& initial_state,
    const OptionalTensor& cu_seqlens, const Tensor& kept) {
  check_delta(q, k, v, log_decay, beta, 4);
  require(!dout || dout.same_shape(v), kShapes);
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> result;
  dispatch_wide(q.dtype(), [&](auto element) {
    using W = decltype(element);
    constexpr DType kWide = dtype_of<W>();
    const DeltaRule<W> self(q, k, v, log_decay, beta, scale, initial_state, cu_seqlens);
    require(kept.numel() >= self.sequences.slots() * self.heads * self.elements(), kKept);
    Tensor dlog = empty(3, log_decay.sizes(), kWide), dbeta = empty(3, beta.sizes(), kWide);
    Tensor dinitial = initial_state ? empty(4, initial_state.sizes(), kWide) : empty({0}, kWide);
    Tensor wide;
    if (dfinal) wide = cast(dfinal, kWide);
    const W* dfinal_data = dfinal ? wide.data<W>() : nullptr;
    const Source<W> upstream = dout ? Source<W>(dout) : Source<W>();
    typename DeltaRule<W>::Gradients to{Sink<W>(q), Sink<W>(k), Sink<W>(v), dlog.mutable_data<W>(),
                                        dbeta.mutable_data<W>(), initial_state ? dinitial.mutable_data<W>() : nullptr};
    parallel_tasks(self.sequences.count() * self.heads, [&](int64_t task) {
      self.backward_head(task / self.heads, task % self.heads, kept.data<W>(), upstream, dfinal_data, to);
    });
    result = {to.q.finish(), to.k.finish(), to.v.finish(), cast(dlog, log_decay.dtype()), cast(dbeta, beta.dtype()),
              initial_state ? cast(dinitial, initial_state.dtype()) : std::move(dinitial)};
  });
  return result;
}

// C vectors of columns of the step below: what their u needs is in them alone, so that they are written while the
// first-level cache still holds what was read.
template <class W, int C, class L>
void step_columns(int64_t keys, int64_t values, Vec<W> decay, Vec<W> beta, Vec<W> match, const W* q, const W* k,
                  const W* v, const W* state, W* new_state, W* o, L lanes) {
  using V = Vec<W>;
  V by_k[C], by_q[C];
  STAR_UNROLL for (int i = 0; i < C; ++i) by_k[i] = by_q[i] = V(0);
  const W* from = state;
  for (int64_t c = 0; c < keys; ++c, from += values) {
    const V key(k[c]), query(q[c]);
    STAR_UNROLL for (int i = 0; i < C; ++i) {
      const V row = V::load(from + i * V::N, lanes);
      by_k[i] = fma(key, row, by_k[i]);
      by_q[i] = fma(query, row, by_q[i]);
    }
  }
  STAR_UNROLL for (int i = 0; i < C; ++i) {
    by_k[i] = beta * fnma(decay, by_k[i], V::load(v + i * V::N));
    fma(match, by_k[i], decay * by_q[i]).store(o + i * V::N);
  }
  for (int64_t c = 0; c < keys; ++c, state += values, new_state += values) {
    const V key(k[c]);
    STAR_UNROLL for (int i = 0; i < C; ++i) {
      fma(decay, V::load(state + i * V::N, lanes), key * by_k[i]).store(new_state + i * V::N, lanes);
    }
  }
}

// One token of one head. The memory is read once for what it holds for k and q, and once more as it is written:
// o = decay S^T q + (q . k) u, with u = beta (v - decay S^T k).
template <class W>
void step_head(int64_t keys, int64_t values, W decay, W beta, const W* q, const W* k, const W* v, const W* state,
               W* new_state, W* held_k, W* held_q) {
  using V = Vec<W>;
  const V kept(decay), strength(beta), match(dot(padded(keys), q, k));
  if constexpr (kStepColumns<W> > 0) {
    return by_columns<W>(values, [&](int64_t j, auto vectors, auto lanes) {
      step_columns<W, decltype(vectors)::value>(keys, values, kept, strength, match, q, k, v + j, state + j,
                                                new_state + j, held_q + j, lanes);
    });
  }
  zero(padded(values), held_k);
  zero(padded(values), held_q);
  by_four_rows(keys, [&](int64_t c, auto rows) {
    read_rows<W, decltype(rows)::value>(values, k + c, q + c, state + c * values, held_k, held_q);
  });
  each_vector<W>(padded(values), [=](int64_t j) {
    const V u = strength * fnma(kept, V::load(held_k + j), V::load(v + j));
    u.store(held_k + j);
    fma(match, u, kept * V::load(held_q + j)).store(held_q + j);
  });
  for (int64_t c = 0; c < keys; ++c) {
    const V key(k[c]);
    sweep<V>(values, [=](int64_t j, auto lanes) {
      fma(kept, V::load(state + c * values + j, lanes), key * V::load(held_k + j)).store(new_state + c * values + j,
                                                                                          lanes);
    });
  }
}

std::tuple<Tensor, Tensor> gated_delta_rule_step(const Tensor& state_any, const Tensor& q_any, const Tensor& k_any,
                                                 const Tensor& v_any, const Tensor& log_decay, const Tensor& beta,
                                                 double scale) {
  check_delta(q_any, k_any, v_any, log_decay, beta, 3);
  require(state_any.has_shape({q_any.size(0), q_any.size(1), q_any.size(2), v_any.size(2)}), kShapes);
  Tensor o, new_state;
  dispatch_wide(q_any.dtype(), [&](auto element) {
    using W = decltype(element);
    using V = Vec<W>;
    const Source<W> q(q_any), k(k_any), v(v_any);
    const Scalars<W> logs(log_decay, false), strength(beta, false);
    const int64_t heads = q_any.size(1), keys = q_any.size(2), values = v_any.size(2);
    const int64_t row_k = padded(keys), row_v = padded(values);
    const Tensor state = cast(state_any, dtype_of<W>());
    Sink<W> out(v_any);
    new_state = empty(4, state.sizes(), dtype_of<W>());
    const W* state_data = state.data<W>();
    W* new_data = new_state.mutable_data<W>();
    parallel_for(q_any.size(0) * heads, grain_rows(keys * values), [&](int64_t begin, int64_t end) {
      Scratch scratch;
      W *q_row = scratch.get<W>(row_k), *k_row = scratch.get<W>(row_k), *v_row = scratch.get<W>(row_v);
      W *held_k = scratch.get<W>(row_v), *held_q = scratch.get<W>(row_v), decay[V::N];
      for (int64_t task = begin; task < end; ++task) {
        const int64_t batch = task / heads, head = task % heads, at = task * keys * values;
        q.load(batch, 0, 1, head, q_row, row_k, 0, static_cast<W>(scale));
        k.load(batch, 0, 1, head, k_row, row_k);
        v.load(batch, 0, 1, head, v_row, row_v);
        exp(V(logs.at(batch, 0, head))).store(decay);
        step_head(keys, values, decay[0], strength.at(batch, 0, head), q_row, k_row, v_row, state_data + at,
                  new_data + at, held_k, held_q);
        out.store(batch, 0, 1, head, held_q, row_v);
      }
    });
    o = out.finish();
  });
  return {std::move(o), std::move(new_state)};
}

STAR_OPERATOR(
    "gated_delta_rule(Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor beta, float scale, Tensor? initial_state, "
    "Tensor? cu_seqlens, bool keep) -> (Tensor, Tensor, Tensor)",
    gated_delta_rule);
STAR_OPERATOR(
    "gated_delta_rule_backward(Tensor? dout, Tensor? dfinal_state, Tensor q, Tensor k, Tensor v, Tensor log_decay, "
    "Tensor beta, float scale, Tensor? initial_state, Tensor? cu_seqlens, Tensor kept) -> (Tensor, Tensor, Tensor, "
    "Tensor, Tensor, Tensor)",
    gated_delta_rule_backward);
STAR_OPERATOR(
    "gated_delta_rule_step(Tensor state, Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor beta, float scale) -> "
    "(Tensor, Tensor)",
    gated_delta_rule_step);

}  // namespace
}  // namespace star
