// grass::squared_norm on CUDA: a warp a segment, one launch a level; 2^31 values need three. Nothing waits for the host.
#include <algorithm>

#include "cuda_kernels.h"
#include "squared_norm.h"

namespace grass {
namespace {

constexpr int kWarp = 32;
constexpr int kWarpsPerBlock = 8;

// sums[i] of segment i, in the order of squared_norm.h. kWide: `values` is aligned for accesses of 16 bytes.
template <typename Terms, bool kWide>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock)
    add_segments(const typename Terms::Stored* values, int64_t numel, float* sums) {
  using Stored = typename Terms::Stored;
  // Neighbouring lanes that a thread holds; it holds kLanes / kWarp = 8, so two groups of four where values are fp32.
  constexpr int kGroup = kWide ? 16 / sizeof(Stored) : 1;
  constexpr int kGroups = kLanes / (kWarp * kGroup);
  struct alignas(kGroup * sizeof(Stored)) Group {
    Stored at[kGroup];
  };
  __shared__ float shared[kWarpsPerBlock][kLanes];
  const int thread = threadIdx.x % kWarp;
  float* lanes = shared[threadIdx.x / kWarp];
  const int64_t segment = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp;
  const int64_t left = numel - segment * kSegment;
  if (left <= 0) return;  // the whole warp: its threads share the segment
  const Stored* from = values + segment * kSegment;

  float held[kGroups][kGroup] = {};
  if (left >= kSegment) {
#pragma unroll 4  // enough loads under way for each thread, and few enough to stay in registers
    for (int row = 0; row < kRows; ++row) {
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        const int at = row * kLanes + (group * kWarp + thread) * kGroup;
        const Group loaded = *reinterpret_cast<const Group*>(from + at);
#pragma unroll
        for (int i = 0; i < kGroup; ++i) held[group][i] += Terms::term(loaded.at[i]);
      }
    }
  } else {
    for (int row = 0; row < kRows; ++row) {
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
          const int at = row * kLanes + (group * kWarp + thread) * kGroup + i;
          if (at < left) held[group][i] += Terms::term(from[at]);
        }
      }
    }
  }
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) lanes[(group * kWarp + thread) * kGroup + i] = held[group][i];
  }
  for (int half = kLanes / 2; half > 0; half /= 2) {
    __syncwarp();  // the lanes that other threads of the warp wrote are seen
    for (int lane = thread; lane < half; lane += kWarp) lanes[lane] += lanes[lane + half];
  }
  if (thread == 0) sums[segment] = lanes[0];  // which this thread folded itself
}

template <typename Terms>
void launch_level(const void* values, int64_t numel, float* sums, cudaStream_t stream) {
  const auto* stored = static_cast<const typename Terms::Stored*>(values);
  const auto blocks = static_cast<unsigned>((num_segments(numel) + kWarpsPerBlock - 1) / kWarpsPerBlock);
  if (reinterpret_cast<uintptr_t>(values) % 16 == 0) {
    add_segments<Terms, true><<<blocks, kWarp * kWarpsPerBlock, 0, stream>>>(stored, numel, sums);
  } else {
    add_segments<Terms, false><<<blocks, kWarp * kWarpsPerBlock, 0, stream>>>(stored, numel, sums);
  }
}

// Floats of one level, a multiple of 16 bytes so that the next one starts aligned.
int64_t level_floats(int64_t numel) { return (num_segments(numel) + 3) / 4 * 4; }

}  // namespace

int64_t squared_norm_scratch(int64_t numel) {
  int64_t floats = 0;
  do {
    floats += level_floats(numel);
    numel = num_segments(numel);
  } while (numel > 1);
  return floats;
}

void launch_squared_norm(const void* values, Format format, int64_t numel, float* scratch, cudaStream_t stream) {
  // The levels lie from the end of the scratch to its beginning, where the last one leaves the result.
  float* sums = scratch + squared_norm_scratch(numel) - level_floats(numel);
  visit_squares(format, [&](auto squares) { launch_level<decltype(squares)>(values, numel, sums, stream); });
  while ((numel = num_segments(numel)) > 1) {
    float* next = sums - level_floats(numel);
    launch_level<Sums>(sums, numel, next, stream);
    sums = next;
  }
}

}  // namespace grass
