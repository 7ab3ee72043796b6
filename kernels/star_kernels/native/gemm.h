// Matrix multiply of tiles, for use inside a kernel: one thread, any strides, float32 sums (float64 for double).
//
//   C (m x n, columns adjacent, `c_row` apart by rows)  =  A (m x k) B (k x n)     or  C += A B with `accumulate`
//                                                       =  diag(f) C0 + A B         with an `Onto`
//
// A transpose is a swap of strides: for A^T B, `a` is {data, 1, row_stride}. bfloat16 operands are widened while they
// are packed. Each element of C is one chain of fused multiply-adds over k = 0, 1, ..., whatever m and n are, so that a
// row of C does not depend on which rows are computed with it.
//
// GFLOP/s of one Zen 4 core, AVX-512 (torch.mm beside it; the core's FMA units give 113):
//
//   m = n = k         64          128          256          512
//   A B               110 (77)    112 (97)     114 (103)    108 (98)
//   A B^T             98          106          111          108
//
// For a single row (m = 1) against B^T, write dot products instead: packing B costs more than the multiply.
#pragma once

#include <cstdint>

#include "lookahead.h"
#include "vec.h"

namespace star {

template <class T> struct Matrix {
  const T* data;
  int64_t row;     // elements between rows
  int64_t column;  // elements between columns
};

// What a product is added to, with adjacent columns and of C's shape: nothing, or rows with a factor each. It may be C
// itself; a state that decays, or rows that each decay, need no pass of their own.
template <class W> struct Onto {
  const W* data = nullptr;
  int64_t row = 0;             // elements between rows
  const W* factors = nullptr;  // null: all 1
  int64_t step = 0;            // elements between factors; 0: one for all rows

  void advance(int64_t rows, int64_t columns = 0) {
    if (data != nullptr) data += rows * row + columns;
    if (factors != nullptr) factors += rows * step;
  }
};

// T: float, bf16 or double; a float with a bf16 operand too. `ahead`, if given, is touched between register tiles.
template <class TA, class TB>
void gemm(int64_t m, int64_t n, int64_t k, Matrix<TA> a, Matrix<TB> b, Wide<TA>* c, int64_t c_row, Onto<Wide<TA>> onto,
          Lookahead* ahead = nullptr);

template <class TA, class TB>
void gemm(int64_t m, int64_t n, int64_t k, Matrix<TA> a, Matrix<TB> b, Wide<TA>* c, int64_t c_row, bool accumulate) {
  gemm<TA, TB>(m, n, k, a, b, c, c_row, accumulate ? Onto<Wide<TA>>{c, c_row} : Onto<Wide<TA>>{});
}

}  // namespace star
