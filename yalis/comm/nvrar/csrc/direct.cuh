// Transport to peers whose memory this GPU can store to: NVLink-mapped slabs, or virtual ranks of one GPU.
#pragma once

#include "protocol.h"

namespace nvrar {

constexpr int kMaxDirectRanks = 64;

struct DirectPeers {
    Line* slab[kMaxDirectRanks];  // as mapped here, in rank order; kernel parameters: the fast path reads few of them
    uint32_t* const* poison;      // one per rank, in memory of this GPU
};

// Pinned memory of the host, mapped into the GPU. The host reads and writes it while a kernel spins.
struct HostWords {
    uint32_t abort;     // host to device
    uint32_t claimed;   // the first failure owns the record
    uint32_t complete;  // the record may be read
    ErrorRecord record;
};

__device__ __forceinline__ uint64_t global_ns() {
    uint64_t now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    return now;
}

// Time stamps of the last calls. Written by thread 0 of block 0; calls of a slab are ordered, so nothing is atomic.
struct Stamp {
    uint64_t entered, arrived, left;
};
struct StampRing {
    static constexpr uint32_t kSlots = 4096;  // 25 decode steps of 80 layers; 96 KiB
    uint64_t calls;
    Stamp slots[kSlots];
};

// First thing in a kernel: wait until the kernels before this one in the stream are complete, then let the next one
// be set up. docs/nvrar.md, "Programmatic dependent launch".
__device__ __forceinline__ void stream_order() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

constexpr uint32_t kMostParts = 8;  // blocks that share a row; the largest cluster that every GPU takes

// Blocks that share a row are a cluster and meet in each other's shared memory. All threads of all its blocks say
// "here" when they start and wait for that before they write there.
__device__ __forceinline__ void cluster_here() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

class DirectTransport {
public:
    static constexpr uint32_t kPollsPerCheck = 1024;  // about half a millisecond

    __device__ DirectTransport(const DirectPeers& peers, int rank, uint32_t* epochs, const uint32_t* poison, HostWords* host,
                               uint32_t parts = 1)
        : peers_(peers), epochs_(epochs), poison_(poison), host_(host), own_(peers.slab[rank]), parts_(parts) {}

    __device__ uint32_t thread() const { return threadIdx.x; }
    __device__ uint32_t threads() const { return blockDim.x; }
    __device__ bool all(bool vote) { return __syncthreads_and(vote) != 0; }
    __device__ void fence() { __threadfence_system(); }

    // One instruction of 16 bytes, which PTX takes for two accesses of 8: what the cells rely on to be whole.
    __device__ void put(int rank, uint64_t line, const Line& l) { store(peers_.slab[rank] + line, l); }
    __device__ void clear(uint64_t line) { store(own_ + line, Line{0, 0, 0, 0}); }
    __device__ void wipe(uint64_t line) { store(own_ + line, Line{~0u, ~0u, ~0u, ~0u}); }
    __device__ Line load(uint64_t line) const {
        uint64_t low, high;
        asm volatile("ld.relaxed.sys.global.v2.b64 {%0, %1}, [%2];" : "=l"(low), "=l"(high) : "l"(own_ + line));
        return {static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32), static_cast<uint32_t>(high),
                static_cast<uint32_t>(high >> 32)};
    }
    __device__ void commit(int, uint64_t, uint64_t) {}  // a store needs no posting

    __device__ uint32_t epoch(uint32_t block) const { return epochs_[block]; }
    __device__ void set_epoch(uint32_t block, uint32_t epoch) { epochs_[block] = epoch; }

    __device__ uint64_t now_ns() const { return global_ns(); }
    __device__ bool abort_requested() const { return word(&host_->abort) != 0; }
    __device__ bool poisoned() const { return word(poison_) != 0; }
    __device__ void poison(int rank) {
        uint32_t* const word = peers_.poison[rank];
        if (word != nullptr) asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(word), "r"(1u));
    }
    __device__ bool fail(const ErrorRecord& record) {
        if (atomicCAS_system(&host_->claimed, 0u, 1u) != 0u) return false;
        host_->record = record;
        __threadfence_system();
        *reinterpret_cast<volatile uint32_t*>(&host_->complete) = 1u;
        return true;
    }
    __device__ void relax() {}

    // Shared memory, as registers are scarce. Only thread 0 of block 0 uses what these return.
    __device__ void stamp_with(StampRing* ring) {
        ring_ = ring;
        if (!stamps()) return;
        times()[0] = global_ns();
        times()[1] = 0;
    }
    __device__ void arrived() {
        if (stamps() && times()[1] == 0) times()[1] = global_ns();
    }
    __device__ void leave() {
        if (!stamps()) return;
        const uint64_t call = ring_->calls;
        ring_->slots[call % StampRing::kSlots] = {times()[0], times()[1], global_ns()};
        ring_->calls = call + 1;
    }

    // Every thread adds the same numbers in the same order. Two rows in turn use the two halves of the shared memory, so
    // one barrier per row is enough.
    __device__ float sum(float value) {  // docs/nvrar.md, "RMSNorm in the kernel"
        __shared__ float warps[2][32];
        turn_ ^= 1u;
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, distance);
        if (threadIdx.x % 32 == 0) warps[turn_][threadIdx.x / 32] = value;
        __syncthreads();
        float total = warps[turn_][0];
        for (uint32_t w = 1; w < blockDim.x / 32; ++w) total += warps[turn_][w];
        if (parts_ == 1) return total;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
        __shared__ float parts[kMostParts];
        cluster_wait();  // they have all started
        if (threadIdx.x < parts_) {
            uint32_t self, there;
            asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(self));
            const uint32_t mine = static_cast<uint32_t>(__cvta_generic_to_shared(&parts[self]));
            asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(mine), "r"(threadIdx.x));
            asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(there), "f"(total) : "memory");
        }
        __syncwarp();  // .aligned below: the whole warp at once
        cluster_here();
        cluster_wait();
        total = parts[0];
        for (uint32_t p = 1; p < parts_; ++p) total += parts[p];
#endif
        return total;
    }

protected:
    __device__ bool stamps() const { return ring_ != nullptr && threadIdx.x == 0 && blockIdx.x == 0; }
    static __device__ uint64_t* times() {
        __shared__ uint64_t of_call[2];
        return of_call;
    }
    static __device__ void store(Line* at, const Line& l) {
        asm volatile("st.relaxed.sys.global.v2.b64 [%0], {%1, %2};" ::"l"(at),
                     "l"(l.data0 | static_cast<uint64_t>(l.flag0) << 32), "l"(l.data1 | static_cast<uint64_t>(l.flag1) << 32)
                     : "memory");
    }
    static __device__ uint32_t word(const uint32_t* at) {
        uint32_t value;
        asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(at));
        return value;
    }

    const DirectPeers& peers_;
    uint32_t* const epochs_;
    const uint32_t* const poison_;
    HostWords* const host_;
    Line* const own_;
    const uint32_t parts_;
    uint32_t turn_ = 0;
    StampRing* ring_ = nullptr;
};

}  // namespace nvrar
