// Cross entropy of a linear layer's outputs, whose logits exist a block at a time.
//
// Where gradients are wanted, a block of rows keeps its logits until they have become gradients: three products in all,
// as many as with all logits held. Rows whose target is ignored are left out from the start.
//
// Two ways to share the work out. A large vocabulary is cut into chunks of columns: each task owns its rows of dweight,
// and dhidden is summed over groups of chunks. A small weight is copied for each group of rows instead, so that a task
// takes its logits from product to product within its cache.
#include "problem.h"

namespace star {
namespace {

using namespace cross_entropy;

enum Reduction : int64_t { kNone, kMean, kSum };

// Multiply-adds below which one thread does all.
constexpr int64_t kLeastWork = int64_t{1} << 18;

template <class F> void run_tasks(int64_t count, int64_t work, F&& body) {
  if (work < kLeastWork) {
    for (int64_t task = 0; task < count; ++task) body(task);
  } else {
    parallel_tasks(count, body);
  }
}

template <class S> struct Gradients {
  Tensor hidden, weight, bias;  // dtypes of hidden, S and S; not there where not wanted
  S* weight_data() { return weight.defined() ? weight.mutable_data<S>() : nullptr; }
  S* bias_data() { return bias.defined() ? bias.mutable_data<S>() : nullptr; }
};

// The scans of `chunks` chunks of `rows` rows, and the rows' log-sums.
template <class S> struct Scans {
  Scans(int64_t num_chunks, int64_t num_rows)
      : rows(num_rows), memory(empty({3 * num_chunks + 2, num_rows}, dtype_of<S>())) {
    S* data = memory.template mutable_data<S>();
    const int64_t each = num_chunks * rows;
    all = {data, data + each, data + 2 * each, data + 3 * each};
    log_sum = data + 3 * each + rows;
  }
  typename Problem<S>::Scan of(int64_t chunk, int64_t row) const {
    const int64_t at = chunk * rows + row;
    return {all.top + at, all.sum + at, all.total + at, all.picked + row};
  }
  int64_t rows;
  Tensor memory;
  typename Problem<S>::Scan all;
  S* log_sum;
};

// Losses alone: tiles of logits that are dropped once they are scanned.
template <class S> void compute_losses(const Problem<S>& problem, S* losses) {
  constexpr int64_t kTile = 192;
  const int64_t rows = problem.rows(), tiles = (rows + kTile - 1) / kTile, chunks = problem.chunks().count;
  if (rows == 0) return;
  const Scans<S> scans(chunks, rows);
  run_tasks(tiles * chunks, rows * problem.vocabulary() * problem.width(), [&](int64_t task) {
    const int64_t chunk = task / tiles, begin = task % tiles * kTile, end = smaller(begin + kTile, rows);
    const int64_t columns = problem.chunks().columns(chunk);
    Scratch scratch;
    S *copy = scratch.get<S>(kTile * problem.width()), *tile = scratch.get<S>(kTile * columns);
    problem.logits(problem.hidden(begin, end, copy), begin, end - begin, chunk, tile, columns,
                   scans.of(chunk, begin));
  });
  problem.join(scans.all, rows, rows, scans.log_sum, losses);
}

// A block of rows at a time, each on all threads.
template <class S> class ByColumns {
 public:
  ByColumns(const Problem<S>& problem, const S* factors, S* losses, Gradients<S>& gradients)
      : problem_(problem), factors_(factors), losses_(losses), gradients_(gradients) {
    const int64_t rows = problem.rows(), vocabulary = problem.vocabulary(), width = problem.width();
    groups_ = smaller(smaller(16, problem.chunks().count), vocabulary / (3 * larger(width, 1)));
    // Logits, partial sums of dhidden and the gradients stay within 15/128 of all logits. Where the gradients leave less
    // than 1/32 of that to the others, blocks are cut as if they were not there: few rows a block mean much traffic for
    // dweight. From 168 rows to 384 the time is the same within 2 %, and under 1 MB it does not matter.
    constexpr int64_t kMostRows = 512, kCached = int64_t{1} << 18, kStep = 24;  // whole tiles of every `gemm`
    const int64_t all = rows * vocabulary, held = (gradients.hidden.defined() ? rows * width : 0) +
                                                  (gradients.weight.defined() ? vocabulary * width : 0);
    const int64_t left = all / 128 * 15 - held, budget = left < all / 32 ? all / 32 * 3 : left;
    const int64_t row = vocabulary + (groups_ >= 2 && gradients.hidden.defined() ? groups_ * width : 0);
    int64_t affordable = budget / larger(row, 1);
    if (affordable > kStep) affordable -= affordable % kStep;
    block_ = larger(smaller(kMostRows, affordable), smaller(224, kCached / larger(vocabulary, 1)));
    block_ = smaller(larger(block_, 1), rows);
  }

  void run() {
    const int64_t rows = problem_.rows(), width = problem_.width();
    Tensor logits = empty({block_, problem_.vocabulary()}, dtype_of<S>());
    Tensor partial = empty({groups_ < 2 || !gradients_.hidden.defined() ? 0 : groups_, block_, width}, dtype_of<S>());
    logits_ = logits.template mutable_data<S>();
    partial_ = partial.template mutable_data<S>();
    const Scans<S> scans(problem_.chunks().count, block_);
    Scratch scratch;
    S* copy = scratch.get<S>(block_ * width);
    for (int64_t begin = 0; begin < rows; begin += block_) {
      const int64_t count = smaller(block_, rows - begin);
      run_block(begin, count, problem_.hidden(begin, begin + count, copy), scans);
    }
  }

 private:
  void run_block(int64_t begin, int64_t count, Matrix<S> hidden, const Scans<S>& scans) {
    const Chunks& chunks = problem_.chunks();
    const int64_t work = count * chunks.vocabulary * problem_.width(), row = chunks.vocabulary;
    run_tasks(chunks.count, work, [&](int64_t chunk) {
      problem_.logits(hidden, begin, count, chunk, logits_ + chunks.begin(chunk), row, scans.of(chunk, 0));
    });
    problem_.join(scans.all, block_, count, scans.log_sum, losses_ + begin);
    if (groups_ >= 2 && gradients_.hidden.defined()) {
      run_tasks(groups_, work, [&](int64_t group) {
        const int64_t first = chunks.count * group / groups_, last = chunks.count * (group + 1) / groups_;
        for (int64_t chunk = first; chunk < last; ++chunk) {
          differentiate(begin, count, chunk, hidden, scans);
          problem_.add_to_hidden(chunks.begin(chunk), chunks.columns(chunk), count, logits_ + chunks.begin(chunk), row,
                                 chunk > first, partial_ + group * block_ * problem_.width());
        }
      });
      write_hidden(begin, count, partial_, groups_);
      return;
    }
    run_tasks(chunks.count, work, [&](int64_t chunk) { differentiate(begin, count, chunk, hidden, scans); });
    if (!gradients_.hidden.defined()) return;
    constexpr int64_t kTile = 32;
    run_tasks((count + kTile - 1) / kTile, work, [&](int64_t tile) {
      const int64_t first = tile * kTile, own = smaller(kTile, count - first);
      Scratch scratch;
      S* sum = scratch.get<S>(own * problem_.width());
      problem_.add_to_hidden(0, row, own, logits_ + first * row, row, false, sum);
      write_hidden(begin + first, own, sum, 1);
    });
  }

  void differentiate(int64_t begin, int64_t count, int64_t chunk, Matrix<S> hidden, const Scans<S>& scans) {
    S* own = logits_ + problem_.chunks().begin(chunk);
    const int64_t row = problem_.vocabulary();
    problem_.gradients(begin, count, chunk, scans.log_sum, factors_ + begin, own, row);
    problem_.add_to_weight(hidden, count, chunk, own, row, begin > 0, gradients_.weight_data(), gradients_.bias_data());
  }

  void write_hidden(int64_t begin, int64_t count, const S* sum, int64_t parts) {
    const int64_t width = problem_.width();
    for (int64_t i = 0; i < count; ++i) {
      problem_.write_hidden(begin + i, sum + i * width, parts, block_ * width, gradients_.hidden);
    }
  }

  const Problem<S>& problem_;
  const S* factors_;
  S* losses_;
  Gradients<S>& gradients_;
  int64_t block_, groups_;
  S *logits_ = nullptr, *partial_ = nullptr;
};

// Groups of rows, each with its own sum of dweight.
template <class S> class ByRows {
 public:
  using V = Vec<S>;
  static constexpr int64_t kTile = 128;

  // The groups' sums take at most 1/16 of what all logits would.
  static int64_t groups(const Problem<S>& problem) {
    constexpr int64_t kMostWeight = int64_t{1} << 18, kMostVocabulary = 4096;
    const int64_t width = larger(problem.width(), 1);
    if (problem.vocabulary() * width > kMostWeight || problem.vocabulary() > kMostVocabulary) return 1;
    return smaller(16, 1 + problem.rows() / (16 * width));
  }

  ByRows(const Problem<S>& problem, const S* factors, S* losses, Gradients<S>& gradients)
      : problem_(problem), factors_(factors), losses_(losses), gradients_(gradients), groups_(groups(problem)) {}

  void run() {
    const int64_t weights = gradients_.weight.defined() ? problem_.vocabulary() * problem_.width() : 0;
    const int64_t biases = gradients_.bias.defined() ? problem_.vocabulary() : 0;
    Tensor partial = empty({groups_ - 1, weights + biases}, dtype_of<S>());
    S* partial_data = partial.template mutable_data<S>();
    run_tasks(groups_, problem_.rows() * problem_.vocabulary() * problem_.width(), [&](int64_t group) {
      S *dweight = gradients_.weight_data(), *dbias = gradients_.bias_data();
      if (group > 0) {
        S* own = partial_data + (group - 1) * (weights + biases);
        if (dweight != nullptr) dweight = own;
        if (dbias != nullptr) dbias = own + weights;
      }
      const int64_t rows = problem_.rows(), end = rows * (group + 1) / groups_;
      bool first = true;
      for (int64_t begin = rows * group / groups_; begin < end; begin += kTile, first = false) {
        run_tile(begin, smaller(kTile, end - begin), !first, dweight, dbias);
      }
    });
    add(gradients_.weight_data(), weights, partial_data, weights + biases);
    add(gradients_.bias_data(), biases, partial_data + weights, weights + biases);
  }

 private:
  void run_tile(int64_t begin, int64_t count, bool accumulate, S* dweight, S* dbias) {
    const Chunks& chunks = problem_.chunks();
    const int64_t row = chunks.vocabulary, width = problem_.width();
    Scratch scratch;
    S *logits = scratch.get<S>(count * row), *copy = scratch.get<S>(count * width), *log_sum = scratch.get<S>(count);
    S* scans = scratch.get<S>((3 * chunks.count + 1) * count);
    const int64_t each = chunks.count * count;
    const typename Problem<S>::Scan all{scans, scans + each, scans + 2 * each, scans + 3 * each};
    const Matrix<S> hidden = problem_.hidden(begin, begin + count, copy);
    for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
      const int64_t at = chunk * count;
      problem_.logits(hidden, begin, count, chunk, logits + chunks.begin(chunk), row,
                      {all.top + at, all.sum + at, all.total + at, all.picked});
    }
    problem_.join(all, count, count, log_sum, losses_ + begin);
    for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
      S* own = logits + chunks.begin(chunk);
      problem_.gradients(begin, count, chunk, log_sum, factors_ + begin, own, row);
      problem_.add_to_weight(hidden, count, chunk, own, row, accumulate, dweight, dbias);
    }
    if (!gradients_.hidden.defined()) return;
    S* dhidden = scratch.get<S>(count * width);
    problem_.add_to_hidden(0, row, count, logits, row, false, dhidden);
    for (int64_t i = 0; i < count; ++i) {
      problem_.write_hidden(begin + i, dhidden + i * width, 1, 0, gradients_.hidden);
    }
  }

