// Memory that will be read or written next, asked for a few cache lines at a time between other work: rows that lie far
// apart, such as those of one head, which the processor does not foresee.
#pragma once

#include <cstdint>

namespace star {

class Lookahead {
 public:
  // `rows` runs of `bytes` each, `stride` bytes apart; dropped where there are too many parts already.
  void add(const void* first, int64_t stride, int64_t bytes, int64_t rows) {
    if (count_ == kMost || rows <= 0 || bytes <= 0) return;
    parts_[count_] = {static_cast<const char*>(first), stride, bytes, rows};
    if (count_++ == current_) begin_row();
  }

  // Ask for the next lines. All at once would hold up the loads of the work between: a core waits for a few dozen lines
  // at most.
  void touch(int64_t lines) {
    for (; lines > 0 && current_ < count_; --lines) {
      __builtin_prefetch(at_, 0, 2);
      at_ += kLine;
      if (at_ >= end_) next_row();
    }
  }
  void touch_rows(int64_t rows) {
    for (; rows > 0 && current_ < count_; --rows, next_row()) {
      for (; at_ < end_; at_ += kLine) __builtin_prefetch(at_, 0, 2);
    }
  }

 private:
  static constexpr int kMost = 8;
  static constexpr int64_t kLine = 64;
  struct Part {
    const char* first;
    int64_t stride, bytes, rows;
  };

  void begin_row() {
    const char* row = parts_[current_].first + row_ * parts_[current_].stride;
    at_ = row - reinterpret_cast<uintptr_t>(row) % kLine;
    end_ = row + parts_[current_].bytes;
  }
  void next_row() {
    if (++row_ == parts_[current_].rows) ++current_, row_ = 0;
    if (current_ < count_) begin_row();
  }

  Part parts_[kMost];
  int count_ = 0, current_ = 0;
  int64_t row_ = 0;
  const char *at_ = nullptr, *end_ = nullptr;
};

}  // namespace star
