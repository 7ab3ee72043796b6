// Matrix multiply of tiles, for use inside a kernel: one thread, any strides, float32 sums (float64 for double).
//
//   C (m x n, columns adjacent, `c_row` apart by rows)  =  A (m x k) B (k x n)     or  C += A B with `accumulate`
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

#include "vec.h"

namespace star {

template <class T> struct Matrix {
  const T* data;
  int64_t row;     // elements between rows
  int64_t column;  // elements between columns
};

// T: float, bf16 or double; a float with a bf16 operand too.
template <class TA, class TB>
void gemm(int64_t m, int64_t n, int64_t k, Matrix<TA> a, Matrix<TB> b, Wide<TA>* c, int64_t c_row, bool accumulate);

}  // namespace star
