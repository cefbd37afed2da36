// A call of grass::adamw_: its arguments checked and taken apart, the same for the CPU and for CUDA.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

#include "adamw.h"

namespace grass {

struct AdamWCall {
  AdamWShard shard;
  AdamWStep step;
  const float* inv_scale;
  int64_t numel;
  Format param, moment, grad;

  // Throws c10::Error with the texts of `_check` in ds_grass/ops/adamw.py: the dispatcher calls kernels without it.
  AdamWCall(const at::Tensor& param, const std::optional<at::Tensor>& master, const at::Tensor& exp_avg,
            const at::Tensor& exp_avg_sq, const at::Tensor& grad, const at::Tensor& inv_scale, double lr, double beta1,
            double beta2, double eps, double weight_decay, int64_t step, bool decoupled, bool maximize, int64_t seed,
            int64_t offset);
};

}  // namespace grass
