// The only place where the compiler matters: g++, clang and nvcc see the same protocol.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#define NVRAR_PURE __host__ __device__ __forceinline__  // arithmetic that both sides need
#define NVRAR_FN __device__ __forceinline__             // what touches a transport
#else
#define NVRAR_PURE inline
#define NVRAR_FN inline
#endif

#if defined(__CUDA_ARCH__) || defined(__clang__)
#define NVRAR_UNROLL _Pragma("unroll")
#elif defined(__CUDACC__)
#define NVRAR_UNROLL  // nvcc's host pass knows neither spelling
#else
#define NVRAR_UNROLL _Pragma("GCC unroll 8")
#endif

#if defined(__CUDA_ARCH__)
#define NVRAR_ON_GPU 1
#else
#define NVRAR_ON_GPU 0
#endif
