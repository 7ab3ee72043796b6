// One lane: float64 on every machine, and float32 where there are no vectors ("plain").
#pragma once

#include <cmath>

#include "vec_common.h"

namespace star {

struct MaskS {
  bool m;
  friend MaskS operator&(MaskS a, MaskS b) { return {a.m && b.m}; }
  friend MaskS operator|(MaskS a, MaskS b) { return {a.m || b.m}; }
  friend MaskS operator~(MaskS a) { return {!a.m}; }
  friend bool any(MaskS a) { return a.m; }
};

template <class T> struct VecS {
  using Scalar = T;
  static constexpr int N = 1;
  T v;

  VecS() = default;
  VecS(T x) : v(x) {}

  static VecS load(const T* p, Full = {}) { return VecS(*p); }
  static VecS load(const T* p, Lanes n) { return VecS(n.count > 0 ? *p : T(0)); }
  static VecS load(const bf16* p, Full = {}) { return VecS(to_float(*p)); }
  static VecS load(const bf16* p, Lanes n) { return VecS(n.count > 0 ? to_float(*p) : 0.0f); }
  void store(T* p, Full = {}) const { *p = v; }
  void store(T* p, Lanes n) const {
    if (n.count > 0) *p = v;
  }
  void store(bf16* p, Full = {}) const { *p = to_bf16(static_cast<float>(v)); }
  void store(bf16* p, Lanes n) const {
    if (n.count > 0) *p = to_bf16(static_cast<float>(v));
  }

  template <class P> void stream(P* p) const { store(p); }

  static VecS iota() { return VecS(T(0)); }

  friend VecS operator+(VecS a, VecS b) { return a.v + b.v; }
  friend VecS operator-(VecS a, VecS b) { return a.v - b.v; }
  friend VecS operator*(VecS a, VecS b) { return a.v * b.v; }
  friend VecS operator/(VecS a, VecS b) { return a.v / b.v; }
  friend VecS operator-(VecS a) { return -a.v; }
#if defined(__FMA__) || defined(__aarch64__)
  friend VecS fma(VecS a, VecS b, VecS c) { return std::fma(a.v, b.v, c.v); }
  friend VecS fnma(VecS a, VecS b, VecS c) { return std::fma(-a.v, b.v, c.v); }
#else  // two roundings: std::fma would be a slow emulation
  friend VecS fma(VecS a, VecS b, VecS c) { return a.v * b.v + c.v; }
  friend VecS fnma(VecS a, VecS b, VecS c) { return c.v - a.v * b.v; }
#endif
  friend VecS min(VecS a, VecS b) { return a.v < b.v ? a.v : b.v; }
  friend VecS max(VecS a, VecS b) { return a.v > b.v ? a.v : b.v; }
  friend VecS abs(VecS a) { return std::fabs(a.v); }
  friend VecS sqrt(VecS a) { return std::sqrt(a.v); }
  friend VecS copysign(VecS a, VecS sign) { return std::copysign(a.v, sign.v); }

  friend MaskS operator<(VecS a, VecS b) { return {a.v < b.v}; }
  friend MaskS operator<=(VecS a, VecS b) { return {a.v <= b.v}; }
  friend MaskS operator>(VecS a, VecS b) { return {a.v > b.v}; }
  friend MaskS operator>=(VecS a, VecS b) { return {a.v >= b.v}; }
  friend MaskS operator==(VecS a, VecS b) { return {a.v == b.v}; }
  friend MaskS operator!=(VecS a, VecS b) { return {a.v != b.v}; }
  friend VecS select(MaskS m, VecS yes, VecS no) { return m.m ? yes : no; }

  friend VecS round_even(VecS a) { return std::nearbyint(a.v); }
  friend T reduce_add(VecS a) { return a.v; }
  friend T reduce_max(VecS a) { return a.v; }
  friend VecS lane_sums(const VecS (&rows)[N]) { return rows[0]; }
  friend void transpose(VecS (&)[N]) {}
};

}  // namespace star