  void add(S* sum, int64_t count, const S* partial, int64_t stride) {
    parallel_for(count, grain_rows(groups_), [&](int64_t begin, int64_t end) {
      sweep<V>(end - begin, [&](int64_t i, auto lanes) {
        V total = V::load(sum + begin + i, lanes);
        for (int64_t g = 0; g + 1 < groups_; ++g) total = total + V::load(partial + g * stride + begin + i, lanes);
        total.store(sum + begin + i, lanes);
      });
    });
  }

  const Problem<S>& problem_;
  const S* factors_;
  S* losses_;
  Gradients<S>& gradients_;
  int64_t groups_;
};

void fill_zero(Tensor& tensor) {
  if (!tensor.defined() || tensor.numel() == 0) return;
  std::memset(tensor.mutable_raw(), 0, static_cast<size_t>(tensor.numel() * tensor.element_size()));
}

template <class S>
void compute_gradients(const Problem<S>& problem, const S* factors, S* losses, Gradients<S>& gradients) {
  if (problem.rows() < problem.all_rows()) fill_zero(gradients.hidden);
  if (problem.rows() == 0) {
    fill_zero(gradients.weight);
    fill_zero(gradients.bias);
  } else if (ByRows<S>::groups(problem) >= 2) {
    ByRows<S>(problem, factors, losses, gradients).run();
  } else {
    ByColumns<S>(problem, factors, losses, gradients).run();
  }
}

