// grass::adamw_ on the CPU: one pass over the shard on all threads, vectorised for the machine it runs on.
//
// Overrides the PyTorch kernel of ds_grass/ops.py (the specification) for CPU tensors. Shards need no alignment beyond
// their element's, and may hold more than 2^31 elements.
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/Tensor.h>
#include <c10/util/Half.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <string>
#include <type_traits>

#include "adamw.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define GRASS_X86_DISPATCH 1
#endif

namespace grass {
namespace {

constexpr int64_t kPage = int64_t{1} << 32;  // elements that share a random key
constexpr int64_t kGrain = 16384;            // elements below which a second thread costs more than it saves

struct Shard {
  void* param;
  float* master;  // null without master weights
  void* exp_avg;
  void* exp_avg_sq;
  const void* grad;
  int64_t seed, step, offset;
};

// How a dtype lies in memory, and the conversions from and to fp32.
struct Fp32 {
  using Stored = float;
  static GRASS_INLINE float load(float stored) { return stored; }
  static GRASS_INLINE float round(float value) { return value; }
  static GRASS_INLINE float round_stochastic(float value, uint32_t) { return value; }
};

struct Bf16 {
  using Stored = uint16_t;
  static GRASS_INLINE float load(uint16_t stored) { return bf16_to_float(stored); }
  static GRASS_INLINE uint16_t round(float value) { return bf16_round_nearest_even(value); }
  static GRASS_INLINE uint16_t round_stochastic(float value, uint32_t random) {
    return bf16_round_stochastic(value, random);
  }
};

struct Fp16 {
  using Stored = uint16_t;
  static GRASS_INLINE float load(uint16_t stored) { return c10::Half(stored, c10::Half::from_bits()); }
  static GRASS_INLINE uint16_t round(float value) { return c10::Half(value).x; }
};

// Elements [begin, end) of the shard, all on one page.
template <bool kL2, bool kMaster, typename Param, typename Moment, typename Grad>
GRASS_INLINE void update_loop(const Shard& shard, const AdamWStep& step, int64_t begin, int64_t end) {
  const AdamWStep s = step;  // a local copy cannot be what the loop's stores overwrite
  auto* __restrict__ param = static_cast<typename Param::Stored*>(shard.param) + begin;
  auto* __restrict__ master = kMaster ? shard.master + begin : nullptr;
  auto* __restrict__ exp_avg = static_cast<typename Moment::Stored*>(shard.exp_avg) + begin;
  auto* __restrict__ exp_avg_sq = static_cast<typename Moment::Stored*>(shard.exp_avg_sq) + begin;
  const auto* __restrict__ grad = static_cast<const typename Grad::Stored*>(shard.grad) + begin;
  const uint64_t first = static_cast<uint64_t>(shard.offset + begin);
  const uint32_t key = random_key(shard.seed, shard.step, first >> 32);
  const uint32_t first_in_page = static_cast<uint32_t>(first);

#pragma GCC ivdep
  for (int64_t i = 0; i < end - begin; ++i) {
    float weight = kMaster ? master[i] : Param::load(param[i]);
    float m = Moment::load(exp_avg[i]);
    float v = Moment::load(exp_avg_sq[i]);
    adamw_update<kL2>(weight, m, v, Grad::load(grad[i]), s);
    const uint32_t random = hash32((first_in_page + static_cast<uint32_t>(i)) ^ key);  // dead code where unused
    exp_avg[i] = Moment::round(m);
    exp_avg_sq[i] = Moment::round_stochastic(v, random & 0xffffu);
    if constexpr (kMaster) master[i] = weight;
    if constexpr (!kMaster && std::is_same_v<Param, Bf16>) {
      param[i] = bf16_round_stochastic(weight, random >> 16);
    } else {
      param[i] = Param::round(weight);
    }
  }
}

template <bool kMaster, typename Param, typename Moment, typename Grad>
GRASS_INLINE void update_range(const Shard& shard, const AdamWStep& step, int64_t begin, int64_t end) {
  if (step.uses_l2) {
    update_loop<true, kMaster, Param, Moment, Grad>(shard, step, begin, end);
  } else {
    update_loop<false, kMaster, Param, Moment, Grad>(shard, step, begin, end);
  }
}

// The same loop, compiled once for each instruction set. None of them contracts a multiply and an add.
#ifdef GRASS_X86_DISPATCH
template <bool kMaster, typename Param, typename Moment, typename Grad>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"))) void update_range_avx512(
    const Shard& shard, const AdamWStep& s, int64_t begin, int64_t end) {
  update_range<kMaster, Param, Moment, Grad>(shard, s, begin, end);
}

template <bool kMaster, typename Param, typename Moment, typename Grad>
__attribute__((target("avx2"))) void update_range_avx2(
    const Shard& shard, const AdamWStep& s, int64_t begin, int64_t end) {
  update_range<kMaster, Param, Moment, Grad>(shard, s, begin, end);
}
#endif

template <bool kMaster, typename Param, typename Moment, typename Grad>
void update_range_baseline(const Shard& shard, const AdamWStep& s, int64_t begin, int64_t end) {
  update_range<kMaster, Param, Moment, Grad>(shard, s, begin, end);
}

using RangeFunction = void (*)(const Shard&, const AdamWStep&, int64_t, int64_t);

// PyTorch's own choice, so that ATEN_CPU_CAPABILITY holds for this kernel too.
template <bool kMaster, typename Param, typename Moment, typename Grad>
RangeFunction select() {
#ifdef GRASS_X86_DISPATCH
  static const std::string capability = at::get_cpu_capability();
  if (capability == "AVX512") return update_range_avx512<kMaster, Param, Moment, Grad>;
  if (capability == "AVX2") return update_range_avx2<kMaster, Param, Moment, Grad>;
#endif
  return update_range_baseline<kMaster, Param, Moment, Grad>;
}

template <bool kMaster, typename Param, typename Moment>
RangeFunction select_grad(at::ScalarType grad) {
  if (grad == at::kFloat) return select<kMaster, Param, Moment, Fp32>();
  if (grad == at::kHalf) return select<kMaster, Param, Moment, Fp16>();
  return select<kMaster, Param, Moment, Bf16>();
}

template <bool kMaster, typename Param>
RangeFunction select_moment(at::ScalarType moment, at::ScalarType grad) {
  if (moment == at::kFloat) return select_grad<kMaster, Param, Fp32>(grad);
  return select_grad<kMaster, Param, Bf16>(grad);
}

RangeFunction select_function(bool master, at::ScalarType param, at::ScalarType moment, at::ScalarType grad) {
  if (!master && param == at::kFloat) return select_moment<false, Fp32>(moment, grad);
  if (!master) return select_moment<false, Bf16>(moment, grad);
  if (param == at::kFloat) return select_moment<true, Fp32>(moment, grad);
  if (param == at::kHalf) return select_moment<true, Fp16>(moment, grad);
  return select_moment<true, Bf16>(moment, grad);
}

// The checks of `_check` in ds_grass/ops.py, text for text: the dispatcher calls this kernel without it.
void check_tensor(const char* name, const at::Tensor& tensor, const at::Tensor& param, const char* allowed,
                  at::ArrayRef<at::ScalarType> dtypes) {
  TORCH_CHECK(tensor.dim() == 1 && tensor.is_contiguous(), "grass::adamw_: ", name, " has ", tensor.dim(),
              " dimensions or gaps; pass a flat contiguous shard");
  TORCH_CHECK(tensor.numel() == param.numel(), "grass::adamw_: ", name, " has ", tensor.numel(),
              " elements but param has ", param.numel(), "; pass shards of one length");
  TORCH_CHECK(tensor.device() == param.device(), "grass::adamw_: ", name, " is on ", tensor.device(),
              " but param is on ", param.device(), "; pass tensors of one device");
  TORCH_CHECK(std::find(dtypes.begin(), dtypes.end(), tensor.scalar_type()) != dtypes.end(), "grass::adamw_: ", name,
              " is ", tensor.scalar_type(), "; use ", allowed);
}

void check(const at::Tensor& param, const std::optional<at::Tensor>& master, const at::Tensor& exp_avg,
           const at::Tensor& exp_avg_sq, const at::Tensor& grad, const at::Tensor& inv_scale, double beta1,
           double beta2, int64_t step, int64_t offset) {
  const auto any = {at::kFloat, at::kBFloat16, at::kHalf};
  const auto moments = {at::kFloat, at::kBFloat16};
  check_tensor("param", param, param, "float32, bfloat16 or float16", any);
  if (master) check_tensor("master", *master, param, "float32", {at::kFloat});
  TORCH_CHECK(master || param.scalar_type() != at::kHalf,
              "grass::adamw_: param is float16 without master weights; pass a float32 master or bfloat16 weights");
  check_tensor("exp_avg", exp_avg, param, "float32 or bfloat16", moments);
  check_tensor("exp_avg_sq", exp_avg_sq, param, "the dtype of exp_avg", {exp_avg.scalar_type()});
  check_tensor("grad", grad, param, "float32, bfloat16 or float16", any);
  TORCH_CHECK(inv_scale.numel() == 1 && inv_scale.scalar_type() == at::kFloat && inv_scale.device() == param.device(),
              "grass::adamw_: inv_scale must be one float32 value on the device of param");
  TORCH_CHECK(0 <= beta1 && beta1 < 1 && 0 <= beta2 && beta2 < 1, "grass::adamw_: betas are (", beta1, ", ", beta2,
              "); use values of at least 0 and below 1");
  TORCH_CHECK(step >= 1, "grass::adamw_: step is ", step, "; the first step is 1");
  TORCH_CHECK(offset >= 0, "grass::adamw_: offset is ", offset, "; use the index of the shard's first element");
}

void adamw_cpu(const at::Tensor& param, const std::optional<at::Tensor>& master, const at::Tensor& exp_avg,
               const at::Tensor& exp_avg_sq, const at::Tensor& grad, const at::Tensor& inv_scale, double lr,
               double beta1, double beta2, double eps, double weight_decay, int64_t step, bool decoupled, bool maximize,
               int64_t seed, int64_t offset) {
  check(param, master, exp_avg, exp_avg_sq, grad, inv_scale, beta1, beta2, step, offset);
  const Shard shard{param.mutable_data_ptr(),
                    master ? master->mutable_data_ptr<float>() : nullptr,
                    exp_avg.mutable_data_ptr(),
                    exp_avg_sq.mutable_data_ptr(),
                    grad.const_data_ptr(),
                    seed,
                    step,
                    offset};
  const AdamWStep scalars = make_adamw_step(*inv_scale.const_data_ptr<float>(), lr, beta1, beta2, eps, weight_decay,
                                            step, decoupled, maximize);
  const RangeFunction update = select_function(master.has_value(), param.scalar_type(), exp_avg.scalar_type(),
                                               grad.scalar_type());
  at::parallel_for(0, param.numel(), kGrain, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t stop = std::min(end, begin + kPage - (offset + begin) % kPage);
      update(shard, scalars, begin, stop);
      begin = stop;
    }
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(grass, CPU, m) { m.impl("adamw_", &adamw_cpu); }

}  // namespace grass
