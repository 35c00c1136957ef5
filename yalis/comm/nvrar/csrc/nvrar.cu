// NVRAR as a library on CUDA: see nvrar.h for the interface and docs/nvrar.md for the protocol.
//
// NVSHMEM brings the processes together, gives symmetric memory and the addresses of peers in it. The data path needs
// nothing else from it where peers are mapped. Its own collectives are used for nothing but allocation: they have no
// deadline. What they do at init and at the end runs in a thread of its own, which is left behind when it does not
// return in time.
#include "nvrar.h"

#include <cuda_runtime.h>
#include <nvshmem.h>
#include <nvshmemx.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <thread>
#include <vector>

#define NVRAR_WITH_RELAY 1  // needs NVSHMEM on the device
#include "kernels.cuh"

namespace {

using namespace nvrar;

thread_local std::string last_error;

__attribute__((format(printf, 2, 3))) nvrar_status refused(nvrar_status status, const char* format, ...) {
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    last_error = text;
    return status;
}

nvrar_status cuda_failed(cudaError_t status, const char* what) {
    return refused(NVRAR_SYSTEM, "%s: %s", what, cudaGetErrorString(status));
}

#define NVRAR_CUDA(call)                                                     \
    do {                                                                     \
        const cudaError_t status_ = (call);                                  \
        if (status_ != cudaSuccess) return cuda_failed(status_, #call);      \
    } while (0)

constexpr uint64_t kDefaultMaxBytes = 8ull << 20;
constexpr uint64_t kMostBytes = 256ull << 20;  // of a call; far above where NCCL wins
constexpr uint64_t kRoundBytes = 2ull << 20;   // a larger message takes several rounds
constexpr uint32_t kDefaultBlocks = 128;
constexpr uint32_t kMostBlocks = 256;
constexpr int kHelloTurns = 2;
constexpr uint64_t kMostHidden = 16384;
constexpr uint32_t kLeastPart = 32;  // packs of a row per block that shares it

// ---- kernels ------------------------------------------------------------------------------------------------------

const void* kernel_for(uint32_t dtype, bool dense, bool pair, bool norm) {
    if (dtype == NVRAR_BF16) return kernel_of<BF16>(dense, pair, norm);
    if (dtype == NVRAR_F16) return kernel_of<F16>(dense, pair, norm);
    return kernel_of<F32>(dense, pair, norm);
}

const void* relayed_kernel_for(uint32_t dtype, bool norm) {
    if (dtype == NVRAR_BF16)
        return norm ? reinterpret_cast<const void*>(relayed_all_reduce<BF16, true>)
                    : reinterpret_cast<const void*>(relayed_all_reduce<BF16, false>);
    if (dtype == NVRAR_F16)
        return norm ? reinterpret_cast<const void*>(relayed_all_reduce<F16, true>)
                    : reinterpret_cast<const void*>(relayed_all_reduce<F16, false>);
    return norm ? reinterpret_cast<const void*>(relayed_all_reduce<F32, true>)
                : reinterpret_cast<const void*>(relayed_all_reduce<F32, false>);
}

// Blocks of any kernel that are on the GPU at once. It also loads them: a kernel that is loaded at its first launch may
// wait for others to end, and those may wait for it.
cudaError_t kernels_fit(int multiprocessors, uint64_t* blocks) {
    for (uint32_t kind = 0; kind < 30; ++kind) {
        int each = 0;
        const void* const kernel = kind < 24 ? kernel_for(kind / 8, (kind & 1) != 0, (kind & 2) != 0, (kind & 4) != 0)
                                             : relayed_kernel_for((kind - 24) / 2, (kind & 1) != 0);
        const cudaError_t status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, kThreads, 0);
        if (status != cudaSuccess) return status;
        const uint64_t all = static_cast<uint64_t>(each) * static_cast<uint64_t>(multiprocessors);
        if (all < *blocks) *blocks = all;
    }
    return cudaSuccess;
}

struct Attributes {
    cudaLaunchAttribute list[2];
    cudaLaunchConfig_t config{};

