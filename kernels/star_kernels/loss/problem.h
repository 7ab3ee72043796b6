// One call's rows, weight and targets, and what is done to a tile of its logits: from products to their softmax's sums,
// to losses, to gradients.
#pragma once

#include <vector>

#include "native/star.h"

namespace star::cross_entropy {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

struct Options {
  int64_t ignore_index;
  double smoothing, softcap;  // softcap 0: none
};

template <class T> Matrix<T> matrix(const T* data, int64_t row, int64_t column) { return {data, row, column}; }

// The columns of the logits in chunks, whose number is a matter of the vocabulary alone: so is the order of every sum.
struct Chunks {
  int64_t vocabulary, width, count;
  explicit Chunks(int64_t size) : vocabulary(size) {
    constexpr int64_t kLeast = 64, kMost = 512;
    width = smaller(kMost, larger(kLeast, size / 8 / kLeast * kLeast));
    count = (size + width - 1) / width;
  }
  int64_t begin(int64_t chunk) const { return chunk * width; }
  int64_t columns(int64_t chunk) const { return smaller(width, vocabulary - begin(chunk)); }
};

// S: float, or double for double. The weight is S or bf16, the hidden rows S or bf16.
template <class S> class Problem {
 public:
  using V = Vec<S>;

  Problem(const Tensor& hidden_any, const Tensor& weight_any, const Tensor& targets_any, const OptionalTensor& bias_any,
          Options options)
      : hidden_(contiguous(hidden_any)),
        weight_(weight_any.dtype() == DType::kBFloat16 && sizeof(S) == 4 ? contiguous(weight_any)
                                                                         : cast(weight_any, dtype_of<S>())),
        targets_(cast(targets_any, DType::kInt64)),
        bias_(bias_any ? cast(bias_any, dtype_of<S>()) : Tensor()),
        options_(options),
        chunks_(weight_any.size(0)),
        width_(weight_any.size(1)) {
    const int64_t* targets = targets_.template data<int64_t>();
    rows_.reserve(static_cast<size_t>(all_rows()));
    for (int64_t r = 0; r < all_rows(); ++r) {
      if (targets[r] == options.ignore_index) continue;
      require(targets[r] >= 0 && targets[r] < vocabulary(),
              "linear_cross_entropy: targets must be ignore_index or lie in 0 .. V - 1");
      rows_.push_back(r);
    }
    smoothing_share_ = vocabulary() > 0 ? static_cast<S>(options.smoothing / static_cast<double>(vocabulary())) : S(0);
  }

  int64_t all_rows() const { return targets_.numel(); }
  int64_t rows() const { return static_cast<int64_t>(rows_.size()); }
  int64_t row(int64_t i) const { return rows_[static_cast<size_t>(i)]; }
  int64_t target(int64_t i) const { return targets_.template data<int64_t>()[row(i)]; }
  int64_t width() const { return width_; }
  int64_t vocabulary() const { return chunks_.vocabulary; }
  const Chunks& chunks() const { return chunks_; }

  // Rows `begin` to `end` as S: in place where they are adjacent, else in `copy`.
  Matrix<S> hidden(int64_t begin, int64_t end, S* copy) const {
    if (hidden_.dtype() == dtype_of<S>() && row(end - 1) - row(begin) == end - 1 - begin) {
      return {hidden_.template data<S>() + row(begin) * width_, width_, 1};
    }
    over_type(hidden_, [&](auto* data) {
      for (int64_t i = begin; i < end; ++i) {
        sweep<V>(width_, [&](int64_t d, auto lanes) {
          V::load(data + row(i) * width_ + d, lanes).store(copy + (i - begin) * width_ + d, lanes);
        });
      }
    });
    return {copy, width_, 1};
  }

  // logits = hidden weight^T for one chunk, with bias and cap, and what the softmax needs of it: each row's maximum,
  // the sum of exp(logit - maximum), the sum of logits, and the target's logit if it is here.
  struct Scan {
    S *top, *sum, *total, *picked;
    Scan from(int64_t row) const { return {top + row, sum + row, total + row, picked + row}; }
  };
  void logits(Matrix<S> hidden, int64_t first, int64_t count, int64_t chunk, S* out, int64_t out_row, Scan scan) const {
    const int64_t begin = chunks_.begin(chunk), columns = chunks_.columns(chunk);
    over_type(weight_, [&](auto* weight) {
      gemm(count, columns, width_, hidden, matrix(weight + begin * width_, 1, width_), out, out_row, false);
    });
    for (int64_t i = 0; i < count; ++i) {
      S* row = out + i * out_row;
      finish_logits(row, begin, columns);
      const S top = top_of(row, columns);
      const V shift(top == -constants::kInf ? S(0) : top);
      V total(0);
      scan.sum[i] = sum_row<V>(columns, [&](int64_t j, auto lanes, V sum) {
        const V term = exp(V::load(row + j, lanes) - shift);
        return sum + zero_beyond(term, lanes);
      });
      scan.total[i] = options_.smoothing > 0 ? sum_row<V>(columns, [&](int64_t j, auto lanes, V sum) {
        return sum + V::load(row + j, lanes);
      }) : S(0);
      scan.top[i] = top;
      const int64_t at = target(first + i) - begin;
      if (at >= 0 && at < columns) scan.picked[i] = row[at];
    }
  }

  // From the scans of all chunks (`stride` apart; `picked` has one place a row) to each row's log-sum and loss.
  void join(Scan scan, int64_t stride, int64_t count, S* log_sum, S* loss) const {
    const V smoothing(static_cast<S>(options_.smoothing)), share(smoothing_share_);
    sweep<V>(count, [&](int64_t i, auto lanes) {
      V top = V::load(scan.top + i, lanes);
      for (int64_t c = 1; c < chunks_.count; ++c) top = max(top, V::load(scan.top + c * stride + i, lanes));
      const V shift = select(top == V(-constants::kInf), V(0), top);
      V sum(0), total(0);
      for (int64_t c = 0; c < chunks_.count; ++c) {
        const V own = V::load(scan.top + c * stride + i, lanes);
        const V weight = select(own == V(-constants::kInf), V(0), exp(own - shift));
        sum = fma(V::load(scan.sum + c * stride + i, lanes), weight, sum);
        total = total + V::load(scan.total + c * stride + i, lanes);
      }
      const V log_total = shift + log(sum), picked = V::load(scan.picked + i, lanes);
      log_total.store(log_sum + i, lanes);
      V result = log_total - picked;
      if (options_.smoothing > 0) {
        result = fma(V(1) - smoothing, result, smoothing * log_total - share * total);
      }
      result.store(loss + i, lanes);
    });
  }

  // One chunk's logits become their gradients in place: factor (softmax - smoothed one-hot), through the cap.
  void gradients(int64_t first, int64_t count, int64_t chunk, const S* log_sum, const S* factors, S* out,
                 int64_t out_row) const {
    const int64_t begin = chunks_.begin(chunk), columns = chunks_.columns(chunk);
    const bool capped = options_.softcap > 0;
    const V share(smoothing_share_), inverse_cap(capped ? static_cast<S>(1 / options_.softcap) : S(0));
    for (int64_t i = 0; i < count; ++i) {
      S* row = out + i * out_row;
      const V shift(log_sum[i]), factor(factors[i]);
      const int64_t at = target(first + i) - begin;
      const bool here = at >= 0 && at < columns;
      const S bounded = here && capped ? row[at] / static_cast<S>(options_.softcap) : S(0);
      sweep<V>(columns, [&](int64_t j, auto lanes) {
        const V logit = V::load(row + j, lanes);
        V gradient = factor * (exp(logit - shift) - share);
        if (capped) {
          const V tanh_here = logit * inverse_cap;
          gradient = gradient * fnma(tanh_here, tanh_here, V(1));
        }
        gradient.store(row + j, lanes);
      });
      if (here) row[at] -= factors[i] * static_cast<S>(1 - options_.smoothing) * (1 - bounded * bounded);
    }
  }

  // dweight's rows of a chunk and dbias's elements, from the gradients of `count` rows.
  void add_to_weight(Matrix<S> hidden, int64_t count, int64_t chunk, const S* gradient, int64_t gradient_row,
                     bool accumulate, S* dweight, S* dbias) const {
    const int64_t begin = chunks_.begin(chunk), columns = chunks_.columns(chunk);
    if (dweight != nullptr) {
      gemm(columns, width_, count, matrix(gradient, 1, gradient_row), hidden, dweight + begin * width_, width_,
           accumulate);
    }
    if (dbias == nullptr) return;
    sweep<V>(columns, [&](int64_t j, auto lanes) {
      V sum(0);
      for (int64_t i = 0; i < count; ++i) sum = sum + V::load(gradient + i * gradient_row + j, lanes);
      if (accumulate) sum = sum + V::load(dbias + begin + j, lanes);
      sum.store(dbias + begin + j, lanes);
    });
  }
  // dhidden (+)= gradient weight, for columns `begin` to `begin + columns` of the logits.
  void add_to_hidden(int64_t begin, int64_t columns, int64_t count, const S* gradient, int64_t gradient_row,
                     bool accumulate, S* dhidden) const {
    over_type(weight_, [&](auto* weight) {
      gemm(count, width_, columns, matrix(gradient, gradient_row, 1), matrix(weight + begin * width_, width_, 1),
           dhidden, width_, accumulate);
    });
  }
  // Row i of dhidden, from the sum of `parts` partial results `stride` apart.
  void write_hidden(int64_t i, const S* partial, int64_t parts, int64_t stride, Tensor& dhidden) const {
    over_type(dhidden, [&](auto* data) {
      auto* out = const_cast<std::remove_const_t<std::remove_pointer_t<decltype(data)>>*>(data) + row(i) * width_;
      sweep<V>(width_, [&](int64_t d, auto lanes) {
        V sum = V::load(partial + d, lanes);
        for (int64_t p = 1; p < parts; ++p) sum = sum + V::load(partial + p * stride + d, lanes);
        sum.store(out + d, lanes);
      });
    });
  }

 private:
  // Call body with the typed data of a tensor of S or, beside float, of bf16.
  template <class F> static void over_type(const Tensor& tensor, F&& body) {
    if constexpr (sizeof(S) == 4) {
      if (tensor.dtype() == DType::kBFloat16) return body(tensor.data<bf16>());
    }
    body(tensor.data<S>());
  }
  static V zero_beyond(V x, Full) { return x; }
  static V zero_beyond(V x, Lanes n) { return select(V::iota() < V(static_cast<S>(n.count)), x, V(0)); }

  void finish_logits(S* row, int64_t begin, int64_t columns) const {
    const bool capped = options_.softcap > 0;
    if (!bias_.defined() && !capped) return;
    const S* bias = bias_.defined() ? bias_.template data<S>() + begin : nullptr;
    const V cap(static_cast<S>(options_.softcap)), inverse_cap(capped ? static_cast<S>(1 / options_.softcap) : S(0));
    sweep<V>(columns, [&](int64_t j, auto lanes) {
      V value = V::load(row + j, lanes);
      if (bias != nullptr) value = value + V::load(bias + j, lanes);
      if (capped) value = cap * tanh(value * inverse_cap);
      value.store(row + j, lanes);
    });
  }
  static S top_of(const S* row, int64_t columns) {
    V tops[2] = {V(-constants::kInf), V(-constants::kInf)};
    int64_t j = 0;
    for (; j + 2 * V::N <= columns; j += 2 * V::N) {
      tops[0] = max(V::load(row + j), tops[0]);
      tops[1] = max(V::load(row + j + V::N), tops[1]);
    }
    S top = reduce_max(max(tops[0], tops[1]));
    for (; j < columns; ++j) top = row[j] > top ? row[j] : top;
    return top;
  }

  Tensor hidden_, weight_, targets_, bias_;
  Options options_;
  Chunks chunks_;
  int64_t width_;
  std::vector<int64_t> rows_;
  S smoothing_share_;
};

}  // namespace star::cross_entropy
