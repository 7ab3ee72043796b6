// What a long convolution works on: the sequences, the tasks, and one block of channels' filters and their gradient.
#pragma once

#include "fourier.h"
#include "lanes.h"

namespace star::long_convolution {

// Taps within reach up to which token by token is the faster: there, 48 taps take 0.93 ns an element forward where the
// transform takes 1.2, and 64 taps 1.04 (B 16, D 64, T as long, one Zen 4 core); 96 take 1.3 against 1.5, but 3.7
// against 3.5 backward.
constexpr int64_t kDirectReach = 64;

// Where each sequence lies: the rows of a batch, or the parts of one packed row.
struct Sequence {
  int64_t batch, begin, length;
};

class Sequences {
 public:
  Sequences(const Tensor& x, const OptionalTensor& cu_seqlens) : length_(x.size(1)), count_(x.size(0)) {
    if (!cu_seqlens) return;
    require(cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1 && count_ == 1,
            "long_conv: cu_seqlens must be (S + 1,), with B == 1");
    ends_ = cast(cu_seqlens, DType::kInt64);
    count_ = ends_.size(0) - 1;
    const int64_t* ends = ends_.data<int64_t>();
    bool rise = ends[0] == 0 && ends[count_] == length_;
    for (int64_t i = 0; i < count_; ++i) rise = rise && ends[i] <= ends[i + 1];
    require(rise, "long_conv: cu_seqlens must rise from 0 to T");
  }
  int64_t count() const { return count_; }
  Sequence operator[](int64_t i) const {
    if (!ends_.defined()) return {i, 0, length_};
    const int64_t* ends = ends_.data<int64_t>();
    return {0, ends[i], ends[i + 1] - ends[i]};
  }
  int64_t longest() const {
    if (!ends_.defined()) return length_;
    int64_t result = 0;
    for (int64_t i = 0; i < count_; ++i) result = (*this)[i].length > result ? (*this)[i].length : result;
    return result;
  }

 private:
  int64_t length_, count_;
  Tensor ends_;
};

// The task grid: blocks of channels, and groups of sequences where there are few blocks. It depends on sizes alone, so
// that sums over sequences do too.
struct Grid {
  int64_t blocks, groups, sequences;

  Grid(int64_t channels, int64_t lanes, int64_t num_sequences)
      : blocks((channels + lanes - 1) / lanes), groups(1), sequences(num_sequences) {
    constexpr int64_t kEnoughTasks = 16;
    if (blocks > 0 && blocks < kEnoughTasks) groups = (kEnoughTasks + blocks - 1) / blocks;
    if (groups > sequences) groups = sequences > 0 ? sequences : 1;
  }
  int64_t begin(int64_t group) const { return sequences * group / groups; }

