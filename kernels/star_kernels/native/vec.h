// The vector type of an element type: `Vec<T>` holds float32 lanes for float and bf16, one float64 lane for double.
//
//   V::N                                 lanes
//   V(x)                                 x in every lane
//   V::load(p), V::load(p, lanes)        converts from the pointer's element type
//   v.store(p), v.store(p, lanes)        converts to it, to nearest even
//   v.stream(p)                          past the caches, see stream.h
//   V::iota()                            0, 1, 2, ...
//   + - * /  fma(a, b, c) = a b + c      fnma(a, b, c) = c - a b
//   min max  abs  sqrt  copysign         min and max return the second operand where one is NaN
//   < <= > >= == !=  & | ~  any(mask)    select(mask, yes, no)
//   round_even                           to the nearest integer
//   reduce_add, reduce_max               one number; always in the same order
//   transpose(rows)                      of V::N vectors
//   sum_quarters(a, b, c, d)             four partial sums of each, side by side; only where V::N >= 4
//   lane_sums(rows)                      lane i: the sum of the lanes of rows[i], of V::N vectors
//   swap_pairs                           lanes 1, 0, 3, 2, ...; not where V::N is 1
//
// math.h has exp, log and their kin. Loops over a row are written once with `sweep` or `sum_row`.
#pragma once

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include "vec_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__)
#include "vec_avx2.h"
#elif defined(__aarch64__)
#include "vec_neon.h"
#else
#define STAR_PLAIN 1
#endif
#include "vec_scalar.h"

namespace star {

#ifdef STAR_PLAIN
using VecF = VecS<float>;
#endif
using VecD = VecS<double>;

template <class T> struct VecOf {
  using Type = VecF;
};
template <> struct VecOf<double> {
  using Type = VecD;
};
template <class T> using Vec = typename VecOf<T>::Type;

// What sums, states and arithmetic are held in: float for float and bf16, double for double.
template <class T> using Wide = typename Vec<T>::Scalar;

// Call body(i, lanes) for i = 0, V::N, 2 V::N, ...; `lanes` is Full, and Lanes for the remainder.
//
//   sweep<V>(width, [&](int64_t i, auto lanes) { (V::load(x + i, lanes) * scale).store(y + i, lanes); });
template <class V, class F> inline __attribute__((always_inline)) void sweep(int64_t count, F&& body) {
  int64_t i = 0;
  for (; i + V::N <= count; i += V::N) body(i, Full{});
  if (V::N > 1 && i < count) body(i, Lanes{static_cast<int>(count - i)});
}

// Sum term(i, lanes, sum) over a row, where `term` adds to the `sum` it is given and returns it. Four sums run side by
// side: an addition takes 4 cycles and two can start in each.
//
//   sum_row<V>(width, [=](int64_t i, auto lanes, V sum) { return sum + V::load(x + i, lanes); });
template <class V, class F> inline typename V::Scalar sum_row(int64_t count, F&& term) {
  V sums[4] = {V(0), V(0), V(0), V(0)};
  int64_t i = 0;
  for (; i + 4 * V::N <= count; i += 4 * V::N) {
    STAR_UNROLL for (int k = 0; k < 4; ++k) sums[k] = term(i + k * V::N, Full{}, sums[k]);
  }
  sweep<V>(count - i, [&](int64_t j, auto lanes) { sums[0] = term(i + j, lanes, sums[0]); });
  return reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

}  // namespace star
