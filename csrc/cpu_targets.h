// One function compiled for several instruction sets, and the choice among them where the program runs.
//
// None of the targets contracts a multiply and an add, so the choice changes no bit.
#pragma once

#include <ATen/Version.h>

#include <string>

#if defined(__x86_64__) && defined(__GNUC__)
#define GRASS_TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")))
#define GRASS_TARGET_AVX2 __attribute__((target("avx2")))
#else
#define GRASS_TARGET_AVX512
#define GRASS_TARGET_AVX2
#endif

namespace grass {

// PyTorch's own choice, so that ATEN_CPU_CAPABILITY holds for these kernels too.
template <typename Function>
Function choose_target(Function avx512, Function avx2, Function baseline) {
#if defined(__x86_64__) && defined(__GNUC__)
  static const std::string capability = at::get_cpu_capability();
  if (capability == "AVX512") return avx512;
  if (capability == "AVX2") return avx2;
#endif
  return baseline;
}

}  // namespace grass
