// Four float32 lanes in NEON (AArch64).
#pragma once

#include <arm_neon.h>

#include "vec_common.h"

namespace star {

struct MaskF {
  uint32x4_t m;
  friend MaskF operator&(MaskF a, MaskF b) { return {vandq_u32(a.m, b.m)}; }
  friend MaskF operator|(MaskF a, MaskF b) { return {vorrq_u32(a.m, b.m)}; }
  friend MaskF operator~(MaskF a) { return {vmvnq_u32(a.m)}; }
  friend bool any(MaskF a) { return vmaxvq_u32(a.m) != 0; }
};

struct VecF {
  using Scalar = float;
  static constexpr int N = 4;
  float32x4_t v;

  VecF() = default;
  VecF(float x) : v(vdupq_n_f32(x)) {}
  explicit VecF(float32x4_t x) : v(x) {}

  static VecF load(const float* p, Full = {}) { return VecF(vld1q_f32(p)); }
  static VecF load(const float* p, Lanes n) { return load_part(p, n); }
  static VecF load(const bf16* p, Full = {}) {
    return VecF(vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p)), 16)));
  }
  static VecF load(const bf16* p, Lanes n) { return load_part(p, n); }

  void store(float* p, Full = {}) const { vst1q_f32(p, v); }
  void store(float* p, Lanes n) const { store_part(p, n); }
  void store(bf16* p, Full = {}) const { vst1_u16(reinterpret_cast<uint16_t*>(p), narrow()); }
  void store(bf16* p, Lanes n) const { store_part(p, n); }

  // A plain store: there is no such instruction for one vector.
  template <class T> void stream(T* p) const { store(p); }

  // Lanes 0, 1, 2, ...
  static VecF iota() {
    const float index[N] = {0, 1, 2, 3};
    return load(index);
  }

  friend VecF operator+(VecF a, VecF b) { return VecF(vaddq_f32(a.v, b.v)); }
  friend VecF operator-(VecF a, VecF b) { return VecF(vsubq_f32(a.v, b.v)); }
  friend VecF operator*(VecF a, VecF b) { return VecF(vmulq_f32(a.v, b.v)); }
  friend VecF operator/(VecF a, VecF b) { return VecF(vdivq_f32(a.v, b.v)); }
  friend VecF operator-(VecF a) { return VecF(vnegq_f32(a.v)); }
  friend VecF fma(VecF a, VecF b, VecF c) { return VecF(vfmaq_f32(c.v, a.v, b.v)); }
  friend VecF fnma(VecF a, VecF b, VecF c) { return VecF(vfmsq_f32(c.v, a.v, b.v)); }
  // As on x86: the second operand where the two are unordered. NEON's own fmin and fmax would return NaN.
  friend VecF min(VecF a, VecF b) { return VecF(vbslq_f32(vcltq_f32(a.v, b.v), a.v, b.v)); }
  friend VecF max(VecF a, VecF b) { return VecF(vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v)); }
  friend VecF abs(VecF a) { return VecF(vabsq_f32(a.v)); }
  friend VecF sqrt(VecF a) { return VecF(vsqrtq_f32(a.v)); }
  friend VecF copysign(VecF a, VecF sign) { return VecF(vbslq_f32(vdupq_n_u32(0x80000000u), sign.v, a.v)); }

  friend MaskF operator<(VecF a, VecF b) { return {vcltq_f32(a.v, b.v)}; }
  friend MaskF operator<=(VecF a, VecF b) { return {vcleq_f32(a.v, b.v)}; }
  friend MaskF operator>(VecF a, VecF b) { return {vcgtq_f32(a.v, b.v)}; }
  friend MaskF operator>=(VecF a, VecF b) { return {vcgeq_f32(a.v, b.v)}; }
  friend MaskF operator==(VecF a, VecF b) { return {vceqq_f32(a.v, b.v)}; }
  friend MaskF operator!=(VecF a, VecF b) { return {vmvnq_u32(vceqq_f32(a.v, b.v))}; }
  friend VecF select(MaskF m, VecF yes, VecF no) { return VecF(vbslq_f32(m.m, yes.v, no.v)); }

  friend VecF round_even(VecF a) { return VecF(vrndnq_f32(a.v)); }
  // a * 2^n for integral n in [-252, 254]: two factors, so that underflow and overflow are right.
  friend VecF scale_by_power_of_2(VecF a, VecF n) {
    const int32x4_t whole = vcvtnq_s32_f32(n.v);
    const int32x4_t first = vshrq_n_s32(whole, 1);
    return VecF(vmulq_f32(vmulq_f32(a.v, power_of_2(first)), power_of_2(vsubq_s32(whole, first))));
  }
  // Mantissa in [2/3, 4/3) and exponent of a positive finite number: a = m * 2^e. Denormals included.
  friend VecF split(VecF a, VecF& e) {
    const uint32x4_t tiny = vcltq_f32(a.v, vdupq_n_f32(1.17549435e-38f));
    const float32x4_t scaled = vbslq_f32(tiny, vmulq_f32(a.v, vdupq_n_f32(8388608.0f)), a.v);
    const int32x4_t two_thirds = vdupq_n_s32(0x3F2AAAAB);
    const int32x4_t offset = vsubq_s32(vreinterpretq_s32_f32(scaled), two_thirds);
    const float32x4_t shift = vreinterpretq_f32_u32(vandq_u32(tiny, vreinterpretq_u32_f32(vdupq_n_f32(23.0f))));
    e.v = vsubq_f32(vcvtq_f32_s32(vshrq_n_s32(offset, 23)), shift);
    return VecF(vreinterpretq_f32_s32(vaddq_s32(vandq_s32(offset, vdupq_n_s32(0x7FFFFF)), two_thirds)));
  }

  // Lanes 1, 0, 3, 2, ...
  friend VecF swap_pairs(VecF a) { return VecF(vrev64q_f32(a.v)); }
  friend float reduce_add(VecF a) { return vaddvq_f32(a.v); }
  friend float reduce_max(VecF a) { return vmaxvq_f32(a.v); }
  // Lane i: the sum of the lanes of rows[i].
  friend VecF lane_sums(const VecF (&rows)[N]) {
    return VecF(vpaddq_f32(vpaddq_f32(rows[0].v, rows[1].v), vpaddq_f32(rows[2].v, rows[3].v)));
  }
  // Lane j: the sum of the j-th argument.
  friend VecF sum_quarters(VecF a, VecF b, VecF c, VecF d) {
    return VecF(vpaddq_f32(vpaddq_f32(a.v, b.v), vpaddq_f32(c.v, d.v)));
  }
  // rows[i] lane j <-> rows[j] lane i.
  friend void transpose(VecF (&rows)[N]) {
    const float32x4x2_t low = vzipq_f32(rows[0].v, rows[2].v), high = vzipq_f32(rows[1].v, rows[3].v);
    const float32x4x2_t first = vzipq_f32(low.val[0], high.val[0]), second = vzipq_f32(low.val[1], high.val[1]);
    rows[0].v = first.val[0];
    rows[1].v = first.val[1];
    rows[2].v = second.val[0];
    rows[3].v = second.val[1];
  }

 private:
  template <class T> static VecF load_part(const T* p, Lanes n) {
    T part[N] = {};
    for (int i = 0; i < n.count; ++i) part[i] = p[i];
    return load(part);
  }
  template <class T> void store_part(T* p, Lanes n) const {
    T part[N];
    store(part);
    for (int i = 0; i < n.count; ++i) p[i] = part[i];
  }
  static float32x4_t power_of_2(int32x4_t n) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(127)), 23));
  }
  // To bfloat16, to nearest even; NaN stays NaN.
  uint16x4_t narrow() const {
    const uint32x4_t bits = vreinterpretq_u32_f32(v);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7FFF)));
    const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
    return vshrn_n_u32(vbslq_u32(vceqq_f32(v, v), rounded, quiet), 16);
  }
};

}  // namespace star
