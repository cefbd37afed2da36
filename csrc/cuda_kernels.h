// What the .cu files give to cuda_ops.cpp. They know CUDA and the shared headers but not PyTorch, so nvcc is quick.
//
// All launch on `stream` of the current device and return at once; the caller checks the launch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "adamw.h"

namespace grass {

// `inv_scale` is on the device. Launches one kernel for each page of random keys that the shard touches.
void launch_adamw(const AdamWShard& shard, const AdamWStep& step, const float* inv_scale, int64_t numel, Format param,
                  Format moment, Format grad, cudaStream_t stream);

// Number of floats that `launch_squared_norm` writes, its result first.
int64_t squared_norm_scratch(int64_t numel);

// scratch[0] becomes the squared norm of `values`. `numel` is above 0.
void launch_squared_norm(const void* values, Format format, int64_t numel, float* scratch, cudaStream_t stream);

}  // namespace grass