    Attributes(uint32_t grid, uint32_t threads, uint32_t parts, bool early, cudaStream_t stream) {
        config.gridDim = dim3(grid);
        config.blockDim = dim3(threads);
        config.stream = stream;
        config.attrs = list;
        if (early) {
            list[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
            list[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
        }
        if (parts > 1) {
            list[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
            list[config.numAttrs].val.clusterDim.x = parts;
            list[config.numAttrs].val.clusterDim.y = list[config.numAttrs].val.clusterDim.z = 1;
            ++config.numAttrs;
        }
    }
    Attributes(const Attributes&) = delete;
    Attributes& operator=(const Attributes&) = delete;
};

// Largest cluster of which enough fit for `blocks` blocks at once. With parts of a GPU (MPS) there may be none.
uint64_t clusters_fit(uint64_t blocks, bool clusters) {
    if (!clusters) return 1;
    for (uint32_t parts = kMostParts; parts > 1; parts /= 2) {
        Attributes a(static_cast<uint32_t>(blocks / parts * parts), kThreads, parts, false, nullptr);
        int clusters = 0;
        const auto status =
            cudaOccupancyMaxActiveClusters(&clusters, kernel_for(NVRAR_BF16, false, false, true), &a.config);
        if (status == cudaSuccess && static_cast<uint64_t>(clusters) * parts >= blocks / parts * parts && blocks >= parts)
            return parts;
        if (status != cudaSuccess) cudaGetLastError();
    }
    return 1;
}

cudaError_t run(Launch& launch, Relay& relay, uint32_t dtype, bool dense, bool norm, uint32_t threads, bool early, cudaStream_t stream) {
    Attributes a(launch.args.grid, threads, launch.args.split.parts, early, stream);
    void* arguments[] = {&launch, &relay};  // the second for the relayed kernels only
    if (relay.staged != nullptr) return cudaLaunchKernelExC(&a.config, relayed_kernel_for(dtype, norm), arguments);
    return cudaLaunchKernelExC(
        &a.config, kernel_for(dtype, dense, is_pair(launch.world, launch.args.algorithm), norm), arguments);
}

// ---- NVSHMEM, once per process ------------------------------------------------------------------------------------

// Runs `work` in a thread and waits at most so long. What the thread needs must outlive this call.
template <class Work>
bool ends_within(uint64_t limit_ns, Work work) {
    struct State {
        std::mutex mutex;
        std::condition_variable changed;
        bool done = false;
    };
    auto state = std::make_shared<State>();
    std::thread thread([state, work] {
        work();
        const std::lock_guard<std::mutex> lock(state->mutex);
        state->done = true;
        state->changed.notify_all();
    });
    std::unique_lock<std::mutex> lock(state->mutex);
    const bool done = state->changed.wait_for(lock, std::chrono::nanoseconds(limit_ns), [&] { return state->done; });
    lock.unlock();
    if (done) {
        thread.join();
    } else {
        thread.detach();
    }
    return done;
}

struct Fabric {
    std::mutex mutex;
    bool up = false, started = false;
    std::atomic<bool> stuck{false};  // a thread is inside of NVSHMEM and does not come back
    int ranks = 0, rank = 0, device = 0;
    const void* anchor = nullptr;  // the first symmetric memory of all
};

Fabric& fabric() {
    static Fabric* one = new Fabric;  // never destroyed: a thread that NVSHMEM keeps may still look at it
    return *one;
}

// At the end of a process NVSHMEM tears down what the thread that it keeps still uses, and hangs. Such a process ends at
// once instead.
void leave_at_once(int status, void*) {
    if (!fabric().stuck) return;
    std::fflush(nullptr);
    _exit(status);
}

int start_nvshmem(int rank, int ranks, const void* id) {
    nvshmemx_uniqueid_t unique = NVSHMEMX_UNIQUEID_INITIALIZER;
    static_assert(sizeof unique == NVRAR_UNIQUE_ID_BYTES, "the size of NVSHMEM's id is part of the interface");
    std::memcpy(&unique, id, sizeof unique);
    nvshmemx_init_attr_t attributes = NVSHMEMX_INIT_ATTR_INITIALIZER;
    if (const int bad = nvshmemx_set_attr_uniqueid_args(rank, ranks, &unique, &attributes)) return bad;
    // Not nvshmemx_init_attr: that ends the process when init fails.
    const nvshmemi_version_t version = {NVSHMEM_VENDOR_MAJOR_VERSION, NVSHMEM_VENDOR_MINOR_VERSION,
                                        NVSHMEM_VENDOR_PATCH_VERSION};
    int provided = 0;
    return nvshmemi_init_thread(NVSHMEM_THREAD_SERIALIZED, &provided, NVSHMEMX_INIT_WITH_UNIQUEID, &attributes, version);
}

// ---- agreement between ranks at init ------------------------------------------------------------------------------

struct Greeting {
    unsigned long long hash, limit;  // never 0 once sent; limit: most blocks, and the largest cluster << 32
};

// What lies in symmetric memory besides the slab.
struct Lobby {
    Greeting hello[kHelloTurns][kMaxDirectRanks];
    uint32_t poison;
};

// Thread r greets rank r and waits for its greeting; `heard` is pinned. Bounded, unlike NVSHMEM's own barrier: so nothing
// waits for the puts (nvshmem_quiet has no deadline); who waits for the greeting sees whether they came.
__global__ void greet(Lobby* own, Lobby* const* lobbies, int rank, int ranks, int turn, Greeting mine, uint64_t deadline_ns,
                      Greeting* heard) {
    const int peer = static_cast<int>(threadIdx.x);
    if (peer >= ranks) return;
    Lobby* const there = lobbies[peer];
    if (there != nullptr) {
        auto* at = reinterpret_cast<volatile unsigned long long*>(&there->hello[turn][rank]);
        at[0] = mine.hash;
        at[1] = mine.limit;
    } else {
        auto* at = reinterpret_cast<uint64_t*>(&own->hello[turn][rank]);
        nvshmem_uint64_p(at, mine.hash, peer);
        nvshmem_uint64_p(at + 1, mine.limit, peer);
    }
    const auto* from = reinterpret_cast<volatile unsigned long long*>(&own->hello[turn][peer]);
    const uint64_t start = global_ns();
    Greeting got{0, 0};
    do {
        if (got.hash == 0) got.hash = from[0];
        if (got.limit == 0) got.limit = from[1];
    } while ((got.hash == 0 || got.limit == 0) && global_ns() - start < deadline_ns);
    heard[peer] = got;
}

__global__ void poison_all(uint32_t* const* poison, uint32_t* own, int ranks) {
    const int peer = static_cast<int>(threadIdx.x);
    if (peer >= ranks) return;
    if (poison[peer] != nullptr) {
        *reinterpret_cast<volatile uint32_t*>(poison[peer]) = 1u;
    } else {
        nvshmem_uint32_p(own, 1u, peer);
    }
}

uint64_t mixed(uint64_t hash, uint64_t value) {
    hash = (hash ^ value) * 0x9E3779B97F4A7C15ull;
    return hash ^ hash >> 29;
}

uint64_t hash_of(const nvrar_options& o) {
    uint64_t hash = NVRAR_ABI_VERSION;
    for (uint64_t value : {static_cast<uint64_t>(o.nodes), static_cast<uint64_t>(o.local), static_cast<uint64_t>(o.blocks),
                           static_cast<uint64_t>(o.relay), static_cast<uint64_t>(o.whole_cells),
                           static_cast<uint64_t>(o.ordinary_launch), o.max_bytes, o.timeout_ns})
        hash = mixed(hash, value);
    return hash | 1u;
}

nvrar_status refuse_options(const nvrar_options& o) {
    if (o.abi_version != NVRAR_ABI_VERSION)
        return refused(NVRAR_INVALID, "abi_version is %u, this library has %d: rebuild one of them", o.abi_version,
                       NVRAR_ABI_VERSION);
    if (o.nodes < 1 || o.local < 1 || o.nodes > kMaxDirectRanks || o.local > kMaxDirectRanks ||
        o.nodes * o.local > kMaxDirectRanks || o.nodes * o.local < 2)
        return refused(NVRAR_INVALID, "%d nodes x %d ranks: an all-reduce takes 2 to %d ranks", o.nodes, o.local,
                       kMaxDirectRanks);
    if (o.node < 0 || o.node >= o.nodes || o.index < 0 || o.index >= o.local)
        return refused(NVRAR_INVALID, "node %d, index %d lie outside of %d nodes x %d ranks", o.node, o.index, o.nodes,
                       o.local);
    if (o.blocks > kMostBlocks)
        return refused(NVRAR_INVALID, "blocks is %u, the most is %u", o.blocks, kMostBlocks);
    if (o.relay > 1 || o.whole_cells > 1 || o.ordinary_launch > 1)
        return refused(NVRAR_INVALID, "relay %u, whole_cells %u, ordinary_launch %u: each must be 0 or 1", o.relay,
                       o.whole_cells, o.ordinary_launch);
    if (o.max_bytes > kMostBytes)
        return refused(NVRAR_INVALID, "max_bytes is %llu, the most is %llu; larger messages belong to NCCL",
                       static_cast<unsigned long long>(o.max_bytes), static_cast<unsigned long long>(kMostBytes));
    if (o.timeout_ns == 0) return refused(NVRAR_INVALID, "timeout_ns is 0: every wait would end at once");
    return NVRAR_OK;
}

}  // namespace

struct nvrar_comm {
    nvrar_options options{};
    int device = 0;
    int ranks = 0, rank = 0;
    Launch launch{};  // what is the same in every call
    Relay relay{};    // staged is null where every rank is mapped and relay was not asked for
    uint32_t threads = 0;
    uint32_t most_parts = 1;  // blocks that may share a row
    uint32_t mapped = 0;
    uint64_t max_bytes = 0;
    bool early = false;  // programmatic dependent launch
    Lobby* lobby = nullptr;
    Line* slab = nullptr;
    uint64_t slab_bytes = 0;
    std::vector<void*> device_memory, pinned_memory;
    Lobby** lobbies = nullptr;  // device
    Greeting* heard = nullptr;  // pinned
    HostWords* words = nullptr;
    StampRing* stamps = nullptr;  // device; made when first asked for
    cudaStream_t side = nullptr;
    std::atomic<bool> aborted{false};
};

namespace {

volatile uint32_t* seen(uint32_t& word) { return &word; }

bool failed(const nvrar_comm& comm) {
    return comm.aborted.load(std::memory_order_relaxed) || *seen(comm.words->complete) != 0;
}

nvrar_status zeroed(nvrar_comm& comm, void** at, size_t bytes) {
    NVRAR_CUDA(cudaMalloc(at, bytes));
    comm.device_memory.push_back(*at);
    NVRAR_CUDA(cudaMemset(*at, 0, bytes));
    return NVRAR_OK;
}

nvrar_status pinned(nvrar_comm& comm, void** at, size_t bytes) {
    NVRAR_CUDA(cudaHostAlloc(at, bytes, cudaHostAllocMapped));
    comm.pinned_memory.push_back(*at);
    std::memset(*at, 0, bytes);
    return NVRAR_OK;
}

// Every rank must say the same; the smallest limit is kept.
nvrar_status agree(nvrar_comm& comm, int turn, uint64_t hash, uint64_t* limit) {
    for (int r = 0; r < comm.ranks; ++r) comm.heard[r] = Greeting{0, 0};
    greet<<<1, kMaxDirectRanks, 0, comm.side>>>(comm.lobby, comm.lobbies, comm.rank, comm.ranks, turn,
                                                Greeting{hash, *limit}, comm.options.timeout_ns, comm.heard);
    NVRAR_CUDA(cudaGetLastError());
    // The kernel has a deadline; what it calls of NVSHMEM may have none.
    cudaError_t ended = cudaErrorNotReady;
    const auto late = std::chrono::steady_clock::now() + std::chrono::nanoseconds(comm.options.timeout_ns) +
                      std::chrono::seconds(2);
    while ((ended = cudaStreamQuery(comm.side)) == cudaErrorNotReady && std::chrono::steady_clock::now() < late)
        std::this_thread::sleep_for(std::chrono::microseconds(20));
    if (ended == cudaErrorNotReady) {
        fabric().stuck = true;
        return refused(NVRAR_FAILED, "NVSHMEM did not send a greeting within %.1f s",
                       static_cast<double>(comm.options.timeout_ns) * 1e-9);
    }
    NVRAR_CUDA(ended);
    for (int r = 0; r < comm.ranks; ++r) {
        if (comm.heard[r].hash == 0 || comm.heard[r].limit == 0)
            return refused(NVRAR_FAILED, "rank %d did not come to init within %.1f s", r,
                           static_cast<double>(comm.options.timeout_ns) * 1e-9);
        if (comm.heard[r].hash != hash)
            return refused(NVRAR_INVALID, "rank %d called init with other options than rank %d: all but node and index must "
                           "be the same everywhere; or one of them lost a communicator that the other freed, and must "
                           "start its process again", r, comm.rank);
        const uint64_t theirs = comm.heard[r].limit;
        const uint64_t blocks = std::min(*limit & 0xFFFFFFFFu, theirs & 0xFFFFFFFFu);
        *limit = blocks | std::min(*limit >> 32 & 0xFFFFu, theirs >> 32 & 0xFFFFu) << 32 |
                 std::min(*limit >> 48, theirs >> 48) << 48;
    }
    return NVRAR_OK;
}

// NVSHMEM's part of init, each step of which waits for all ranks.
nvrar_status join_fabric(const nvrar_comm& comm, const void* id) {
    Fabric& f = fabric();
    const std::lock_guard<std::mutex> lock(f.mutex);
    if (f.stuck) return refused(NVRAR_FAILED, "an earlier call into NVSHMEM never came back; start the process again");
    if (f.up) {
        if (f.ranks != comm.ranks || f.rank != comm.rank || f.device != comm.device)
            return refused(NVRAR_INVALID, "this process is rank %d of %d on device %d for NVSHMEM, once and for all",
                           f.rank, f.ranks, f.device);
        return NVRAR_OK;
    }
    struct Job {
        unsigned char id[NVRAR_UNIQUE_ID_BYTES];
        int status = -1;
    };
    auto job = std::make_shared<Job>();
    std::memcpy(job->id, id, sizeof job->id);
    const int rank = comm.rank, ranks = comm.ranks, device = comm.device;
    const bool done = ends_within(comm.options.timeout_ns, [job, rank, ranks, device] {
        if (cudaSetDevice(device) == cudaSuccess) job->status = start_nvshmem(rank, ranks, job->id);
    });
    if (!f.started) on_exit(leave_at_once, nullptr);  // before NVSHMEM's own handlers, which were there first
    f.started = true;
    f.stuck = !done;
    if (!done)
        return refused(NVRAR_FAILED, "NVSHMEM did not start within %.1f s: a rank is missing or cannot be reached",
                       static_cast<double>(comm.options.timeout_ns) * 1e-9);
    if (job->status != 0) {
        f.stuck = true;  // half initialised; it cannot be told to start anew
        return refused(NVRAR_SYSTEM, "NVSHMEM did not start, status %d; NVSHMEM_DEBUG=INFO has more", job->status);
    }
    f.up = true;
    f.ranks = ranks;
    f.rank = rank;
    f.device = device;
    return NVRAR_OK;
}

// Symmetric memory, filled with a byte on all ranks when this returns NVRAR_OK on one.
nvrar_status symmetric(const nvrar_comm& comm, void** at, uint64_t bytes) {
    auto memory = std::make_shared<void*>(nullptr);
    const int device = comm.device;
    const bool done = ends_within(comm.options.timeout_ns, [memory, device, bytes] {
        if (cudaSetDevice(device) == cudaSuccess) *memory = nvshmem_malloc(bytes);
    });
    if (!done) {
        fabric().stuck = true;
        return refused(NVRAR_FAILED, "nvshmem_malloc did not return within %.1f s: a rank is missing",
                       static_cast<double>(comm.options.timeout_ns) * 1e-9);
    }
    if (*memory == nullptr)
        return refused(NVRAR_SYSTEM, "no %llu bytes of symmetric memory; lower max_bytes, or raise "
                       "NVSHMEM_SYMMETRIC_SIZE", static_cast<unsigned long long>(bytes));
    *at = *memory;
    return NVRAR_OK;
}

nvrar_status start(nvrar_comm& comm, const nvrar_options& options, const void* id) {
    comm.options = options;
    comm.ranks = options.nodes * options.local;
    comm.rank = options.node * options.local + options.index;
    NVRAR_CUDA(cudaGetDevice(&comm.device));
    int multiprocessors = 0, major = 0;
    NVRAR_CUDA(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, comm.device));
    NVRAR_CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, comm.device));
    comm.early = major >= 9 && options.ordinary_launch == 0;
    const bool clusters = major >= 9;
    if (const nvrar_status bad = join_fabric(comm, id)) return bad;

