// grass::transfer_ between two ranges of host memory: what a CPU that plays the device needs.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cstring>

#include "tensor_checks.h"

namespace grass {
namespace {

constexpr int64_t kGrainBytes = 1 << 20;

void transfer_cpu(const at::Tensor& destination, const at::Tensor& source) {
  check_transfer(destination, source);
  const int64_t width = source.size(1);
  for (int64_t row = 0; row < source.size(0); ++row) {
    auto* to = static_cast<char*>(destination.mutable_data_ptr()) + row * destination.stride(0);
    const auto* from = static_cast<const char*>(source.const_data_ptr()) + row * source.stride(0);
    at::parallel_for(0, width, kGrainBytes, [&](int64_t begin, int64_t end) {
      std::memcpy(to + begin, from + begin, static_cast<size_t>(end - begin));
    });
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(grass, CPU, m) { m.impl("transfer_", &transfer_cpu); }

}  // namespace grass
