// What all vector types share: the element types, and how a partial vector is named.
#pragma once

#include <cstdint>
#include <cstring>

// Before a loop of constant length whose array of vectors must stay in registers: -O2 does not unroll it by itself.
#define STAR_UNROLL _Pragma("GCC unroll 16")

namespace star {

// bfloat16 as stored: the upper half of a float32.
struct bf16 {
  uint16_t bits;
};

inline float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

// To nearest even; NaN stays NaN.
inline bf16 to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (x != x) return {static_cast<uint16_t>((bits | 0x400000) >> 16)};
  return {static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)};
}

// All lanes of a vector, or its first `count` (0 to N - 1): the rest is neither read nor written, and loads as 0.
struct Full {
  static constexpr bool kFull = true;
};
struct Lanes {
  static constexpr bool kFull = false;
  int count;
};

}  // namespace star
