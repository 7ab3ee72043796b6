// Eight float32 lanes in AVX2 with FMA.
#pragma once

#include <immintrin.h>

#include "vec_common.h"

namespace star {

struct MaskF {
  __m256 m;
  friend MaskF operator&(MaskF a, MaskF b) { return {_mm256_and_ps(a.m, b.m)}; }
  friend MaskF operator|(MaskF a, MaskF b) { return {_mm256_or_ps(a.m, b.m)}; }
  friend MaskF operator~(MaskF a) { return {_mm256_xor_ps(a.m, _mm256_castsi256_ps(_mm256_set1_epi32(-1)))}; }
  friend bool any(MaskF a) { return _mm256_movemask_ps(a.m) != 0; }
};

struct VecF {
  using Scalar = float;
  static constexpr int N = 8;
  __m256 v;

  VecF() = default;
  VecF(float x) : v(_mm256_set1_ps(x)) {}
  explicit VecF(__m256 x) : v(x) {}

  static __m256i mask_of(Lanes n) {
    const __m256i index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n.count), index);
  }
  static __m256 widen(__m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }

  static VecF load(const float* p, Full = {}) { return VecF(_mm256_loadu_ps(p)); }
  static VecF load(const float* p, Lanes n) { return VecF(_mm256_maskload_ps(p, mask_of(n))); }
  static VecF load(const bf16* p, Full = {}) {
    return VecF(widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static VecF load(const bf16* p, Lanes n) {
    bf16 part[N] = {};
    for (int i = 0; i < n.count; ++i) part[i] = p[i];
    return load(part);
  }

  void store(float* p, Full = {}) const { _mm256_storeu_ps(p, v); }
  void store(float* p, Lanes n) const { _mm256_maskstore_ps(p, mask_of(n), v); }
  void store(bf16* p, Full = {}) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow()); }
  void store(bf16* p, Lanes n) const {
    bf16 part[N];
    store(part);
    for (int i = 0; i < n.count; ++i) p[i] = part[i];
  }

  // Past the caches; p is aligned to the vector's size there.
  void stream(float* p) const { _mm256_stream_ps(p, v); }
  void stream(bf16* p) const { _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrow()); }

  // Lanes 0, 1, 2, ...
  static VecF iota() { return VecF(_mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7)); }

  friend VecF operator+(VecF a, VecF b) { return VecF(_mm256_add_ps(a.v, b.v)); }
  friend VecF operator-(VecF a, VecF b) { return VecF(_mm256_sub_ps(a.v, b.v)); }
  friend VecF operator*(VecF a, VecF b) { return VecF(_mm256_mul_ps(a.v, b.v)); }
  friend VecF operator/(VecF a, VecF b) { return VecF(_mm256_div_ps(a.v, b.v)); }
  friend VecF operator-(VecF a) { return VecF(_mm256_xor_ps(a.v, _mm256_set1_ps(-0.0f))); }
  friend VecF fma(VecF a, VecF b, VecF c) { return VecF(_mm256_fmadd_ps(a.v, b.v, c.v)); }
  friend VecF fnma(VecF a, VecF b, VecF c) { return VecF(_mm256_fnmadd_ps(a.v, b.v, c.v)); }
  friend VecF min(VecF a, VecF b) { return VecF(_mm256_min_ps(a.v, b.v)); }
  friend VecF max(VecF a, VecF b) { return VecF(_mm256_max_ps(a.v, b.v)); }
  friend VecF abs(VecF a) { return VecF(_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)); }
  friend VecF sqrt(VecF a) { return VecF(_mm256_sqrt_ps(a.v)); }
  friend VecF copysign(VecF a, VecF sign) {
    const __m256 bit = _mm256_set1_ps(-0.0f);
    return VecF(_mm256_or_ps(_mm256_andnot_ps(bit, a.v), _mm256_and_ps(bit, sign.v)));
  }

  friend MaskF operator<(VecF a, VecF b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
  friend MaskF operator<=(VecF a, VecF b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LE_OQ)}; }
  friend MaskF operator>(VecF a, VecF b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)}; }
  friend MaskF operator>=(VecF a, VecF b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GE_OQ)}; }
  friend MaskF operator==(VecF a, VecF b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)}; }
  friend MaskF operator!=(VecF a, VecF b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_NEQ_UQ)}; }
  friend VecF select(MaskF m, VecF yes, VecF no) { return VecF(_mm256_blendv_ps(no.v, yes.v, m.m)); }

  friend VecF round_even(VecF a) { return VecF(_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)); }
  // a * 2^n for integral n in [-252, 254]: two factors, so that underflow and overflow are right.
  friend VecF scale_by_power_of_2(VecF a, VecF n) {
    const __m256i whole = _mm256_cvtps_epi32(n.v);
    const __m256i first = _mm256_srai_epi32(whole, 1);
    return VecF(_mm256_mul_ps(_mm256_mul_ps(a.v, power_of_2(first)), power_of_2(_mm256_sub_epi32(whole, first))));
  }
  // Lane by lane, the bits of a moved up by 23: its lowest eight become the exponent.
  friend VecF shift_to_exponent(VecF a) {
    return VecF(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a.v), 23)));
  }
  // Mantissa in [2/3, 4/3) and exponent of a positive finite number: a = m * 2^e. Denormals included.
  friend VecF split(VecF a, VecF& e) {
    const __m256 tiny = _mm256_cmp_ps(a.v, _mm256_set1_ps(1.17549435e-38f), _CMP_LT_OQ);
    const __m256 scaled = _mm256_blendv_ps(a.v, _mm256_mul_ps(a.v, _mm256_set1_ps(8388608.0f)), tiny);
    const __m256i two_thirds = _mm256_set1_epi32(0x3F2AAAAB);
    const __m256i offset = _mm256_sub_epi32(_mm256_castps_si256(scaled), two_thirds);
    const __m256 whole = _mm256_cvtepi32_ps(_mm256_srai_epi32(offset, 23));
    e.v = _mm256_sub_ps(whole, _mm256_and_ps(tiny, _mm256_set1_ps(23.0f)));
    const __m256i fraction = _mm256_and_si256(offset, _mm256_set1_epi32(0x7FFFFF));
    return VecF(_mm256_castsi256_ps(_mm256_add_epi32(fraction, two_thirds)));
  }

  // Lanes 1, 0, 3, 2, ...
  friend VecF swap_pairs(VecF a) { return VecF(_mm256_permute_ps(a.v, 0xB1)); }
  friend float reduce_add(VecF a) {
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
  }
  friend float reduce_max(VecF a) {
    __m128 q = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    q = _mm_max_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
  }
  // Lane i: the sum of the lanes of rows[i].
  friend VecF lane_sums(const VecF (&rows)[N]) {
    __m256 half[2];
    STAR_UNROLL for (int i = 0; i < 2; ++i) {
      half[i] = _mm256_hadd_ps(_mm256_hadd_ps(rows[4 * i].v, rows[4 * i + 1].v),
                               _mm256_hadd_ps(rows[4 * i + 2].v, rows[4 * i + 3].v));
    }
    return VecF(_mm256_add_ps(_mm256_permute2f128_ps(half[0], half[1], 0x20),
                              _mm256_permute2f128_ps(half[0], half[1], 0x31)));
  }
  // Lane 4 L + j: the sum of the 128-bit part L of the j-th argument.
  friend VecF sum_quarters(VecF a, VecF b, VecF c, VecF d) {
    const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a.v, b.v), _mm256_unpackhi_ps(a.v, b.v));
    const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c.v, d.v), _mm256_unpackhi_ps(c.v, d.v));
    return VecF(_mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xEE)));
  }
  // rows[i] lane j <-> rows[j] lane i.
  friend void transpose(VecF (&rows)[N]) {
    __m256 t[N], u[N];
    STAR_UNROLL for (int i = 0; i < 4; ++i) {
      t[2 * i] = _mm256_unpacklo_ps(rows[2 * i].v, rows[2 * i + 1].v);
      t[2 * i + 1] = _mm256_unpackhi_ps(rows[2 * i].v, rows[2 * i + 1].v);
    }
    // After this, 128-bit part L of u[4 i + j] holds lane 4 L + j of rows 4 i .. 4 i + 3.
    STAR_UNROLL for (int i = 0; i < N; i += 4) {
      u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
      u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xEE);
      u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
    }
    STAR_UNROLL for (int j = 0; j < 4; ++j) {
      rows[j].v = _mm256_permute2f128_ps(u[j], u[4 + j], 0x20);
      rows[4 + j].v = _mm256_permute2f128_ps(u[j], u[4 + j], 0x31);
    }
  }

 private:
  static __m256 power_of_2(__m256i n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
  }
  // To bfloat16, to nearest even; NaN stays NaN.
  __m128i narrow() const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  }
};

}  // namespace star
