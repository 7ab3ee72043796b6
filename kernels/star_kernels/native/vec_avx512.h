// Sixteen float32 lanes in AVX-512 (F, BW, DQ, VL).
#pragma once

#include <immintrin.h>

#include "vec_common.h"

namespace star {

struct MaskF {
  __mmask16 m;
  friend MaskF operator&(MaskF a, MaskF b) { return {static_cast<__mmask16>(a.m & b.m)}; }
  friend MaskF operator|(MaskF a, MaskF b) { return {static_cast<__mmask16>(a.m | b.m)}; }
  friend MaskF operator~(MaskF a) { return {static_cast<__mmask16>(~a.m)}; }
  friend bool any(MaskF a) { return a.m != 0; }
};

struct VecF {
  using Scalar = float;
  static constexpr int N = 16;
  __m512 v;

  VecF() = default;
  VecF(float x) : v(_mm512_set1_ps(x)) {}
  explicit VecF(__m512 x) : v(x) {}

  static __mmask16 mask_of(Lanes n) { return static_cast<__mmask16>((1u << n.count) - 1); }
  static __m512 widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }

  static VecF load(const float* p, Full = {}) { return VecF(_mm512_loadu_ps(p)); }
  static VecF load(const float* p, Lanes n) { return VecF(_mm512_maskz_loadu_ps(mask_of(n), p)); }
  static VecF load(const bf16* p, Full = {}) {
    return VecF(widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
  }
  static VecF load(const bf16* p, Lanes n) { return VecF(widen(_mm256_maskz_loadu_epi16(mask_of(n), p))); }

  void store(float* p, Full = {}) const { _mm512_storeu_ps(p, v); }
  void store(float* p, Lanes n) const { _mm512_mask_storeu_ps(p, mask_of(n), v); }
  void store(bf16* p, Full = {}) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow()); }
  void store(bf16* p, Lanes n) const { _mm256_mask_storeu_epi16(p, mask_of(n), narrow()); }

  // Past the caches; p is aligned to the vector's size there.
  void stream(float* p) const { _mm512_stream_ps(p, v); }
  void stream(bf16* p) const { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow()); }

  // Lanes 0, 1, 2, ...
  static VecF iota() { return VecF(_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)); }

  friend VecF operator+(VecF a, VecF b) { return VecF(_mm512_add_ps(a.v, b.v)); }
  friend VecF operator-(VecF a, VecF b) { return VecF(_mm512_sub_ps(a.v, b.v)); }
  friend VecF operator*(VecF a, VecF b) { return VecF(_mm512_mul_ps(a.v, b.v)); }
  friend VecF operator/(VecF a, VecF b) { return VecF(_mm512_div_ps(a.v, b.v)); }
  friend VecF operator-(VecF a) { return VecF(_mm512_xor_ps(a.v, _mm512_set1_ps(-0.0f))); }
  friend VecF fma(VecF a, VecF b, VecF c) { return VecF(_mm512_fmadd_ps(a.v, b.v, c.v)); }
  friend VecF fnma(VecF a, VecF b, VecF c) { return VecF(_mm512_fnmadd_ps(a.v, b.v, c.v)); }
  friend VecF min(VecF a, VecF b) { return VecF(_mm512_min_ps(a.v, b.v)); }
  friend VecF max(VecF a, VecF b) { return VecF(_mm512_max_ps(a.v, b.v)); }
  friend VecF abs(VecF a) { return VecF(_mm512_andnot_ps(_mm512_set1_ps(-0.0f), a.v)); }
  friend VecF sqrt(VecF a) { return VecF(_mm512_sqrt_ps(a.v)); }
  friend VecF copysign(VecF a, VecF sign) {
    // Bitwise select: the sign bit of `sign`, the rest of `a`.
    return VecF(_mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_set1_epi32(INT32_MIN), _mm512_castps_si512(sign.v),
                                                              _mm512_castps_si512(a.v), 0xCA)));
  }

  friend MaskF operator<(VecF a, VecF b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
  friend MaskF operator<=(VecF a, VecF b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ)}; }
  friend MaskF operator>(VecF a, VecF b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)}; }
  friend MaskF operator>=(VecF a, VecF b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ)}; }
  friend MaskF operator==(VecF a, VecF b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
  friend MaskF operator!=(VecF a, VecF b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_NEQ_UQ)}; }
  friend VecF select(MaskF m, VecF yes, VecF no) { return VecF(_mm512_mask_blend_ps(m.m, no.v, yes.v)); }

  friend VecF round_even(VecF a) {
    return VecF(_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  // a * 2^n for integral n; underflow and overflow are right.
  friend VecF scale_by_power_of_2(VecF a, VecF n) { return VecF(_mm512_scalef_ps(a.v, n.v)); }
  // Mantissa in [2/3, 4/3) and exponent of a positive finite number: a = m * 2^e. Denormals included.
  friend VecF split(VecF a, VecF& e) {
    const __m512 m = _mm512_getmant_ps(a.v, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src);
    const __mmask16 high = _mm512_cmp_ps_mask(m, _mm512_set1_ps(4.0f / 3.0f), _CMP_GE_OQ);
    e.v = _mm512_getexp_ps(a.v);
    e.v = _mm512_mask_add_ps(e.v, high, e.v, _mm512_set1_ps(1.0f));
    return VecF(_mm512_mask_mul_ps(m, high, m, _mm512_set1_ps(0.5f)));
  }

  // Lanes 1, 0, 3, 2, ...
  friend VecF swap_pairs(VecF a) { return VecF(_mm512_permute_ps(a.v, 0xB1)); }
  friend float reduce_add(VecF a) {
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
  }
  friend float reduce_max(VecF a) {
    const __m256 half = _mm256_max_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
    __m128 q = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    q = _mm_max_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
  }
  // Lane i: the sum of the lanes of rows[i]. Pairs of vectors are added until one is left, 45 instructions in all.
  friend VecF lane_sums(const VecF (&rows)[N]) {
    __m512 a[8], b[4], c[2];
    STAR_UNROLL for (int i = 0; i < 8; ++i) {
      a[i] = _mm512_add_ps(_mm512_unpacklo_ps(rows[2 * i].v, rows[2 * i + 1].v),
                           _mm512_unpackhi_ps(rows[2 * i].v, rows[2 * i + 1].v));
    }
    // Each 128-bit part of b[i] holds its own lanes' sums of rows 4 i .. 4 i + 3.
    STAR_UNROLL for (int i = 0; i < 4; ++i) {
      const __m512d even = _mm512_castps_pd(a[2 * i]), odd = _mm512_castps_pd(a[2 * i + 1]);
      b[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(even, odd)),
                           _mm512_castpd_ps(_mm512_unpackhi_pd(even, odd)));
    }
    STAR_UNROLL for (int i = 0; i < 2; ++i) {
      c[i] = _mm512_add_ps(_mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0x88),
                           _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0xDD));
    }
    return VecF(_mm512_add_ps(_mm512_shuffle_f32x4(c[0], c[1], 0x88), _mm512_shuffle_f32x4(c[0], c[1], 0xDD)));
  }
  // Lane 4 L + j: the sum of the 128-bit part L of the j-th argument.
  friend VecF sum_quarters(VecF a, VecF b, VecF c, VecF d) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a.v, b.v), _mm512_unpackhi_ps(a.v, b.v));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c.v, d.v), _mm512_unpackhi_ps(c.v, d.v));
    return VecF(_mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xEE)));
  }
  // rows[i] lane j <-> rows[j] lane i.
  friend void transpose(VecF (&rows)[N]) {
    __m512 t[N], u[N];
    STAR_UNROLL for (int i = 0; i < 8; ++i) {
      t[2 * i] = _mm512_unpacklo_ps(rows[2 * i].v, rows[2 * i + 1].v);
      t[2 * i + 1] = _mm512_unpackhi_ps(rows[2 * i].v, rows[2 * i + 1].v);
    }
    // After this, 128-bit part L of u[4 i + j] holds lane 4 L + j of rows 4 i .. 4 i + 3.
    STAR_UNROLL for (int i = 0; i < N; i += 4) {
      u[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[i]), _mm512_castps_pd(t[i + 2])));
      u[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[i]), _mm512_castps_pd(t[i + 2])));
      u[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[i + 1]), _mm512_castps_pd(t[i + 3])));
      u[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[i + 1]), _mm512_castps_pd(t[i + 3])));
    }
    STAR_UNROLL for (int j = 0; j < 4; ++j) {
      const __m512 a = _mm512_shuffle_f32x4(u[j], u[4 + j], 0x88), b = _mm512_shuffle_f32x4(u[j], u[4 + j], 0xDD);
      const __m512 c = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0x88);
      const __m512 d = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0xDD);
      rows[j].v = _mm512_shuffle_f32x4(a, c, 0x88);
      rows[4 + j].v = _mm512_shuffle_f32x4(b, d, 0x88);
      rows[8 + j].v = _mm512_shuffle_f32x4(a, c, 0xDD);
      rows[12 + j].v = _mm512_shuffle_f32x4(b, d, 0xDD);
    }
  }

 private:
  // To bfloat16, to nearest even; NaN stays NaN. Integer steps: not every AVX-512 processor has vcvtneps2bf16, and that
  // instruction flushes denormals.
  __m256i narrow() const {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
  }
};

}  // namespace star
