// Transport to ranks of other nodes through NVSHMEM puts; ranks of the own node are mapped, as in direct.cuh.
//
// What a block sends to one rank in one phase is staged in symmetric memory, at the same place as in the receiver's slab, and
// posted as one put: few and large, as proxies want them. Nothing waits for their completion (docs/nvrar.md, "Transport").
//
// With signals no write of the network needs to be whole: each put also sets a word of its slot to the epoch, after its
// data, and a cell counts when that word says the same as its flag.
#pragma once

#include <nvshmem.h>
#include <nvshmemx.h>

#include "direct.cuh"

namespace nvrar {

struct Relay {
    Line* staged = nullptr;           // symmetric, as large as the cells of the slab; null: no relay
    uint64_t signals_at = 0;          // lines from the start of a slab to its signals, a word per slot; 0: whole cells
    uint32_t slot_lines = 0;          // of one slot; all lines of a slab are fewer than 2^32
    uint32_t* poison_word = nullptr;  // symmetric
    int local = 0, node = 0;
};

class RelayTransport : public DirectTransport {
public:
    static constexpr bool kPosts = true;

    __device__ RelayTransport(const Relay& relay, const DirectPeers& peers, int rank, uint32_t* epochs, const uint32_t* poison,
                              HostWords* host, uint32_t parts = 1)
        : DirectTransport(peers, rank, epochs, poison, host, parts), relay_(relay), peers_of_(peers) {}

    __device__ void put(int rank, uint64_t line, const Line& l) {
        epoch_ = l.flag0;
        if (near(rank)) {
            DirectTransport::put(rank, line, l);
        } else {
            store(relay_.staged + line, l);
        }
    }
    // After a fence of every thread and a barrier of the block. Thread 0 has put the first pack, so it knows the epoch.
    __device__ void commit(int rank, uint64_t line, uint64_t lines) {
        if (lines == 0) return;
        if (near(rank)) {
            if (signals() && thread() == 0)
                asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(signal(peers_of_.slab[rank], line)),
                             "l"(static_cast<uint64_t>(epoch_))
                             : "memory");
        } else if (signals()) {
            nvshmemx_putmem_signal_nbi_block(own_ + line, relay_.staged + line, lines * sizeof(Line), signal(own_, line),
                                             relay_.staged[line].flag0, NVSHMEM_SIGNAL_SET, rank);
        } else {
            nvshmemx_putmem_nbi_block(own_ + line, relay_.staged + line, lines * sizeof(Line), rank);
        }
    }
    __device__ Line load(uint64_t line) const {
        if (!signals()) return DirectTransport::load(line);
        uint64_t epoch;
        asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(epoch) : "l"(signal(own_, line)) : "memory");
        Line l = DirectTransport::load(line);
        if (l.flag0 != epoch) l.flag0 = 0;  // no epoch (I1)
        if (l.flag1 != epoch) l.flag1 = 0;
        return l;
    }
    __device__ void clear(uint64_t line) {
        DirectTransport::clear(line);
        if (signals()) *signal(own_, line) = 0;
    }
    __device__ void poison(int rank) {
        if (peers_of_.poison[rank] != nullptr) {
            DirectTransport::poison(rank);
        } else {
            nvshmem_uint32_p(relay_.poison_word, 1u, rank);
        }
    }

private:
    __device__ bool near(int rank) const { return rank / relay_.local == relay_.node; }
    __device__ bool signals() const { return relay_.signals_at != 0; }
    __device__ uint64_t* signal(Line* slab, uint64_t line) const {
        return reinterpret_cast<uint64_t*>(slab + relay_.signals_at) + static_cast<uint32_t>(line) / relay_.slot_lines;
    }

    const Relay& relay_;
    const DirectPeers& peers_of_;
    uint32_t epoch_ = 0;
};

}  // namespace nvrar
