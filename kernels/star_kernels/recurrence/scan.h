// What the diagonal recurrences share: which tokens a sequence has, the states that the forward keeps for the backward,
// and how tasks are shared out.
//
// The backward needs every h_{t-1}. It computes them again from the states that the forward kept, one at each multiple
// of kScanBlock tokens of a batch row (packed sequences share that grid), so nothing of size T x D x N is stored and
// nothing is divided by a decay.
#pragma once

#include "native/star.h"

namespace star {

// 64 tokens: 1/64 of the states is 1/4 of x for N = 16, and a block of one tile stays in the first two caches.
constexpr int64_t kScanBlock = 64;

inline int64_t scan_slots(int64_t length) { return (length + kScanBlock - 1) / kScanBlock; }

// The end of the block that begins at token t, and the begin of the block that ends before token `end`.
inline int64_t block_end(int64_t t, int64_t end) {
  const int64_t next = (t / kScanBlock + 1) * kScanBlock;
  return next < end ? next : end;
}
inline int64_t block_begin(int64_t end, int64_t begin) {
  const int64_t start = (end - 1) / kScanBlock * kScanBlock;
  return start > begin ? start : begin;
}

// The rows of a batch, or the packed sequences of its one row.
class Sequences {
 public:
  // x: (B, T, ...); cu_seqlens: (S + 1,) int32 or int64.
  Sequences(const Tensor& x, const OptionalTensor& cu_seqlens) : length_(x.size(1)), count_(x.size(0)) {
    if (!cu_seqlens) return;
    require(cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1 && x.size(0) == 1,
            "recurrence: cu_seqlens must be (S + 1,) for x (1, T, ...)");
    ends_ = contiguous(cu_seqlens);
    count_ = ends_.size(0) - 1;
    bool rising = bound(0) == 0 && bound(count_) == length_;
    for (int64_t s = 0; s < count_; ++s) rising = rising && bound(s) <= bound(s + 1);
    require(rising, "recurrence: cu_seqlens must rise from 0 to T");
  }

  int64_t count() const { return count_; }
  int64_t row(int64_t s) const { return ends_ ? 0 : s; }
  int64_t begin(int64_t s) const { return ends_ ? bound(s) : 0; }
  int64_t end(int64_t s) const { return ends_ ? bound(s + 1) : length_; }

 private:
  int64_t bound(int64_t i) const {
    return ends_.dtype() == DType::kInt32 ? ends_.data<int32_t>()[i] : ends_.data<int64_t>()[i];
  }

  Tensor ends_;
  int64_t length_;
  int64_t count_;
};

// An input (B, T, ...) whose last axis is contiguous.
template <class T> struct Track {
  const T* data = nullptr;
  int64_t batch = 0;
  int64_t time = 0;

  Track() = default;
  explicit Track(const Tensor& tensor) {
    if (!tensor) return;
    data = tensor.data<T>();
    batch = tensor.stride(0);
    time = tensor.stride(1);
  }
  explicit operator bool() const { return data != nullptr; }
  const T* at(int64_t row, int64_t t) const { return data + row * batch + t * time; }
};

// body(task) for each of [0, count), which cost `operations` in all: handed out one by one, since packed sequences
// differ in length, or done here where starting a thread would cost more.
template <class F> inline void scan_tasks(int64_t count, int64_t operations, F&& body) {
  if (count > 1 && operations > 2 * kGrainElements) return parallel_tasks(count, body);
  for (int64_t task = 0; task < count; ++task) body(task);
}

// The state (S, ...) that the sequences begin from, in the type that states are held in; zeros where none is given.
template <class W> inline Tensor starting_states(const OptionalTensor& state, std::initializer_list<int64_t> sizes) {
  if (!state) return zeros(sizes, dtype_of<W>());
  require(state.dim() == static_cast<int64_t>(sizes.size()), "recurrence: a state has the wrong number of axes");
  for (int64_t axis = 0; axis < state.dim(); ++axis) {
    require(state.size(axis) == sizes.begin()[axis], "recurrence: a state has the wrong shape");
  }
  return cast(state, dtype_of<W>());
}

// The gradient of a parameter: partial results (S, width), one a sequence, added in order.
template <class W> inline Tensor add_sequences(Tensor& partial, std::initializer_list<int64_t> sizes, DType dtype) {
  Tensor sum = empty(sizes, dtype_of<W>());
  const int64_t width = sum.numel(), count = partial.size(0);
  if (count == 0) sum = zeros(sizes, dtype_of<W>());
  if (count > 0) add_chunks<Vec<W>>(partial.data<W>(), count, width, sum.mutable_data<W>());
  return cast(sum, dtype);
}

}  // namespace star