    // The lobby: agree before anything depends on the options.
    void* memory = nullptr;
    if (const nvrar_status bad = symmetric(comm, &memory, sizeof(Lobby))) return bad;
    comm.lobby = static_cast<Lobby*>(memory);
    if (fabric().anchor == nullptr) fabric().anchor = memory;
    NVRAR_CUDA(cudaMemset(comm.lobby, 0, sizeof(Lobby)));
    NVRAR_CUDA(cudaDeviceSynchronize());
    const int device = comm.device;
    const bool met = ends_within(options.timeout_ns, [device] {
        if (cudaSetDevice(device) == cudaSuccess) nvshmem_barrier_all();
    });
    if (!met) {
        fabric().stuck = true;
        return refused(NVRAR_FAILED, "a rank did not come to init within %.1f s", static_cast<double>(options.timeout_ns) * 1e-9);
    }
    if (const nvrar_status bad = pinned(comm, reinterpret_cast<void**>(&comm.heard), sizeof(Greeting) * kMaxDirectRanks))
        return bad;
    if (const nvrar_status bad = pinned(comm, reinterpret_cast<void**>(&comm.words), sizeof(HostWords))) return bad;
    if (const nvrar_status bad = zeroed(comm, reinterpret_cast<void**>(&comm.lobbies), sizeof(Lobby*) * kMaxDirectRanks))
        return bad;
    NVRAR_CUDA(cudaStreamCreateWithFlags(&comm.side, cudaStreamNonBlocking));
    std::vector<Lobby*> lobbies(kMaxDirectRanks, nullptr);
    for (int r = 0; r < comm.ranks; ++r) {
        lobbies[static_cast<size_t>(r)] = static_cast<Lobby*>(nvshmem_ptr(comm.lobby, r));
        comm.mapped += lobbies[static_cast<size_t>(r)] != nullptr;
    }
    NVRAR_CUDA(cudaMemcpy(comm.lobbies, lobbies.data(), sizeof(Lobby*) * kMaxDirectRanks, cudaMemcpyHostToDevice));

