// What the benchmarks of NVRAR share: inputs whose sums are known exactly, and error checks.
#pragma once

#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>

#include "numeric.h"

#define CHECK(call)                                                                                     \
    do {                                                                                                \
        const cudaError_t status_ = (call);                                                             \
        if (status_ != cudaSuccess) {                                                                   \
            std::printf("%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(status_));      \
            std::exit(1);                                                                               \
        }                                                                                               \
    } while (0)

namespace bench {

// -8 to 8: sums of up to 30 ranks are exact in every type, so every bit of a result is known.
__device__ inline int integer_of(uint32_t call, uint32_t rank, uint64_t i) {
    uint64_t z = (static_cast<uint64_t>(call) << 40 ^ static_cast<uint64_t>(rank) << 32 ^ i) * 0x9E3779B97F4A7C15ull;
    z = (z ^ z >> 31) * 0xBF58476D1CE4E5B9ull;
    return static_cast<int>((z >> 33) % 17u) - 8;
}

template <class E>
__device__ typename E::Bits bits_of_value(float value) {
    float v[E::kPerPack] = {};
    v[0] = value;
    nvrar::Pack p;
    E::narrow(v, p);
    return static_cast<typename E::Bits>(p.w[0]);
}

// Inputs of a norm, small enough that squares of a row sum exactly in any order: rank -1 is the residual.
__device__ inline float small_of(uint32_t call, int rank, uint64_t i) {
    return static_cast<float>(integer_of(call, static_cast<uint32_t>(rank + 1), i) / 4);
}

template <class E>
__device__ float float_of_bits(typename E::Bits bits) {
    nvrar::Pack p{};
    p.w[0] = bits;
    float v[E::kPerPack];
    E::widen(p, v);
    return v[0];
}

template <class E>
__device__ typename E::Bits weight_of(uint64_t column) {
    return bits_of_value<E>(1.0f + static_cast<float>(column % 7) / 8);
}

// What residual and out of a row must be, bit for bit. All threads of a block; *squares is shared memory that holds 0.
template <class E>
__device__ void check_row(const typename E::Bits* residual, const typename E::Bits* out, uint64_t row, uint64_t hidden,
                          int ranks, float eps, uint32_t call, float* squares, unsigned long long* wrong) {
    for (int turn = 0; turn < 2; ++turn) {
        for (uint64_t c = threadIdx.x; c < hidden; c += blockDim.x) {
            const uint64_t i = row * hidden + c;
            float sum = 0;
            for (int r = -1; r < ranks; ++r) sum += small_of(call, r, i);
            if (turn == 0) {
                atomicAdd(squares, sum * sum);  // integers: exact in any order
                continue;
            }
            const float factor = rsqrtf(*squares / static_cast<float>(hidden) + eps);
            const float scaled = float_of_bits<E>(bits_of_value<E>(sum * factor));
            const auto want = bits_of_value<E>(scaled * float_of_bits<E>(weight_of<E>(c)));
            if (residual[i] != bits_of_value<E>(sum) || out[i] != want) atomicAdd(wrong, 1ull);
        }
        __syncthreads();
    }
}

}  // namespace bench
