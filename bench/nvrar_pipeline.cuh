// What NVRAR is compared with where several ranks share a GPU: a hierarchical all-reduce made of separate kernels. NVSHMEM's
// reduce-scatter in the node, a kernel that bumps the epoch, one that packs 8-byte cells, recursive doubling between nodes,
// one that unpacks, NVSHMEM's all-gather. bfloat16, a power of two of nodes, sizes that divide evenly. No deadlines, no
// errors: a baseline, nothing to use.
#pragma once

#include <cuda_bf16.h>
#include <nvshmem.h>
#include <nvshmemx.h>

#include "nvrar_bench.cuh"

namespace bench {

struct PipelineView {
    __nv_bfloat16* shard;     // what the reduce-scatter leaves, and the sum afterwards
    uint64_t* send;           // [steps][cells] {two elements, epoch}
    uint64_t* receive;        // [2 parities][steps][cells]
    const uint32_t* epoch;
    uint64_t cells, capacity;
    int steps, rank, local;
};

__device__ inline uint64_t cell_of(uint32_t data, uint32_t epoch) { return data | static_cast<uint64_t>(epoch) << 32; }

__global__ void pipeline_bump(uint32_t* epoch) { *epoch += 1; }

__global__ void pipeline_pack(PipelineView v) {
    const auto* words = reinterpret_cast<const uint32_t*>(v.shard);
    for (uint64_t i = blockIdx.x * static_cast<uint64_t>(blockDim.x) + threadIdx.x; i < v.cells;
         i += static_cast<uint64_t>(gridDim.x) * blockDim.x)
        v.send[i] = cell_of(words[i], *v.epoch);
}

__global__ void pipeline_doubling(PipelineView v) {
    const uint32_t epoch = *v.epoch;
    const uint64_t each = (v.cells + gridDim.x - 1) / gridDim.x, from = blockIdx.x * each;
    const uint64_t to = from + each < v.cells ? from + each : v.cells;
    if (from >= to) return;
    for (int step = 0; step < v.steps; ++step) {
        const int peer = ((v.rank / v.local) ^ (1 << step)) * v.local + v.rank % v.local;
        uint64_t* const send = v.send + static_cast<uint64_t>(step) * v.capacity;
        uint64_t* const receive = v.receive + (static_cast<uint64_t>(epoch & 1u) * static_cast<uint64_t>(v.steps) +
                                               static_cast<uint64_t>(step)) * v.capacity;
        nvshmemx_putmem_nbi_block(receive + from, send + from, (to - from) * 8, peer);
        for (uint64_t i = from + threadIdx.x; i < to; i += blockDim.x) {
            uint64_t cell = 0;
            do {
                cell = *reinterpret_cast<volatile uint64_t*>(receive + i);
            } while (static_cast<uint32_t>(cell >> 32) != epoch);
            const uint32_t theirs = static_cast<uint32_t>(cell), ours = static_cast<uint32_t>(send[i]);
            const auto a = *reinterpret_cast<const __nv_bfloat162*>(&theirs);
            const auto b = *reinterpret_cast<const __nv_bfloat162*>(&ours);
            const float2 x = __bfloat1622float2(a), y = __bfloat1622float2(b);
            const __nv_bfloat162 sum = __floats2bfloat162_rn(x.x + y.x, x.y + y.y);
            send[v.capacity + i] = cell_of(*reinterpret_cast<const uint32_t*>(&sum), epoch);  // of the next step, or the result
        }
        __syncthreads();
    }
}

__global__ void pipeline_unpack(PipelineView v) {
    auto* words = reinterpret_cast<uint32_t*>(v.shard);
    const uint64_t* const result = v.send + static_cast<uint64_t>(v.steps) * v.capacity;
    for (uint64_t i = blockIdx.x * static_cast<uint64_t>(blockDim.x) + threadIdx.x; i < v.cells;
         i += static_cast<uint64_t>(gridDim.x) * blockDim.x)
        words[i] = static_cast<uint32_t>(result[i]);
}

// NVSHMEM is up already. `data` and `result` are symmetric.
struct Pipeline {
    nvshmem_team_t node = NVSHMEM_TEAM_INVALID;
    PipelineView v{};
    uint32_t* epoch = nullptr;
    __nv_bfloat16* data = nullptr;
    __nv_bfloat16* result = nullptr;

    Pipeline(int nodes, int local, int rank, uint64_t most_elements) {
        nvshmem_team_t other = NVSHMEM_TEAM_INVALID;
        if (nvshmem_team_split_2d(NVSHMEM_TEAM_WORLD, local, nullptr, 0, &node, nullptr, 0, &other) != 0) {
            std::printf("no team\n");
            std::_Exit(1);
        }
        v.rank = rank;
        v.local = local;
        while (1 << (v.steps + 1) <= nodes) ++v.steps;
        v.capacity = most_elements / static_cast<uint64_t>(local) / 2;
        data = static_cast<__nv_bfloat16*>(nvshmem_malloc(most_elements * 2));
        result = static_cast<__nv_bfloat16*>(nvshmem_malloc(most_elements * 2));
        v.shard = static_cast<__nv_bfloat16*>(nvshmem_malloc(most_elements * 2 / static_cast<uint64_t>(local)));
        const uint64_t steps = static_cast<uint64_t>(v.steps);
        v.send = static_cast<uint64_t*>(nvshmem_malloc((steps + 1) * v.capacity * 8));
        v.receive = static_cast<uint64_t*>(nvshmem_malloc(2 * (steps + 1) * v.capacity * 8));
        CHECK(cudaMalloc(&epoch, 4));
        CHECK(cudaMemset(epoch, 0, 4));
        CHECK(cudaMemset(v.receive, 0, 2 * (steps + 1) * v.capacity * 8));
        CHECK(cudaDeviceSynchronize());
        v.epoch = epoch;
        nvshmem_barrier_all();
    }

    // data -> result
    void run(uint64_t count, uint32_t blocks, cudaStream_t stream) {
        const uint64_t part = count / static_cast<uint64_t>(v.local);
        v.cells = part / 2;
        nvshmemx_bfloat16_sum_reducescatter_on_stream(node, v.shard, data, part, stream);
        pipeline_bump<<<1, 1, 0, stream>>>(epoch);
        pipeline_pack<<<blocks, 512, 0, stream>>>(v);
        pipeline_doubling<<<blocks, 512, 0, stream>>>(v);
        pipeline_unpack<<<blocks, 512, 0, stream>>>(v);
        nvshmemx_bfloat16_fcollect_on_stream(node, result, v.shard, part, stream);
    }
};

}  // namespace bench