    uint64_t blocks = options.blocks != 0 ? options.blocks : kDefaultBlocks;
    NVRAR_CUDA(kernels_fit(multiprocessors, &blocks));
    // Relayed as soon as one rank must. The least over all ranks of 1 (must not) or 0, shifted so that a limit is not 0.
    uint64_t limits = blocks | clusters_fit(blocks, clusters) << 32;
    const bool must = options.relay != 0 || comm.mapped != static_cast<uint32_t>(comm.ranks);
    limits |= static_cast<uint64_t>(must ? 0 : 1) << 48;
    if (const nvrar_status bad = agree(comm, 0, hash_of(options), &limits)) return bad;
    blocks = limits & 0xFFFFFFFFu;
    const bool relays = limits >> 48 == 0;
    limits &= 0xFFFFFFFFFFFFull;
    comm.most_parts = static_cast<uint32_t>(limits >> 32);
    for (int r = 0; r < comm.ranks; ++r) {
        if (r / options.local == options.node && lobbies[static_cast<size_t>(r)] == nullptr)
            return refused(NVRAR_INVALID, "rank %d of the same node is not mapped here: declare every rank a node", r);
    }

    // The slab.
    comm.max_bytes = options.max_bytes != 0 ? options.max_bytes : kDefaultMaxBytes;
    const uint64_t round = comm.max_bytes < kRoundBytes ? comm.max_bytes : kRoundBytes;
    const uint64_t packs = (round / sizeof(Pack) + blocks - 1) / blocks;
    Launch& launch = comm.launch;
    launch.layout = {static_cast<uint32_t>(blocks), slots_for(options.nodes, options.local),
                     static_cast<uint32_t>((packs / kGroup + 1) * kGroup)};
    launch.world = {options.nodes, options.local, options.node, options.index};
    if (const char* why = refuse(launch.world, launch.layout)) return refused(NVRAR_INVALID, "%s", why);
    const uint64_t cell_bytes = launch.layout.lines() * sizeof(Line);
    // Behind the cells: what the dense format uses, or what is staged for puts.
    comm.slab_bytes = cell_bytes + (relays ? cell_bytes : launch.layout.dense_lines() * sizeof(Line));
    const bool signals = relays && options.whole_cells == 0;
    if (signals) {
        if (launch.layout.lines() >> 32 != 0) return refused(NVRAR_INVALID, "the slab has 2^32 lines or more; lower blocks");
        comm.slab_bytes += 2ull * blocks * launch.layout.slots * sizeof(uint64_t);
    }
    if (const nvrar_status bad = symmetric(comm, &memory, comm.slab_bytes)) return bad;
    comm.slab = static_cast<Line*>(memory);
    NVRAR_CUDA(cudaMemset(comm.slab, 0, cell_bytes));
    NVRAR_CUDA(cudaMemset(reinterpret_cast<char*>(comm.slab) + cell_bytes, relays ? 0 : 0xFF, comm.slab_bytes - cell_bytes));
    if (relays)
        comm.relay = {comm.slab + launch.layout.lines(), signals ? 2 * launch.layout.lines() : 0,
                      2 * launch.layout.slot_packs, &comm.lobby->poison, options.local, options.node};
    NVRAR_CUDA(cudaDeviceSynchronize());

