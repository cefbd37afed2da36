// Checks of the smaller ops, text for text those of their fakes in ds_grass/ops, and a tensor's format.
#pragma once

#include <ATen/core/Tensor.h>

#include "formats.h"

namespace grass {

// Of a tensor that is fp32, bf16 or fp16.
inline Format format_of(const at::Tensor& tensor) {
  if (tensor.scalar_type() == at::kFloat) return Format::kFp32;
  return tensor.scalar_type() == at::kHalf ? Format::kFp16 : Format::kBf16;
}

inline void check_squared_norm(const at::Tensor& x) {
  const auto dtype = x.scalar_type();
  TORCH_CHECK(x.dim() == 1 && x.is_contiguous(), "grass::squared_norm: x has ", x.dim(),
              " dimensions or gaps; pass a flat contiguous tensor");
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf, "grass::squared_norm: x is ", dtype,
              "; use float32, bfloat16 or float16");
}

inline void check_transfer_side(const char* name, const at::Tensor& side) {
  TORCH_CHECK(side.scalar_type() == at::kByte, "grass::transfer_: ", name, " is ", side.scalar_type(), "; use uint8");
  TORCH_CHECK(side.dim() == 2 && (side.size(1) <= 1 || side.stride(1) == 1) &&
                  (side.size(0) <= 1 || side.stride(0) >= side.size(1)),
              "grass::transfer_: ", name, " has ", side.dim(),
              " dimensions or rows with gaps; pass rows of neighbouring bytes, one behind the other");
}

inline void check_transfer(const at::Tensor& destination, const at::Tensor& source) {
  check_transfer_side("destination", destination);
  check_transfer_side("source", source);
  TORCH_CHECK(destination.sizes() == source.sizes(), "grass::transfer_: destination is ", destination.size(0), " x ",
              destination.size(1), " bytes but source is ", source.size(0), " x ", source.size(1),
              "; pass two of one shape");
}

}  // namespace grass