// The losses of the rows that count, as the operator's result.
template <class S> Tensor reduce(const Problem<S>& problem, const Tensor& targets, const S* losses, int64_t reduction) {
  if (reduction == kNone) {
    Tensor result = empty(targets.dim(), targets.sizes(), dtype_of<S>());
    fill_zero(result);
    S* out = result.template mutable_data<S>();
    for (int64_t i = 0; i < problem.rows(); ++i) out[problem.row(i)] = losses[i];
    return result;
  }
  Tensor result = empty({}, dtype_of<S>());
  double sum = 0;
  for (int64_t i = 0; i < problem.rows(); ++i) sum += losses[i];
  if (reduction == kMean) sum /= static_cast<double>(problem.rows());  // a mean of nothing is NaN, as in torch
  *result.template mutable_data<S>() = static_cast<S>(sum);
  return result;
}

void check(const Tensor& hidden, const Tensor& weight, const Tensor& targets, const OptionalTensor& bias) {
  require(hidden.dim() >= 1 && weight.dim() == 2 && weight.size(1) == hidden.size(-1),
          "linear_cross_entropy: weight must be (V, D) for hidden (..., D)");
  require(!bias || (bias.dim() == 1 && bias.size(0) == weight.size(0)), "linear_cross_entropy: bias must be (V,)");
  require(targets.dtype() == DType::kInt32 || targets.dtype() == DType::kInt64,
          "linear_cross_entropy: targets must hold int32 or int64");
  bool fits = targets.dim() == hidden.dim() - 1;
  for (int64_t axis = 0; fits && axis < targets.dim(); ++axis) fits = targets.size(axis) == hidden.size(axis);
  require(fits, "linear_cross_entropy: targets must have the shape of hidden without its last axis");
}

