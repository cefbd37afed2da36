// What a host compiler and nvcc spell differently.
#pragma once

// Inlined wherever it is called, so that a caller compiled for a wider instruction set vectorises it.
#ifdef __CUDACC__
#define GRASS_INLINE __host__ __device__ __forceinline__
#else
#define GRASS_INLINE inline __attribute__((always_inline))
#endif
