// NVRAR through its C interface with several processes, one rank each. Where the nodes divide evenly over the GPUs a node is
// on one GPU, so that what crosses nodes crosses a link; else rank r is on GPU r % GPUs.
//
//   W=<site-packages>/nvidia/nvshmem
//   nvcc -std=c++17 -O3 -rdc=true -arch=sm_90 -I yalis/comm/nvrar/csrc -I $W/include bench/nvrar_peers.cu \
//        yalis/comm/nvrar/csrc/nvrar.cu -L $W/lib -l:libnvshmem_host.so.3 -lnvshmem_device -lcuda -lnvidia-ml \
//        -Xlinker -rpath=$W/lib -o nvrar_peers
//   ./nvrar_peers NxG COMMAND [number]
//
//   verify, replays          random calls; graph replays between other calls
//   latency, norm, nvshmem, pipeline, parts    times, each verified; JSON lines
//   kill, stop, abort, mismatch, stamps        what must end in an error, or be told apart
//
// Before a command: relay- (puts between nodes although they are mapped, with signals), whole- (those in whole cells),
// ordinary- (without programmatic dependent launch). Several ranks on one GPU need MPS (tests/gpu/nvrar/mps.sh); what is
// measured there is emulated.
#include <nvrar.h>
#include <cuda_runtime.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "direct.cuh"
#include "nvrar_bench.cuh"
#include "nvrar_pipeline.cuh"

namespace {

using namespace nvrar;
using Clock = std::chrono::steady_clock;

constexpr int kMostRanks = 16;
constexpr uint64_t kSecond = 1000000000ull;

struct Shared {
    unsigned char id[NVRAR_UNIQUE_ID_BYTES];
    std::atomic<int> arrived, turn;
    std::atomic<int> failed;
    double value[kMostRanks];
};

struct Me {
    Shared* shared;
    int nodes, local, rank;
    bool relay, whole, ordinary;
    int ranks() const { return nodes * local; }
};

[[noreturn]] void die(const Me& me, const char* what) {
    std::printf("rank %d: %s: %s\n", me.rank, what, nvrar_last_error());
    std::fflush(stdout);
    me.shared->failed = 1;
    std::_Exit(1);
}

// All processes; bounded.
void meet(const Me& me) {
    Shared& s = *me.shared;
    const int turn = s.turn.load();
    if (s.arrived.fetch_add(1) + 1 == me.ranks()) {
        s.arrived = 0;
        s.turn = turn + 1;
        return;
    }
    const auto start = Clock::now();
    while (s.turn.load() == turn) {
        if (s.failed.load() != 0 || Clock::now() - start > std::chrono::seconds(60)) std::_Exit(1);
        std::this_thread::yield();
    }
}

double largest(const Me& me, double value) {
    me.shared->value[me.rank] = value;
    meet(me);
    double most = value;
    for (int r = 0; r < me.ranks(); ++r) most = std::max(most, me.shared->value[r]);
    meet(me);
    return most;
}

template <class E>
__global__ void fill(typename E::Bits* in, uint64_t count, uint32_t rank, uint32_t call) {
    for (uint64_t i = blockIdx.x * static_cast<uint64_t>(blockDim.x) + threadIdx.x; i < count;
         i += static_cast<uint64_t>(gridDim.x) * blockDim.x)
        in[i] = bench::bits_of_value<E>(static_cast<float>(bench::integer_of(call, rank, i)));
}

template <class E>
__global__ void check(const typename E::Bits* out, uint64_t count, uint32_t ranks, uint32_t call, unsigned long long* wrong) {
    for (uint64_t i = blockIdx.x * static_cast<uint64_t>(blockDim.x) + threadIdx.x; i < count;
         i += static_cast<uint64_t>(gridDim.x) * blockDim.x) {
        int sum = 0;
        for (uint32_t r = 0; r < ranks; ++r) sum += bench::integer_of(call, r, i);
        if (out[i] != bench::bits_of_value<E>(static_cast<float>(sum))) atomicAdd(wrong, 1ull);
    }
}

template <class E>
__global__ void fill_norm(typename E::Bits* in, typename E::Bits* residual, typename E::Bits* weight, uint64_t count,
                          uint64_t hidden, int rank, uint32_t call) {
    for (uint64_t i = blockIdx.x * static_cast<uint64_t>(blockDim.x) + threadIdx.x; i < count;
         i += static_cast<uint64_t>(gridDim.x) * blockDim.x) {
        in[i] = bench::bits_of_value<E>(bench::small_of(call, rank, i));
        residual[i] = bench::bits_of_value<E>(bench::small_of(call, -1, i));
        if (i < hidden) weight[i] = bench::weight_of<E>(i);
    }
}

template <class E>
__global__ void check_norm(const typename E::Bits* residual, const typename E::Bits* out, uint64_t hidden, int ranks,
                           float eps, uint32_t call, unsigned long long* wrong) {
    __shared__ float squares;
    if (threadIdx.x == 0) squares = 0;
    __syncthreads();
    bench::check_row<E>(residual, out, blockIdx.x, hidden, ranks, eps, call, &squares, wrong);
}

struct Rank {
    Me me;
    nvrar_comm* comm = nullptr;
    nvrar_info info{};
    cudaStream_t stream = nullptr;
    unsigned char* in = nullptr;
    unsigned char* out = nullptr;
    unsigned long long* wrong = nullptr;
    uint64_t bytes = 64ull << 20;  // rotated through by the measurements
    uint32_t call = 0;

