// Vector exp, log and their kin, each on any Vec type: float32 lanes by the polynomials below, float64 (and the plain
// build's float32) by the C library.
//
//                  largest error, ULP    notes
//   exp            1.1                   0 below -103.98, inf above 88.72
//   expm1          1.5                   -1 below -17.33, inf above 88.72
//   log            1.0                   -inf at 0, NaN below
//   log1p          1.7                   -inf at -1, NaN below
//   sigmoid        2.5
//   softplus       2.0                   log(1 + exp(x))
//   tanh           2.6
//   silu           3.5                   x sigmoid(x); below -87.3, where the sigmoid is denormal, within 1e-43
//   normal_cdf     5.5                   Phi(x), the lower tail included; its density 3.0
//
// Denormal arguments and results are right within the same bounds; NaN gives NaN. Errors count in units of the float32
// result (of the least denormal, below the normal range), and tests/kernels/native/test_math.py holds them over every
// exponent. Polynomials are minimax fits (Remez) to the ranges named beside them.
#pragma once

#include <cmath>

#include "vec.h"

namespace star {

namespace constants {
constexpr float kLog2E = 1.44269504f;
// ln 2 in two parts: the first has 9 trailing zero bits, so that its product with an exponent is exact.
constexpr float kLn2High = 0.693145752f;
constexpr float kLn2Low = 1.42860677e-6f;
constexpr float kLn2 = 0.693147181f;
constexpr float kInf = __builtin_inff();
constexpr float kNaN = __builtin_nanf("");
}  // namespace constants

#ifndef STAR_PLAIN

namespace detail {

// x = n ln 2 + r, |r| <= ln 2 / 2.
inline VecF reduce_by_ln2(VecF x, VecF& n) {
  n = round_even(x * VecF(constants::kLog2E));
  return fnma(n, VecF(constants::kLn2Low), fnma(n, VecF(constants::kLn2High), x));
}

// log(1 + f) for f in [-1/3, 1/3], relative error 2^-27.7 before rounding: f + f^2 P(f).
inline VecF log1p_third(VecF f) {
  VecF p(-0.13311754f);
  p = fma(p, f, VecF(0.14006247f));
  p = fma(p, f, VecF(-0.12078147f));
  p = fma(p, f, VecF(0.14000821f));
  p = fma(p, f, VecF(-0.16689503f));
  p = fma(p, f, VecF(0.20010772f));
  p = fma(p, f, VecF(-0.24999507f));
  p = fma(p, f, VecF(0.3333321f));
  p = fma(p, f, VecF(-0.5f));
  return fma(f * f, p, f);
}

// exp(r) - 1 = r + r^2 q(r) for |r| <= ln 2 / 2, relative error of exp(r) 2^-28.2 before rounding.
inline VecF exp_fraction(VecF r) {
  VecF q(0.0013950542f);
  q = fma(q, r, VecF(0.008368918f));
  q = fma(q, r, VecF(0.041666206f));
  q = fma(q, r, VecF(0.16666518f));
  q = fma(q, r, VecF(0.5f));
  return fma(r * r, q, r);
}

// exp(x) for x in [-104, 89].
inline VecF exp_within(VecF x) {
  VecF n;
  const VecF r = reduce_by_ln2(x, n);
  return scale_by_power_of_2(VecF(1.0f) + exp_fraction(r), n);
}

}  // namespace detail

inline VecF exp(VecF x) {
  // Beyond these ends the result has become 0 or infinity. The bound is the first operand, so that NaN passes.
  return detail::exp_within(min(VecF(89.0f), max(VecF(-104.0f), x)));
}

inline VecF expm1(VecF x) {
  x = min(VecF(89.0f), max(VecF(-18.0f), x));
  VecF n;
  const VecF r = detail::reduce_by_ln2(x, n);
  // expm1(r) = r + r^2 q(r), relative error 2^-32 before rounding.
  VecF q(0.0001991423f);
  q = fma(q, r, VecF(0.001394105f));
  q = fma(q, r, VecF(0.008333273f));
  q = fma(q, r, VecF(0.041666355f));
  q = fma(q, r, VecF(0.16666667f));
  q = fma(q, r, VecF(0.5f));
  const VecF p = fma(r * r, q, r);
  // 2^n (1 + p) - 1, in halves: 2^128 is infinite. For n = 0 it is p, and halving could lose a denormal's last bit.
  const VecF half = scale_by_power_of_2(VecF(0.5f), n);
  const VecF whole = fma(half, p, half - VecF(0.5f));
  return select(n == VecF(0.0f), p, whole + whole);
}

inline VecF log(VecF x) {
  VecF e;
  const VecF m = split(x, e);
  VecF result = fma(e, VecF(constants::kLn2), detail::log1p_third(m - VecF(1.0f)));
  result = select(x == VecF(constants::kInf), x, result);
  result = select(x > VecF(0.0f), result, VecF(constants::kNaN));
  return select(x == VecF(0.0f), VecF(-constants::kInf), result);
}

inline VecF log1p(VecF x) {
  const VecF t = VecF(1.0f) + x;
  VecF e;
  split(t, e);
  // f = 2^-e (1 + x) - 1 from x itself: 1 + x has lost x's last bits, 2^-e - 1 is exact.
  const VecF s = scale_by_power_of_2(VecF(1.0f), -e);
  VecF result = fma(e, VecF(constants::kLn2), detail::log1p_third(fma(x, s, s - VecF(1.0f))));
  result = select(t == VecF(constants::kInf), t, result);
  result = select(t > VecF(0.0f), result, VecF(constants::kNaN));
  return select(t == VecF(0.0f), VecF(-constants::kInf), result);
}

// log(1 + u) for u in [0, 1].
inline VecF log1p_unit(VecF u) {
  const MaskF low = u < VecF(1.0f / 3.0f);
  const VecF f = select(low, u, fma(u, VecF(0.5f), VecF(-0.5f)));
  return select(low, VecF(0.0f), VecF(constants::kLn2)) + detail::log1p_third(f);
}

// sigmoid(x) = e / (1 + e) with e = exp(x): both sides keep their relative accuracy, since below 0 the sum is near 1 and
// above 17 the quotient is 1. In two steps for loops that take each over several vectors: 2^32 e, where x beyond
// [-104, 64] gives the bound's, and the quotient. Scaled so, e is a normal number all over and 2^(n + 32) takes one
// shift, where 2^n in two factors takes seven instructions (AVX2: 4.5 to 3.2 ns a vector, Zen 3).
template <class V> inline V sigmoid_power(V x) {
  x = min(V(64.0f), max(V(-104.0f), x));
  // Adding 1.5 * 2^23 leaves the nearest integer in the lowest bits, and 32 + 127 there make it the exponent's.
  const V bias(12582912.0f + 159.0f);
  const V t = fma(x, V(constants::kLog2E), bias);
  const V n = t - bias;
  const V r = fnma(n, V(constants::kLn2Low), fnma(n, V(constants::kLn2High), x));
  const V scale = shift_to_exponent(t);
  return fma(scale, detail::exp_fraction(r), scale);
}
template <class V> inline V sigmoid_from(V power) { return power / (V(4294967296.0f) + power); }

namespace detail {

// AVX-512 has one instruction for a product with 2^n.
template <class V> inline V sigmoid(V x) {
  if constexpr (V::N == 8) {
    return sigmoid_from(sigmoid_power(x));
  } else {
    const V e = exp_within(min(V(88.0f), max(V(-104.0f), x)));
    return e / (V(1.0f) + e);
  }
}

}  // namespace detail

inline VecF sigmoid(VecF x) { return detail::sigmoid(x); }

inline VecF softplus(VecF x) { return max(VecF(0.0f), x) + log1p_unit(exp(-abs(x))); }

inline VecF tanh(VecF x) {
  const VecF t = expm1(VecF(-2.0f) * abs(x));
  return copysign(-t / (VecF(2.0f) + t), x);
}

// Phi(x), and the density phi(x), which its derivative needs.
inline VecF normal_cdf(VecF x, VecF& density) {
  const VecF a = min(VecF(15.0f), abs(x));  // past 14.2 the tail has underflowed
  // exp(-a^2 / 2) with the square's rounding error put back: a^2 reaches 200, an ULP of it 1.5e-5.
  const VecF square = a * a;
  const VecF lost = fma(a, a, -square);
  const VecF e = exp(VecF(-0.5f) * square);
  const VecF gauss = fnma(e, VecF(0.5f) * lost, e);
  density = gauss * VecF(0.39894228f);
  // Phi(-a) = exp(-a^2 / 2) g(u) / (a + 2.5), u = 1 - 5 / (a + 2.5) in [-1, 0.71]; g has relative error 2^-26.
  const VecF reciprocal = VecF(1.0f) / (a + VecF(2.5f));
  const VecF u = fnma(VecF(5.0f), reciprocal, VecF(1.0f));
  VecF g(-0.0001573608702594933f);
  g = fma(g, u, VecF(-0.0003110294780992614f));
  g = fma(g, u, VecF(0.000684357655344092f));
  g = fma(g, u, VecF(0.002523434053534843f));
  g = fma(g, u, VecF(-0.0016009319657092466f));
  g = fma(g, u, VecF(-0.016386056577538114f));
  g = fma(g, u, VecF(0.009235906297034926f));
  g = fma(g, u, VecF(0.13198696821576467f));
  g = fma(g, u, VecF(-0.43369201398674034f));
  g = fma(g, u, VecF(0.706656660040848f));
  const VecF tail = gauss * (g * reciprocal);
  return select(x >= VecF(0.0f), VecF(1.0f) - tail, tail);
}

#endif  // STAR_PLAIN

template <class T> inline VecS<T> exp(VecS<T> x) { return std::exp(x.v); }
template <class T> inline VecS<T> expm1(VecS<T> x) { return std::expm1(x.v); }
template <class T> inline VecS<T> log(VecS<T> x) { return std::log(x.v); }
template <class T> inline VecS<T> log1p(VecS<T> x) { return std::log1p(x.v); }
template <class T> inline VecS<T> tanh(VecS<T> x) { return std::tanh(x.v); }
template <class T> inline VecS<T> sigmoid(VecS<T> x) {
  const T z = std::exp(-std::fabs(x.v));
  return (x.v >= T(0) ? T(1) : z) / (T(1) + z);
}
template <class T> inline VecS<T> softplus(VecS<T> x) {
  return max(VecS<T>(T(0)), x).v + std::log1p(std::exp(-std::fabs(x.v)));
}
template <class T> inline VecS<T> normal_cdf(VecS<T> x, VecS<T>& density) {
  density = T(0.398942280401432678) * std::exp(T(-0.5) * x.v * x.v);
  return T(0.5) * std::erfc(x.v * T(-0.707106781186547524));
}

template <class V> inline V silu(V x) { return x * sigmoid(x); }

}  // namespace star
