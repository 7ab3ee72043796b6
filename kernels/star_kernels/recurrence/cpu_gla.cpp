// Gated linear attention, a decay a key channel: S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T, o_t = scale S_t^T q_t.
//
// A chunk is cut into blocks of 16 tokens. Between two blocks the decays factor at the boundary before the later one,
// where both factors are products of decays, at most 1: matrix products serve them. Inside a block they are carried
// along token by token.
#include "memory.h"

namespace star {
namespace {

using namespace chunked;  // NOLINT

constexpr const char* kShapes =
    "gated_linear_attention: q, k and log_decay must be (B, T, H, K), v (B, T, H, V) with the same B, T, H";

// The 16 x 16 triangle of scores inside a block: sum over channels c of q_ic k_jc decay_{j+1,c} ... decay_{i,c}.
// Queries and decays come by channels, 16 adjacent tokens each. `turned` holds the block's keys by channels (rows kChunk
// apart), and is left decayed to the block's end.
template <class W> void diagonal_scores(int64_t keys, const W* q, const W* decay, W* turned, W* scores) {
  using V = Vec<W>;
  for (int64_t j = 0; j < kBlock; j += V::N) {
    const V column = V::iota() + V(static_cast<W>(j));
    V sum[kBlock];
    STAR_UNROLL for (int i = 0; i < kBlock; ++i) sum[i] = V(0);
    for (int64_t c = 0; c < keys; ++c) {
      V key = V::load(turned + c * kChunk + j);
      STAR_UNROLL for (int i = 0; i < kBlock; ++i) {
        key = select(column < V(static_cast<W>(i)), key * V(decay[c * kBlock + i]), key);
        sum[i] = fma(V(q[c * kBlock + i]), key, sum[i]);
      }
      key.store(turned + c * kChunk + j);
    }
    for (int i = 0; i < kBlock; ++i) {
      select(column <= V(static_cast<W>(i)), sum[i], V(0)).store(scores + i * kChunk + j);
    }
  }
}

// The gradients that go through the pairs of tokens inside a block, added to dq, dk and dlog; for the channels of one
// vector. `dscores` is the block's triangle. Forward in time sixteen keys are carried along in registers and noted at
// each token; backward in time, what comes back to them is.
template <class W>
void diagonal_gradients(const W* dscores, const W* q, const W* k, const W* decay, int64_t row, W* dq, W* dk, W* dlog) {
  using V = Vec<W>;
  V key[kBlock], noted[kBlock][kBlock];  // noted[i][j]: k_j decayed to token i
  STAR_UNROLL for (int i = 0; i < kBlock; ++i) {
    const V own = V::load(decay + i * row);
    V sum = V::load(dq + i * row);
    STAR_UNROLL for (int j = 0; j < i; ++j) {
      key[j] = key[j] * own;
      noted[i][j] = key[j];
      sum = fma(V(dscores[i * kChunk + j]), key[j], sum);
    }
    key[i] = V::load(k + i * row);
    fma(V(dscores[i * kChunk + i]), key[i], sum).store(dq + i * row);
  }
  V pull[kBlock];  // what the tokens from i on send back to token j, at token i
  STAR_UNROLL for (int j = 0; j < kBlock; ++j) pull[j] = V(0);
  STAR_UNROLL for (int i = kBlock - 1; i >= 0; --i) {
    const V own = V::load(decay + i * row), query = V::load(q + i * row);
    V sum = V::load(dlog + i * row);
    STAR_UNROLL for (int j = 0; j < i; ++j) {
      const V sent = fma(V(dscores[i * kChunk + j]), query, pull[j]);
      sum = fma(noted[i][j], sent, sum);
      pull[j] = sent * own;
    }
    sum.store(dlog + i * row);
    (V::load(dk + i * row) + fma(V(dscores[i * kChunk + i]), query, pull[i])).store(dk + i * row);
  }
}

// A chunk's inputs of one head, and what its decays make of them; rows padded to whole blocks, zeros with decay 1.
template <class W> struct Tiles {
  using V = Vec<W>;
  int64_t row_k, row_v;
  W *q, *k, *v, *decay;
  W *local, *since;            // decays to token i: from its block's start, and from the chunk's
  W *q_local, *q_since;        // q times these
  W *totals, *whole;           // decays of each block, and of the chunk
  W *turned;                   // keys by channels, decayed to the chunk's end
  W *turned_q, *turned_decay;  // a block's queries and decays by channels
  W *scores;

  Tiles(Scratch& scratch, int64_t keys_row, int64_t values_row) : row_k(keys_row), row_v(values_row) {
    for (W** one : {&q, &k, &decay, &local, &since, &q_local, &q_since, &turned}) {
      *one = scratch.get<W>(kChunk * row_k);
    }
    v = scratch.get<W>(kChunk * row_v);
    turned_q = scratch.get<W>(kBlock * row_k), turned_decay = scratch.get<W>(kBlock * row_k);
    totals = scratch.get<W>(kChunk / kBlock * row_k);
    whole = scratch.get<W>(row_k);
    scores = scratch.get<W>(kChunk * kChunk);
  }

  void exp_of_logs(int64_t rows) {
    each_vector<W>(rows * row_k, [=](int64_t i) { exp(V::load(decay + i)).store(decay + i); });
  }

  // `kKeep`: with `local` and `since`, which the backward needs.
  template <bool kKeep> void accumulate_decays(int64_t blocks) {
    each_vector<W>(row_k, [&](int64_t c) {
      V all(1);
      for (int64_t block = 0; block < blocks; ++block) {
        V part(1);
        for (int64_t i = block * kBlock * row_k + c, r = 0; r < kBlock; ++r, i += row_k) {
          const V own = V::load(decay + i), query = V::load(q + i);
          part = part * own, all = all * own;
          if constexpr (kKeep) part.store(local + i), all.store(since + i);
          (query * part).store(q_local + i), (query * all).store(q_since + i);
        }
        part.store(totals + block * row_k + c);
      }
      all.store(whole + c);
    });
  }

  void score(int64_t blocks, int64_t keys) {
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t before = block * kBlock, at = before * row_k;
      W* out = scores + before * kChunk;
      transpose_tile(kBlock, row_k, k + at, row_k, turned + before, kChunk, kBlock);
      if (before > 0) {
        gemm<W, W>(kBlock, before, keys, {q_local + at, row_k, 1}, {turned, kChunk, 1}, out, kChunk, false);
      }
      transpose_tile(kBlock, row_k, q + at, row_k, turned_q, kBlock, kBlock);
      transpose_tile(kBlock, row_k, decay + at, row_k, turned_decay, kBlock, kBlock);
      diagonal_scores(keys, turned_q, turned_decay, turned + before, out + before);
      for (int64_t c = 0; before > 0 && c < keys; ++c) {
        chunked::scale(before, totals[block * row_k + c], turned + c * kChunk);
      }
    }
  }
};

template <class W> struct Gla : Memory<W> {
  using V = Vec<W>;
  using Memory<W>::q, Memory<W>::k, Memory<W>::v, Memory<W>::sequences, Memory<W>::heads, Memory<W>::keys;
  using Memory<W>::row_k, Memory<W>::row_v, Memory<W>::elements;
  Source<W> logs;

  Gla(const Tensor& q_any, const Tensor& k_any, const Tensor& v_any, const Tensor& log_decay, double scale,
      const Tensor& initial_state, const Tensor& cu_seqlens)
      : Memory<W>(q_any, k_any, v_any, scale, initial_state, cu_seqlens), logs(log_decay) {}

  // Returns whether the values are finite.
  bool load(const Chunk& chunk, int64_t head, int64_t rows, Tiles<W>& tile) const {
    const int64_t n = chunk.length, b = chunk.batch, t = chunk.begin;
    q.load(b, t, n, head, tile.q, row_k, rows, this->scale);
    k.load(b, t, n, head, tile.k, row_k, rows);
    logs.load(b, t, n, head, tile.decay, row_k, rows);
    tile.exp_of_logs(rows);
    return v.load(b, t, n, head, tile.v, row_v, rows);
  }

  // S = diag(decay) S by rows.
  void decay_rows(const W* decay, W* memory) const {
    for (int64_t c = 0; c < keys; ++c) chunked::scale(row_v, decay[c], memory + c * row_v);
  }

  // `kept` may be null.
  void forward_head(int64_t s, int64_t head, W* final_states, W* kept, Sink<W>& o) const {
    const Sequence& sequence = sequences[s];
    Scratch scratch;
    Tiles<W> tile(scratch, row_k, row_v);
    W *memory = scratch.get<W>(elements()), *out = scratch.get<W>(kChunk * row_v);
    this->begin(this->initial_states(), s, head, memory);
    for (int64_t c = 0; c < sequence.chunks(); ++c) {
      const Chunk& chunk = sequences.chunk(sequence.first_chunk + c);
      const int64_t n = chunk.length, rows = padded(n);
      this->keep(memory, s, c, head, kept);
      const bool finite = load(chunk, head, rows, tile);
      tile.template accumulate_decays<false>(rows / kBlock);
      tile.score(rows / kBlock, keys);
      Lookahead ahead;
      if (c + 1 < sequence.chunks()) {
        look_ahead<W>(sequences.chunk(sequence.first_chunk + c + 1), head, {&q, &k, &logs, &v}, ahead);
      }
      const bool blank = c == 0 && !this->initial;  // nothing has been written to the memory
      if (!blank) {
        product<W>(n, row_v, keys, {tile.q_since, row_k, 1}, memory, row_v, out, row_v, false, ahead);
        decay_rows(tile.whole, memory);
      }
      multiply_lower(n, row_v, tile.scores, tile.v, row_v, out, row_v, !blank, finite);
      product<W>(keys, row_v, n, {tile.turned, kChunk, 1}, tile.v, row_v, memory, row_v, !blank, ahead);
      o.store(chunk.batch, chunk.begin, n, head, out, row_v);
    }
    this->end(memory, s, head, final_states);
  }

  struct Gradients {
    Sink<W> q, k, v, logs;
    W* initial;  // (S, H, K, V), or null
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
      if (c > 0) look_ahead<W>(sequences.chunk(sequence.first_chunk + c - 1), head, {&q, &k, &logs, &v, &dout}, ahead);
      const bool blank = c + 1 == sequence.chunks() && dfinal == nullptr;  // no gradient has come yet
      backward_chunk(sequences.chunk(sequence.first_chunk + c), head, dout, this->start(kept, s, c, head, first), blank,
                     pull, ahead, tile, to);
    }
    if (to.initial != nullptr) this->end(pull, s, head, to.initial);
  }

