// grass::adamw_ on CUDA: one pass, each thread a few neighbouring elements, nothing but registers in between.
//
// The maths is that of adamw.h; compiled with --fmad=false it gives the bits of the CPU. The kernel is bound by memory:
// every tensor is read once and written once. Where shards lie aligned, and states always do, fp32 tensors are accessed
// by 16 bytes a thread; without any fp32 tensor bf16 ones are.
#include <algorithm>
#include <type_traits>

#include "cuda_kernels.h"

namespace grass {
namespace {

constexpr int kThreads = 256;

// kCount stored elements that move in accesses of up to 16 bytes.
template <typename Stored, int kCount>
struct alignas(sizeof(Stored) * kCount < 16 ? sizeof(Stored) * kCount : 16) Pack {
  Stored at[kCount];
};

template <typename Stored, int kCount>
__device__ __forceinline__ Pack<Stored, kCount> load_pack(const void* tensor, int64_t begin) {
  return *reinterpret_cast<const Pack<Stored, kCount>*>(static_cast<const Stored*>(tensor) + begin);
}

template <typename Stored, int kCount>
__device__ __forceinline__ void store_pack(void* tensor, int64_t begin, const Pack<Stored, kCount>& pack) {
  *reinterpret_cast<Pack<Stored, kCount>*>(static_cast<Stored*>(tensor) + begin) = pack;
}

// kCount elements from `begin`, all of them within the shard.
template <typename Formats, int kCount>
__device__ __forceinline__ void update_pack(const AdamWShard& shard, const AdamWStep& s, int64_t begin, uint32_t first,
                                            uint32_t key) {
  using Param = typename Formats::Param::Stored;
  using Moment = typename Formats::Moment::Stored;
  using Grad = typename Formats::Grad::Stored;
  Pack<Param, kCount> param;
  Pack<float, kCount> master;
  if constexpr (Formats::kMaster) {
    master = load_pack<float, kCount>(shard.master, begin);
  } else {
    param = load_pack<Param, kCount>(shard.param, begin);
  }
  auto exp_avg = load_pack<Moment, kCount>(shard.exp_avg, begin);
  auto exp_avg_sq = load_pack<Moment, kCount>(shard.exp_avg_sq, begin);
  const auto grad = load_pack<Grad, kCount>(shard.grad, begin);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const uint32_t index = first + static_cast<uint32_t>(begin) + i;
    if (s.uses_l2) {
      adamw_update_stored<true, Formats>(param.at[i], master.at[i], exp_avg.at[i], exp_avg_sq.at[i], grad.at[i], index,
                                         key, s);
    } else {
      adamw_update_stored<false, Formats>(param.at[i], master.at[i], exp_avg.at[i], exp_avg_sq.at[i], grad.at[i],
                                          index, key, s);
    }
  }
  if constexpr (Formats::kMaster) store_pack(shard.master, begin, master);
  store_pack(shard.exp_avg, begin, exp_avg);
  store_pack(shard.exp_avg_sq, begin, exp_avg_sq);
  store_pack(shard.param, begin, param);
}

// `first` is the place on its page of the shard's first element.
template <typename Formats, int kCount>
__global__ void __launch_bounds__(kThreads)
    adamw_kernel(AdamWShard shard, AdamWStep step, const float* inv_scale, int64_t numel, uint32_t first,
                 uint32_t key) {
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kCount;
  step.grad_scale *= *inv_scale;
  if (begin + kCount <= numel) {
    update_pack<Formats, kCount>(shard, step, begin, first, key);
    return;
  }
  for (int64_t i = begin; i < numel; ++i) update_pack<Formats, 1>(shard, step, i, first, key);
}

template <typename Formats, int kCount>
void launch(const AdamWShard& shard, const AdamWStep& step, const float* inv_scale, int64_t numel, uint32_t first,
            uint32_t key, cudaStream_t stream) {
  constexpr int64_t kPerBlock = int64_t{kThreads} * kCount;
  const auto blocks = static_cast<unsigned>((numel + kPerBlock - 1) / kPerBlock);  // a page needs 2^24 at most
  adamw_kernel<Formats, kCount><<<blocks, kThreads, 0, stream>>>(shard, step, inv_scale, numel, first, key);
}

template <typename Formats>
constexpr int pack_count() {
  constexpr bool kWide = Formats::kMaster || std::is_same_v<typename Formats::Param, Fp32> ||
                         std::is_same_v<typename Formats::Moment, Fp32> ||
                         std::is_same_v<typename Formats::Grad, Fp32>;
  return kWide ? 4 : 8;
}

template <typename Format, int kCount>
bool is_aligned(const void* tensor) {
  return reinterpret_cast<uintptr_t>(tensor) % alignof(Pack<typename Format::Stored, kCount>) == 0;
}

template <typename Formats, int kCount>
bool all_aligned(const AdamWShard& shard) {
  using Param = typename Formats::Param;
  using Moment = typename Formats::Moment;
  return is_aligned<Param, kCount>(shard.param) && is_aligned<Fp32, kCount>(shard.master) &&
         is_aligned<Moment, kCount>(shard.exp_avg) && is_aligned<Moment, kCount>(shard.exp_avg_sq) &&
         is_aligned<typename Formats::Grad, kCount>(shard.grad);
}

// The shard from its element `start` on.
template <typename Formats>
AdamWShard shifted(AdamWShard shard, int64_t start) {
  using Moment = typename Formats::Moment::Stored;
  shard.param = static_cast<typename Formats::Param::Stored*>(shard.param) + start;
  if (Formats::kMaster) shard.master += start;
  shard.exp_avg = static_cast<Moment*>(shard.exp_avg) + start;
  shard.exp_avg_sq = static_cast<Moment*>(shard.exp_avg_sq) + start;
  shard.grad = static_cast<const typename Formats::Grad::Stored*>(shard.grad) + start;
  shard.offset += start;
  return shard;
}

}  // namespace

void launch_adamw(const AdamWShard& shard, const AdamWStep& step, const float* inv_scale, int64_t numel, Format param,
                  Format moment, Format grad, cudaStream_t stream) {
  visit_formats(shard.master != nullptr, param, moment, grad, [&](auto formats) {
    using Formats = decltype(formats);
    constexpr int kCount = pack_count<Formats>();
    for (int64_t start = 0; start < numel;) {
      const AdamWShard part = shifted<Formats>(shard, start);
      const int64_t count = std::min(numel - start, kPage - part.offset % kPage);
      const uint32_t key = random_key(part.seed, part.step, part.offset / kPage);
      const auto first = static_cast<uint32_t>(part.offset);
      if (all_aligned<Formats, kCount>(part)) {
        launch<Formats, kCount>(part, step, inv_scale, count, first, key, stream);
      } else {
        launch<Formats, 1>(part, step, inv_scale, count, first, key, stream);
      }
      start += count;
    }
  });
}

}  // namespace grass
