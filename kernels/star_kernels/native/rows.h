// The rows (last axis) of a tensor of any layout, by number: row r begins at data + offset(r).
#pragma once

#include <utility>

#include "parallel.h"
#include "tensor.h"

namespace star {

class Rows {
 public:
  static constexpr int kMostAxes = 16;

  explicit Rows(const Tensor& tensor) {
    for (int64_t axis = 0; axis + 1 < tensor.dim(); ++axis) {
      const int64_t size = tensor.size(axis), stride = tensor.stride(axis);
      count_ *= size;
      if (size == 1) continue;
      // An axis that continues the one before it makes one longer axis with it.
      if (axes_ > 0 && strides_[axes_ - 1] == size * stride) {
        sizes_[axes_ - 1] *= size;
        strides_[axes_ - 1] = stride;
        continue;
      }
      require(axes_ < kMostAxes, "star_kernels: a tensor has more than 16 axes");
      sizes_[axes_] = size;
      strides_[axes_++] = stride;
    }
  }

  int64_t count() const { return count_; }

  int64_t offset(int64_t row) const {
    if (axes_ == 1) return row * strides_[0];
    int64_t result = 0;
    for (int axis = axes_ - 1; axis >= 0; --axis) {
      result += row % sizes_[axis] * strides_[axis];
      row /= sizes_[axis];
    }
    return result;
  }

 private:
  int64_t count_ = 1;
  int axes_ = 0;
  int64_t sizes_[kMostAxes];
  int64_t strides_[kMostAxes];
};

template <size_t K, size_t... k, class F>
inline void parallel_strided_runs(const Tensor* const (&inputs)[K], std::index_sequence<k...>, F&& body) {
  const Rows rows[K] = {Rows(*inputs[k])...};
  const int64_t width = inputs[0]->size(-1);
  parallel_for(rows[0].count(), grain_rows(width), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t own[K] = {rows[k].offset(r)...};
      body(own, r * width, width);
    }
  });
}

// For elementwise operators: call body(offsets, out_offset, count) on runs that cover every element, where `offsets[k]`
// is the run's place in inputs[k], whose last axis is contiguous, and `out_offset` its place in a contiguous output of
// the same shape.
template <size_t K, class F> inline void parallel_runs(const Tensor* const (&inputs)[K], F&& body) {
  bool flat = true;
  for (const Tensor* input : inputs) flat = flat && input->is_contiguous();
  if (flat) {
    parallel_for(inputs[0]->numel(), kGrainElements, [&](int64_t begin, int64_t end) {
      int64_t own[K];
      for (int64_t& offset : own) offset = begin;
      body(own, begin, end - begin);
    });
    return;
  }
  parallel_strided_runs(inputs, std::make_index_sequence<K>(), body);
}

}  // namespace star