    Rank(const Me& place, uint64_t timeout_ns, bool odd_one = false) : me(place) {
        int devices = 0;
        CHECK(cudaGetDeviceCount(&devices));
        CHECK(cudaSetDevice(me.nodes % devices == 0 ? me.rank / me.local % devices : me.rank % devices));
        if (me.rank == 0 && nvrar_get_unique_id(me.shared->id) != NVRAR_OK) die(me, "unique id");
        meet(me);
        nvrar_options options{};
        options.abi_version = NVRAR_ABI_VERSION;
        options.nodes = me.nodes;
        options.local = me.local;
        options.node = me.rank / me.local;
        options.index = me.rank % me.local;
        options.timeout_ns = timeout_ns;
        if (odd_one) options.max_bytes = 1 << 20;
        options.relay = me.relay ? 1 : 0;
        options.whole_cells = me.whole ? 1 : 0;
        options.ordinary_launch = me.ordinary ? 1 : 0;
        const auto start = Clock::now();
        const nvrar_status status = nvrar_init(&comm, &options, me.shared->id);
        const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
        if (status != NVRAR_OK) {
            if (me.rank == 0) std::printf("init after %.2f s: status %d: %s\n", seconds, status, nvrar_last_error());
            return;
        }
        if (nvrar_query(comm, &info) != NVRAR_OK) die(me, "query");
        if (me.rank == 0)
            std::printf("init %.2f s; blocks %u, threads %u, mapped %u, formats %u, relay %u, parts %u, slab %.1f MiB, "
                        "max_hidden %llu\n", seconds, info.blocks, info.threads, info.mapped_peers, info.formats, info.relay,
                        info.parts, static_cast<double>(info.slab_bytes) / 1048576, static_cast<unsigned long long>(info.max_hidden));
        CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
        CHECK(cudaMalloc(&in, bytes));
        CHECK(cudaMalloc(&out, bytes));
        CHECK(cudaMalloc(&wrong, 8));
        CHECK(cudaMemset(in, 0, bytes));
        CHECK(cudaMemset(wrong, 0, 8));
        CHECK(cudaDeviceSynchronize());
    }

    void all_reduce(const void* from, void* to, uint64_t count, uint32_t dtype, const nvrar_plan& plan) {
        if (nvrar_all_reduce(comm, from, to, count, dtype, &plan, stream) != NVRAR_OK) die(me, "all_reduce");
    }

