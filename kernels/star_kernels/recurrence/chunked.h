// What the recurrences with a matrix state share (ssd, gated linear attention, the gated delta rule). Time goes in
// chunks of 64 tokens; a chunk's tokens meet one another in a lower triangle of 64 x 64 and the state in matrix products.
//
// A task packs its inputs into tiles of float32 (float64 for double) whose rows are padded with zeros to a multiple of
// 16, so that the code below is compiled for two element types and runs on whole vectors.
//
// Decays are products of single decays between two tokens, so none is a difference of logarithms: log decays of -3e4
// and -inf are exact. A masked product is never formed where an operand is not finite, so that NaN moves forward only.
#pragma once

#include <vector>

#include "native/star.h"

namespace star {
namespace chunked {

constexpr int64_t kChunk = 64;
constexpr int64_t kBlock = 16;  // rows of a triangle that are multiplied at once; a multiple of any vector's lanes

inline int64_t padded(int64_t size) { return (size + kBlock - 1) / kBlock * kBlock; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

template <class F> inline void dispatch_wide(DType dtype, F&& function) {
  if (dtype == DType::kFloat64) return function(double{});
  require(dtype == DType::kFloat32 || dtype == DType::kBFloat16,
          "star_kernels: dtype must be float32, bfloat16 or float64");
  function(float{});
}

// Which tokens belong together: the rows of a batch, or the sequences packed into its only row.
struct Sequence {
  int64_t batch, begin, length;
  int64_t first_chunk;  // the number of chunks in the sequences before
  int64_t first_slot;   // and of those among them that do not begin a sequence
  int64_t chunks() const { return (length + kChunk - 1) / kChunk; }
};

struct Chunk {
  int64_t sequence, batch, begin, length;
};

class Sequences {
 public:
  Sequences(const Tensor& x, const Tensor& cu_seqlens) {
    const int64_t batch = x.size(0), length = x.size(1);
    if (!cu_seqlens) {
      for (int64_t b = 0; b < batch; ++b) add(b, 0, length);
      return;
    }
    require(batch == 1 && cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1,
            "cu_seqlens: needs (N + 1,) boundaries and B == 1");
    const Tensor ends = cast(cu_seqlens, DType::kInt64);
    const int64_t *bound = ends.data<int64_t>(), count = ends.size(0) - 1;
    require(bound[0] == 0 && bound[count] == length, "cu_seqlens: needs boundaries that rise from 0 to T");
    for (int64_t s = 0; s < count; ++s) {
      require(bound[s] <= bound[s + 1], "cu_seqlens: needs boundaries that rise from 0 to T");
      add(0, bound[s], bound[s + 1] - bound[s]);
    }
  }

  int64_t count() const { return static_cast<int64_t>(all_.size()); }
  int64_t chunks() const { return static_cast<int64_t>(chunks_.size()); }
  int64_t slots() const { return slots_; }
  const Sequence& operator[](int64_t s) const { return all_[static_cast<size_t>(s)]; }
  const Chunk& chunk(int64_t c) const { return chunks_[static_cast<size_t>(c)]; }

 private:
  void add(int64_t batch, int64_t begin, int64_t length) {
    const int64_t own = (length + kChunk - 1) / kChunk;
    all_.push_back({batch, begin, length, chunks(), slots_});
    slots_ += own > 0 ? own - 1 : 0;
    for (int64_t t = 0; t < length; t += kChunk) {
      chunks_.push_back({count() - 1, batch, begin + t, smaller(kChunk, length - t)});
    }
  }

  std::vector<Sequence> all_;
  std::vector<Chunk> chunks_;
  int64_t slots_ = 0;
};

constexpr const char* kKept = "star_kernels: a backward needs the states that a forward with keep=True returns";

// The states at the chunks' starts that a forward keeps for its backward, but for a sequence's first, which is the
// initial one. There is room for as many as the shapes alone allow, since how long packed sequences are is not known
// where shapes are; what is left of it is zero.
inline Tensor new_kept_states(const Tensor& x, const Sequences& sequences, int64_t elements, bool keep, DType dtype) {
  const int64_t slots = keep ? x.size(0) * ((x.size(1) + kChunk - 1) / kChunk) : 0;
  Tensor kept = empty({slots * elements}, dtype);
  const int64_t used = keep ? sequences.slots() * elements * kept.element_size() : 0;
  const int64_t all = kept.numel() * kept.element_size();
  if (used < all) std::memset(static_cast<char*>(kept.mutable_raw()) + used, 0, static_cast<size_t>(all - used));
  return kept;
}

// The state of one head at the start of chunk c > 0 of a sequence.
template <class W> inline W* kept_state(W* kept, const Sequence& sequence, int64_t c, int64_t heads, int64_t head,
                                        int64_t elements) {
  return kept + ((sequence.first_slot + c - 1) * heads + head) * elements;
}

// Whether tiles are read from and written to a tensor of this dtype directly; others are cast as a whole.
template <class W> inline bool is_direct(DType dtype) {
  return dtype == dtype_of<W>() || (sizeof(W) == 4 && dtype == DType::kBFloat16);
}

// Whether all vectors it has seen are finite.
template <class V> class FiniteCheck {
 public:
  void see(V x) { finite_ = finite_ & (abs(x) < V(constants::kInf)); }
  bool holds() const { return !any(~finite_); }

 private:
  decltype(V(0) < V(0)) finite_ = V(0) < V(1);
};

template <class T, class W>
inline bool load_rows(const T* in, int64_t stride, int64_t rows, int64_t width, W factor, const W* factors, W* tile,
                      int64_t row) {
  using V = Vec<W>;
  FiniteCheck<V> check;
  for (int64_t i = 0; i < rows; ++i, in += stride, tile += row) {
    const V f(factors != nullptr ? factors[i] : factor);
    int64_t end = 0;
    sweep<V>(width, [&](int64_t j, auto lanes) {
      const V value = V::load(in + j, lanes) * f;
      value.store(tile + j);
      check.see(value);
      end = j + V::N;
    });
    for (; end < row; end += V::N) V(0).store(tile + end);
  }
  return check.holds();
}

// An input (B, T, H, D), or (B, H, D) of a step (which then has T = 1), read by tiles.
template <class W> class Source {
 public:
  Source() = default;
  explicit Source(const Tensor& any)
      : tensor_(is_direct<W>(any.dtype()) ? last_contiguous(any) : cast(any, dtype_of<W>())), width_(any.size(-1)) {
    const bool timed = any.dim() == 4;
    batch_ = tensor_.stride(0), time_ = timed ? tensor_.stride(1) : 0, head_ = tensor_.stride(timed ? 2 : 1);
  }

  bool defined() const { return tensor_.defined(); }
  int64_t width() const { return width_; }

  void add_to(Lookahead& ahead, int64_t batch, int64_t t, int64_t rows, int64_t head) const {
    const int64_t size = tensor_.element_size();
    const auto* data = static_cast<const char*>(tensor_.raw());
    ahead.add(data + offset(batch, t, head) * size, time_ * size, width_ * size, rows);
  }

  // Tokens t, t + 1, ... of a head where they lie, `row()` elements apart; null where they are of another dtype.
  const W* in_place(int64_t batch, int64_t t, int64_t head) const {
    if (tensor_.dtype() != dtype_of<W>()) return nullptr;
    return tensor_.template data<W>() + offset(batch, t, head);
  }
  int64_t row() const { return time_; }

  // Tokens t .. t + rows - 1 of a head, times one factor or one each, into a tile whose rows are `row` apart: zeros
  // from the width to `row`, and in the rows up to `padded_rows`. Returns whether all of it is finite.
  bool load(int64_t batch, int64_t t, int64_t rows, int64_t head, W* tile, int64_t row, int64_t padded_rows = 0,
            W factor = 1, const W* factors = nullptr) const {
    for (int64_t i = rows * row; i < padded_rows * row; ++i) tile[i] = 0;
    const int64_t at = offset(batch, t, head);
    if constexpr (sizeof(W) == 4) {
      if (tensor_.dtype() == DType::kBFloat16) {
        return load_rows(tensor_.template data<bf16>() + at, time_, rows, width_, factor, factors, tile, row);
      }
    }
    return load_rows(tensor_.template data<W>() + at, time_, rows, width_, factor, factors, tile, row);
  }

 private:
  int64_t offset(int64_t batch, int64_t t, int64_t head) const { return batch * batch_ + t * time_ + head * head_; }

  Tensor tensor_;
  int64_t width_ = 0, batch_ = 0, time_ = 0, head_ = 0;
};

// Have a chunk's tiles of some inputs, where they are given, asked for.
template <class W>
inline void look_ahead(const Chunk& chunk, int64_t head, std::initializer_list<const Source<W>*> inputs,
                       Lookahead& ahead) {
  for (const Source<W>* one : inputs) {
    if (one->defined()) one->add_to(ahead, chunk.batch, chunk.begin, chunk.length, head);
  }
}

// An input of one number a head and token, (B, T, H) or (B, H), in any layout.
template <class W> class Scalars {
 public:
  Scalars(const Tensor& any, bool timed)
      : tensor_(any.dtype() == dtype_of<W>() ? any.alias() : cast(any, dtype_of<W>())), data_(tensor_.template data<W>()) {
    batch_ = tensor_.stride(0), time_ = timed ? tensor_.stride(1) : 0, head_ = tensor_.stride(timed ? 2 : 1);
  }

  W at(int64_t batch, int64_t t, int64_t head) const { return data_[batch * batch_ + t * time_ + head * head_]; }

  // Tokens t .. t + rows - 1, then zeros up to a whole chunk.
  void load(int64_t batch, int64_t t, int64_t rows, int64_t head, W* out) const {
    for (int64_t i = 0; i < rows; ++i) out[i] = at(batch, t + i, head);
    for (int64_t i = rows; i < kChunk; ++i) out[i] = 0;
  }

 private:
  Tensor tensor_;
  const W* data_;
  int64_t batch_ = 0, time_ = 0, head_ = 0;
};

// An output (B, T, H, D), or (B, H, D) of a step, contiguous, written by tiles.
template <class W> class Sink {
 public:
  Sink() : dtype_(dtype_of<W>()), tensor_(empty({0}, dtype_)) {}
  explicit Sink(const Tensor& like)
      : dtype_(like.dtype()),
        tensor_(empty(like.dim(), like.sizes(), is_direct<W>(dtype_) ? dtype_ : dtype_of<W>())),
        time_(like.dim() == 4 ? like.size(1) : 1),
        heads_(like.size(-2)),
        width_(like.size(-1)) {}

  void store(int64_t batch, int64_t t, int64_t rows, int64_t head, const W* tile, int64_t row, W factor = 1) {
    const int64_t at = offset(batch, t, head);
    if constexpr (sizeof(W) == 4) {
      if (tensor_.dtype() == DType::kBFloat16) {
        return store_rows(tensor_.template mutable_data<bf16>() + at, rows, tile, row, factor);
      }
    }
    store_rows(tensor_.template mutable_data<W>() + at, rows, tile, row, factor);
  }

  // Where tokens t, t + 1, ... of a head go, `row()` elements apart; null where they are of another dtype.
  W* in_place(int64_t batch, int64_t t, int64_t head) {
    if (tensor_.dtype() != dtype_of<W>()) return nullptr;
    return tensor_.template mutable_data<W>() + offset(batch, t, head);
  }
  int64_t row() const { return heads_ * width_; }

  void add_to(Lookahead& ahead, int64_t batch, int64_t t, int64_t rows, int64_t head) const {
    const int64_t size = tensor_.element_size();
    const auto* data = static_cast<const char*>(tensor_.raw());
    ahead.add(data + offset(batch, t, head) * size, row() * size, width_ * size, rows);
  }

  Tensor finish() { return cast(tensor_, dtype_); }

 private:
  int64_t offset(int64_t batch, int64_t t, int64_t head) const { return ((batch * time_ + t) * heads_ + head) * width_; }

  template <class T> void store_rows(T* out, int64_t rows, const W* tile, int64_t row, W factor) const {
    using V = Vec<W>;
    for (int64_t i = 0; i < rows; ++i) {
      sweep<V>(width_, [&](int64_t j, auto lanes) {
        (V::load(tile + i * row + j, lanes) * V(factor)).store(out + i * heads_ * width_ + j, lanes);
      });
    }
  }

  DType dtype_;
  Tensor tensor_;
  int64_t time_ = 0, heads_ = 0, width_ = 0;
};

// The same of the rows that some outputs will take. Only with up to 8 lanes, where it was measured (Zen 3, half the
// second-level cache of a Zen 4).
template <class W>
inline void look_ahead(const Chunk& chunk, int64_t head, std::initializer_list<const Sink<W>*> outputs,
                       Lookahead& ahead) {
  if (Vec<W>::N > 8) return;
  for (const Sink<W>* one : outputs) one->add_to(ahead, chunk.batch, chunk.begin, chunk.length, head);
}

// A parameter of one number a head; null if it was not given.
template <class W> class Parameter {
 public:
  explicit Parameter(const Tensor& any) {
    if (any) tensor_ = cast(any, dtype_of<W>());
    data_ = any ? tensor_.template data<W>() : nullptr;
  }
  bool defined() const { return data_ != nullptr; }
  W operator[](int64_t head) const { return data_ != nullptr ? data_[head] : W(0); }

 private:
  Tensor tensor_;
  const W* data_;
};

// out (columns x rows) = the transpose of in (rows x columns), in rows of which `out_width` >= rows elements are
// written, the rest of them zero.
template <class W>
inline void transpose_tile(int64_t rows, int64_t columns, const W* in, int64_t in_row, W* out, int64_t out_row,
                           int64_t out_width) {
  using V = Vec<W>;
  for (int64_t i = 0; i < out_width; i += V::N) {
    const int height = static_cast<int>(smaller(V::N, out_width - i));
    sweep<V>(columns, [&](int64_t j, auto lanes) {
      V block[V::N];
      STAR_UNROLL for (int r = 0; r < V::N; ++r) {
        block[r] = i + r < rows ? V::load(in + (i + r) * in_row + j, lanes) : V(0);
      }
      transpose(block);
      const int64_t width = smaller(V::N, columns - j);
      for (int64_t r = 0; r < width; ++r) {
        if (height == V::N) {
          block[r].store(out + (j + r) * out_row + i);
        } else {
          block[r].store(out + (j + r) * out_row + i, Lanes{height});
        }
      }
    });
  }
}

// body(i) for whole vectors of a padded run of `count` elements.
template <class W, class F> inline void each_vector(int64_t count, F&& body) {
  for (int64_t i = 0; i < count; i += Vec<W>::N) body(i);
}

template <class W> inline void zero(int64_t count, W* x) {
  each_vector<W>(count, [=](int64_t i) { Vec<W>(0).store(x + i); });
}

template <class W> inline void copy(int64_t count, const W* from, W* to) {
  if (count > 0) std::memcpy(to, from, static_cast<size_t>(count) * sizeof(W));
}

template <class W>
inline void copy_rows(int64_t rows, int64_t width, const W* from, int64_t from_row, W* to, int64_t to_row) {
  for (int64_t i = 0; i < rows; ++i) copy(width, from + i * from_row, to + i * to_row);
}

template <class W> inline void scale(int64_t count, W factor, W* x) {
  using V = Vec<W>;
  each_vector<W>(count, [=](int64_t i) { (V::load(x + i) * V(factor)).store(x + i); });
}

// out_i = factors_i x_i by rows, padded. Returns whether all of it is finite.
template <class W> inline bool scale_rows(int64_t rows, int64_t row, const W* factors, const W* x, W* out) {
  using V = Vec<W>;
  FiniteCheck<V> check;
  for (int64_t i = 0; i < rows; ++i) {
    const V f(factors[i]);
    each_vector<W>(row, [&](int64_t j) {
      const V value = V::load(x + i * row + j) * f;
      value.store(out + i * row + j);
      check.see(value);
    });
  }
  return check.holds();
}

template <class W> inline bool all_finite(int64_t count, const W* x) {
  using V = Vec<W>;
  FiniteCheck<V> check;
  each_vector<W>(count, [&](int64_t i) { check.see(V::load(x + i)); });
  return check.holds();
}

template <class W> inline W dot(int64_t count, const W* a, const W* b) {
  using V = Vec<W>;
  return sum_row<V>(count, [=](int64_t i, auto lanes, V sum) {
    return fma(V::load(a + i, lanes), V::load(b + i, lanes), sum);
  });
}

// Decays between the tokens of a chunk, each multiplying what comes before it by `decay`:
//   between (row i, column j) = decay_{j+1} ... decay_i for j <= i, and 0 for j > i up to the end of j's block of 16;
//   since_i = decay_0 ... decay_i;  until_j = decay_{j+1} ... decay_{n-1}.
template <class W> inline void chunk_decays(int64_t n, const W* decay, W* between, W* since, W* until) {
  using V = Vec<W>;
  W product = 1;
  for (int64_t i = 0; i < n; ++i) {
    since[i] = product = product * decay[i];
    W* row = between + i * kChunk;
    const V own(decay[i]), index(static_cast<W>(i));
    each_vector<W>(i / kBlock * kBlock + kBlock, [&](int64_t j) {
      const V column = V::iota() + V(static_cast<W>(j));
      const V start = select(column == index, V(1), V(0));
      // The row above has no value yet where its block of 16 ended before j; nothing of it is used there.
      const V above = i > 0 && j < (i - 1) / kBlock * kBlock + kBlock ? V::load(row - kChunk + j) : V(0);
      select(column < index, above * own, start).store(row + j);
    });
  }
  for (int64_t j = 0; j < n; ++j) until[j] = between[(n - 1) * kChunk + j];
}

// The same decays from the chunk's start and to its end alone.
template <class W> inline void end_decays(int64_t n, const W* decay, W* since, W* until) {
  W from_start = 1, to_end = 1;
  for (int64_t i = 0; i < n; ++i) since[i] = from_start = from_start * decay[i];
  for (int64_t j = n - 1; j >= 0; --j) until[j] = to_end, to_end = to_end * decay[j];
}

// body(offset, keep) for the vectors of the lower triangle by rows, whole blocks of 16 columns; `keep(v)` is v on and
// below the diagonal and 0 above.
template <class W, class F> inline void each_lower(int64_t n, F&& body) {
  using V = Vec<W>;
  for (int64_t i = 0; i < n; ++i) {
    const V index(static_cast<W>(i));
    const int64_t end = i / kBlock * kBlock + kBlock;
    for (int64_t j = 0; j < end; j += V::N) {
      const auto mask = V::iota() + V(static_cast<W>(j)) <= index;
      body(i * kChunk + j, [mask](V v) { return select(mask, v, V(0)); });
    }
  }
}

// c (m x n) = a b, added to `onto`, for b with adjacent columns, with a look ahead. With up to 8 lanes it goes on between
// register tiles: in bursts after every 16 rows of c, ssd took 2 to 3 % longer on a Zen 3 (T 2048, 8 heads of 64 x 64).
// With more lanes, 40 rows of it follow each 16 rows of c: with that the forward of gated linear attention took 7.0 ms
// instead of 8.0 on a Zen 4 (the same sizes), with 16 rows nearly as long as without.
template <class W>
inline void product(int64_t m, int64_t n, int64_t k, Matrix<W> a, const W* b, int64_t b_row, W* c, int64_t c_row,
                    Onto<W> onto, Lookahead& ahead) {
  if (Vec<W>::N <= 8) return gemm<W, W>(m, n, k, a, {b, b_row, 1}, c, c_row, onto, &ahead);
  for (int64_t i = 0; i < m; i += kBlock, onto.advance(kBlock)) {
    gemm<W, W>(smaller(kBlock, m - i), n, k, {a.data + i * a.row, a.row, a.column}, {b, b_row, 1}, c + i * c_row, c_row,
               onto);
    ahead.touch_rows(40);
  }
}

template <class W>
inline void product(int64_t m, int64_t n, int64_t k, Matrix<W> a, const W* b, int64_t b_row, W* c, int64_t c_row,
                    bool accumulate, Lookahead& ahead) {
  product<W>(m, n, k, a, b, b_row, c, c_row, accumulate ? Onto<W>{c, c_row} : Onto<W>{}, ahead);
}

// c (n x n, lower triangle in blocks of 16, rows kChunk apart) = a (n x k, rows a_row apart) b (k x n).
template <class W>
inline void lower_product(int64_t n, int64_t k, const W* a, int64_t a_row, const W* b, int64_t b_row, W* c) {
  for (int64_t i = 0; i < n; i += kBlock) {
    gemm<W, W>(smaller(kBlock, n - i), i + kBlock, k, {a + i * a_row, a_row, 1}, {b, b_row, 1}, c + i * kChunk, kChunk,
               false);
  }
}

// c (n x width) = or += L b for the lower triangle L (n x n, rows kChunk apart, 0 above the diagonal); with `factors`,
// each row of c is multiplied by its own before. Unless b is `finite`, row by row, so that no row of b is multiplied by
// what lies above the diagonal; the sums are the same.
template <class W>
inline void multiply_lower(int64_t n, int64_t width, const W* lower, const W* b, int64_t b_row, W* c, int64_t c_row,
                           bool accumulate, bool finite, const W* factors = nullptr) {
  const int64_t step = finite ? kBlock : 1;
  Onto<W> onto = accumulate ? Onto<W>{c, c_row, factors, 1} : Onto<W>{};
  for (int64_t i = 0; i < n; i += step, onto.advance(step)) {
    const int64_t rows = smaller(step, n - i);
    gemm<W, W>(rows, width, i + rows, {lower + i * kChunk, kChunk, 1}, {b, b_row, 1}, c + i * c_row, c_row, onto);
  }
}

// c (n x width) = or += L^T b, the same way.
template <class W>
inline void multiply_lower_transposed(int64_t n, int64_t width, const W* lower, const W* b, int64_t b_row, W* c,
                                      int64_t c_row, bool accumulate, bool finite, const W* factors = nullptr) {
  const int64_t step = finite ? kBlock : 1;
  Onto<W> onto = accumulate ? Onto<W>{c, c_row, factors, 1} : Onto<W>{};
  for (int64_t j = 0; j < n; j += step, onto.advance(step)) {
    gemm<W, W>(smaller(step, n - j), width, n - j, {lower + j * kChunk + j, 1, kChunk}, {b + j * b_row, b_row, 1},
               c + j * c_row, c_row, onto);
  }
}

// The gradient of a chunk's log decays: that of token t is the sum of all that is carried over t, which is m_ij (a lower
// triangle) for j < t <= i, from_start_i for t <= i, to_end_j for j < t, and `through`. Sums of those terms alone: a
// difference of sums over rows and columns would leave a rounding error, which a step size of 3e4 then multiplies.
// `to_end` is used up.
template <class W>
inline void log_decay_gradient(int64_t n, const W* m, const W* from_start, W* to_end, W through, W* dlog) {
  using V = Vec<W>;
  for (int64_t t = n - 1; t >= 0; --t) {
    V sum(0);
    const V index(static_cast<W>(t));
    each_vector<W>(t / kBlock * kBlock + kBlock, [&](int64_t j) {
      const V carried = V::load(to_end + j) + V::load(m + t * kChunk + j);
      carried.store(to_end + j);
      sum = sum + select(V::iota() + V(static_cast<W>(j)) < index, carried, V(0));
    });
    through = through + from_start[t];
    dlog[t] = through + reduce_add(sum);
  }
}

}  // namespace chunked
}  // namespace star