// body(a number of type S) with S double for double and float for the rest.
template <class F> void dispatch_wide(const Tensor& hidden, F&& body) {
  if (hidden.dtype() == DType::kFloat64) return body(double{});
  require(hidden.dtype() == DType::kFloat32 || hidden.dtype() == DType::kBFloat16,
          "linear_cross_entropy: hidden must be float32, bfloat16 or float64");
  body(float{});
}

Tensor linear_cross_entropy(const Tensor& hidden, const Tensor& weight, const Tensor& targets,
                            const OptionalTensor& bias, int64_t ignore_index, int64_t reduction, double smoothing,
                            double softcap) {
  check(hidden, weight, targets, bias);
  Tensor result;
  dispatch_wide(hidden, [&](auto number) {
    using S = decltype(number);
    const Problem<S> problem(hidden, weight, targets, bias, {ignore_index, smoothing, softcap});
    std::vector<S> losses(static_cast<size_t>(problem.rows()));
    compute_losses(problem, losses.data());
    result = reduce(problem, targets, losses.data(), reduction);
  });
  return result;
}

// Loss and gradients for the gradient `dloss` of the loss: a number, or with reduction "none" one for each row.
std::tuple<Tensor, Tensor, Tensor, Tensor> linear_cross_entropy_gradients(
    const OptionalTensor& dloss_any, const Tensor& hidden, const Tensor& weight, const Tensor& targets,
    const OptionalTensor& bias, int64_t ignore_index, int64_t reduction, double smoothing, double softcap,
    bool wants_hidden, bool wants_weight, bool wants_bias) {
  check(hidden, weight, targets, bias);
  require(!dloss_any || dloss_any.numel() == (reduction == kNone ? targets.numel() : 1),
          "linear_cross_entropy: dloss must have the loss's shape");
  std::tuple<Tensor, Tensor, Tensor, Tensor> result;
  dispatch_wide(hidden, [&](auto number) {
    using S = decltype(number);
    const Problem<S> problem(hidden, weight, targets, bias, {ignore_index, smoothing, softcap});
    const auto rows = static_cast<size_t>(problem.rows());
    std::vector<S> losses(rows), factors(rows, S(1));
    const Tensor dloss = dloss_any ? cast(dloss_any, dtype_of<S>()) : Tensor();
    for (size_t i = 0; i < rows; ++i) {
      if (dloss.defined()) {
        factors[i] = dloss.data<S>()[reduction == kNone ? problem.row(static_cast<int64_t>(i)) : 0];
      }
      if (reduction == kMean) factors[i] /= static_cast<S>(rows);
    }
    Gradients<S> gradients;
    if (wants_hidden) gradients.hidden = empty_like(hidden);
    if (wants_weight) gradients.weight = empty({weight.size(0), weight.size(1)}, dtype_of<S>());
    if (wants_bias && bias) gradients.bias = empty({weight.size(0)}, dtype_of<S>());
    compute_gradients(problem, factors.data(), losses.data(), gradients);
    const auto finish = [](Tensor& gradient, DType dtype) {
      return gradient.defined() ? cast(gradient, dtype) : empty({0}, dtype);
    };
    result = {reduce(problem, targets, losses.data(), reduction), finish(gradients.hidden, hidden.dtype()),
              finish(gradients.weight, weight.dtype()),
              finish(gradients.bias, bias ? bias.dtype() : weight.dtype())};
  });
  return result;
}

STAR_OPERATOR(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, int ignore_index, int reduction, "
    "float label_smoothing, float softcap) -> Tensor",
    linear_cross_entropy);
STAR_OPERATOR(
    "linear_cross_entropy_gradients(Tensor? dloss, Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, "
    "int ignore_index, int reduction, float label_smoothing, float softcap, bool wants_hidden, bool wants_weight, "
    "bool wants_bias) -> (Tensor, Tensor, Tensor, Tensor)",
    linear_cross_entropy_gradients);

}  // namespace
}  // namespace star
