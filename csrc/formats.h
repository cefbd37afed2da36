// How fp32, bf16 and fp16 lie in memory, and the conversions from and to fp32 that all kernels share.
#pragma once

#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>

#include "portable.h"

namespace grass {

enum class Format { kFp32, kBf16, kFp16 };

GRASS_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

GRASS_INLINE float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

struct Fp32 {
  using Stored = float;
  static GRASS_INLINE float load(float stored) { return stored; }
  static GRASS_INLINE float round(float value) { return value; }
  static GRASS_INLINE float round_stochastic(float value, uint32_t) { return value; }
};

// The upper half of an fp32.
struct Bf16 {
  using Stored = uint16_t;
  static GRASS_INLINE float load(uint16_t stored) { return float_of(static_cast<uint32_t>(stored) << 16); }
  // To nearest, ties to even.
  static GRASS_INLINE uint16_t round(float value) {
    return truncate_after(value, 0x7fffu + ((bits_of(value) >> 16) & 1u));
  }
  // Away from zero with a probability of the discarded half over 2^16, so unbiased. `random` is below 2^16.
  static GRASS_INLINE uint16_t round_stochastic(float value, uint32_t random) { return truncate_after(value, random); }

 private:
  // Adds `increment` (below 2^16) to the discarded half and truncates; infinities and exact values stay. The select is
  // in 32 bits, like its condition, because compilers do not vectorise one of mixed widths.
  static GRASS_INLINE uint16_t truncate_after(float value, uint32_t increment) {
    const uint32_t bits = bits_of(value);
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    const uint32_t rounded = is_nan ? 0x7fc00000u : bits + increment;
    return static_cast<uint16_t>(rounded >> 16);
  }
};

struct Fp16 {
  using Stored = uint16_t;
  static GRASS_INLINE float load(uint16_t stored) { return c10::Half(stored, c10::Half::from_bits()); }
  static GRASS_INLINE uint16_t round(float value) { return c10::Half(value).x; }
};

}  // namespace grass