  // `start` is null where the memory is zero, and `pull` is it where `blank`.
  void backward_chunk(const Chunk& chunk, int64_t head, const Source<W>& dout, const W* start, bool blank, W* pull,
                      Lookahead& ahead, Tiles<W>& tile, Gradients& to) const {
    const int64_t n = chunk.length, b = chunk.batch, t = chunk.begin, rows = padded(n), blocks = rows / kBlock;
    const int64_t tile_k = kChunk * row_k;
    Scratch scratch;
    W *dy = scratch.get<W>(kChunk * row_v), *dv = scratch.get<W>(kChunk * row_v), *turned_v = scratch.get<W>(kChunk * row_v);
    W *dq = scratch.get<W>(tile_k), *dk = scratch.get<W>(tile_k), *dlog = scratch.get<W>(tile_k);
    W *dq_state = scratch.get<W>(tile_k), *dk_end = scratch.get<W>(tile_k), *until = scratch.get<W>(tile_k);
    W* frames = scratch.get<W>(kBlock * row_k * (kChunk / kBlock) * (kChunk / kBlock + 1) / 2);
    W *dscores = scratch.get<W>(kChunk * kChunk), *through = scratch.get<W>(row_k);

    load(chunk, head, rows, tile);
    bool finite_dy = true;
    if (dout.defined()) {
      finite_dy = dout.load(b, t, n, head, dy, row_v, rows);
    } else {
      zero(rows * row_v, dy);
    }
    tile.template accumulate_decays<true>(blocks);
    tile.score(blocks, keys);
    build_frames(blocks, tile, until, frames);
    transpose_tile(rows, row_v, tile.v, row_v, turned_v, kChunk, rows);
    lower_product(rows, row_v, dy, row_v, turned_v, kChunk, dscores);
    each_lower<W>(rows, [=](int64_t at, auto keep) { keep(V::load(dscores + at)).store(dscores + at); });

    const W* keys_at_end = frames + frame(blocks);
    if (!blank) product<W>(n, row_v, keys, {keys_at_end, row_k, 1}, pull, row_v, dv, row_v, false, ahead);
    multiply_lower_transposed(n, row_v, tile.scores, dy, row_v, dv, row_v, !blank, finite_dy);
    to.v.store(b, t, n, head, dv, row_v);

    if (start != nullptr) {
      gemm<W, W>(rows, row_k, row_v, {dy, row_v, 1}, {start, 1, row_v}, dq_state, row_k, false);
    } else {
      zero(rows * row_k, dq_state);
    }
    if (!blank) {
      gemm<W, W>(rows, row_k, row_v, {tile.v, row_v, 1}, {pull, 1, row_v}, dk_end, row_k, false);
    } else {
      zero(rows * row_k, dk_end);
    }
    zero(row_k, through);
    for (int64_t c = 0; start != nullptr && !blank && c < row_k; ++c) {
      through[c] = tile.whole[c] * dot(row_v, start + c * row_v, pull + c * row_v);
    }

    // From the last block to the first. `dk_end` holds what the blocks after this one send back to the keys before
    // them, at their boundary; `through` what the chunk's start and the tokens after this block have to do with one
    // another and with the chunk's end.
    for (int64_t block = blocks - 1; block >= 0; --block) {
      const int64_t before = block * kBlock, at = before * row_k;
      const W *keys_before = frames + frame(block), *total = tile.totals + block * row_k;
      if (before > 0) {
        gemm<W, W>(kBlock, row_k, before, {dscores + before * kChunk, kChunk, 1}, {keys_before, row_k, 1}, dq + at,
                   row_k, false);
      } else {
        zero(kBlock * row_k, dq);
      }
      each_vector<W>(row_k, [&](int64_t c) {
        V across(0);
        for (int64_t j = 0; j < before; ++j) {
          W* sent = dk_end + j * row_k + c;
          across = fma(V::load(keys_before + j * row_k + c), V::load(sent), across);
          (V::load(sent) * V::load(total + c)).store(sent);
        }
        V outer = V::load(through + c), from_start(0), later(0), earlier(0);
        const V fixed = fma(across, V::load(total + c), outer);
        for (int64_t r = kBlock - 1, i = at + r * row_k + c; r >= 0; --r, i -= row_k) {
          const V query = V::load(tile.q + i), by_state = V::load(tile.since + i) * V::load(dq_state + i);
          const V grad = fma(V::load(tile.local + i), V::load(dq + i), by_state);
          grad.store(dq + i);
          later = fma(query, grad, later);
          from_start = fma(query, by_state, from_start);
          (fixed + later).store(dlog + i);
        }
        (outer + from_start).store(through + c);
        for (int64_t r = 0, i = at + c; r < kBlock; ++r, i += row_k) {
          const V grad = V::load(until + i) * V::load(dk_end + i);
          grad.store(dk + i);
          (V::load(dlog + i) + earlier).store(dlog + i);
          earlier = fma(V::load(tile.k + i), grad, earlier);
        }
        diagonal_gradients(dscores + before * kChunk + before, tile.q + at + c, tile.k + at + c, tile.decay + at + c,
                           row_k, dq + at + c, dk + at + c, dlog + at + c);
      });
      if (before > 0) {
        gemm<W, W>(before, row_k, kBlock, {dscores + before * kChunk, 1, kChunk}, {tile.q_local + at, row_k, 1},
                   dk_end, row_k, true);
      }
    }
    if (!blank) decay_rows(tile.whole, pull);
    product<W>(keys, row_v, n, {tile.q_since, 1, row_k}, dy, row_v, pull, row_v, !blank, ahead);
    to.q.store(b, t, n, head, dq, row_k, this->scale);
    to.k.store(b, t, n, head, dk, row_k);
    to.logs.store(b, t, n, head, dlog, row_k);
  }