    std::vector<uint32_t*> poison(kMaxDirectRanks, nullptr);
    for (int r = 0; r < comm.ranks; ++r) {
        launch.peers.slab[r] = static_cast<Line*>(nvshmem_ptr(comm.slab, r));
        if (lobbies[static_cast<size_t>(r)] != nullptr) poison[static_cast<size_t>(r)] = &lobbies[static_cast<size_t>(r)]->poison;
    }
    void* table = nullptr;
    if (const nvrar_status bad = zeroed(comm, &table, sizeof(uint32_t*) * kMaxDirectRanks)) return bad;
    NVRAR_CUDA(cudaMemcpy(table, poison.data(), sizeof(uint32_t*) * kMaxDirectRanks, cudaMemcpyHostToDevice));
    launch.peers.poison = static_cast<uint32_t* const*>(table);
    launch.poison = &comm.lobby->poison;
    if (const nvrar_status bad = zeroed(comm, reinterpret_cast<void**>(&launch.epochs), blocks * sizeof(uint32_t))) return bad;
    launch.host = comm.words;
    NVRAR_CUDA(cudaDeviceSynchronize());
    comm.threads = kThreads;
    // Every slab is ready, and at the same place: a rank that kept memory of a communicator which failed, when a peer freed
    // it, would write elsewhere than the peer reads.
    const auto offset = static_cast<uint64_t>(reinterpret_cast<char*>(comm.slab) - static_cast<const char*>(fabric().anchor));
    return agree(comm, 1, mixed(hash_of(options), offset) | 1u, &limits);
}

void free_local(nvrar_comm& comm) {
    if (fabric().stuck) return;  // would wait for a kernel that may never end
    for (void* memory : comm.device_memory) cudaFree(memory);
    for (void* memory : comm.pinned_memory) cudaFreeHost(memory);
    if (comm.side != nullptr) cudaStreamDestroy(comm.side);
}

size_t width_of(uint32_t dtype) { return dtype == NVRAR_F32 ? 4 : 2; }

nvrar_status check_call(const nvrar_comm& comm, const nvrar_plan& plan, uint32_t dtype, uint64_t count) {
    if (dtype > NVRAR_F32) return refused(NVRAR_INVALID, "dtype %u is none of nvrar_dtype", dtype);
    if (plan.algorithm > NVRAR_DIRECT) return refused(NVRAR_INVALID, "algorithm %u is none of nvrar_algorithm", plan.algorithm);
    if (plan.format > NVRAR_DENSE) return refused(NVRAR_INVALID, "format %u is none of nvrar_format", plan.format);
    if (plan.format == NVRAR_DENSE && comm.relay.staged != nullptr)
        return refused(NVRAR_INVALID, "the dense format needs stores between all ranks; use cells");
    if (plan.threads == 0 || plan.threads % 32 != 0 || plan.threads > comm.threads)
        return refused(NVRAR_INVALID, "threads is %u, it must be a multiple of 32 up to %u", plan.threads, comm.threads);
    if (plan.parts > kMostParts || (plan.parts & (plan.parts - 1)) != 0)
        return refused(NVRAR_INVALID, "parts is %u, it must be 0, 1, 2, 4 or 8", plan.parts);
    if (count > comm.max_bytes / width_of(dtype))
        return refused(NVRAR_TOO_LARGE, "%llu elements of %zu bytes exceed the capacity of %llu bytes",
                       static_cast<unsigned long long>(count), width_of(dtype),
                       static_cast<unsigned long long>(comm.max_bytes));
    if (failed(comm))
        return refused(NVRAR_FAILED, "this communicator has failed (nvrar_error says how); finalize it and start a new one");
    return NVRAR_OK;
}

}  // namespace

