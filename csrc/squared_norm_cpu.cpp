// grass::squared_norm on the CPU: segments on all threads, lanes in vector registers.
#include <ATen/Parallel.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <vector>

#include "cpu_targets.h"
#include "squared_norm.h"
#include "tensor_checks.h"

namespace grass {
namespace {

constexpr int64_t kGrainSegments = 8;

template <typename Terms>
GRASS_INLINE float add_segment(const typename Terms::Stored* __restrict__ values, int count) {
  float lanes[kLanes] = {};
  int row = 0;
  for (; row < count / kLanes; ++row) {
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += Terms::term(values[row * kLanes + lane]);
  }
  for (int lane = 0; lane < count % kLanes; ++lane) lanes[lane] += Terms::term(values[row * kLanes + lane]);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

// sums[i] for segments begin <= i < end.
template <typename Terms>
GRASS_INLINE void add_segments(const void* values, int64_t numel, float* sums, int64_t begin, int64_t end) {
  const auto* stored = static_cast<const typename Terms::Stored*>(values);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t left = numel - i * kSegment;
    sums[i] = left >= kSegment ? add_segment<Terms>(stored + i * kSegment, kSegment)
                               : add_segment<Terms>(stored + i * kSegment, static_cast<int>(left));
  }
}

template <typename Terms>
GRASS_TARGET_AVX512 void add_avx512(const void* values, int64_t numel, float* sums, int64_t begin, int64_t end) {
  add_segments<Terms>(values, numel, sums, begin, end);
}

template <typename Terms>
GRASS_TARGET_AVX2 void add_avx2(const void* values, int64_t numel, float* sums, int64_t begin, int64_t end) {
  add_segments<Terms>(values, numel, sums, begin, end);
}

template <typename Terms>
void add_baseline(const void* values, int64_t numel, float* sums, int64_t begin, int64_t end) {
  add_segments<Terms>(values, numel, sums, begin, end);
}

// The sums of all segments of `numel` values.
template <typename Terms>
std::vector<float> level(const void* values, int64_t numel) {
  const auto add = choose_target(&add_avx512<Terms>, &add_avx2<Terms>, &add_baseline<Terms>);
  std::vector<float> sums(num_segments(numel));
  at::parallel_for(0, static_cast<int64_t>(sums.size()), kGrainSegments,
                   [&](int64_t begin, int64_t end) { add(values, numel, sums.data(), begin, end); });
  return sums;
}

at::Tensor squared_norm_cpu(const at::Tensor& x) {
  check_squared_norm(x);
  if (x.numel() == 0) return at::zeros({}, x.options().dtype(at::kFloat));
  auto sums = visit_squares(format_of(x), [&](auto squares) {
    return level<decltype(squares)>(x.const_data_ptr(), x.numel());
  });
  while (sums.size() > 1) sums = level<Sums>(sums.data(), static_cast<int64_t>(sums.size()));
  return at::scalar_tensor(sums[0], x.options().dtype(at::kFloat));
}

}  // namespace

TORCH_LIBRARY_IMPL(grass, CPU, m) { m.impl("squared_norm", &squared_norm_cpu); }

}  // namespace grass
