// Mamba-2's scan: S_t = exp(s_t A) S_{t-1} + s_t x_t B_t^T, y_t = (S_t C_t + D x_t) silu(z_t), with s_t = softplus(dt_t
// + dt_bias).
//
// Forward: the products C_i . B_j of every chunk, which the heads of a group share, then each head by itself over time.
// Backward: each head over time for the gradients of its states at the chunks' ends, then each chunk by itself, all heads
// of a group together: the gradients of B and C need no sum across tasks, and take one triangle for all heads.
#include "chunked.h"

namespace star {
namespace {

using namespace chunked;  // NOLINT

// Gradients of chunk states held at once in backward: 1 MB in float32, or up to 16 MB where so many threads need chunks
// to work on. More is slower: memory that comes from the system is cleared page by page at each call.
constexpr int64_t kHeldElements = int64_t{1} << 18, kMostHeldElements = int64_t{1} << 22;
constexpr int64_t kChunksAThread = 4;

void check(const Tensor& x, const Tensor& dt, const Tensor& a, const Tensor& b, const Tensor& c, int64_t axes) {
  require(x.dim() == axes && dt.dim() == axes - 1 && a.dim() == 1 && b.dim() == axes && c.same_shape(b),
          "ssd: x must be (B, T, H, P), dt (B, T, H), A (H,), B and C (B, T, G, N)");
  const int64_t heads = x.size(-2), groups = b.size(-2);
  require(dt.size(-1) == heads && a.size(0) == heads && groups > 0 && heads % groups == 0,
          "ssd: dt and A must have the heads of x, and B groups that divide them");
  for (int64_t axis = 0; axis < axes - 2; ++axis) {
    require(dt.size(axis) == x.size(axis) && b.size(axis) == x.size(axis), "ssd: dt, B and C must have x's B and T");
  }
}

// Rows of whole vectors, in a tile or where a tensor has them.
template <class W> struct Rows {
  W* data;
  int64_t row;
};

// out = (y + skip x) silu(gate) by rows of `width`; x's and y's are adjacent.
template <class W>
void finish_rows(int64_t rows, int64_t width, bool has_skip, W skip, const W* x, Rows<const W> gate, const W* y,
                 Rows<W> out) {
  using V = Vec<W>;
  if (!has_skip && gate.data == nullptr && out.data == y) return;
  for (int64_t i = 0; i < rows; ++i, x += width, y += width, gate.data += gate.row, out.data += out.row) {
    each_vector<W>(width, [&](int64_t j) {
      V value = V::load(y + j);
      if (has_skip) value = fma(V(skip), V::load(x + j), value);
      if (gate.data != nullptr) value = value * silu(V::load(gate.data + j));
      value.store(out.data + j);
    });
  }
}

// sum_i += f_i x_i by rows, and products_i = f_i x_i . other_i.
template <class W>
void add_rows(int64_t rows, int64_t row, const W* factors, const W* x, const W* other, W* sum, W* products) {
  using V = Vec<W>;
  for (int64_t i = 0; i < rows; ++i) {
    const V f(factors[i]);
    V product(0);
    each_vector<W>(row, [&](int64_t j) {
      const V value = f * V::load(x + i * row + j);
      (V::load(sum + i * row + j) + value).store(sum + i * row + j);
      product = fma(value, V::load(other + i * row + j), product);
    });
    products[i] = reduce_add(product);
  }
}

template <class W> struct Ssd {
  using V = Vec<W>;

  Source<W> x, inward, outward, gate;
  Scalars<W> dt;
  Parameter<W> rate, skip, bias;
  bool softplus_steps;
  Sequences sequences;
  int64_t length, heads, groups, width, size;  // T, H, G, P, N
  int64_t row_p, row_n;                // P and N padded
  Tensor initial;                      // (S, H, P, N), if given

  Ssd(const Tensor& x_any, const Tensor& dt_any, const Tensor& a, const Tensor& b, const Tensor& c, const Tensor& d,
      const Tensor& z, const Tensor& dt_bias, bool dt_softplus, const Tensor& initial_state, const Tensor& cu_seqlens)
      : x(x_any),
        inward(b),
        outward(c),
        dt(dt_any, true),
        rate(a),
        skip(d),
        bias(dt_bias),
        softplus_steps(dt_softplus),
        sequences(x_any, cu_seqlens),
        length(x_any.size(1)),
        heads(x_any.size(2)),
        groups(b.size(2)),
        width(x_any.size(3)),
        size(b.size(3)),
        row_p(padded(width)),
        row_n(padded(size)) {
    if (z) gate = Source<W>(z);
    if (initial_state) initial = cast(initial_state, dtype_of<W>());
  }

  int64_t heads_a_group() const { return heads / groups; }
  const W* initial_states() const { return initial ? initial.data<W>() : nullptr; }

  // What a chunk's step sizes make of its tokens, for one head.
  struct Steps {
    W step[kChunk], slope[kChunk], decay[kChunk];          // s_t, its derivative by dt_t, exp(s_t A)
    W since[kChunk], until[kChunk], between[kChunk * kChunk];  // see chunk_decays
  };

  // `all`: with the decays between any two tokens.
  void steps(const Chunk& chunk, int64_t head, bool all, Steps& out) const {
    W raw[kChunk];
    dt.load(chunk.batch, chunk.begin, chunk.length, head, raw);
    const V shift(bias[head]), a(rate[head]);
    each_vector<W>(padded(chunk.length), [&](int64_t i) {
      const V plain = V::load(raw + i) + shift;
      const V step = softplus_steps ? softplus(plain) : plain;
      step.store(out.step + i);
      (softplus_steps ? sigmoid(plain) : V(1)).store(out.slope + i);
      exp(step * a).store(out.decay + i);
    });
    if (all) {
      chunk_decays(chunk.length, out.decay, out.between, out.since, out.until);
    } else {
      end_decays(chunk.length, out.decay, out.since, out.until);
    }
  }

  // The triangle of C_i . B_j from their tiles; `turned` is memory for B's transpose.
  void products(int64_t n, const W* out_tile, const W* in_tile, W* turned, W* triangle) const {
    transpose_tile(n, size, in_tile, row_n, turned, kChunk, padded(n));
    lower_product(n, size, out_tile, row_n, turned, kChunk, triangle);
  }

  // A chunk's tokens of x, z or y's gradient: where they lie, or in a tile.
  Rows<const W> rows_of(const Source<W>& source, const Chunk& chunk, int64_t head, W* tile) const {
    const W* place = width == row_p ? source.in_place(chunk.batch, chunk.begin, head) : nullptr;
    if (place != nullptr) return {place, source.row()};
    source.load(chunk.batch, chunk.begin, chunk.length, head, tile, row_p);
    return {tile, row_p};
  }
  // Where a chunk's rows of an output go: into the tensor, or into a tile that `store` takes.
  Rows<W> place_of(Sink<W>& sink, const Chunk& chunk, int64_t head, W* tile) const {
    W* place = width == row_p ? sink.in_place(chunk.batch, chunk.begin, head) : nullptr;
    return place != nullptr ? Rows<W>{place, sink.row()} : Rows<W>{tile, row_p};
  }
  void store(Sink<W>& sink, const Chunk& chunk, int64_t head, const W* tile, Rows<W> place) const {
    if (place.data == tile) sink.store(chunk.batch, chunk.begin, chunk.length, head, tile, row_p);
  }

  // The chunk's upstream gradient before the gate: dy silu(z), times one of `factors` a token if they are given.
  // Returns whether it is finite. With a gate, `slope` gets dy silu'(z), or is memory of that size without `kSlope`.
  template <bool kSlope>
  bool load_upstream(const Source<W>& dy, const Chunk& chunk, int64_t head, const W* factors, W* tile, W* slope) const {
    const int64_t n = chunk.length;
    if (!dy.defined()) {
      zero(n * row_p, tile);
      if (gate.defined()) zero(n * row_p, slope);
      return true;
    }
    if (!gate.defined()) return dy.load(chunk.batch, chunk.begin, n, head, tile, row_p, 0, 1, factors);
    Rows<const W> upstream = rows_of(dy, chunk, head, tile), z_rows = rows_of(gate, chunk, head, slope);
    FiniteCheck<V> check;
    for (int64_t i = 0; i < n; ++i, upstream.data += upstream.row, z_rows.data += z_rows.row) {
      const V factor(factors != nullptr ? factors[i] : W(1));
      each_vector<W>(row_p, [&](int64_t j) {
        const V z = V::load(z_rows.data + j), s = sigmoid(z), own = V::load(upstream.data + j) * s;
        const V value = own * z * factor;
        value.store(tile + i * row_p + j);
        check.see(value);
        if constexpr (kSlope) (own * fma(z, V(1) - s, V(1))).store(slope + i * row_p + j);
      });
    }
    return check.holds();
  }

  // `kept` may be null.
  void forward(W* final_states, W* kept, Sink<W>& y) const {
    Tensor table;
    if (heads_a_group() > 1) table = shared_products();
    parallel_tasks(sequences.count() * heads, [&](int64_t task) {
      forward_head(task / heads, task % heads, table ? table.data<W>() : nullptr, final_states, kept, y);
    });
  }

  Tensor shared_products() const {
    Tensor table = empty({sequences.chunks(), groups, kChunk, kChunk}, dtype_of<W>());
    W* triangles = table.mutable_data<W>();
    parallel_tasks(sequences.chunks() * groups, [&](int64_t task) {
      const Chunk& chunk = sequences.chunk(task / groups);
      Scratch scratch;
      W *in_tile = scratch.get<W>(kChunk * row_n), *out_tile = scratch.get<W>(kChunk * row_n);
      inward.load(chunk.batch, chunk.begin, chunk.length, task % groups, in_tile, row_n);
      outward.load(chunk.batch, chunk.begin, chunk.length, task % groups, out_tile, row_n);
      products(chunk.length, out_tile, in_tile, scratch.get<W>(kChunk * row_n), triangles + task * kChunk * kChunk);
    });
    return table;
  }

  // Elements of a state as it is held here: N x P, both axes padded.
  int64_t state_elements() const { return row_n * row_p; }

  // The first state, or gradient of the last, from (S, H, P, N); zeros if there is none.
  void begin(const W* states, int64_t s, int64_t head, W* state) const {
    zero(state_elements(), state);
    if (states == nullptr) return;
    transpose_tile(width, size, states + (s * heads + head) * width * size, size, state, row_p, row_p);
  }
  void end(const W* state, int64_t s, int64_t head, W* states) const {
    transpose_tile(size, width, state, row_p, states + (s * heads + head) * width * size, size, size);
  }

  // One head of one sequence over time.
  void forward_head(int64_t s, int64_t head, const W* table, W* final_states, W* kept, Sink<W>& y) const {
    const Sequence& sequence = sequences[s];
    const int64_t group = head / heads_a_group();
    const int64_t count = state_elements();
    Scratch scratch;
    W* last = scratch.get<W>(count);
    W *x_tile = scratch.get<W>(kChunk * row_p), *value = scratch.get<W>(kChunk * row_p);
    W *y_tile = scratch.get<W>(kChunk * row_p), *in_tile = scratch.get<W>(kChunk * row_n);
    W *out_tile = scratch.get<W>(kChunk * row_n), *turned = scratch.get<W>(kChunk * row_n);
    W *triangle = scratch.get<W>(kChunk * kChunk), *scores = scratch.get<W>(kChunk * kChunk);
    Steps& own = *scratch.get<Steps>(1);
    begin(initial_states(), s, head, last);
    W* state = last;
    for (int64_t c = 0; c < sequence.chunks(); ++c) {
      const Chunk& chunk = sequences.chunk(sequence.first_chunk + c);
      const int64_t n = chunk.length, b = chunk.batch, t = chunk.begin;
      const bool blank = c == 0 && !initial;  // nothing has been written to the state
      // The next state is formed where it is kept.
      W* next = kept != nullptr && c + 1 < sequence.chunks() ? kept_state(kept, sequence, c + 1, heads, head, count)
                                                             : last;
      steps(chunk, head, true, own);
      const W* shared = triangle;
      if (table != nullptr) {
        shared = table + ((sequence.first_chunk + c) * groups + group) * kChunk * kChunk;
      } else {
        inward.load(b, t, n, group, in_tile, row_n);
        outward.load(b, t, n, group, out_tile, row_n);
        products(n, out_tile, in_tile, turned, triangle);
      }
      const Matrix<W> out = tile_of(outward, chunk, group, out_tile), in = tile_of(inward, chunk, group, in_tile);
      each_lower<W>(n, [&](int64_t at, auto keep) {
        keep(V::load(shared + at) * V::load(own.between + at)).store(scores + at);
      });
      x.load(b, t, n, head, x_tile, row_p);
      const bool finite = scale_rows(n, row_p, own.step, x_tile, value);

      Lookahead ahead;
      if (c + 1 < sequence.chunks()) {
        const Chunk& after = sequences.chunk(sequence.first_chunk + c + 1);
        look_ahead<W>(after, head, {&x, &gate}, ahead);
        look_ahead<W>(after, group, {&inward, &outward}, ahead);
        if (kept != nullptr && c + 2 < sequence.chunks()) {
          ahead.add(kept_state(kept, sequence, c + 2, heads, head, count), row_p * sizeof(W), row_p * sizeof(W), row_n);
        }
        look_ahead<W>(after, head, {&y}, ahead);
      }
      if (!blank) {
        product<W>(n, row_p, size, out, state, row_p, y_tile, row_p, false, ahead);
      }
      multiply_lower(n, row_p, scores, value, row_p, y_tile, row_p, !blank, finite, own.since);
      scale_rows(n, row_p, own.until, value, value);
      renew(in, value, n, blank ? nullptr : state, own.since[n - 1], next, ahead);
      state = next;

      const Rows<W> place = place_of(y, chunk, head, y_tile);
      const Rows<const W> z = gate.defined() ? rows_of(gate, chunk, head, value) : Rows<const W>{nullptr, 0};
      finish_rows(n, row_p, skip.defined(), skip[head], x_tile, z, y_tile, place);
      store(y, chunk, head, y_tile, place);
    }
    end(state, s, head, final_states);
  }

  // A chunk's tokens of B or C: where they lie, or in a tile.
  Matrix<W> tile_of(const Source<W>& source, const Chunk& chunk, int64_t group, W* tile) const {
    const W* place = source.row() == size ? source.in_place(chunk.batch, chunk.begin, group) : nullptr;
    if (place != nullptr) return {place, size, 1};
    source.load(chunk.batch, chunk.begin, chunk.length, group, tile, row_n);
    return {tile, row_n, 1};
  }

  // new_state = decay state + keys^T values over the n tokens of a chunk; a null state is zero.
  void renew(Matrix<W> keys, const W* values, int64_t n, const W* state, W decay, W* new_state,
             Lookahead& ahead) const {
    product<W>(size, row_p, n, {keys.data, 1, keys.row}, values, row_p, new_state, row_p,
               Onto<W>{state, row_p, &decay, 0}, ahead);
    zero((row_n - size) * row_p, new_state + size * row_p);
  }

  struct Gradients {
    Sink<W> x, inward, outward, gate;
    W* dt;       // (B, T, H)
    W* partial;  // (chunks, 3, H): of A, D and dt_bias
    W* initial;  // (S, H, P, N), or null
  };

  void backward(const W* kept, const Source<W>& dy, const W* dfinal, Gradients& out) const {
    const int64_t a_chunk = heads * state_elements();
    const int64_t wanted = larger(kHeldElements, kChunksAThread * num_threads() * a_chunk);
    const int64_t most = larger(1, smaller(wanted, kMostHeldElements) / larger(1, a_chunk));
    Tensor pulls = empty({smaller(most, sequences.chunks()), a_chunk}, dtype_of<W>());
    Tensor carried = empty({a_chunk}, dtype_of<W>());
    W *pull = pulls.mutable_data<W>(), *carry = carried.mutable_data<W>();
    // Some whole sequences at a time, or a part of one that is too long, from its last chunks to the first.
    for (int64_t first = 0, last; first < sequences.count(); first = last) {
      int64_t chunks = 0;
      for (last = first; last < sequences.count(); ++last) {
        if (last > first && chunks + sequences[last].chunks() > most) break;
        chunks += sequences[last].chunks();
      }
      int64_t end = chunks;
      do {
        const int64_t begin = larger(0, end - most), first_chunk = sequences[first].first_chunk + begin;
        const bool whole = last - first > 1;
        parallel_tasks((last - first) * heads, [&](int64_t task) {
          const int64_t s = first + task / heads;
          scan_head(s, task % heads, whole ? 0 : begin, whole ? sequences[s].chunks() : end, first_chunk, dy, dfinal,
                    carry, pull, out.initial);
        });
        parallel_tasks((end - begin) * groups, [&](int64_t task) {
          backward_chunk(first_chunk + task / groups, task % groups, kept, dy, dfinal != nullptr,
                         pull + task / groups * a_chunk, out);
        });
        end = begin;
      } while (end > 0);
    }
  }

  // The gradient of the state at the ends of chunks `from` to `to` of a sequence, for one head. Where `to` is not the
  // sequence's end, it begins with what the chunks after left in `carry`. Nothing is written for a last chunk without a
  // gradient from outside.
  void scan_head(int64_t s, int64_t head, int64_t from, int64_t to, int64_t first_chunk, const Source<W>& dy,
                 const W* dfinal, W* carry, W* pulls, W* dinitial) const {
    const Sequence& sequence = sequences[s];
    const int64_t group = head / heads_a_group(), count = state_elements();
    Scratch scratch;
    W *first = scratch.get<W>(count), *tile = scratch.get<W>(kChunk * row_p);
    W *slope = scratch.get<W>(kChunk * row_p), *out_tile = scratch.get<W>(kChunk * row_n);
    Steps& own = *scratch.get<Steps>(1);
    bool blank = to == sequence.chunks() && dfinal == nullptr;  // no gradient has come yet
    const auto slot = [&](int64_t c) {
      return pulls + ((sequence.first_chunk + c - first_chunk) * heads + head) * count;
    };
    if (to < sequence.chunks()) {
      copy(count, carry + head * count, slot(to - 1));
    } else if (!blank || to == 0) {
      begin(dfinal, s, head, to > 0 ? slot(to - 1) : first);
    }
    for (int64_t c = to - 1; c >= from; --c) {
      const Chunk& chunk = sequences.chunk(sequence.first_chunk + c);
      if (c == 0 && dinitial == nullptr) break;
      steps(chunk, head, false, own);
      load_upstream<false>(dy, chunk, head, own.since, tile, slope);
      const Matrix<W> out = tile_of(outward, chunk, group, out_tile);
      Lookahead ahead;
      if (c > 0) {
        const Chunk& after = sequences.chunk(sequence.first_chunk + c - 1);
        look_ahead<W>(after, head, {&dy, &gate}, ahead);
        look_ahead<W>(after, group, {&outward}, ahead);
      }
      W* before = c > from ? slot(c - 1) : first;
      renew(out, tile, chunk.length, blank ? nullptr : slot(c), own.since[chunk.length - 1], before, ahead);
      blank = false;
    }
    if (from > 0) {
      copy(count, first, carry + head * count);
    } else if (dinitial != nullptr) {
      end(first, s, head, dinitial);
    }
  }

  // Tiles of one chunk and group in backward, and of one of its heads at a time.
  struct Tiles {
    Tiles(Scratch& scratch, int64_t row_p, int64_t row_n) {
      for (W** one : {&in, &out, &turned, &din, &dout, &carried}) *one = scratch.get<W>(kChunk * row_n);
      for (W** one : {&x, &value, &dy, &slope, &gated, &dvalue}) *one = scratch.get<W>(kChunk * row_p);
      for (W** one : {&products, &scores, &dscores, &m, &dproducts}) *one = scratch.get<W>(kChunk * kChunk);
      steps = scratch.get<Steps>(1);
    }
    W *in, *out, *turned, *din, *dout, *carried;
    W *x, *value, *dy, *slope, *gated, *dvalue;
    W *products, *scores, *dscores, *m, *dproducts;
    Steps* steps;
  };

  // Everything inside one chunk, for all heads of a group. `pulls` is the chunk's; it holds nothing for a sequence's
  // last chunk unless `pulled`.
  void backward_chunk(int64_t number, int64_t group, const W* kept, const Source<W>& dy, bool pulled, const W* pulls,
                      Gradients& to) const {
    const Chunk& chunk = sequences.chunk(number);
    const int64_t n = chunk.length, b = chunk.batch, t = chunk.begin;
    Scratch scratch;
    Tiles tile(scratch, row_p, row_n);
    W *turned_value = scratch.get<W>(kChunk * row_p), *first = scratch.get<W>(state_elements());
    const int64_t c = number - sequences[chunk.sequence].first_chunk;
    const bool finite_in = inward.load(b, t, n, group, tile.in, row_n);
    const bool finite_out = outward.load(b, t, n, group, tile.out, row_n);
    products(n, tile.out, tile.in, tile.turned, tile.products);
    zero(n * row_n, tile.din);
    zero(n * row_n, tile.dout);
    each_lower<W>(n, [&](int64_t at, auto) { V(0).store(tile.dproducts + at); });
    for (int64_t head = group * heads_a_group(); head < (group + 1) * heads_a_group(); ++head) {
      const W* start = nullptr;
      if (c > 0) {
        start = kept_state(kept, sequences[chunk.sequence], c, heads, head, state_elements());
      } else if (initial) {
        begin(initial_states(), chunk.sequence, head, first);
        start = first;
      }
      const bool ends = c + 1 == sequences[chunk.sequence].chunks();
      const W* pull = ends && !pulled ? nullptr : pulls + head * state_elements();
      backward_head(number, head, dy, start, pull, turned_value, tile, to);
    }
    multiply_lower(n, row_n, tile.dproducts, tile.in, row_n, tile.dout, row_n, true, finite_in);
    multiply_lower_transposed(n, row_n, tile.dproducts, tile.out, row_n, tile.din, row_n, true, finite_out);
    to.outward.store(b, t, n, group, tile.dout, row_n);
    to.inward.store(b, t, n, group, tile.din, row_n);
  }

  // The state at the chunk's start and the gradient of that at its end are null where they are zero.
  void backward_head(int64_t number, int64_t head, const Source<W>& dy, const W* start, const W* pull, W* turned_value,
                     Tiles& tile, Gradients& to) const {
    const Chunk& chunk = sequences.chunk(number);
    const int64_t n = chunk.length, b = chunk.batch, t = chunk.begin;
    Steps& own = *tile.steps;
    steps(chunk, head, true, own);
    x.load(b, t, n, head, tile.x, row_p);
    const bool finite_value = scale_rows(n, row_p, own.step, tile.x, tile.value);
    const bool finite_dy = load_upstream<true>(dy, chunk, head, nullptr, tile.dy, tile.slope);

    // The gradient of the scores is dy V^T; from it that of C B^T, and the terms of the log decays.
    transpose_tile(n, row_p, tile.value, row_p, turned_value, kChunk, padded(n));
    lower_product(n, row_p, tile.dy, row_p, turned_value, kChunk, tile.dscores);
    each_lower<W>(n, [&](int64_t at, auto keep) {
      const V between = V::load(own.between + at), product = V::load(tile.products + at);
      const V dproduct = keep(V::load(tile.dscores + at) * between);
      (V::load(tile.dproducts + at) + dproduct).store(tile.dproducts + at);
      keep(dproduct * product).store(tile.m + at);
      keep(product * between).store(tile.scores + at);
    });
    Lookahead ahead;
    if (head + 1 < heads) {
      look_ahead<W>(chunk, head + 1, {&x, &dy, &gate}, ahead);
      look_ahead<W>(chunk, head + 1, {&to.x, &to.gate}, ahead);
    }
    if (gate.defined()) {
      const Rows<W> place = place_of(to.gate, chunk, head, tile.gated);
      backward_gate(n, head, start, finite_value, ahead, tile, place);
      store(to.gate, chunk, head, tile.gated, place);
    }

    if (pull != nullptr) {
      product<W>(n, row_p, size, {tile.in, row_n, 1}, pull, row_p, tile.dvalue, row_p, false, ahead);
    }
    multiply_lower_transposed(n, row_p, tile.scores, tile.dy, row_p, tile.dvalue, row_p, pull != nullptr, finite_dy,
                              own.until);

    W from_start[kChunk] = {}, to_end[kChunk] = {}, dlog[kChunk], through = 0;
    if (start != nullptr) {
      gemm<W, W>(n, row_n, row_p, {tile.dy, row_p, 1}, {start, 1, row_p}, tile.carried, row_n, false);
      add_rows(n, row_n, own.since, tile.carried, tile.out, tile.dout, from_start);
    }
    if (pull != nullptr) {
      gemm<W, W>(n, row_n, row_p, {tile.value, row_p, 1}, {pull, 1, row_p}, tile.carried, row_n, false);
      add_rows(n, row_n, own.until, tile.carried, tile.in, tile.din, to_end);
    }
    if (start != nullptr && pull != nullptr) through = own.since[n - 1] * dot(state_elements(), start, pull);
    log_decay_gradient(n, tile.m, from_start, to_end, through, dlog);

    // From the gradient of the values step x to those of x, D and the steps.
    W drate = 0, dbias = 0;
    V dskip(0);
    const V skipped(skip[head]);
    const bool has_skip = skip.defined();
    const Rows<W> place = place_of(to.x, chunk, head, tile.dvalue);
    for (int64_t i = 0; i < n; ++i) {
      const V step(own.step[i]);
      V product(0);
      each_vector<W>(row_p, [&](int64_t j) {
        const V value = V::load(tile.dvalue + i * row_p + j), input = V::load(tile.x + i * row_p + j);
        const V upstream = V::load(tile.dy + i * row_p + j);
        product = fma(value, input, product), dskip = fma(upstream, input, dskip);
        (has_skip ? fma(skipped, upstream, step * value) : step * value).store(place.data + i * place.row + j);
      });
      const W ddt = (reduce_add(product) + rate[head] * dlog[i]) * own.slope[i];
      drate += own.step[i] * dlog[i], dbias += ddt;
      to.dt[(b * length + t + i) * heads + head] = ddt;
    }
    W* partial = to.partial + number * 3 * heads + head;
    partial[0] = drate, partial[heads] = reduce_add(dskip), partial[2 * heads] = dbias;
    store(to.x, chunk, head, tile.dvalue, place);
  }

  // The gradient of z: dy silu'(z), which is in tile.slope, times the output before the gate, which is computed again.
  void backward_gate(int64_t n, int64_t head, const W* start, bool finite_value, Lookahead& ahead, Tiles& tile,
                     Rows<W> out) const {
    W* y = tile.gated;
    if (start != nullptr) {
      product<W>(n, row_p, size, {tile.out, row_n, 1}, start, row_p, y, row_p, false, ahead);
    }
    multiply_lower(n, row_p, tile.scores, tile.value, row_p, y, row_p, start != nullptr, finite_value,
                   tile.steps->since);
    const V skipped(skip[head]);
    const bool has_skip = skip.defined();
    for (int64_t i = 0; i < n; ++i, out.data += out.row) {
      each_vector<W>(row_p, [&](int64_t j) {
        const int64_t at = i * row_p + j;
        const V value = V::load(y + at), full = has_skip ? fma(skipped, V::load(tile.x + at), value) : value;
        (V::load(tile.slope + at) * full).store(out.data + j);
      });
    }
  }
};

std::tuple<Tensor, Tensor, Tensor> ssd(const Tensor& x, const Tensor& dt, const Tensor& a, const Tensor& b,
                                       const Tensor& c, const OptionalTensor& d, const OptionalTensor& z,
                                       const OptionalTensor& dt_bias, bool dt_softplus,
                                       const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens,
                                       bool keep) {
  check(x, dt, a, b, c, 4);
  Tensor y, final_state, kept;
  dispatch_wide(x.dtype(), [&](auto element) {
    using W = decltype(element);
    const Ssd<W> self(x, dt, a, b, c, d, z, dt_bias, dt_softplus, initial_state, cu_seqlens);
    Sink<W> out(x);
    final_state = empty({self.sequences.count(), self.heads, self.width, self.size}, dtype_of<W>());
    kept = new_kept_states(x, self.sequences, self.heads * self.state_elements(), keep, dtype_of<W>());
    self.forward(final_state.mutable_data<W>(), keep ? kept.mutable_data<W>() : nullptr, out);
    y = out.finish();
  });
  return {std::move(y), std::move(final_state), std::move(kept)};
}

using NineTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

NineTensors ssd_backward(const OptionalTensor& dy, const OptionalTensor& dfinal, const Tensor& x, const Tensor& dt,
                         const Tensor& a, const Tensor& b, const Tensor& c, const OptionalTensor& d,
                         const OptionalTensor& z, const OptionalTensor& dt_bias, bool dt_softplus,
                         const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens, const Tensor& kept) {
  check(x, dt, a, b, c, 4);
  NineTensors result;
  dispatch_wide(x.dtype(), [&](auto element) {
    using W = decltype(element);
    constexpr DType kWide = dtype_of<W>();
    const Ssd<W> self(x, dt, a, b, c, d, z, dt_bias, dt_softplus, initial_state, cu_seqlens);
    const int64_t chunks = self.sequences.chunks(), heads = self.heads;
    require(kept.numel() >= self.sequences.slots() * heads * self.state_elements(), kKept);
    Tensor ddt = empty(3, dt.sizes(), kWide), partial = empty({chunks, 3, heads}, kWide);
    Tensor dinitial = initial_state ? empty(4, initial_state.sizes(), kWide) : empty({0}, kWide);
    Tensor dfinal_wide;
    if (dfinal) dfinal_wide = cast(dfinal, kWide);
    typename Ssd<W>::Gradients to{Sink<W>(x), Sink<W>(b), Sink<W>(c), z ? Sink<W>(z) : Sink<W>(), ddt.mutable_data<W>(),
                                  partial.mutable_data<W>(), initial_state ? dinitial.mutable_data<W>() : nullptr};
    self.backward(kept.data<W>(), dy ? Source<W>(dy) : Source<W>(), dfinal ? dfinal_wide.template data<W>() : nullptr, to);
    Tensor sums = chunks > 0 ? empty({3, heads}, kWide) : zeros({3, heads}, kWide);
    if (chunks > 0) add_chunks<Vec<W>>(partial.data<W>(), chunks, 3 * heads, sums.mutable_data<W>());
    const auto parameter = [&](int64_t row, const Tensor& like) {
      if (!like) return empty({0}, kWide);
      Tensor gradient = empty({heads}, kWide);
      copy(heads, sums.data<W>() + row * heads, gradient.mutable_data<W>());
      return cast(gradient, like.dtype());
    };
    result = {to.x.finish(),       cast(ddt, dt.dtype()),        parameter(0, a),
              to.inward.finish(),  to.outward.finish(),          parameter(1, d),
              to.gate.finish(),    parameter(2, dt_bias),        initial_state ? cast(dinitial, initial_state.dtype())
                                                                               : std::move(dinitial)};
  });
  return result;
}

// One token of one head: S' = decay S + (step x) B^T, y = (S' C + D x) silu(z).
template <class W>
void step_head(int64_t width, int64_t size, W decay, const W* driven, const W* in, const W* out, const W* state,
               W* new_state, W* y) {
  using V = Vec<W>;
  for (int64_t p = 0; p < width; ++p) {
    const V value(driven[p]), kept(decay);
    const W* from = state + p * size;
    W* to = new_state + p * size;
    y[p] = sum_row<V>(size, [=](int64_t i, auto lanes, V sum) {
      const V h = fma(V::load(from + i, lanes), kept, value * V::load(in + i, lanes));
      h.store(to + i, lanes);
      return fma(h, V::load(out + i, lanes), sum);
    });
  }
}

std::tuple<Tensor, Tensor> ssd_step(const Tensor& state_any, const Tensor& x_any, const Tensor& dt_any, const Tensor& a,
                                    const Tensor& b, const Tensor& c, const OptionalTensor& d, const OptionalTensor& z,
                                    const OptionalTensor& dt_bias, bool dt_softplus) {
  check(x_any, dt_any, a, b, c, 3);
  require(state_any.has_shape({x_any.size(0), x_any.size(1), x_any.size(2), b.size(2)}) &&
              (!z || z.same_shape(x_any)) && (!d || d.has_shape({x_any.size(1)})) &&
              (!dt_bias || dt_bias.has_shape({x_any.size(1)})),
          "ssd_step: state must be (B, H, P, N), z have the shape of x, D and dt_bias be (H,)");
  Tensor y, new_state;
  dispatch_wide(x_any.dtype(), [&](auto element) {
    using W = decltype(element);
    using V = Vec<W>;
    const Source<W> x(x_any), inward(b), outward(c);
    Source<W> gate;
    if (z) gate = Source<W>(z);
    const Scalars<W> dt(dt_any, false);
    const Parameter<W> rate(a), skip(d), bias(dt_bias);
    const int64_t heads = x_any.size(1), width = x_any.size(2), size = b.size(2), row_p = padded(width),
                  row_n = padded(size), per_group = heads / b.size(1);
    const Tensor state = cast(state_any, dtype_of<W>());
    Sink<W> out(x_any);
    new_state = empty(4, state.sizes(), dtype_of<W>());
    const W* state_data = state.data<W>();
    W* new_data = new_state.mutable_data<W>();
    parallel_for(x_any.size(0) * heads, grain_rows(width * size), [&](int64_t begin, int64_t end) {
      Scratch scratch;
      W *in_row = scratch.get<W>(row_n), *out_row = scratch.get<W>(row_n);
      W *x_row = scratch.get<W>(row_p), *driven = scratch.get<W>(row_p), *y_row = scratch.get<W>(row_p);
      zero(row_p, y_row);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t batch = task / heads, head = task % heads;
        const V plain(dt.at(batch, 0, head) + bias[head]);
        const V step = dt_softplus ? softplus(plain) : plain;
        W steps[V::N], decays[V::N];
        step.store(steps);
        exp(step * V(rate[head])).store(decays);
        inward.load(batch, 0, 1, head / per_group, in_row, row_n);
        outward.load(batch, 0, 1, head / per_group, out_row, row_n);
        x.load(batch, 0, 1, head, x_row, row_p);
        scale_rows(1, row_p, steps, x_row, driven);
        const int64_t at = task * width * size;
        step_head(width, size, decays[0], driven, in_row, out_row, state_data + at, new_data + at, y_row);
        if (gate.defined()) gate.load(batch, 0, 1, head, driven, row_p);
        finish_rows<W>(1, row_p, skip.defined(), skip[head], x_row, {gate.defined() ? driven : nullptr, 0}, y_row,
                       {y_row, row_p});
        out.store(batch, 0, 1, head, y_row, row_p);
      }
    });
    y = out.finish();
  });
  return {std::move(y), std::move(new_state)};
}

STAR_OPERATOR(
    "ssd(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, bool dt_softplus, "
    "Tensor? initial_state, Tensor? cu_seqlens, bool keep) -> (Tensor, Tensor, Tensor)",
    ssd);
STAR_OPERATOR(
    "ssd_backward(Tensor? dy, Tensor? dfinal_state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, "
    "Tensor? z, Tensor? dt_bias, bool dt_softplus, Tensor? initial_state, Tensor? cu_seqlens, Tensor kept) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    ssd_backward);
STAR_OPERATOR(
    "ssd_step(Tensor state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
    "bool dt_softplus) -> (Tensor, Tensor)",
    ssd_step);

}  // namespace
}  // namespace star
