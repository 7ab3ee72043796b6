// Attention and differential attention, forward: tiles of keys outside, tiles of queries inside, with a running softmax
// (Milakov and Gimelshein, 2018, arXiv 1805.02867; Dao, 2023, arXiv 2307.08691). Both maps of differential attention
// run over the same tile of values. Tiles that the mask hides are never formed.
//
// Saved for the backward: `stats` (maps, 2, B, H, T), each row's `top` and 1 / sum rather than their log-sum-exp, whose
// rounding error at scores of 1e4 would be 5e-4; and `wide` (maps, B, T, H, E), the maps' outputs before they are
// rounded or subtracted, where the output is not itself that.
#include "attention/cpu_tiles.h"

namespace star {
namespace {

using namespace tiles;

// Rows (queries times heads) of a block that shares each packed tile of keys: packing costs one part in 64 of the work.
constexpr int64_t kBlockRows = 512;

template <class W> struct KeyTile {
  int64_t first, count;
  W* keys[2];  // transposed, one of each map
  W* values;
  bool finite;  // all values are
};

// The running softmax of consecutive queries.
template <class W> struct Running {
  W *q, *top, *sum, *o;
};

// Queries [first, last) of one head against one key tile.
template <class W>
void attend(const Problem& problem, const Mask& mask, const Scores<W>& scores, const KeyTile<W>& tile, const W* keys,
            int64_t first, int64_t last, Running<W> rows, W* map) {
  using V = Vec<W>;
  const Pieces<V> pieces(mask, first, last, tile.first, tile.count);
  const int64_t width = problem.width, value_width = problem.value_width;
  for (const auto* p = pieces.first_piece(); p != pieces.last_piece(); ++p) {
    gemm<W, W>(p->rows, p->columns, width, {rows.q + p->row * width, width, 1}, {keys + p->column, kRow, 1},
               map + p->row * kRow + p->column, kRow, false);
  }
  const auto begin = [&](int64_t r) { return larger(0, mask.begin(first + r) - tile.first); };
  const auto end = [&](int64_t r) { return smaller(tile.count, mask.end(first + r) - tile.first); };
  for (int64_t r = 0; r < last - first; ++r) {
    const int64_t from = pieces.begin[r / kEdge], to = pieces.end[r / kEdge];
    if (from >= to) continue;
    W* row = map + r * kRow;
    if (scores.transform) scores.template apply<V>(row + from, to - from);
    const W factor = softmax_row<V>(row, begin(r), end(r), from, to, scores.c, rows.top[r], rows.sum[r]);
    if (factor != 1) {
      W* o = rows.o + r * value_width;
      sweep<V>(value_width, [=](int64_t x, auto lanes) { (V::load(o + x, lanes) * V(factor)).store(o + x, lanes); });
    }
  }
  for (const auto* p = pieces.first_piece(); p != pieces.last_piece(); ++p) {
    multiply_visible<W>(
        tile.finite || !p->crossed, p->rows, value_width, p->columns, {map + p->row * kRow + p->column, kRow, 1},
        tile.values + p->column * value_width, rows.o + p->row * value_width, value_width,
        [&](int64_t r) { return begin(p->row + r) - p->column; }, [&](int64_t r) { return end(p->row + r) - p->column; });
  }
}

template <class T> struct Forward {
  using W = Wide<T>;
  using V = Vec<T>;

  const Problem& problem;
  Scores<W> scores;
  int maps;
  Heads<T> q[2], k[2], v;
  const W *sinks, *lam;  // (H,) or null
  int64_t tokens, batch;  // of the tensors
  T* o;
  W *stats, *wide;  // `wide` null: not wanted

  // Queries [first, last) of all the heads that read `key_head`.
  void block(const Sequence& sequence, int64_t key_head, int64_t first, int64_t last) const {
    const Mask mask = problem.mask(sequence);
    const int64_t width = problem.width, value_width = problem.value_width, count = last - first;
    const int64_t rows = maps * problem.group * count;
    Scratch scratch;
    const Running<W> all{scratch.get<W>(rows * width), scratch.get<W>(rows), scratch.get<W>(rows),
                         scratch.get<W>(rows * value_width)};
    W* map = scratch.get<W>(kQueries * kRow);
    KeyTile<W> tile{};
    for (int m = 0; m < maps; ++m) tile.keys[m] = scratch.get<W>(width * kRow);
    tile.values = scratch.get<W>(kKeys * value_width);

    clear(all.o, rows * value_width);
    for (int64_t part = 0; part < maps * problem.group; ++part) {
      const int64_t head = key_head * problem.group + part % problem.group;
      const Heads<T>& from = q[part / problem.group];
      pack_rows(from.at(sequence.batch, sequence.query + first, head), from.token, count, width,
                all.q + part * count * width);
      for (int64_t r = part * count; r < (part + 1) * count; ++r) {
        all.top[r] = sinks != nullptr ? sinks[head] : -static_cast<W>(__builtin_inf());
        all.sum[r] = sinks != nullptr ? 1 : 0;
      }
    }
    const int64_t stop = mask.end(last - 1);
    for (tile.first = mask.begin(first) / kKeys * kKeys; tile.first < stop; tile.first += kKeys) {
      tile.count = smaller(kKeys, stop - tile.first);
      const int64_t key = sequence.key + tile.first;
      for (int m = 0; m < maps; ++m) {
        pack_columns(k[m].at(sequence.batch, key, key_head), k[m].token, tile.count, width, tile.keys[m]);
      }
      tile.finite = pack_rows(v.at(sequence.batch, key, key_head), v.token, tile.count, value_width, tile.values);
      for (int64_t part = 0; part < maps * problem.group; ++part) {
        for (int64_t i = 0; i < count; i += kQueries) {
          const int64_t r = part * count + i;
          attend<W>(problem, mask, scores, tile, tile.keys[part / problem.group], first + i,
                    first + smaller(i + kQueries, count),
                    {all.q + r * width, all.top + r, all.sum + r, all.o + r * value_width}, map);
        }
      }
    }
    for (int64_t g = 0; g < problem.group; ++g) {
      for (int64_t i = 0; i < count; ++i) {
        finish(all, key_head * problem.group + g, g * count + i, problem.group * count, sequence.batch,
               sequence.query + first + i);
      }
    }
  }

  // Write one query's output and what the backward needs; its maps are `step` rows apart.
  void finish(const Running<W>& all, int64_t head, int64_t row, int64_t step, int64_t b, int64_t t) const {
    const int64_t value_width = problem.value_width;
    W inverse[2];
    for (int m = 0; m < maps; ++m) {
      const W sum = all.sum[row + m * step];
      inverse[m] = sum == 0 ? 0 : 1 / sum;
      W* place = stats + ((2 * m * batch + b) * problem.heads + head) * tokens + t;
      place[0] = all.top[row + m * step];
      place[batch * problem.heads * tokens] = inverse[m];
    }
    const W* in = all.o + row * value_width;
    const int64_t place = ((b * tokens + t) * problem.heads + head) * value_width;
    T* out = o + place;
    const V first(inverse[0]);
    if (maps == 1) {
      W* kept = wide == nullptr ? nullptr : wide + place;
      sweep<V>(value_width, [=](int64_t x, auto lanes) {
        const V value = V::load(in + x, lanes) * first;
        value.store(out + x, lanes);
        if (kept != nullptr) value.store(kept + x, lanes);
      });
      return;
    }
    const W* other = in + step * value_width;
    W *kept = wide + place, *kept_other = kept + batch * tokens * problem.heads * value_width;
    const V second(inverse[1]), weight(lam[head]);
    sweep<V>(value_width, [=](int64_t x, auto lanes) {
      const V value = V::load(in + x, lanes) * first, value_other = V::load(other + x, lanes) * second;
      value.store(kept + x, lanes);
      value_other.store(kept_other + x, lanes);
      fnma(weight, value_other, value).store(out + x, lanes);
    });
  }

  void run() const {
    struct Block {
      const Sequence* sequence;
      int64_t first;
    };
    int64_t work = 0, queries = 0;
    for (const Sequence& one : problem.sequences) {
      work += one.queries * one.keys * problem.heads * (problem.width + problem.value_width);
      queries += one.queries * problem.key_heads;
    }
    // Long blocks, unless the threads would then have too few. A row's bits do not depend on its block.
    int64_t length = larger(kQueries, kBlockRows / larger(1, maps * problem.group) / kQueries * kQueries);
    while (length > kQueries && queries < 4 * num_threads() * length) length -= kQueries;
    std::vector<Block> blocks;
    for (const Sequence& one : problem.sequences) {
      // The last block first: under a causal mask it takes longest.
      for (int64_t i = (one.queries - 1) / length * length; i >= 0 && one.queries > 0; i -= length) {
        blocks.push_back({&one, i});
      }
    }
    const int64_t count = static_cast<int64_t>(blocks.size()) * problem.key_heads;
    const auto body = [&](int64_t task) {
      const Block& one = blocks[static_cast<size_t>(task / problem.key_heads)];
      block(*one.sequence, task % problem.key_heads, one.first, smaller(one.first + length, one.sequence->queries));
    };
    run_tasks(count, work, body);
  }
};

template <class T>
void forward(const Problem& problem, int maps, const Tensor& q1, const Tensor& k1, const Tensor& q2, const Tensor& k2,
             const Tensor& v, const Tensor& sinks, const Tensor& lam, double scale, double cap, Tensor& o,
             Tensor& stats, Tensor& wide) {
  using W = Wide<T>;
  Forward<T>{problem,
             Scores<W>(scale, cap, sinks.defined()),
             maps,
             {Heads<T>(q1), Heads<T>(q2)},
             {Heads<T>(k1), Heads<T>(k2)},
             Heads<T>(v),
             sinks.defined() ? sinks.data<W>() : nullptr,
             lam.defined() ? lam.data<W>() : nullptr,
             q1.size(1),
             q1.size(0),
             o.mutable_data<T>(),
             stats.mutable_data<W>(),
             wide.numel() > 0 ? wide.mutable_data<W>() : nullptr}
      .run();
}

std::tuple<Tensor, Tensor, Tensor> attention(const Tensor& q_any, const Tensor& k_any, const Tensor& v_any,
                                             const OptionalTensor& sinks_any, const OptionalTensor& ends_q,
                                             const OptionalTensor& ends_k, bool causal, int64_t window, double scale,
                                             double softcap) {
  const Problem problem(q_any, k_any, v_any, ends_q, ends_k, causal, window);
  const Tensor q = last_contiguous(q_any), k = last_contiguous(k_any), v = last_contiguous(v_any);
  const Tensor sinks = wide_heads(sinks_any, q, "attention: sinks must be (Hq,)");
  const int64_t batch = q.size(0), tokens = q.size(1);
  Tensor o = empty({batch, tokens, problem.heads, problem.value_width}, q.dtype());
  Tensor stats = empty({1, 2, batch, problem.heads, tokens}, wide_of(q));
  const bool rounded = q.dtype() == DType::kBFloat16;
  Tensor wide = empty({rounded ? 1 : 0, batch, tokens, problem.heads, problem.value_width}, wide_of(q));
  dispatch_dtype(q.dtype(), [&](auto element) {
    forward<decltype(element)>(problem, 1, q, k, q, k, v, sinks, Tensor(), scale, softcap, o, stats, wide);
  });
  return {std::move(o), std::move(stats), std::move(wide)};
}

std::tuple<Tensor, Tensor, Tensor> differential_attention(const Tensor& q1_any, const Tensor& k1_any,
                                                          const Tensor& q2_any, const Tensor& k2_any,
                                                          const Tensor& v_any, const Tensor& lam_any,
                                                          const OptionalTensor& ends_q, const OptionalTensor& ends_k,
                                                          bool causal, int64_t window, double scale) {
  const Problem problem(q1_any, k1_any, v_any, ends_q, ends_k, causal, window);
  check_second_map(q1_any, k1_any, q2_any, k2_any);
  const Tensor q1 = last_contiguous(q1_any), k1 = last_contiguous(k1_any), v = last_contiguous(v_any);
  const Tensor q2 = last_contiguous(q2_any), k2 = last_contiguous(k2_any);
  const Tensor lam = wide_heads(lam_any, q1, "differential_attention: lam must be () or (Hq,)");
  const int64_t batch = q1.size(0), tokens = q1.size(1);
  Tensor o = empty({batch, tokens, problem.heads, problem.value_width}, q1.dtype());
  Tensor stats = empty({2, 2, batch, problem.heads, tokens}, wide_of(q1));
  Tensor wide = empty({2, batch, tokens, problem.heads, problem.value_width}, wide_of(q1));
  dispatch_dtype(q1.dtype(), [&](auto element) {
    forward<decltype(element)>(problem, 2, q1, k1, q2, k2, v, Tensor(), lam, scale, 0.0, o, stats, wide);
  });
  return {std::move(o), std::move(stats), std::move(wide)};
}

STAR_OPERATOR("attention(Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
              "bool causal, int window, float scale, float softcap) -> (Tensor, Tensor, Tensor)",
              attention);
STAR_OPERATOR("differential_attention(Tensor q1, Tensor k1, Tensor q2, Tensor k2, Tensor v, Tensor lam, "
              "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, bool causal, int window, float scale) "
              "-> (Tensor, Tensor, Tensor)",
              differential_attention);

}  // namespace
}  // namespace star
