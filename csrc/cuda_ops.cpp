// The ops on CUDA: each checks like its fake, sets the device, and enqueues on the caller's current stream.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "adamw_call.h"
#include "cuda_kernels.h"
#include "tensor_checks.h"

namespace grass {
namespace {

void adamw_cuda(const at::Tensor& param, const std::optional<at::Tensor>& master, const at::Tensor& exp_avg,
                const at::Tensor& exp_avg_sq, const at::Tensor& grad, const at::Tensor& inv_scale, double lr,
                double beta1, double beta2, double eps, double weight_decay, int64_t step, bool decoupled,
                bool maximize, int64_t seed, int64_t offset) {
  const AdamWCall call(param, master, exp_avg, exp_avg_sq, grad, inv_scale, lr, beta1, beta2, eps, weight_decay, step,
                       decoupled, maximize, seed, offset);
  const c10::cuda::CUDAGuard guard(param.device());
  launch_adamw(call.shard, call.step, call.inv_scale, call.numel, call.param, call.moment, call.grad,
               c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

at::Tensor squared_norm_cuda(const at::Tensor& x) {
  check_squared_norm(x);
  const c10::cuda::CUDAGuard guard(x.device());
  const auto options = x.options().dtype(at::kFloat);
  if (x.numel() == 0) return at::zeros({}, options);
  const at::Tensor scratch = at::empty({squared_norm_scratch(x.numel())}, options);
  launch_squared_norm(x.const_data_ptr(), format_of(x), x.numel(), scratch.mutable_data_ptr<float>(),
                      c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return scratch[0].clone();  // a storage of its own: the scratch goes back at once
}

// Rows are gathered and scattered by the copy engine of the device, which needs no kernel for it.
void transfer_cuda(const at::Tensor& destination, const at::Tensor& source) {
  constexpr int64_t kLargestPitch = 0x7fffffff;  // cudaDevAttrMaxPitch of every device so far
  check_transfer(destination, source);
  const int64_t rows = source.size(0), width = source.size(1);
  if (rows == 0 || width == 0) return;
  const c10::cuda::CUDAGuard guard(destination.is_cuda() ? destination.device() : source.device());
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  auto* to = static_cast<char*>(destination.mutable_data_ptr());
  const auto* from = static_cast<const char*>(source.const_data_ptr());
  const int64_t to_pitch = destination.stride(0), from_pitch = source.stride(0);
  if (rows > 1 && to_pitch <= kLargestPitch && from_pitch <= kLargestPitch) {
    C10_CUDA_CHECK(cudaMemcpy2DAsync(to, to_pitch, from, from_pitch, width, rows, cudaMemcpyDefault, stream));
    return;
  }
  for (int64_t row = 0; row < rows; ++row) {
    C10_CUDA_CHECK(
        cudaMemcpyAsync(to + row * to_pitch, from + row * from_pitch, width, cudaMemcpyDefault, stream));
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(grass, CUDA, m) {
  m.impl("adamw_", &adamw_cuda);
  m.impl("squared_norm", &squared_norm_cuda);
  m.impl("transfer_", &transfer_cuda);
}

}  // namespace grass
