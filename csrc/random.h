// Counter-based random bits: a hash of a key and an element's index, so that any element can be drawn by itself.
#pragma once

#include <cstdint>

#include "portable.h"

namespace grass {

constexpr int64_t kPage = int64_t{1} << 32;  // elements that share a random key

// The two-round permutation [16 21f0aaad 15 d35a2d97 15] found by TheIronBorn with the hash prospector, avalanche
// bias 0.1076 (https://github.com/skeeto/hash-prospector, "Two round functions", public domain).
GRASS_INLINE uint32_t hash32(uint32_t x) {
  x ^= x >> 16;
  x *= 0x21f0aaadu;
  x ^= x >> 15;
  x *= 0xd35a2d97u;
  x ^= x >> 15;
  return x;
}

// One key for each (seed, step, page). The odd constant keeps zero from mapping to zero.
inline uint32_t random_key(uint64_t seed, uint64_t step, uint64_t page) {
  const uint64_t words[] = {seed, seed >> 32, step, step >> 32, page};
  uint32_t key = 0;
  for (const uint64_t word : words) key = hash32((key ^ static_cast<uint32_t>(word)) + 0x9e3779b9u);
  return key;
}

}  // namespace grass
