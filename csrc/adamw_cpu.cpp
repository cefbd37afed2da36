// grass::adamw_ on the CPU: one pass over the shard on all threads, vectorised for the machine it runs on.
//
// Overrides the PyTorch kernel of ds_grass/ops/adamw.py (the specification) for CPU tensors. Shards need no alignment
// beyond their element's, and may hold more than 2^31 elements.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>

#include "adamw_call.h"
#include "cpu_targets.h"

namespace grass {
namespace {

constexpr int64_t kGrain = 16384;  // elements below which a second thread costs more than it saves

// Elements [begin, end) of the shard, all on one page.
template <bool kL2, typename Formats>
GRASS_INLINE void update_loop(const AdamWShard& shard, const AdamWStep& step, int64_t begin, int64_t end) {
  const AdamWStep s = step;  // a local copy cannot be what the loop's stores overwrite
  auto* __restrict__ param = static_cast<typename Formats::Param::Stored*>(shard.param) + begin;
  auto* __restrict__ master = Formats::kMaster ? shard.master + begin : nullptr;
  auto* __restrict__ exp_avg = static_cast<typename Formats::Moment::Stored*>(shard.exp_avg) + begin;
  auto* __restrict__ exp_avg_sq = static_cast<typename Formats::Moment::Stored*>(shard.exp_avg_sq) + begin;
  const auto* __restrict__ grad = static_cast<const typename Formats::Grad::Stored*>(shard.grad) + begin;
  const uint64_t first = static_cast<uint64_t>(shard.offset + begin);
  const uint32_t key = random_key(shard.seed, shard.step, first / kPage);
  const uint32_t first_in_page = static_cast<uint32_t>(first);

#pragma GCC ivdep
  for (int64_t i = 0; i < end - begin; ++i) {
    float no_master;
    adamw_update_stored<kL2, Formats>(param[i], Formats::kMaster ? master[i] : no_master, exp_avg[i], exp_avg_sq[i],
                                      grad[i], first_in_page + static_cast<uint32_t>(i), key, s);
  }
}

template <typename Formats>
GRASS_INLINE void update_range(const AdamWShard& shard, const AdamWStep& step, int64_t begin, int64_t end) {
  if (step.uses_l2) {
    update_loop<true, Formats>(shard, step, begin, end);
  } else {
    update_loop<false, Formats>(shard, step, begin, end);
  }
}

template <typename Formats>
GRASS_TARGET_AVX512 void update_avx512(const AdamWShard& shard, const AdamWStep& s, int64_t begin, int64_t end) {
  update_range<Formats>(shard, s, begin, end);
}

template <typename Formats>
GRASS_TARGET_AVX2 void update_avx2(const AdamWShard& shard, const AdamWStep& s, int64_t begin, int64_t end) {
  update_range<Formats>(shard, s, begin, end);
}

template <typename Formats>
void update_baseline(const AdamWShard& shard, const AdamWStep& s, int64_t begin, int64_t end) {
  update_range<Formats>(shard, s, begin, end);
}

void adamw_cpu(const at::Tensor& param, const std::optional<at::Tensor>& master, const at::Tensor& exp_avg,
               const at::Tensor& exp_avg_sq, const at::Tensor& grad, const at::Tensor& inv_scale, double lr,
               double beta1, double beta2, double eps, double weight_decay, int64_t step, bool decoupled, bool maximize,
               int64_t seed, int64_t offset) {
  const AdamWCall call(param, master, exp_avg, exp_avg_sq, grad, inv_scale, lr, beta1, beta2, eps, weight_decay, step,
                       decoupled, maximize, seed, offset);
  AdamWStep scaled = call.step;
  scaled.grad_scale *= *call.inv_scale;
  const auto update = visit_formats(master.has_value(), call.param, call.moment, call.grad, [](auto formats) {
    using Formats = decltype(formats);
    return choose_target(&update_avx512<Formats>, &update_avx2<Formats>, &update_baseline<Formats>);
  });
  at::parallel_for(0, call.numel, kGrain, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t stop = std::min(end, begin + kPage - (offset + begin) % kPage);
      update(call.shard, scaled, begin, stop);
      begin = stop;
    }
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(grass, CPU, m) { m.impl("adamw_", &adamw_cpu); }

}  // namespace grass
