// The maths of grass::adamw_, element by element.
//
// The specification is the PyTorch kernel in ds_grass/ops.py: same operations, same order, one IEEE rounding each, so
// that all kernels agree bit for bit (NaN payloads aside). Compile with -ffp-contract=off and without -ffast-math.
// Not covered: memory, threads, dispatch.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

// Inlined wherever it is called, so that a caller compiled for a wider instruction set vectorises it.
#define GRASS_INLINE inline __attribute__((always_inline))

namespace grass {

// What one step needs besides the element itself. Computed in double, rounded to fp32 once.
struct AdamWStep {
  float grad_scale;  // inv_scale, negated to maximize (exact)
  float decay;       // 1 - lr * weight_decay when decoupled, else 1 (exact)
  float l2;          // weight_decay when not decoupled
  bool uses_l2;
  float beta1, one_minus_beta1;
  float beta2, one_minus_beta2;
  float step_size;         // lr / (1 - beta1^step)
  float root_correction2;  // 1 / sqrt(1 - beta2^step)
  float eps;
};

inline AdamWStep make_adamw_step(float inv_scale, double lr, double beta1, double beta2, double eps,
                                 double weight_decay, int64_t step, bool decoupled, bool maximize) {
  const double steps = static_cast<double>(step);
  AdamWStep s;
  s.grad_scale = maximize ? -inv_scale : inv_scale;
  s.decay = decoupled ? static_cast<float>(1.0 - lr * weight_decay) : 1.0f;
  s.l2 = static_cast<float>(weight_decay);
  s.uses_l2 = !decoupled && weight_decay != 0.0;
  s.beta1 = static_cast<float>(beta1);
  s.one_minus_beta1 = static_cast<float>(1.0 - beta1);
  s.beta2 = static_cast<float>(beta2);
  s.one_minus_beta2 = static_cast<float>(1.0 - beta2);
  s.step_size = static_cast<float>(lr / (1.0 - std::pow(beta1, steps)));
  s.root_correction2 = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(beta2, steps)));
  s.eps = static_cast<float>(eps);
  return s;
}

// kL2 is uses_l2, known to the compiler because a loop with that test inside is not vectorised.
template <bool kL2>
GRASS_INLINE void adamw_update(float& weight, float& exp_avg, float& exp_avg_sq, float grad, const AdamWStep& s) {
  float g = grad * s.grad_scale;
  if constexpr (kL2) g = g + weight * s.l2;
  const float w = weight * s.decay;
  exp_avg = exp_avg * s.beta1 + g * s.one_minus_beta1;
  exp_avg_sq = exp_avg_sq * s.beta2 + (g * s.one_minus_beta2) * g;
  const float denominator = std::sqrt(exp_avg_sq) * s.root_correction2 + s.eps;
  weight = w - (exp_avg * s.step_size) / denominator;
}

// -- bf16 as the upper half of fp32 --------------------------------------------------------------------------------

GRASS_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

GRASS_INLINE float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

GRASS_INLINE float bf16_to_float(uint16_t stored) { return float_of(static_cast<uint32_t>(stored) << 16); }

// Adds `increment` (below 2^16) to the discarded half and truncates; infinities and exact values stay. The select is in
// 32 bits, like its condition, because compilers do not vectorise one of mixed widths.
GRASS_INLINE uint16_t bf16_truncate_after(float value, uint32_t increment) {
  const uint32_t bits = bits_of(value);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const uint32_t rounded = is_nan ? 0x7fc00000u : bits + increment;
  return static_cast<uint16_t>(rounded >> 16);
}

GRASS_INLINE uint16_t bf16_round_nearest_even(float value) {
  return bf16_truncate_after(value, 0x7fffu + ((bits_of(value) >> 16) & 1u));
}

// -- counter-based randomness --------------------------------------------------------------------------------------

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

// One key for each (seed, step, page), a page being 2^32 elements. The odd constant keeps zero from mapping to zero.
inline uint32_t random_key(uint64_t seed, uint64_t step, uint64_t page) {
  const uint64_t words[] = {seed, seed >> 32, step, step >> 32, page};
  uint32_t key = 0;
  for (const uint64_t word : words) key = hash32((key ^ static_cast<uint32_t>(word)) + 0x9e3779b9u);
  return key;
}

// Unbiased: rounds away from zero with a probability of the discarded half over 2^16. `random` is below 2^16.
GRASS_INLINE uint16_t bf16_round_stochastic(float value, uint32_t random) { return bf16_truncate_after(value, random); }

}  // namespace grass
