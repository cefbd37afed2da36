// The STREAM triad a = b + scale * c over fp32, the yardstick of memory bandwidth, on PyTorch's threads.
//
// Plain stores first read the lines they write (write-allocate); streaming stores do not.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <immintrin.h>
#include <torch/library.h>

namespace {

void triad(float* __restrict__ a, const float* __restrict__ b, const float* __restrict__ c, float scale, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) a[i] = b[i] + scale * c[i];
}

// `a` is aligned to 64 bytes and n a multiple of 16.
void triad_streaming(float* a, const float* b, const float* c, float scale, int64_t n) {
#if defined(__AVX512F__)
  const __m512 factor = _mm512_set1_ps(scale);
  for (int64_t i = 0; i < n; i += 16) {
    _mm512_stream_ps(a + i, _mm512_fmadd_ps(factor, _mm512_loadu_ps(c + i), _mm512_loadu_ps(b + i)));
  }
#elif defined(__AVX2__)
  const __m256 factor = _mm256_set1_ps(scale);
  for (int64_t i = 0; i < n; i += 8) {
    _mm256_stream_ps(a + i, _mm256_add_ps(_mm256_mul_ps(factor, _mm256_loadu_ps(c + i)), _mm256_loadu_ps(b + i)));
  }
#else
  const __m128 factor = _mm_set1_ps(scale);
  for (int64_t i = 0; i < n; i += 4) {
    _mm_stream_ps(a + i, _mm_add_ps(_mm_mul_ps(factor, _mm_loadu_ps(c + i)), _mm_loadu_ps(b + i)));
  }
#endif
  _mm_sfence();  // the stores are seen by the thread that waits for this one
}

void triad_op(const at::Tensor& a, const at::Tensor& b, const at::Tensor& c, double scale, bool streaming) {
  constexpr int64_t kStep = 4096;
  float* to = a.mutable_data_ptr<float>();
  const float *left = b.const_data_ptr<float>(), *right = c.const_data_ptr<float>();
  TORCH_CHECK(a.numel() % kStep == 0 && reinterpret_cast<uintptr_t>(to) % 64 == 0, "triad: pass aligned multiples");
  at::parallel_for(0, a.numel() / kStep, 4, [&](int64_t begin, int64_t end) {
    const int64_t start = begin * kStep, n = (end - begin) * kStep;
    (streaming ? triad_streaming : triad)(to + start, left + start, right + start, static_cast<float>(scale), n);
  });
}

}  // namespace

TORCH_LIBRARY(grass_bench, m) {
  m.def("triad(Tensor(a!) a, Tensor b, Tensor c, float scale, bool streaming) -> ()");
  m.impl("triad", c10::DispatchKey::CPU, &triad_op);
}