  // Where frame `block` begins: the keys before that block, decayed to its start. There is none before block 0.
  int64_t frame(int64_t block) const { return kBlock * row_k * block * (block - 1) / 2; }

  void build_frames(int64_t blocks, const Tiles<W>& tile, W* until, W* frames) const {
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t before = block * kBlock, at = before * row_k;
      const W* now = frames + frame(block);
      W* next = frames + frame(block + 1);
      each_vector<W>(row_k, [&](int64_t c) {
        const V total = V::load(tile.totals + block * row_k + c);
        for (int64_t j = c; j < at; j += row_k) (V::load(now + j) * total).store(next + j);
        V rest(1);
        for (int64_t r = kBlock - 1, i = at + r * row_k + c; r >= 0; --r, i -= row_k) {
          rest.store(until + i);
          (V::load(tile.k + i) * rest).store(next + i);
          rest = rest * V::load(tile.decay + i);
        }
      });
    }
  }
};

std::tuple<Tensor, Tensor, Tensor> gated_linear_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                                          const Tensor& log_decay, double scale,
                                                          const OptionalTensor& initial_state,
                                                          const OptionalTensor& cu_seqlens, bool keep) {
  check_memory(kShapes, q, k, v, 4);
  require(log_decay.same_shape(q), kShapes);
  Tensor o, final_state, kept;
  dispatch_wide(q.dtype(), [&](auto element) {
    using W = decltype(element);
    const Gla<W> self(q, k, v, log_decay, scale, initial_state, cu_seqlens);
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

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gated_linear_attention_backward(
    const OptionalTensor& dout, const OptionalTensor& dfinal, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& log_decay, double scale, const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens,
    const Tensor& kept) {
  check_memory(kShapes, q, k, v, 4);
  require(log_decay.same_shape(q) && (!dout || dout.same_shape(v)), kShapes);
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> result;
  dispatch_wide(q.dtype(), [&](auto element) {
    using W = decltype(element);
    constexpr DType kWide = dtype_of<W>();
    const Gla<W> self(q, k, v, log_decay, scale, initial_state, cu_seqlens);
    require(kept.numel() >= self.sequences.slots() * self.heads * self.elements(), kKept);
    Tensor dinitial = initial_state ? empty(4, initial_state.sizes(), kWide) : empty({0}, kWide);
    Tensor wide;
    if (dfinal) wide = cast(dfinal, kWide);
    const W* dfinal_data = dfinal ? wide.data<W>() : nullptr;
    const Source<W> upstream = dout ? Source<W>(dout) : Source<W>();
    typename Gla<W>::Gradients to{Sink<W>(q), Sink<W>(k), Sink<W>(v), Sink<W>(log_decay),
                                  initial_state ? dinitial.mutable_data<W>() : nullptr};
    parallel_tasks(self.sequences.count() * self.heads, [&](int64_t task) {
      self.backward_head(task / self.heads, task % self.heads, kept.data<W>(), upstream, dfinal_data, to);
    });
    result = {to.q.finish(), to.k.finish(), to.v.finish(), to.logs.finish(),
              initial_state ? cast(dinitial, initial_state.dtype()) : std::move(dinitial)};
  });
  return result;
}

std::tuple<Tensor, Tensor> gated_linear_attention_step(const Tensor& state_any, const Tensor& q_any,
                                                       const Tensor& k_any, const Tensor& v_any,
                                                       const Tensor& log_decay, double scale) {
  check_memory(kShapes, q_any, k_any, v_any, 3);
  require(log_decay.same_shape(q_any), kShapes);
  require(state_any.has_shape({q_any.size(0), q_any.size(1), q_any.size(2), v_any.size(2)}), kShapes);
  Tensor o, new_state;
  dispatch_wide(q_any.dtype(), [&](auto element) {
    using W = decltype(element);
    using V = Vec<W>;
    const Source<W> q(q_any), k(k_any), v(v_any), logs(log_decay);
    const int64_t heads = q_any.size(1), keys = q_any.size(2), values = v_any.size(2);
    const int64_t row_k = padded(keys), row_v = padded(values);
    const Tensor state = cast(state_any, dtype_of<W>());
    Sink<W> out(v_any);
    new_state = empty(4, state.sizes(), dtype_of<W>());
    const W* state_data = state.data<W>();
    W* new_data = new_state.mutable_data<W>();
    parallel_for(q_any.size(0) * heads, grain_rows(keys * values), [&](int64_t begin, int64_t end) {
      Scratch scratch;
      W *q_row = scratch.get<W>(row_k), *k_row = scratch.get<W>(row_k), *decay = scratch.get<W>(row_k);
      W *v_row = scratch.get<W>(row_v), *o_row = scratch.get<W>(row_v);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t batch = task / heads, head = task % heads;
        q.load(batch, 0, 1, head, q_row, row_k, 0, static_cast<W>(scale));
        k.load(batch, 0, 1, head, k_row, row_k);
        v.load(batch, 0, 1, head, v_row, row_v);
        logs.load(batch, 0, 1, head, decay, row_k);
        each_vector<W>(row_k, [=](int64_t i) { exp(V::load(decay + i)).store(decay + i); });
        const W* from = state_data + task * keys * values;
        W* to = new_data + task * keys * values;
        if constexpr (kStepColumns<W> > 0) {
          by_columns<W>(values, [&](int64_t j, auto vectors, auto lanes) {
            step_columns<W, decltype(vectors)::value>(keys, values, decay, k_row, q_row, v_row + j, from + j, to + j,
                                                      o_row + j, lanes);
          });
        } else {
          zero(row_v, o_row);
          by_four_rows(keys, [&](int64_t c, auto rows) {
            step_rows<W, decltype(rows)::value>(values, decay + c, k_row + c, q_row + c, v_row, from + c * values,
                                                to + c * values, o_row);
          });
        }
        out.store(batch, 0, 1, head, o_row, row_v);
      }
    });
    o = out.finish();
  });
  return {std::move(o), std::move(new_state)};
}

STAR_OPERATOR(
    "gated_linear_attention(Tensor q, Tensor k, Tensor v, Tensor log_decay, float scale, Tensor? initial_state, "
    "Tensor? cu_seqlens, bool keep) -> (Tensor, Tensor, Tensor)",
    gated_linear_attention);
STAR_OPERATOR(
    "gated_linear_attention_backward(Tensor? dout, Tensor? dfinal_state, Tensor q, Tensor k, Tensor v, Tensor "
    "log_decay, float scale, Tensor? initial_state, Tensor? cu_seqlens, Tensor kept) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    gated_linear_attention_backward);
STAR_OPERATOR(
    "gated_linear_attention_step(Tensor state, Tensor q, Tensor k, Tensor v, Tensor log_decay, float scale) -> "
    "(Tensor, Tensor)",
    gated_linear_attention_step);

}  // namespace
}  // namespace star