  // body(block, group) for all, on several threads if there are `elements` enough.
  template <class F> void run(int64_t elements, F&& body) const {
    const auto one = [&](int64_t task) { body(task % blocks, task / blocks); };
    if (elements < kGrainElements / 4) {
      for (int64_t task = 0; task < blocks * groups; ++task) one(task);
    } else {
      parallel_tasks(blocks * groups, one);
    }
  }
};

// The filters of one block of channels, made ready for one length of sequence at a time.
template <class V> class BlockFilter {
 public:
  using S = typename V::Scalar;

  BlockFilter(const S* taps, int64_t taps_per_channel, int64_t channels, int64_t longest)
      : taps_(taps), row_(taps_per_channel), channels_(channels), transform_(longest) {
    const bool fourier = smaller(row_, longest) > kDirectReach;
    // Columns are read up to the transform's size; the sizes of shorter sequences are no larger.
    column_size_ = fourier ? transform_.size() : longest;
    spectrum_size_ = fourier ? transform_.size() * Transform<V>::kPoint : 0;
    column_ = new_column();
    spectrum_ = new_spectrum();
  }
  S* new_column() { return scratch_.get<S>(column_size_ * V::N); }
  S* new_spectrum() { return scratch_.get<S>(spectrum_size_); }

  void fit(int64_t length) {
    if (length == length_) return;
    length_ = length;
    reach_ = smaller(row_, length);
    fourier_ = reach_ > kDirectReach;
    if (fourier_) transform_ = Transform<V>(length);
    poison_ = stage_taps<V>(taps_, row_, reach_, fourier_ ? padded() : reach_, channels_, column_);
    if (fourier_) transform_.forward(column_, spectrum_);
  }
  bool fourier() const { return fourier_; }
  int64_t length() const { return length_; }
  int64_t reach() const { return reach_; }
  // Tokens of a column, zeros after the sequence included.
  int64_t padded() const { return fourier_ ? transform_.size() : length_; }
  const Transform<V>& transform() const { return transform_; }

  // From u's part of a spectrum to the product's, transformed back.
  void multiply_part(S* u_spectrum, int64_t part) const { transform_.inverse_part(u_spectrum, spectrum_, part); }

  // out = filter conv u, for u's column and its spectrum, all of whose parts have been multiplied.
  void finish(const S* u, Poison<V> poison, const S* multiplied, S* out) const {
    if (!fourier_) return convolve_directly<V>(column_, reach_, u, length_, 0, length_, out);
    transform_.end_inverse(multiplied, out);
    if (poison.any_lane() || poison_.any_lane()) {
      // The transform has spread a NaN over its channel's tokens.
      const auto bad = poison.mask() | poison_.mask();
      Scratch scratch;
      S* exact = scratch.get<S>(length_ * V::N);
      convolve_directly<V>(column_, reach_, u, length_, 0, length_, exact);
      for (int64_t i = 0; i < length_ * V::N; i += V::N) {
        select(bad, V::load(exact + i), V::load(out + i)).store(out + i);
      }
    }
  }

 private:
  static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

  Scratch scratch_;
  const S* taps_;
  int64_t row_, channels_, column_size_, spectrum_size_;
  S *column_, *spectrum_;
  int64_t length_ = -1, reach_ = 0;
  bool fourier_ = false;
  Poison<V> poison_;
  Transform<V> transform_;
};

// The sum over sequences of dfilter, for one block of channels.
template <class V> class BlockFilterGradient {
 public:
  using S = typename V::Scalar;

  // `sum`: a column of `count` taps.
  BlockFilterGradient(BlockFilter<V>& filter, S* sum, int64_t count)
      : filter_(filter), sum_(sum), spectrum_(filter.new_spectrum()), column_(filter.new_column()) {
    for (int64_t j = 0; j < count * V::N; ++j) sum[j] = 0;
  }

  // Call before `filter` is fitted to another length.
  void flush() {
    if (!pending_) return;
    pending_ = false;
    filter_.transform().inverse(spectrum_, column_);
    add(column_ + (filter_.length() - filter_.reach()) * V::N);
  }

  // Add one sequence's: first each part of the spectra of u and, backwards in time, of dv; then their columns.
  void see_part(const S* u_spectrum, Poison<V> u_poison, const S* dv_spectrum, Poison<V> dv_poison, int64_t part) {
    const auto good = ~(u_poison.mask() | dv_poison.mask());
    const int64_t count = filter_.transform().part_scalars(), begin = part * count;
    for (int64_t i = begin; i < begin + count; i += Transform<V>::kPoint) {
      const Complex<V> product = Complex<V>::load(u_spectrum + i) * Complex<V>::load(dv_spectrum + i);
      Complex<V> sum = pending_ ? Complex<V>::load(spectrum_ + i) : Complex<V>{V(0), V(0)};
      sum = {sum.re + select(good, product.re, V(0)), sum.im + select(good, product.im, V(0))};
      sum.store(spectrum_ + i);
    }
  }
  void see(const S* u, Poison<V> u_poison, const S* dv, Poison<V> dv_poison) {
    if (!filter_.fourier()) return add_directly(u, dv);
    pending_ = true;
    if (u_poison.any_lane() || dv_poison.any_lane()) {
      const auto bad = u_poison.mask() | dv_poison.mask();
      const int64_t length = filter_.length(), reach = filter_.reach();
      convolve_directly<V>(dv, length, u, length, length - reach, length, column_);
      for (int64_t i = 0; i < reach * V::N; i += V::N) {
        select(bad, V::load(column_ + i), V(0)).store(column_ + i);
      }
      add(column_);
    }
  }

 private:
  // A part of dv at a time: a chain of thousands of additions would lose accuracy.
  void add_directly(const S* u, const S* dv) {
    constexpr int64_t kPart = 512;
    const int64_t length = filter_.length(), reach = filter_.reach();
    for (int64_t t = 0; t < length; t += kPart) {
      const int64_t count = length - t < kPart ? length - t : kPart;
      convolve_directly<V>(dv + t * V::N, count, u, length, length - reach - t, length - t, column_);
      add(column_);
    }
  }

  // `reversed` holds tap reach - 1 first.
  void add(const S* reversed) {
    const int64_t reach = filter_.reach();
    for (int64_t j = 0; j < reach; ++j) {
      (V::load(sum_ + j * V::N) + V::load(reversed + (reach - 1 - j) * V::N)).store(sum_ + j * V::N);
    }
  }

  BlockFilter<V>& filter_;
  S *sum_, *spectrum_, *column_;
  bool pending_ = false;
};

// The sums over groups of every block's column of taps, as rows of (D, L) with zeros beyond `reach`.
template <class V> class FilterSums {
 public:
  using S = typename V::Scalar;

  FilterSums(const Grid& grid, int64_t reach, int64_t width, int64_t taps_per_channel, S* dtaps)
      : grid_(grid), reach_(reach), width_(width), taps_per_channel_(taps_per_channel), dtaps_(dtaps) {
    if (grid.groups == 1) return;
    partial_ = empty({grid.groups, grid.blocks, reach, V::N}, dtype_of<S>());
    columns_ = partial_.template mutable_data<S>();
  }

  // Where a task sums; `own` is used if there is one group, so that the column can be written out while it is in cache.
  S* column(int64_t block, int64_t group, Scratch& own) const {
    if (grid_.groups == 1) return own.get<S>(reach_ * V::N);
    return columns_ + (group * grid_.blocks + block) * reach_ * V::N;
  }
  void done(int64_t block, const S* column) const {
    if (grid_.groups == 1) write(block, column);
  }
  // After all tasks.
  void finish() const {
    if (grid_.groups == 1) return;
    const int64_t size = reach_ * V::N;
    parallel_for(grid_.blocks, grain_rows(size), [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        S* sum = columns_ + block * size;
        for (int64_t group = 1; group < grid_.groups; ++group) {
          const S* other = sum + group * grid_.blocks * size;
          for (int64_t i = 0; i < size; i += V::N) (V::load(sum + i) + V::load(other + i)).store(sum + i);
        }
        write(block, sum);
      }
    });
  }

 private:
  void write(int64_t block, const S* column) const {
    const int64_t first = block * V::N, channels = width_ - first < V::N ? width_ - first : V::N;
    S* out = dtaps_ + first * taps_per_channel_;
    unstage_taps<V>(column, reach_, channels, out, taps_per_channel_);
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t j = reach_; j < taps_per_channel_; ++j) out[c * taps_per_channel_ + j] = 0;
    }
  }

  const Grid& grid_;
  int64_t reach_, width_, taps_per_channel_;
  S *dtaps_, *columns_ = nullptr;
  Tensor partial_;
};

}  // namespace star::long_convolution