extern "C" {

nvrar_status nvrar_get_unique_id(void* id) {
    if (id == nullptr) return refused(NVRAR_INVALID, "id is NULL; give %d bytes", NVRAR_UNIQUE_ID_BYTES);
    nvshmemx_uniqueid_t unique = NVSHMEMX_UNIQUEID_INITIALIZER;
    if (const int bad = nvshmemx_get_uniqueid(&unique))
        return refused(NVRAR_SYSTEM, "nvshmemx_get_uniqueid failed with %d; NVSHMEM_DEBUG=INFO has more", bad);
    std::memcpy(id, &unique, sizeof unique);
    return NVRAR_OK;
}

uint64_t nvrar_host_bytes(const nvrar_options*) { return 0; }

nvrar_status nvrar_init(nvrar_comm** comm, const nvrar_options* options, const void* id) {
    if (comm == nullptr || options == nullptr || id == nullptr)
        return refused(NVRAR_INVALID, "comm, options and id must not be NULL");
    *comm = nullptr;
    if (const nvrar_status bad = refuse_options(*options)) return bad;
    auto* made = new (std::nothrow) nvrar_comm;
    if (made == nullptr) return refused(NVRAR_SYSTEM, "out of memory");
    const nvrar_status status = start(*made, *options, id);
    if (status != NVRAR_OK) {
        // Symmetric memory stays: giving it back would wait for ranks that may not be there.
        free_local(*made);
        delete made;
        return status;
    }
    *comm = made;
    return NVRAR_OK;
}

nvrar_status nvrar_query(const nvrar_comm* comm, nvrar_info* info) {
    if (comm == nullptr || info == nullptr) return refused(NVRAR_INVALID, "comm and info must not be NULL");
    *info = {};
    info->ranks = static_cast<uint32_t>(comm->ranks);
    info->rank = static_cast<uint32_t>(comm->rank);
    info->blocks = comm->launch.layout.blocks;
    info->threads = comm->threads;
    info->mapped_peers = comm->mapped;
    info->formats = 1u << NVRAR_CELLS | (comm->relay.staged == nullptr ? 1u << NVRAR_DENSE : 0u);
    info->relay = comm->relay.staged == nullptr ? 0 : comm->relay.signals_at == 0 ? 1 : 2;
    info->parts = comm->most_parts;
    info->max_bytes = comm->max_bytes;
    info->slab_bytes = comm->slab_bytes;
    info->max_hidden = kMostHidden;
    return NVRAR_OK;
}

nvrar_status nvrar_all_reduce(nvrar_comm* comm, const void* in, void* out, uint64_t count, uint32_t dtype,
                              const nvrar_plan* plan, void* stream) {
    if (comm == nullptr || plan == nullptr) return refused(NVRAR_INVALID, "comm and plan must not be NULL");
    if (count == 0) return NVRAR_OK;
    if (const nvrar_status bad = check_call(*comm, *plan, dtype, count)) return bad;
    const uint32_t per_pack = dtype == NVRAR_F32 ? 4 : 8;
    Launch launch = comm->launch;
    launch.args = Args{in, out, count, plan->blocks, static_cast<Algorithm>(plan->algorithm), comm->options.timeout_ns};
    if (const char* why = refuse(launch.layout, launch.args, width_of(dtype))) return refused(NVRAR_INVALID, "%s", why);
    launch.args.split = Split::of((count + per_pack - 1) / per_pack, 1, plan->blocks, 1);
    NVRAR_CUDA(run(launch, comm->relay, dtype, plan->format == NVRAR_DENSE, false, plan->threads, comm->early,
                   static_cast<cudaStream_t>(stream)));
    return NVRAR_OK;
}

nvrar_status nvrar_all_reduce_rmsnorm(nvrar_comm* comm, const void* in, void* residual, const void* weight, void* out,
                                      uint64_t rows, uint64_t hidden, float eps, uint32_t dtype, const nvrar_plan* plan,
                                      void* stream) {
    if (comm == nullptr || plan == nullptr) return refused(NVRAR_INVALID, "comm and plan must not be NULL");
    if (rows == 0) return NVRAR_OK;
    const uint32_t per_pack = dtype == NVRAR_F32 ? 4 : 8;
    if (hidden == 0 || hidden > kMostHidden || hidden % per_pack != 0)
        return refused(NVRAR_INVALID, "hidden is %llu, it must be a multiple of %u up to %llu",
                       static_cast<unsigned long long>(hidden), per_pack, static_cast<unsigned long long>(kMostHidden));
    if (rows > kMostBytes) return refused(NVRAR_TOO_LARGE, "%llu rows", static_cast<unsigned long long>(rows));
    if (const nvrar_status bad = check_call(*comm, *plan, dtype, rows * hidden)) return bad;
    // A function of what all ranks share: several blocks per row as long as there are blocks for all rows.
    const uint32_t row_packs = static_cast<uint32_t>(hidden / per_pack);
    uint32_t parts = plan->parts != 0 ? std::min(plan->parts, comm->most_parts) : comm->most_parts;
    while (parts > 1 && (rows * parts > plan->blocks || row_packs / parts < kLeastPart)) parts /= 2;
    Launch launch = comm->launch;
    Args& args = launch.args;
    const uint32_t grid = parts > 1 ? static_cast<uint32_t>(rows) * parts
                                    : static_cast<uint32_t>(std::min<uint64_t>(rows, plan->blocks));
    args = Args{in, out, rows * hidden, grid, static_cast<Algorithm>(plan->algorithm), comm->options.timeout_ns};
    args.split = Split::of(rows, row_packs, grid, parts);
    args.norm = Norm{residual, weight, row_packs, static_cast<float>(hidden), eps};
    if (plan->blocks == 0 || plan->blocks > launch.layout.blocks)
        return refused(NVRAR_INVALID, "blocks is %u, it must be 1 to %u", plan->blocks, launch.layout.blocks);
    if (const char* why = refuse(launch.layout, args, width_of(dtype))) return refused(NVRAR_INVALID, "%s", why);
    if (const char* why = refuse(args, per_pack)) return refused(NVRAR_INVALID, "%s", why);
    NVRAR_CUDA(run(launch, comm->relay, dtype, plan->format == NVRAR_DENSE, true, plan->threads, comm->early,
                   static_cast<cudaStream_t>(stream)));
    return NVRAR_OK;
}

nvrar_status nvrar_stamps(nvrar_comm* comm, uint32_t on) {
    if (comm == nullptr || on > 1) return refused(NVRAR_INVALID, "comm must not be NULL, on must be 0 or 1");
    if (on == 1 && comm->stamps == nullptr) {
        if (const nvrar_status bad = zeroed(*comm, reinterpret_cast<void**>(&comm->stamps), sizeof(StampRing))) return bad;
        NVRAR_CUDA(cudaDeviceSynchronize());
    }
    comm->launch.stamps = on == 1 ? comm->stamps : nullptr;
    return NVRAR_OK;
}

nvrar_status nvrar_read_stamps(nvrar_comm* comm, nvrar_stamp* stamps, uint32_t most, uint32_t* count) {
    if (comm == nullptr || stamps == nullptr || count == nullptr)
        return refused(NVRAR_INVALID, "comm, stamps and count must not be NULL");
    *count = 0;
    if (comm->stamps == nullptr) return refused(NVRAR_INVALID, "no call has noted its times; turn nvrar_stamps on first");
    StampRing ring;
    NVRAR_CUDA(cudaDeviceSynchronize());  // our kernels have deadlines
    NVRAR_CUDA(cudaMemcpy(&ring, comm->stamps, sizeof ring, cudaMemcpyDeviceToHost));
    const uint64_t kept = std::min<uint64_t>(ring.calls, StampRing::kSlots), given = std::min<uint64_t>(kept, most);
    for (uint64_t i = 0; i < given; ++i) {
        const Stamp& stamp = ring.slots[(ring.calls - given + i) % StampRing::kSlots];
        stamps[i] = {stamp.entered, stamp.arrived, stamp.left};
    }
    *count = static_cast<uint32_t>(given);
    return NVRAR_OK;
}

nvrar_status nvrar_error(const nvrar_comm* comm, nvrar_error_record* record) {
    if (comm == nullptr || record == nullptr) return refused(NVRAR_INVALID, "comm and record must not be NULL");
    *record = {};
    if (!failed(*comm)) return NVRAR_OK;
    if (*seen(comm->words->complete) != 0) {
        std::atomic_thread_fence(std::memory_order_acquire);
        static_assert(sizeof(ErrorRecord) == sizeof(nvrar_error_record), "the record is part of the interface");
        std::memcpy(record, &comm->words->record, sizeof *record);
        return refused(NVRAR_FAILED, "rank %d gave up waiting for rank %d (epoch %u, phase %u, step %d, block %u)",
                       record->rank, record->peer, record->epoch, record->phase, record->step, record->block);
    }
    record->reason = NVRAR_ABORTED;
    record->rank = comm->rank;
    record->step = record->peer = -1;
    return refused(NVRAR_FAILED, "rank %d was told to abort", comm->rank);
}

nvrar_status nvrar_abort(nvrar_comm* comm) {
    if (comm == nullptr) return refused(NVRAR_INVALID, "comm must not be NULL");
    if (comm->aborted.exchange(true)) return NVRAR_OK;
    *seen(comm->words->abort) = 1u;  // whoever spins on this rank sees it
    // Peers may wait for this rank while nothing spins here.
    int before = 0;
    NVRAR_CUDA(cudaGetDevice(&before));
    NVRAR_CUDA(cudaSetDevice(comm->device));
    poison_all<<<1, kMaxDirectRanks, 0, comm->side>>>(comm->launch.peers.poison, &comm->lobby->poison, comm->ranks);
    const cudaError_t launched = cudaGetLastError();
    NVRAR_CUDA(cudaSetDevice(before));
    if (launched != cudaSuccess) return cuda_failed(launched, "poison_all");
    return NVRAR_OK;
}

nvrar_status nvrar_finalize(nvrar_comm* comm) {
    if (comm == nullptr) return NVRAR_OK;
    // A peer that gave up while nothing ran here has left its word in this GPU's memory only.
    uint32_t poison = 1;
    if (!failed(*comm)) {
        NVRAR_CUDA(cudaDeviceSynchronize());  // our kernels have deadlines
        NVRAR_CUDA(cudaMemcpy(&poison, &comm->lobby->poison, sizeof poison, cudaMemcpyDeviceToHost));
    }
    if (failed(*comm) || poison != 0) {
        // A kernel may still be on its way out, and peers may still write here: what they could touch stays.
        delete comm;
        return NVRAR_OK;
    }
    Lobby* const lobby = comm->lobby;
    Line* const slab = comm->slab;
    const int device = comm->device;
    const bool done = ends_within(comm->options.timeout_ns, [lobby, slab, device] {
        if (cudaSetDevice(device) != cudaSuccess) return;
        nvshmem_free(slab);
        nvshmem_free(lobby);
    });
    const double seconds = static_cast<double>(comm->options.timeout_ns) * 1e-9;
    if (done) free_local(*comm);
    delete comm;
    if (done) return NVRAR_OK;
    fabric().stuck = true;
    return refused(NVRAR_FAILED, "a peer did not come to finalize within %.1f s", seconds);
}

const char* nvrar_last_error(void) { return last_error.c_str(); }

}  // extern "C"
