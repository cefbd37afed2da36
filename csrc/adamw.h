// The maths of grass::adamw_, element by element.
//
// The specification is the PyTorch kernel in ds_grass/ops/adamw.py: same operations, same order, one IEEE rounding each, so
// that all kernels agree bit for bit (NaN payloads aside). Compile with -ffp-contract=off (nvcc: --fmad=false)
// and without -ffast-math.
// Not covered: memory, threads, instruction sets.
#pragma once

#include <cmath>
#include <cstdint>

#include <type_traits>

#include "formats.h"
#include "portable.h"
#include "random.h"

namespace grass {

// What one step needs besides the element itself. Computed in double, rounded to fp32 once.
struct AdamWStep {
  float grad_scale;  // 1, or -1 to maximize; each kernel multiplies it by inv_scale where that is (exact)
  float decay;       // 1 - lr * weight_decay when decoupled, else 1 (exact)
  float l2;          // weight_decay when not decoupled
  bool uses_l2;
  float beta1, one_minus_beta1;
  float beta2, one_minus_beta2;
  float step_size;         // lr / (1 - beta1^step)
  float root_correction2;  // 1 / sqrt(1 - beta2^step)
  float eps;
};

inline AdamWStep make_adamw_step(double lr, double beta1, double beta2, double eps, double weight_decay, int64_t step,
                                 bool decoupled, bool maximize) {
  const double steps = static_cast<double>(step);
  AdamWStep s;
  s.grad_scale = maximize ? -1.0f : 1.0f;
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

// Where a shard's tensors lie. `seed`, `step` and `offset` are those of the random bits.
struct AdamWShard {
  void* param;
  float* master;  // null without master weights
  void* exp_avg;
  void* exp_avg_sq;
  const void* grad;
  int64_t seed, step, offset;
};

// The formats of one call.
template <bool kMaster_, typename Param_, typename Moment_, typename Grad_>
struct AdamWFormats {
  static constexpr bool kMaster = kMaster_;
  static constexpr bool kRoundsWeight = !kMaster && !std::is_same_v<Param_, Fp32>;  // stochastically
  using Param = Param_;
  using Moment = Moment_;
  using Grad = Grad_;
};

// One element as it is stored. `index` and `key` are those of its random bits: 16 for the weight and 16 for exp_avg_sq.
// Without a master, `master` is neither read nor written.
template <bool kL2, typename Formats>
GRASS_INLINE void adamw_update_stored(typename Formats::Param::Stored& param, float& master,
                                      typename Formats::Moment::Stored& exp_avg,
                                      typename Formats::Moment::Stored& exp_avg_sq,
                                      typename Formats::Grad::Stored grad, uint32_t index, uint32_t key,
                                      const AdamWStep& s) {
  using Param = typename Formats::Param;
  using Moment = typename Formats::Moment;
  float weight = Formats::kMaster ? master : Param::load(param);
  float m = Moment::load(exp_avg);
  float v = Moment::load(exp_avg_sq);
  adamw_update<kL2>(weight, m, v, Formats::Grad::load(grad), s);
  const uint32_t random = hash32(index ^ key);  // dead code where unused
  exp_avg = Moment::round(m);
  exp_avg_sq = Moment::round_stochastic(v, random & 0xffffu);
  if constexpr (Formats::kMaster) master = weight;
  if constexpr (Formats::kRoundsWeight) {
    param = Param::round_stochastic(weight, random >> 16);
  } else {
    param = Param::round(weight);
  }
}

// Calls `visit(AdamWFormats<...>{})` for the formats of a call; what the checks refuse is never visited.
template <bool kMaster, typename Param, typename Moment, typename Visitor>
auto visit_grad(Format grad, const Visitor& visit) {
  if (grad == Format::kFp32) return visit(AdamWFormats<kMaster, Param, Moment, Fp32>{});
  if (grad == Format::kFp16) return visit(AdamWFormats<kMaster, Param, Moment, Fp16>{});
  return visit(AdamWFormats<kMaster, Param, Moment, Bf16>{});
}

template <bool kMaster, typename Param, typename Visitor>
auto visit_moment(Format moment, Format grad, const Visitor& visit) {
  if (moment == Format::kFp32) return visit_grad<kMaster, Param, Fp32>(grad, visit);
  return visit_grad<kMaster, Param, Bf16>(grad, visit);
}

template <typename Visitor>
auto visit_formats(bool master, Format param, Format moment, Format grad, const Visitor& visit) {
  if (!master && param == Format::kFp32) return visit_moment<false, Fp32>(moment, grad, visit);
  if (!master) return visit_moment<false, Bf16>(moment, grad, visit);
  if (param == Format::kFp32) return visit_moment<true, Fp32>(moment, grad, visit);
  if (param == Format::kFp16) return visit_moment<true, Fp16>(moment, grad, visit);
  return visit_moment<true, Bf16>(moment, grad, visit);
}

}  // namespace grass
