// Stores past the caches, for operators whose tensors together about fill the last-level cache: a line that would
// have left the cache before its reader comes is not read in first, nor does it push others out.
//
// GB/s of one Zen 4 core with 32 MB of third-level cache, rows of 2048 floats, 16 MB a tensor (usual stores beside it):
// copy 54 (43), 2 read and 1 written 50 (30), 4 read and 3 written 41 (20). At 4 MB a tensor, where the next reader
// finds the lines in cache, a copy falls from 88 to 57. Between lies what fills the cache without leaving it: the gated
// short convolution's backward on 7 tensors of 4 MB takes 0.52 ms with streams and 0.82 without.
#pragma once

#include <cstdint>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "tensor.h"
#include "vec.h"

namespace star {

// Whether an operator that reads and writes this many bytes in all should stream its outputs. A number, not the size
// that the system reports: glibc gave 320 MB where a group of cores shares 32.
inline bool worth_streaming(int64_t bytes) { return bytes >= (int64_t{24} << 20); }

// Streaming needs whole lines: a row that begins on one.
inline bool on_line(const void* row) { return reinterpret_cast<uintptr_t>(row) % 64 == 0; }

// Both, for an operator on `count` tensors like the new tensor `out` (..., D), which it writes row by row.
inline bool stream_rows(const Tensor& out, int64_t count) {
  const int64_t row = out.dim() > 0 ? out.size(-1) * out.element_size() : 1;
  return row % 64 == 0 && on_line(out.raw()) && worth_streaming(count * out.numel() * out.element_size());
}

// v.store(p, lanes), or past the caches. Each thread ends with `finish_streaming`.
template <class V, class T, class L> inline void put(V v, T* p, L lanes, bool stream) {
  if constexpr (L::kFull) {
    if (stream) return v.stream(p);
  }
  v.store(p, lanes);
}

inline void finish_streaming([[maybe_unused]] bool stream) {
#ifdef __x86_64__
  if (stream) _mm_sfence();
#endif
}

}  // namespace star