    template <class E>
    void verified(uint64_t count, uint32_t dtype, const nvrar_plan& plan, uint64_t shift, bool in_place) {
        using Bits = typename E::Bits;
        Bits* source = reinterpret_cast<Bits*>(in) + shift;
        Bits* target = in_place ? source : reinterpret_cast<Bits*>(out) + shift;
        ++call;
        fill<E><<<32, 256, 0, stream>>>(source, count, static_cast<uint32_t>(me.rank), call);
        all_reduce(source, target, count, dtype, plan);
        check<E><<<32, 256, 0, stream>>>(target, count, static_cast<uint32_t>(me.ranks()), call, wrong);
        CHECK(cudaGetLastError());
    }
    template <class E>
    void verified_norm(uint64_t rows, uint64_t hidden, uint32_t dtype, const nvrar_plan& plan, bool in_place) {
        using Bits = typename E::Bits;
        constexpr float kEps = 1e-5f;
        Bits* source = reinterpret_cast<Bits*>(in);
        Bits* target = in_place ? source : reinterpret_cast<Bits*>(out);
        Bits* residual = reinterpret_cast<Bits*>(out + bytes / 2);
        Bits* weight = reinterpret_cast<Bits*>(in + bytes / 2);
        ++call;
        fill_norm<E><<<32, 256, 0, stream>>>(source, residual, weight, rows * hidden, hidden, me.rank, call);
        if (nvrar_all_reduce_rmsnorm(comm, source, residual, weight, target, rows, hidden, kEps, dtype, &plan, stream) != NVRAR_OK)
            die(me, "all_reduce_rmsnorm");
        check_norm<E><<<static_cast<uint32_t>(rows), 256, 0, stream>>>(residual, target, hidden, me.ranks(), kEps, call, wrong);
        CHECK(cudaGetLastError());
    }
    unsigned long long count_wrong() {
        unsigned long long n = 0;
        CHECK(cudaStreamSynchronize(stream));
        CHECK(cudaMemcpy(&n, wrong, 8, cudaMemcpyDeviceToHost));
        return n;
    }
};

int verify(const Me& me, int calls) {
    Rank r(me, 10 * kSecond);
    if (r.comm == nullptr) return 1;
    uint64_t state = 99;
    auto dice = [&state](uint64_t n) {
        state = state * 6364136223846793005ull + 1442695040888963407ull;
        return (state >> 33) % n;
    };
    for (int c = 0; c < calls; ++c) {
        const uint64_t caps[] = {16, 5000, 70000, 1100000};
        const uint64_t count = 1 + dice(caps[dice(4)]);
        nvrar_plan plan{};
        plan.algorithm = static_cast<uint32_t>(dice(3));
        plan.format = (r.info.formats >> NVRAR_DENSE & 1u) != 0 ? static_cast<uint32_t>(dice(2)) : 0u;
        plan.blocks = 1 + static_cast<uint32_t>(dice(r.info.blocks));
        plan.threads = 32 * (1 + static_cast<uint32_t>(dice(r.info.threads / 32)));
        const uint64_t shift = dice(3) == 0 ? dice(8) : 0;
        const bool in_place = dice(2) == 0;
        const uint64_t type = dice(3);
        if (dice(4) == 0) {
            const uint64_t hiddens[] = {64, 1024, 3072, 8192, 16384};
            const uint64_t hidden = hiddens[dice(5)], rows = 1 + dice(dice(2) == 0 ? 4 : 40);
            if (type == 0) r.verified_norm<BF16>(rows, hidden, NVRAR_BF16, plan, in_place);
            if (type == 1) r.verified_norm<F16>(rows, hidden, NVRAR_F16, plan, in_place);
            if (type == 2) r.verified_norm<F32>(rows, hidden, NVRAR_F32, plan, in_place);
            continue;
        }
        if (type == 0) r.verified<BF16>(count, NVRAR_BF16, plan, shift, in_place);
        if (type == 1) r.verified<F16>(count, NVRAR_F16, plan, shift, in_place);
        if (type == 2) r.verified<F32>(count, NVRAR_F32, plan, shift, in_place);
    }
    const unsigned long long wrong = r.count_wrong();
    nvrar_error_record record;
    const bool good = wrong == 0 && nvrar_error(r.comm, &record) == NVRAR_OK;
    const double most = largest(me, static_cast<double>(wrong) + (good ? 0 : 1));
    if (nvrar_finalize(r.comm) != NVRAR_OK) die(me, "finalize");
    if (me.rank == 0) std::printf("%dx%d: %d random calls, %.0f wrong: %s\n", me.nodes, me.local, calls, most, most == 0 ? "ok" : "FAILED");
    return most == 0 ? 0 : 1;
}

// Microseconds per call without a graph: 40 calls, median of 15, of the slowest rank.
template <class Work>
double measured_eagerly(Rank& r, Work work) {
    cudaEvent_t from, to;
    CHECK(cudaEventCreate(&from));
    CHECK(cudaEventCreate(&to));
    std::vector<float> times;
    for (int i = 0; i < 18; ++i) {
        CHECK(cudaStreamSynchronize(r.stream));
        meet(r.me);
        CHECK(cudaEventRecord(from, r.stream));
        for (int k = 0; k < 40; ++k) work(k);
        CHECK(cudaEventRecord(to, r.stream));
        CHECK(cudaEventSynchronize(to));
        float ms = 0;
        CHECK(cudaEventElapsedTime(&ms, from, to));
        if (i >= 3) times.push_back(ms * 1000 / 40);
    }
    std::sort(times.begin(), times.end());
    return largest(r.me, static_cast<double>(times[times.size() / 2]));
}

// Microseconds per call: a graph of 40 calls on rotating buffers, median of 15 replays, of the slowest rank.
template <class Work>
double measured(Rank& r, Work work, int replays = 15) {
    constexpr int kCalls = 40, kWarm = 3;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CHECK(cudaStreamBeginCapture(r.stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < kCalls; ++i) work(i);
    CHECK(cudaStreamEndCapture(r.stream, &graph));
    CHECK(cudaGraphInstantiate(&exec, graph, 0));
    CHECK(cudaGraphUpload(exec, r.stream));
    cudaEvent_t from, to;
    CHECK(cudaEventCreate(&from));
    CHECK(cudaEventCreate(&to));
    std::vector<float> times;
    for (int i = 0; i < replays + kWarm; ++i) {
        CHECK(cudaStreamSynchronize(r.stream));
        meet(r.me);
        CHECK(cudaEventRecord(from, r.stream));
        CHECK(cudaGraphLaunch(exec, r.stream));
        CHECK(cudaEventRecord(to, r.stream));
        CHECK(cudaEventSynchronize(to));
        float ms = 0;
        CHECK(cudaEventElapsedTime(&ms, from, to));
        if (i >= kWarm) times.push_back(ms * 1000 / kCalls);
    }
    CHECK(cudaGraphExecDestroy(exec));
    CHECK(cudaGraphDestroy(graph));
    CHECK(cudaEventDestroy(from));
    CHECK(cudaEventDestroy(to));
    std::sort(times.begin(), times.end());
    return largest(r.me, static_cast<double>(times[times.size() / 2]));
}

constexpr uint64_t kPlaces = 8;  // buffers that every contender rotates through
constexpr uint64_t kHidden = 8192;
constexpr uint64_t kLeastBytes = 8 << 10, kMostBytes = 8 << 20;
constexpr int kAgain = 45;  // replays of the best plans: the least of many medians is too good

struct Timed {
    nvrar_plan plan;
    double us;
};

// Every plan once, then the best three again with more replays; the best of those.
template <class Time>
Timed best_of(const std::vector<nvrar_plan>& plans, Time time) {
    std::vector<Timed> all;
    for (const nvrar_plan& plan : plans) all.push_back({plan, time(plan, 15)});
    const auto faster = [](const Timed& a, const Timed& b) { return a.us < b.us; };
    std::sort(all.begin(), all.end(), faster);
    all.resize(std::min<size_t>(all.size(), 3));
    for (Timed& one : all) one.us = time(one.plan, kAgain);
    return *std::min_element(all.begin(), all.end(), faster);
}

void tell(const Rank& r, const char* kind, uint64_t bytes, const Timed& best, double wrong) {
    const char* const algorithms[] = {"one_shot", "doubling", "direct"};
    if (r.me.rank == 0)
        std::printf("{\"kind\": \"%s\", \"shape\": \"%dx%d\", \"bytes\": %llu, \"format\": \"%s\", \"algorithm\": \"%s\", "
                    "\"blocks\": %u, \"threads\": %u, \"parts\": %u, \"us\": %.3f, \"verified\": %s}\n", kind, r.me.nodes,
                    r.me.local, static_cast<unsigned long long>(bytes), best.plan.format ? "dense" : "cells",
                    algorithms[best.plan.algorithm], best.plan.blocks, best.plan.threads, best.plan.parts, best.us,
                    wrong == 0 ? "true" : "false");
    std::fflush(stdout);
}

// Grids worth measuring: from four threads for each pack to sixteen packs for each thread.
std::vector<nvrar_plan> plans_for(const Rank& r, uint64_t bytes, uint32_t format, uint32_t algorithm) {
    std::vector<nvrar_plan> plans;
    for (uint32_t threads : {128u, 256u, 512u}) {
        for (uint32_t blocks : {1u, 2u, 4u, 8u, 12u, 16u, 24u, 32u, 48u, 64u, 96u, 128u}) {
            const uint64_t lanes = static_cast<uint64_t>(blocks) * threads, packs = bytes / 16;
            if (blocks > r.info.blocks || threads > r.info.threads || lanes > 4 * packs || 16 * lanes < packs) continue;
            plans.push_back({algorithm, format, blocks, threads, 0});
        }
    }
    return plans;
}

int latency(const Me& me) {
    Rank r(me, 10 * kSecond);
    if (r.comm == nullptr) return 1;
    for (uint64_t bytes = kLeastBytes; bytes <= kMostBytes; bytes *= 2) {
        for (uint32_t format = 0; format < 2; ++format) {
            if ((r.info.formats >> format & 1u) == 0) continue;
            for (uint32_t algorithm = 0; algorithm < 3; ++algorithm) {
                if (me.ranks() == 2 && algorithm != 0) continue;  // the same exchange, or a second trip for nothing
                const auto plans = plans_for(r, bytes, format, algorithm);
                if (plans.empty()) continue;
                const Timed best = best_of(plans, [&](const nvrar_plan& plan, int replays) {
                    return measured(r, [&](int i) {
                        const uint64_t place = static_cast<uint64_t>(i) % kPlaces * kMostBytes;
                        r.all_reduce(r.in + place, r.out + place, bytes / 2, NVRAR_BF16, plan);
                    }, replays);
                });
                r.verified<BF16>(bytes / 2, NVRAR_BF16, best.plan, 0, false);
                tell(r, me.ordinary ? "ordinary" : "plain", bytes, best, largest(me, static_cast<double>(r.count_wrong())));
            }
        }
    }
    if (nvrar_finalize(r.comm) != NVRAR_OK) die(me, "finalize");
    return 0;
}

// Fused with residual and RMSNorm, rows of 8192.
int norm_latency(const Me& me) {
    Rank r(me, 10 * kSecond);
    if (r.comm == nullptr) return 1;
    unsigned char* residual = nullptr;
    CHECK(cudaMalloc(&residual, r.bytes));
    CHECK(cudaMemset(residual, 0, r.bytes));
    unsigned char* weight = nullptr;
    CHECK(cudaMalloc(&weight, kHidden * 2));
    CHECK(cudaMemset(weight, 0, kHidden * 2));
    for (uint64_t bytes = 2 * kHidden; bytes <= kMostBytes; bytes *= 2) {
        const uint64_t rows = bytes / 2 / kHidden;
        for (uint32_t format = 0; format < 2; ++format) {
            if ((r.info.formats >> format & 1u) == 0) continue;
            std::vector<nvrar_plan> plans;
            for (uint32_t threads : {128u, 256u, 512u}) {
                for (uint32_t parts = 1; parts <= r.info.parts && rows * parts <= r.info.blocks; parts *= 2)
                    plans.push_back({NVRAR_ONE_SHOT, format, r.info.blocks, threads, parts});
                if (rows > r.info.blocks) plans.push_back({NVRAR_ONE_SHOT, format, r.info.blocks, threads, 1});
            }
            const Timed best = best_of(plans, [&](const nvrar_plan& plan, int replays) {
                return measured(r, [&](int i) {
                    const uint64_t place = static_cast<uint64_t>(i) % kPlaces * kMostBytes;
                    if (nvrar_all_reduce_rmsnorm(r.comm, r.in + place, residual + place, weight, r.out + place, rows, kHidden,
                                                 1e-5f, NVRAR_BF16, &plan, r.stream) != NVRAR_OK)
                        die(me, "rmsnorm");
                }, replays);
            });
            r.verified_norm<BF16>(rows, kHidden, NVRAR_BF16, best.plan, false);
            tell(r, "norm", bytes, best, largest(me, static_cast<double>(r.count_wrong())));
        }
    }
    if (nvrar_finalize(r.comm) != NVRAR_OK) die(me, "finalize");
    return 0;
}

// NVSHMEM's own all-reduce on the stream, in a graph, on its own (symmetric) memory.
int nvshmem_latency(const Me& me) {
    Rank r(me, 10 * kSecond);
    if (r.comm == nullptr) return 1;
    auto* source = static_cast<unsigned char*>(nvshmem_malloc(kPlaces * kMostBytes));
    auto* target = static_cast<unsigned char*>(nvshmem_malloc(kPlaces * kMostBytes));
    if (source == nullptr || target == nullptr) die(me, "no symmetric memory");
    for (uint64_t bytes = kLeastBytes; bytes <= kMostBytes; bytes *= 2) {
        const uint64_t count = bytes / 2;
        const auto reduce = [&](uint64_t place) {
            nvshmemx_bfloat16_sum_reduce_on_stream(NVSHMEM_TEAM_WORLD, reinterpret_cast<__nv_bfloat16*>(target + place),
                                                   reinterpret_cast<const __nv_bfloat16*>(source + place), count, r.stream);
        };
        ++r.call;
        fill<BF16><<<32, 256, 0, r.stream>>>(reinterpret_cast<BF16::Bits*>(source), count, static_cast<uint32_t>(me.rank), r.call);
        reduce(0);
        check<BF16><<<32, 256, 0, r.stream>>>(reinterpret_cast<const BF16::Bits*>(target), count,
                                             static_cast<uint32_t>(me.ranks()), r.call, r.wrong);
        const double wrong = largest(me, static_cast<double>(r.count_wrong()));
        const double us = measured(r, [&](int i) { reduce(static_cast<uint64_t>(i) % kPlaces * kMostBytes); }, kAgain);
        if (me.rank == 0)
            std::printf("{\"kind\": \"nvshmem\", \"shape\": \"%dx%d\", \"bytes\": %llu, \"us\": %.3f, \"verified\": %s}\n",
                        me.nodes, me.local, static_cast<unsigned long long>(bytes), us, wrong == 0 ? "true" : "false");
        std::fflush(stdout);
    }
    std::_Exit(0);
}

// ---- where the time goes ------------------------------------------------------------------------------------------

__global__ void nothing() {}

// Rank 0 sends a number, rank 1 sends it back, `rounds` times; both words are symmetric. Bounded.
__global__ void ping(volatile uint32_t* own, volatile uint32_t* peer, int rank, uint32_t rounds, unsigned long long* ns) {
    const uint64_t start = global_ns();
    for (uint32_t i = 1; i <= rounds; ++i) {
        if (rank == 0) *peer = i;
        while (*own < i && global_ns() - start < 2000000000ull) {
        }
        if (rank == 1) *peer = i;
    }
    *ns = global_ns() - start;
}

double median(std::vector<double> values) {
    std::sort(values.begin(), values.end());
    return values.empty() ? 0 : values[values.size() / 2];
}

// An empty kernel, the latency of one store, and the stamps of the best plain plans: the parts of a small call.
int parts_of_time(const Me& me) {
    Rank r(me, 10 * kSecond);
    if (r.comm == nullptr) return 1;
    const double empty = measured(r, [&](int) { nothing<<<1, 32, 0, r.stream>>>(); });
    if (me.rank == 0) std::printf("{\"kind\": \"empty_kernel\", \"us\": %.3f}\n", empty);
    if (me.ranks() == 2) {
        constexpr uint32_t kRounds = 2000;
        auto* own = static_cast<uint32_t*>(nvshmem_calloc(1, 128));
        auto* peer = static_cast<uint32_t*>(nvshmem_ptr(own, 1 - me.rank));
        unsigned long long ns = 0;
        if (peer != nullptr) {
            meet(me);
            ping<<<1, 1, 0, r.stream>>>(own, peer, me.rank, kRounds, r.wrong);
            CHECK(cudaStreamSynchronize(r.stream));
            CHECK(cudaMemcpy(&ns, r.wrong, 8, cudaMemcpyDeviceToHost));
            CHECK(cudaMemset(r.wrong, 0, 8));
            if (me.rank == 0)
                std::printf("{\"kind\": \"one_way\", \"us\": %.3f}\n", static_cast<double>(ns) * 1e-3 / (2.0 * kRounds));
        }
    }
    if (nvrar_stamps(r.comm, 1) != NVRAR_OK) die(me, "stamps");
    for (uint64_t bytes : {8ull << 10, 128ull << 10, 1ull << 20, 2ull << 20}) {
        for (uint32_t format = 0; format < 2; ++format) {
            if ((r.info.formats >> format & 1u) == 0) continue;
            const Timed best = best_of(plans_for(r, bytes, format, NVRAR_ONE_SHOT), [&](const nvrar_plan& plan, int replays) {
                return measured(r, [&](int i) {
                    const uint64_t place = static_cast<uint64_t>(i) % kPlaces * kMostBytes;
                    r.all_reduce(r.in + place, r.out + place, bytes / 2, NVRAR_BF16, plan);
                }, replays);
            });
            measured(r, [&](int i) {
                const uint64_t place = static_cast<uint64_t>(i) % kPlaces * kMostBytes;
                r.all_reduce(r.in + place, r.out + place, bytes / 2, NVRAR_BF16, best.plan);
            });
            std::vector<nvrar_stamp> all(600);  // of the 15 replays of 40 calls
            uint32_t count = 0;
            if (nvrar_read_stamps(r.comm, all.data(), 600, &count) != NVRAR_OK) die(me, "read_stamps");
            std::vector<double> wait, move, gap;
            for (uint32_t i = 0; i < count; ++i) {
                if (all[i].arrived_ns == 0) continue;
                wait.push_back(static_cast<double>(all[i].arrived_ns - all[i].entered_ns) * 1e-3);
                move.push_back(static_cast<double>(all[i].left_ns - all[i].arrived_ns) * 1e-3);
                if (i > 0 && all[i].entered_ns - all[i - 1].left_ns < 20000)  // not between two replays
                    gap.push_back(static_cast<double>(all[i].entered_ns - all[i - 1].left_ns) * 1e-3);
            }
            if (me.rank == 0)
                std::printf("{\"kind\": \"stamps\", \"bytes\": %llu, \"format\": \"%s\", \"blocks\": %u, \"threads\": %u, \"us\": %.3f, "
                            "\"until_first_data_us\": %.3f, \"rest_us\": %.3f, \"between_calls_us\": %.3f, \"calls\": %u}\n",
                            static_cast<unsigned long long>(bytes), format ? "dense" : "cells", best.plan.blocks,
                            best.plan.threads, best.us, median(wait), median(move), median(gap), count);
            std::fflush(stdout);
        }
    }
    meet(me);
    std::_Exit(0);
}

// ---- replays ------------------------------------------------------------------------------------------------------

// As fill and check, with a number that a kernel of the graph advances: every replay has other data.
__global__ void advance(uint32_t* turn) { *turn += 1; }

__global__ void fill_turn(BF16::Bits* in, uint64_t count, uint32_t rank, uint32_t call, const uint32_t* turn) {
    for (uint64_t i = blockIdx.x * static_cast<uint64_t>(blockDim.x) + threadIdx.x; i < count;
         i += static_cast<uint64_t>(gridDim.x) * blockDim.x)
        in[i] = bench::bits_of_value<BF16>(static_cast<float>(bench::integer_of(call + 8 * *turn, rank, i)));
}

__global__ void check_turn(const BF16::Bits* out, uint64_t count, uint32_t ranks, uint32_t call, const uint32_t* turn,
                           unsigned long long* wrong) {
    for (uint64_t i = blockIdx.x * static_cast<uint64_t>(blockDim.x) + threadIdx.x; i < count;
         i += static_cast<uint64_t>(gridDim.x) * blockDim.x) {
        int sum = 0;
        for (uint32_t r = 0; r < ranks; ++r) sum += bench::integer_of(call + 8 * *turn, r, i);
        if (out[i] != bench::bits_of_value<BF16>(static_cast<float>(sum))) atomicAdd(wrong, 1ull);
    }
}

// A graph of five verified calls, replayed; after every 20th replay a call of another size and plan.
int replays(const Me& me, int many) {
    Rank r(me, 10 * kSecond);
    if (r.comm == nullptr) return 1;
    uint32_t* turn = nullptr;
    CHECK(cudaMalloc(&turn, 4));
    CHECK(cudaMemset(turn, 0, 4));
    CHECK(cudaDeviceSynchronize());
    const uint32_t dense = r.info.formats >> NVRAR_DENSE & 1u, blocks = r.info.blocks;
    const uint64_t counts[] = {8192, 13, 40961, 4097, 16384};
    const nvrar_plan plans[] = {{NVRAR_DOUBLING, dense, std::min(12u, blocks), 256, 0}, {NVRAR_ONE_SHOT, 0, 1, 512, 0},
                                {NVRAR_DIRECT, dense, std::min(12u, blocks), 512, 0}, {NVRAR_DOUBLING, 0, std::min(3u, blocks), 128, 0},
                                {NVRAR_ONE_SHOT, dense, std::min(6u, blocks), 512, 0}};
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CHECK(cudaStreamBeginCapture(r.stream, cudaStreamCaptureModeThreadLocal));
    for (uint32_t c = 0; c < 5; ++c) {
        auto* in = reinterpret_cast<BF16::Bits*>(r.in + c * kMostBytes);
        auto* out = reinterpret_cast<BF16::Bits*>(r.out + c * kMostBytes);
        fill_turn<<<16, 256, 0, r.stream>>>(in, counts[c], static_cast<uint32_t>(me.rank), c, turn);
        r.all_reduce(in, out, counts[c], NVRAR_BF16, plans[c]);
        check_turn<<<16, 256, 0, r.stream>>>(out, counts[c], static_cast<uint32_t>(me.ranks()), c, turn, r.wrong);
    }
    advance<<<1, 1, 0, r.stream>>>(turn);
    CHECK(cudaStreamEndCapture(r.stream, &graph));
    CHECK(cudaGraphInstantiate(&exec, graph, 0));
    uint64_t state = 7;
    const auto dice = [&state](uint64_t n) {
        state = state * 6364136223846793005ull + 1442695040888963407ull;
        return (state >> 33) % n;
    };
    r.call = 1u << 22;  // other numbers than the graph's
    int others = 0;
    for (int i = 0; i < many; ++i) {
        CHECK(cudaGraphLaunch(exec, r.stream));
        if (i % 20 != 0) continue;
        const nvrar_plan plan{static_cast<uint32_t>(dice(3)), dense * static_cast<uint32_t>(dice(2)),
                              1 + static_cast<uint32_t>(dice(blocks)), 32 * (1 + static_cast<uint32_t>(dice(16))), 0};
        r.verified<BF16>(1 + dice(i % 200 == 0 ? 300000 : 5000), NVRAR_BF16, plan, dice(3), dice(2) == 0);
        ++others;
        if (i % 2000 == 0) CHECK(cudaStreamSynchronize(r.stream));
    }
    const unsigned long long wrong = r.count_wrong();
    nvrar_error_record record;
    const bool good = wrong == 0 && nvrar_error(r.comm, &record) == NVRAR_OK;
    const double most = largest(me, static_cast<double>(wrong) + (good ? 0 : 1));
    if (me.rank == 0)
        std::printf("{\"kind\": \"replays\", \"shape\": \"%dx%d\", \"replays\": %d, \"other_calls\": %d, \"wrong\": %.0f}\n", me.nodes,
                    me.local, many, others, most);
    if (nvrar_finalize(r.comm) != NVRAR_OK) die(me, "finalize");
    return most == 0 ? 0 : 1;
}

// Beside the pipeline of separate kernels, 128 KiB to 2 MiB, both without a graph and both in one.
int pipeline(const Me& me) {
    Rank r(me, 20 * kSecond);
    if (r.comm == nullptr) return 1;
    bench::Pipeline baseline(me.nodes, me.local, me.rank, 1 << 20);
    const nvrar_plan plans[] = {{NVRAR_DOUBLING, NVRAR_CELLS, 8, 512, 0},  {NVRAR_DOUBLING, NVRAR_CELLS, 16, 512, 0},
                                {NVRAR_DOUBLING, NVRAR_DENSE, 8, 512, 0},  {NVRAR_DOUBLING, NVRAR_DENSE, 16, 512, 0},
                                {NVRAR_DIRECT, NVRAR_CELLS, 16, 512, 0},   {NVRAR_DIRECT, NVRAR_DENSE, 16, 512, 0}};
    bool good = true;
    for (const bool graph : {false, true}) {
        for (uint64_t bytes = 128 << 10; bytes <= 2 << 20; bytes *= 2) {
            const uint64_t count = bytes / 2;
            auto time = [&](auto work) { return graph ? measured(r, work) : measured_eagerly(r, work); };
            ++r.call;
            fill<BF16><<<32, 256, 0, r.stream>>>(reinterpret_cast<BF16::Bits*>(baseline.data), count,
                                                static_cast<uint32_t>(me.rank), r.call);
            double theirs = 1e30;
            for (uint32_t blocks : {4u, 8u, 16u})
                theirs = std::min(theirs, time([&](int) { baseline.run(count, blocks, r.stream); }));
            check<BF16><<<32, 256, 0, r.stream>>>(reinterpret_cast<const BF16::Bits*>(baseline.result), count,
                                                 static_cast<uint32_t>(me.ranks()), r.call, r.wrong);
            double ours = 1e30;
            const nvrar_plan* best = nullptr;
            for (const nvrar_plan& plan : plans) {
                if (plan.blocks > r.info.blocks) continue;
                const double us = time([&](int) { r.all_reduce(baseline.data, r.out, count, NVRAR_BF16, plan); });
                if (us < ours) {
                    ours = us;
                    best = &plan;
                }
            }
            r.verified<BF16>(count, NVRAR_BF16, *best, 0, false);
            const double wrong = largest(me, static_cast<double>(r.count_wrong()));
            good = good && wrong == 0;
            if (me.rank == 0)
                std::printf("{\"kind\": \"pipeline\", \"emulated\": true, \"shape\": \"%dx%d\", \"graph\": %s, \"bytes\": %llu, \"pipeline_us\": %.2f, "
                            "\"nvrar_us\": %.2f, \"ratio\": %.2f, \"algorithm\": %u, \"format\": %u, \"blocks\": %u, "
                            "\"verified\": %s}\n", me.nodes, me.local, graph ? "true" : "false",
                            static_cast<unsigned long long>(bytes), theirs, ours, theirs / ours, best->algorithm,
                            best->format, best->blocks, wrong == 0 ? "true" : "false");
            std::fflush(stdout);
        }
    }
    std::_Exit(good ? 0 : 1);
}

// The last rank is lost in the middle of calls. The others must learn it within the deadline.
int lose(const Me& me, const std::string& how) {
    const uint64_t timeout = 2 * kSecond;
    Rank r(me, how == "mismatch" ? 3 * kSecond : timeout, how == "mismatch" && me.rank == me.ranks() - 1);
    if (how == "mismatch") {
        if (me.rank == 0) std::printf("mismatch: %s\n", r.comm == nullptr ? "ok" : "FAILED");
        return r.comm == nullptr ? 0 : 1;
    }
    if (r.comm == nullptr) return 1;
    const nvrar_plan plan{NVRAR_DOUBLING, NVRAR_CELLS, 8, 256, 0};
    const bool last = me.rank == me.ranks() - 1;
    for (int i = 0; i < 100; ++i) r.all_reduce(r.in, r.out, 10000, NVRAR_BF16, plan);
    CHECK(cudaStreamSynchronize(r.stream));
    meet(me);
    if (last) {
        std::fflush(stdout);
        if (how == "kill") raise(SIGKILL);
        if (how == "stop") raise(SIGSTOP);
        if (how == "abort") {
            std::this_thread::sleep_for(std::chrono::milliseconds(200));
            if (nvrar_abort(r.comm) != NVRAR_OK) die(me, "abort");
        }
    }
    const auto start = Clock::now();
    nvrar_error_record record{};
    if (!last) {
        for (int i = 0; i < 3; ++i) r.all_reduce(r.in, r.out, 10000, NVRAR_BF16, plan);
        while (nvrar_error(r.comm, &record) == NVRAR_OK && Clock::now() - start < std::chrono::seconds(20))
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
    } else {
        nvrar_error(r.comm, &record);
    }
    const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
    const cudaError_t ended = last ? cudaSuccess : cudaStreamSynchronize(r.stream);
    uint16_t first = 0;
    if (!last && ended == cudaSuccess) CHECK(cudaMemcpy(&first, r.out, 2, cudaMemcpyDeviceToHost));
    const nvrar_status again = nvrar_all_reduce(r.comm, r.in, r.out, 100, NVRAR_BF16, &plan, r.stream);
    const auto end = Clock::now();
    const nvrar_status gone = nvrar_finalize(r.comm);
    const double finalize = std::chrono::duration<double>(Clock::now() - end).count();
    const bool good = record.reason != NVRAR_NO_ERROR && seconds < (how == "abort" ? 1.5 : 4.0) && again == NVRAR_FAILED &&
                      gone == NVRAR_OK && finalize < 1 && (last || (ended == cudaSuccess && first == 0x7FFF));
    std::printf("%s, rank %d: reason %u after %.3f s, rank %d waited for %d in phase %u; sync %s, out %04x, next call %d, "
                "finalize %.3f s: %s\n", how.c_str(), me.rank, record.reason, seconds, record.rank, record.peer, record.phase,
                cudaGetErrorName(ended), first, again, finalize, good ? "ok" : "FAILED");
    std::fflush(stdout);
    std::_Exit(good ? 0 : 1);
}

// The last rank comes half a millisecond late: the others' stamps must say that they waited, not that data was slow.
int stamps(const Me& me) {
    Rank r(me, 10 * kSecond);
    if (r.comm == nullptr) return 1;
    const nvrar_plan plan{NVRAR_DOUBLING, NVRAR_CELLS, 8, 256, 0};
    const bool last = me.rank == me.ranks() - 1;
    r.all_reduce(r.in, r.out, 10000, NVRAR_BF16, plan);
    if (nvrar_stamps(r.comm, 1) != NVRAR_OK) die(me, "stamps");
    for (int i = 0; i < 70; ++i) {
        if (i == 69) {
            CHECK(cudaStreamSynchronize(r.stream));
            meet(me);
            if (last) std::this_thread::sleep_for(std::chrono::microseconds(500));
        }
        r.all_reduce(r.in, r.out, 10000, NVRAR_BF16, plan);
    }
    constexpr uint32_t kCalls = 70;
    std::vector<nvrar_stamp> all(kCalls + 30);
    uint32_t count = 0;
    if (nvrar_read_stamps(r.comm, all.data(), kCalls + 30, &count) != NVRAR_OK || count != kCalls) die(me, "read_stamps");
    const nvrar_stamp& late = all[kCalls - 1];
    const double waited = static_cast<double>(late.arrived_ns - late.entered_ns) * 1e-3;
    const double rest = static_cast<double>(late.left_ns - late.arrived_ns) * 1e-3;
    bool good = waited >= 0 && rest >= 0 && rest < 300 && (last || waited > 300);
    for (uint32_t i = 1; i < count; ++i) good = good && all[i].entered_ns >= all[i - 1].left_ns;
    std::printf("rank %d: waited %.1f us, then received for %.1f us: %s\n", me.rank, waited, rest, good ? "ok" : "FAILED");
    const double bad = largest(me, good ? 0 : 1);
    if (nvrar_finalize(r.comm) != NVRAR_OK) die(me, "finalize");
    return bad == 0 ? 0 : 1;
}

int run(const Me& me, const std::string& command, int argument) {
    if (command == "verify") return verify(me, argument);
    if (command == "latency") return latency(me);
    if (command == "pipeline") return pipeline(me);
    if (command == "norm") return norm_latency(me);
    if (command == "nvshmem") return nvshmem_latency(me);
    if (command == "parts") return parts_of_time(me);
    if (command == "replays") return replays(me, argument);
    if (command == "stamps") return stamps(me);
    return lose(me, command);
}

}  // namespace

int main(int argc, char** argv) {
    int nodes = 0, local = 0;
    if (argc < 3 || std::sscanf(argv[1], "%dx%d", &nodes, &local) != 2 || nodes < 1 || local < 1 || nodes * local > kMostRanks) {
        std::printf("usage: %s NxG [relay-|whole-|ordinary-]COMMAND [number]; the head of the source has the commands\n", argv[0]);
        return 2;
    }
    std::string command = argv[2];
    const auto prefixed = [&command](const std::string& prefix) {
        const bool yes = command.rfind(prefix, 0) == 0;
        if (yes) command = command.substr(prefix.size());
        return yes;
    };
    const bool whole = prefixed("whole-"), relay = prefixed("relay-") || whole, ordinary = prefixed("ordinary-");
    void* memory = mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return 2;
    auto* shared = new (memory) Shared{};
    std::vector<pid_t> children;
    for (int r = 0; r < nodes * local; ++r) {
        const pid_t child = fork();  // before anything touches CUDA
        if (child == 0) {
            const int status = run({shared, nodes, local, r, relay, whole, ordinary}, command, argc > 3 ? std::atoi(argv[3]) : 200);
            std::fflush(stdout);
            std::_Exit(status);
        }
        children.push_back(child);
    }
    // The lost rank is not waited for; whoever is left when the others are done is ended.
    const bool loses = command == "kill" || command == "stop";
    bool good = true;
    const size_t waited = children.size() - (loses ? 1 : 0);
    for (size_t i = 0; i < waited; ++i) {
        int status = 0;
        const auto start = Clock::now();
        pid_t ended = 0;
        while ((ended = waitpid(children[i], &status, WNOHANG)) == 0 && Clock::now() - start < std::chrono::seconds(120))
            std::this_thread::sleep_for(std::chrono::milliseconds(5));
        good = good && ended == children[i] && WIFEXITED(status) && WEXITSTATUS(status) == 0;
    }
    for (pid_t child : children) kill(child, SIGKILL);
    std::printf("%s %s %s\n", good ? "ok" : "FAILED", argv[1], command.c_str());
    return good ? 0 : 1;
}
