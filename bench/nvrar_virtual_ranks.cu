// NVRAR on one GPU: each rank is a group of blocks of one co-resident kernel, each with a slab of its own.
//
//   nvcc -std=c++17 -O3 -arch=sm_90 -I yalis/comm/nvrar/csrc bench/nvrar_virtual_ranks.cu -o nvrar_virtual_ranks
//   ./nvrar_virtual_ranks verify 10000 | long 100000 | fail | small | tiny | latency
//
// It verifies the CUDA code of the protocol. Its latencies are those of a GPU's own L2, not of NVLink or of a network.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <algorithm>
#include <chrono>
#include <string>
#include <thread>
#include <vector>

#include "direct.cuh"
#include "nvrar_bench.cuh"

namespace {

using namespace nvrar;
using namespace bench;

constexpr int kThreads = 512;

struct Virtual {
    DirectPeers peers;
    uint32_t* poison;  // [ranks]
    Layout layout;
    int nodes, local;
    uint32_t* epochs;  // [ranks][layout.blocks]
    HostWords* host;
    const unsigned char* in;  // [ranks] buffers of `stride` bytes
    unsigned char* out;
    uint64_t stride;
    uint64_t shift;  // bytes from a buffer's start: misaligned when not a multiple of 16
    Split split;
    unsigned char* residual;  // [ranks]
    unsigned char* weight;
    uint64_t hidden;  // 0: no norm
};

constexpr float kEps = 1e-5f;

template <class E, class Format, bool kPair, bool kNorm>
__global__ __launch_bounds__(kThreads, kPair && !kNorm && Format::kDense ? 2 : 1) void all_reduce(const __grid_constant__ Virtual v, uint64_t count, uint32_t grid,
                                                       Algorithm algorithm, uint64_t deadline_ns, int ranks_present) {
    // Blocks that share a row are neighbours: a cluster.
    const uint32_t parts = kNorm ? v.split.parts : 1, place_of = blockIdx.x / parts;
    if (parts > 1) cluster_here();
    stream_order();
    const int ranks = v.nodes * v.local;
    const int rank = static_cast<int>(place_of) % ranks;
    const uint32_t block = place_of / static_cast<uint32_t>(ranks) * parts + blockIdx.x % parts;
    if (rank >= ranks_present) return;  // a dead rank, for the failure tests
    DirectTransport transport(v.peers, rank, v.epochs + static_cast<uint64_t>(rank) * v.layout.blocks,
                              v.poison + rank, v.host, parts);
    const uint64_t at = static_cast<uint64_t>(rank) * v.stride + v.shift;
    const Norm norm{v.residual + at, v.weight, static_cast<uint32_t>(v.hidden / E::kPerPack), static_cast<float>(v.hidden), kEps};
    const Args args{v.in + at, v.out + at, count, grid, algorithm, deadline_ns, v.split, norm};
    const Topology place{v.nodes, v.local, rank / v.local, rank % v.local};
    Exchange<E, Format, kPair, kNorm, DirectTransport>(transport, place, v.layout, args, block).run();
}

__global__ void next_call(uint32_t* counter) { *counter += 1; }

template <class E>
__global__ void fill(unsigned char* in, uint64_t stride, uint64_t shift, uint64_t count, int ranks, const uint32_t* counter) {
    const uint64_t n = count * static_cast<uint64_t>(ranks);
    for (uint64_t k = blockIdx.x * static_cast<uint64_t>(blockDim.x) + threadIdx.x; k < n;
         k += static_cast<uint64_t>(gridDim.x) * blockDim.x) {
        const uint64_t rank = k / count, i = k % count;
        reinterpret_cast<typename E::Bits*>(in + rank * stride + shift)[i] =
            bits_of_value<E>(static_cast<float>(integer_of(*counter, static_cast<uint32_t>(rank), i)));
    }
}

// Integers sum exactly, so every bit of every rank is known; a stale, lost or repeated cell shows.
template <class E>
__global__ void check(const unsigned char* out, uint64_t stride, uint64_t shift, uint64_t count, int ranks,
                      const uint32_t* counter, unsigned long long* wrong) {
    for (uint64_t i = blockIdx.x * static_cast<uint64_t>(blockDim.x) + threadIdx.x; i < count;
         i += static_cast<uint64_t>(gridDim.x) * blockDim.x) {
        int sum = 0;
        for (int r = 0; r < ranks; ++r) sum += integer_of(*counter, static_cast<uint32_t>(r), i);
        const typename E::Bits want = bits_of_value<E>(static_cast<float>(sum));
        for (int r = 0; r < ranks; ++r) {
            const auto got =
                reinterpret_cast<const typename E::Bits*>(out + static_cast<uint64_t>(r) * stride + shift)[i];
            // +0 and -0: integers that cancel give +0; a sum of -0 does not occur here.
            if (got != want) atomicAdd(wrong, 1ull);
        }
    }
}

struct World {
    Virtual v{};
    std::vector<void*> memory;
    uint32_t* counter = nullptr;
    unsigned long long* wrong = nullptr;
    cudaStream_t stream{};
    bool early = false;  // programmatic dependent launch

    World(int nodes, int local, uint32_t blocks, uint32_t slot_packs, uint64_t message_bytes) {
        const int ranks = nodes * local;
        v.layout = {blocks, slots_for(nodes, local), slot_packs};
        v.nodes = nodes;
        v.local = local;
        v.stride = (message_bytes + 64 + 255) / 256 * 256;
        for (int r = 0; r < ranks; ++r) {
            const uint64_t cells = v.layout.lines() * sizeof(Line), dense = v.layout.dense_lines() * sizeof(Line);
            v.peers.slab[r] = static_cast<Line*>(zeroed(cells + dense));
            CHECK(cudaMemset(v.peers.slab[r] + v.layout.lines(), 0xFF, dense));
        }
        v.poison = static_cast<uint32_t*>(zeroed(static_cast<uint64_t>(ranks) * 4));
        auto** poison = static_cast<uint32_t**>(zeroed(sizeof(uint32_t*) * kMaxDirectRanks));
        for (int r = 0; r < ranks; ++r) {
            uint32_t* const word = v.poison + r;
            CHECK(cudaMemcpy(poison + r, &word, sizeof word, cudaMemcpyHostToDevice));
        }
        v.peers.poison = poison;
        v.epochs = static_cast<uint32_t*>(zeroed(static_cast<uint64_t>(ranks) * blocks * 4));
        v.in = static_cast<unsigned char*>(zeroed(v.stride * static_cast<uint64_t>(ranks)));
        v.out = static_cast<unsigned char*>(zeroed(v.stride * static_cast<uint64_t>(ranks)));
        v.residual = static_cast<unsigned char*>(zeroed(v.stride * static_cast<uint64_t>(ranks)));
        v.weight = static_cast<unsigned char*>(zeroed(1 << 17));
        counter = static_cast<uint32_t*>(zeroed(4));
        wrong = static_cast<unsigned long long*>(zeroed(8));
        CHECK(cudaHostAlloc(&v.host, sizeof(HostWords), cudaHostAllocMapped));
        memset(v.host, 0, sizeof(HostWords));
        CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
        CHECK(cudaDeviceSynchronize());
        int major = 0;
        CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
        early = major >= 9;
    }
    ~World() {
        for (void* p : memory) cudaFree(p);
        cudaFreeHost(v.host);
        cudaStreamDestroy(stream);
    }
    World(const World&) = delete;
    World& operator=(const World&) = delete;

    int ranks() const { return v.nodes * v.local; }
    void* zeroed(uint64_t bytes) {
        void* p = nullptr;
        CHECK(cudaMalloc(&p, bytes));
        CHECK(cudaMemset(p, 0, bytes));
        memory.push_back(p);
        return p;
    }
    void preset_epochs(uint32_t epoch) {
        std::vector<uint32_t> words(static_cast<size_t>(ranks()) * v.layout.blocks, epoch);
        CHECK(cudaMemcpy(v.epochs, words.data(), words.size() * 4, cudaMemcpyHostToDevice));
    }
    unsigned long long count_wrong() {
        unsigned long long n = 0;
        CHECK(cudaStreamSynchronize(stream));
        CHECK(cudaMemcpy(&n, wrong, 8, cudaMemcpyDeviceToHost));
        return n;
    }
};

constexpr uint64_t kSecond = 1000000000ull;

struct How {
    uint32_t grid;
    Algorithm algorithm;
    bool dense = false;
    uint32_t threads = kThreads;
    uint64_t hidden = 0;  // elements of a row; 0: no norm
};

template <class E, bool kNorm>
auto kernel_of(bool dense, bool pair) {
    return dense ? (pair ? all_reduce<E, Dense, true, kNorm> : all_reduce<E, Dense, false, kNorm>)
                 : (pair ? all_reduce<E, Cells, true, kNorm> : all_reduce<E, Cells, false, kNorm>);
}

template <class E>
void launch(World& w, uint64_t count, const How& how, uint64_t deadline = 5 * kSecond, int present = 1 << 20) {
    w.v.split = Split::of((count + E::kPerPack - 1) / E::kPerPack, 1, how.grid, 1);
    w.v.hidden = how.hidden;
    uint32_t grid = how.grid, parts = 1;
    if (how.hidden != 0) {
        const uint64_t rows = count / how.hidden;
        parts = w.early ? 8 : 1;
        while (parts > 1 && rows * parts > how.grid) parts /= 2;
        grid = parts > 1 ? static_cast<uint32_t>(rows) * parts : static_cast<uint32_t>(std::min<uint64_t>(rows, how.grid));
        w.v.split = Split::of(rows, static_cast<uint32_t>(how.hidden / E::kPerPack), grid, parts);
    }
    const bool pair = is_pair({w.v.nodes, w.v.local, 0, 0}, how.algorithm);
    const auto kernel = how.hidden != 0 ? kernel_of<E, true>(how.dense, pair) : kernel_of<E, false>(how.dense, pair);
    cudaLaunchAttribute attributes[2]{};
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim.x = parts;
    attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(grid * static_cast<uint32_t>(w.ranks()));
    config.blockDim = dim3(how.threads);
    config.stream = w.stream;
    config.attrs = attributes;
    config.numAttrs = w.early ? (parts > 1 ? 2 : 1) : 0;
    CHECK(cudaLaunchKernelEx(&config, kernel, w.v, count, grid, how.algorithm, deadline, present));
}

// The ranks of a launch wait for each other: they must all be on the GPU at once.
template <class E>
void require_coresident(const World& w, uint32_t grid) {
    int per_sm = 0, sms = 0;
    CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, all_reduce<E, Cells, false, false>, kThreads, 0));
    CHECK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0));
    if (static_cast<int>(grid) * w.ranks() > per_sm * sms) {
        std::printf("grid %u x %d ranks does not fit on %d x %d blocks\n", grid, w.ranks(), per_sm, sms);
        std::exit(1);
    }
}

template <class E>
void verified_call(World& w, uint64_t count, const How& how, uint64_t shift, bool in_place) {
    World& x = w;
    unsigned char* out = x.v.out;
    const uint64_t before = x.v.shift;
    x.v.shift = shift;
    if (in_place) x.v.out = const_cast<unsigned char*>(x.v.in);
    next_call<<<1, 1, 0, x.stream>>>(x.counter);
    fill<E><<<32, 256, 0, x.stream>>>(const_cast<unsigned char*>(x.v.in), x.v.stride, shift, count, x.ranks(), x.counter);
    // Three calls on parts of the buffer with nothing in between, so that dependent launches overlap.
    const uint64_t part = count / 3 / 8 * 8;
    for (uint64_t from = 0; from < count;) {
        const uint64_t length = part != 0 && from < 2 * part ? part : count - from;
        x.v.shift = shift + from * sizeof(typename E::Bits);
        How other = how;
        if (from == part) {  // the middle one in the other format, on another grid
            other.grid = 1 + how.grid / 2;
            other.dense = !how.dense;
        }
        launch<E>(x, length, other);
        from += length;
    }
    x.v.shift = shift;
    check<E><<<32, 256, 0, x.stream>>>(x.v.out, x.v.stride, shift, count, x.ranks(), x.counter, x.wrong);
    CHECK(cudaGetLastError());
    x.v.out = out;
    x.v.shift = before;
}

template <class E>
__global__ void fill_norm(Virtual v, uint64_t count, const uint32_t* counter) {
    const uint64_t n = count * static_cast<uint64_t>(v.nodes * v.local);
    for (uint64_t k = blockIdx.x * static_cast<uint64_t>(blockDim.x) + threadIdx.x; k < n;
         k += static_cast<uint64_t>(gridDim.x) * blockDim.x) {
        const uint64_t rank = k / count, i = k % count, at = rank * v.stride;
        auto* in = reinterpret_cast<typename E::Bits*>(const_cast<unsigned char*>(v.in) + at);
        in[i] = bits_of_value<E>(small_of(*counter, static_cast<int>(rank), i));
        reinterpret_cast<typename E::Bits*>(v.residual + at)[i] = bits_of_value<E>(small_of(*counter, -1, i));
        if (k < v.hidden) reinterpret_cast<typename E::Bits*>(v.weight)[k] = weight_of<E>(k);
    }
}

template <class E>
__global__ void check_norms(Virtual v, const uint32_t* counter, unsigned long long* wrong) {
    // A block per row of a rank; integers, so the sum of squares is exact in any order.
    __shared__ float squares;
    if (threadIdx.x == 0) squares = 0;
    __syncthreads();
    const uint64_t row = blockIdx.x, at = blockIdx.y * v.stride;
    const auto* residual = reinterpret_cast<const typename E::Bits*>(v.residual + at);
    const auto* out = reinterpret_cast<const typename E::Bits*>(v.out + at);
    check_row<E>(residual, out, row, v.hidden, v.nodes * v.local, kEps, *counter, &squares, wrong);
}

template <class E>
void verified_norm(World& w, uint64_t rows, const How& how, bool in_place) {
    unsigned char* const out = w.v.out;
    if (in_place) w.v.out = const_cast<unsigned char*>(w.v.in);
    w.v.hidden = how.hidden;
    next_call<<<1, 1, 0, w.stream>>>(w.counter);
    fill_norm<E><<<64, 256, 0, w.stream>>>(w.v, rows * how.hidden, w.counter);
    launch<E>(w, rows * how.hidden, how);
    check_norms<E><<<dim3(static_cast<uint32_t>(rows), static_cast<uint32_t>(w.ranks())), 256, 0, w.stream>>>(
        w.v, w.counter, w.wrong);
    CHECK(cudaGetLastError());
    w.v.out = out;
}

// Replays of one graph (five sizes) with eager calls of other sizes, grids, algorithms in between.
template <class E>
bool verify(int nodes, int local, int replays, uint32_t blocks, const char* type) {
    constexpr uint64_t kMost = 300000;
    constexpr uint64_t kSize = sizeof(typename E::Bits);
    World w(nodes, local, blocks, 128, kMost * kSize);
    require_coresident<E>(w, blocks);
    w.preset_epochs(0xFFFFFF00u);  // the wrap comes early
    uint64_t calls = 0, state = 12345;
    auto dice = [&state](uint64_t n) {
        state = state * 6364136223846793005ull + 1442695040888963407ull;
        return (state >> 33) % n;
    };
    auto eager = [&](uint64_t most) {
        const uint64_t count = 1 + dice(most);
        const How how{1 + static_cast<uint32_t>(dice(blocks)), static_cast<Algorithm>(dice(3)), dice(2) == 0,
                      32 * (1 + static_cast<uint32_t>(dice(16)))};
        verified_call<E>(w, count, how, dice(3) == 0 ? kSize * dice(8) : 0, dice(2) == 0);
        ++calls;
    };
    for (uint64_t count : {1ull, 2ull, 7ull, 8ull, 9ull, 1001ull, 4097ull, 65537ull, 262147ull})
        for (uint32_t a = 0; a < 6; ++a, ++calls)
            verified_call<E>(w, count, {blocks, static_cast<Algorithm>(a % 3), a >= 3}, 0, false);
    const struct { uint64_t count; How how; } plan[] = {
        {8192, {blocks, Algorithm::kDoubling, true}}, {13, {1, Algorithm::kOneShot}}, {40961, {blocks, Algorithm::kDirect}},
        {4097, {3, Algorithm::kDoubling}}, {16384, {blocks / 2, Algorithm::kOneShot, true, 256}}};
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CHECK(cudaStreamBeginCapture(w.stream, cudaStreamCaptureModeGlobal));
    for (const auto& p : plan) verified_call<E>(w, p.count, p.how, 0, false);
    CHECK(cudaStreamEndCapture(w.stream, &graph));
    CHECK(cudaGraphInstantiate(&exec, graph, 0));
    for (int i = 0; i < replays; ++i) {
        CHECK(cudaGraphLaunch(exec, w.stream));
        if (i % 20 == 0) eager(i % 200 == 0 ? kMost : 5000);
        if (i % 2000 == 1999 && w.count_wrong() != 0) break;
    }
    calls += static_cast<uint64_t>(replays) * 5;
    int norms = 0;
    for (uint64_t hidden : {64ull, 1024ull, 3072ull, 8192ull, 16384ull})
        for (uint64_t rows : {1ull, 2ull, 3ull, 17ull})
            for (uint32_t a = 0; a < 6; ++a, ++norms)
                verified_norm<E>(w, rows, {1 + static_cast<uint32_t>(dice(blocks)), static_cast<Algorithm>(a % 3), a >= 3,
                                           32 * (1 + static_cast<uint32_t>(dice(16))), hidden}, dice(2) == 0);
    calls += static_cast<uint64_t>(norms);
    const unsigned long long wrong = w.count_wrong();
    std::printf("%dx%d %s: %llu calls (%d replays of 5), %llu wrong elements%s\n", nodes, local, type,
                static_cast<unsigned long long>(calls), replays, wrong, w.v.host->claimed ? ", GAVE UP" : "");
    std::fflush(stdout);
    CHECK(cudaGraphExecDestroy(exec));
    CHECK(cudaGraphDestroy(graph));
    return wrong == 0 && w.v.host->claimed == 0;
}

// One rank is missing. The kernel must end, by deadline or by abort, with a record, NaN everywhere, and stay refused.
bool failure(bool by_abort) {
    using Clock = std::chrono::steady_clock;
    World w(2, 2, 8, 64, 1 << 16);
    const uint64_t count = 9000;
    const auto start = Clock::now();
    launch<BF16>(w, count, {8, Algorithm::kDoubling, by_abort}, by_abort ? 600 * kSecond : kSecond / 20, 3);
    if (by_abort) {
        std::this_thread::sleep_for(std::chrono::milliseconds(20));
        *reinterpret_cast<volatile uint32_t*>(&w.v.host->abort) = 1;
    }
    CHECK(cudaStreamSynchronize(w.stream));
    const double first = std::chrono::duration<double>(Clock::now() - start).count();
    CHECK(cudaMemset(w.v.out, 0, w.v.stride * 4));
    const auto again = Clock::now();
    launch<BF16>(w, count, {8, Algorithm::kDoubling}, 600 * kSecond);  // all ranks are there, but poisoned
    CHECK(cudaStreamSynchronize(w.stream));
    const double second = std::chrono::duration<double>(Clock::now() - again).count();
    std::vector<uint16_t> out(w.v.stride * 2);
    CHECK(cudaMemcpy(out.data(), w.v.out, w.v.stride * 4, cudaMemcpyDeviceToHost));
    uint64_t numbers = 0;
    for (uint64_t r = 0; r < 4; ++r)
        for (uint64_t i = 0; i < count; ++i) numbers += out[r * w.v.stride / 2 + i] != 0x7FFF;
    const ErrorRecord& e = w.v.host->record;
    const bool good = w.v.host->complete == 1 && e.reason == (by_abort ? Reason::kAborted : Reason::kLate) && e.epoch == 1 &&
                      e.rank != 3 && numbers == 0 && first < 2 && second < 2;
    std::printf("missing rank, %s: %s; ended after %.3f s and %.4f s; rank %d waited for %d in phase %u, block %u; %llu numbers "
                "after poison\n", by_abort ? "abort" : "deadline", good ? "ok" : "WRONG", first, second, e.rank, e.peer,
                static_cast<unsigned>(e.phase), e.block, static_cast<unsigned long long>(numbers));
    return good;
}

double microseconds_per_call(World& w, uint64_t bytes, const How& how) {
    constexpr int kCalls = 40, kReplays = 15;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CHECK(cudaStreamBeginCapture(w.stream, cudaStreamCaptureModeGlobal));
    for (int i = 0; i < kCalls; ++i) launch<BF16>(w, bytes / 2, how);
    CHECK(cudaStreamEndCapture(w.stream, &graph));
    CHECK(cudaGraphInstantiate(&exec, graph, 0));
    cudaEvent_t from, to;
    CHECK(cudaEventCreate(&from));
    CHECK(cudaEventCreate(&to));
    std::vector<float> times;
    for (int i = 0; i < kReplays + 3; ++i) {
        CHECK(cudaEventRecord(from, w.stream));
        CHECK(cudaGraphLaunch(exec, w.stream));
        CHECK(cudaEventRecord(to, w.stream));
        CHECK(cudaEventSynchronize(to));
        float ms = 0;
        CHECK(cudaEventElapsedTime(&ms, from, to));
        if (i >= 3) times.push_back(ms * 1000 / kCalls);
    }
    CHECK(cudaGraphExecDestroy(exec));
    CHECK(cudaGraphDestroy(graph));
    std::sort(times.begin(), times.end());
    return static_cast<double>(times[times.size() / 2]);
}

bool latency(int nodes, int local, uint32_t blocks, const std::vector<How>& ways, const char* label) {
    World w(nodes, local, blocks, 2048, 2 << 20);
    require_coresident<BF16>(w, blocks);
    std::printf("emulated: virtual ranks of one GPU, %dx%d, %s, bf16, us per call in a graph of 40, median of 15\n%8s", nodes,
                local, label, "KiB");
    for (const How& how : ways) std::printf(" %5s %-3u", how.dense ? "dense" : "cells", how.grid);
    std::printf("  verified\n");
    bool good = true;
    for (uint64_t kib = ways[0].hidden != 0 ? 16 : 8; kib <= 2048; kib *= 2) {
        std::printf("%8llu", static_cast<unsigned long long>(kib));
        for (const How& how : ways) std::printf("  %7.2f ", microseconds_per_call(w, kib * 1024, how));
        for (const How& how : ways) {
            if (how.hidden != 0) verified_norm<BF16>(w, kib * 512 / how.hidden, how, false);
            else verified_call<BF16>(w, kib * 512, how, 0, false);
        }
        const bool right = w.count_wrong() == 0 && w.v.host->claimed == 0;
        good = good && right;
        std::printf("  %s\n", right ? "yes" : "NO");
        std::fflush(stdout);
    }
    return good;
}

std::vector<How> ways_of(Algorithm a, const std::vector<uint32_t>& grids, uint32_t threads = kThreads, uint64_t hidden = 0) {
    std::vector<How> ways;
    for (const bool dense : {false, true})
        for (uint32_t grid : grids) ways.push_back({grid, a, dense, threads, hidden});
    return ways;
}

}  // namespace

int main(int argc, char** argv) {
    const std::string command = argc > 1 ? argv[1] : "verify";
    const int replays = argc > 2 ? std::atoi(argv[2]) : 10000;
    bool good = true;
    if (command == "verify" || command == "small") {
        const bool small = command == "small";
        const int shapes[][2] = {{2, 4}, {4, 2}, {3, 2}, {8, 1}, {1, 8}, {2, 1}};
        for (const auto& s : shapes) {
            const uint32_t blocks = small ? 4 : 12;
            good = verify<BF16>(s[0], s[1], small ? 3 : replays, blocks, "bf16") && good;
            good = verify<F32>(s[0], s[1], small ? 3 : replays, blocks, "fp32") && good;
            if (small && s[0] == 3) break;
        }
        if (!small) good = verify<F16>(3, 2, replays / 10, 12, "fp16") && good;
    } else if (command == "long") {
        good = verify<BF16>(2, 4, replays, 12, "bf16");
    } else if (command == "tiny") {  // for compute-sanitizer
        good = verify<BF16>(2, 1, 1, 4, "bf16");
        good = verify<BF16>(3, 2, 1, 4, "bf16") && good;
    } else if (command == "fail") {
        good = failure(false);
        good = failure(true) && good;
    } else if (command == "latency") {
        const Algorithm shot = Algorithm::kOneShot, doubling = Algorithm::kDoubling, direct = Algorithm::kDirect;
        good = latency(2, 1, 64, ways_of(shot, {4, 8, 16, 32, 64}), "one exchange, 512 threads");
        good = latency(2, 1, 64, ways_of(shot, {8, 16, 32, 64}, 256), "one exchange, 256 threads") && good;
        good = latency(2, 1, 64, ways_of(shot, {1, 4, 16, 64}, 512, 8192), "with residual and RMSNorm, 512 threads") && good;
        good = latency(2, 1, 64, ways_of(shot, {4, 16, 64}, 256, 8192), "with residual and RMSNorm, 256 threads") && good;
        good = latency(2, 4, 16, ways_of(doubling, {4, 8, 16}), "hierarchical doubling") && good;
        good = latency(4, 2, 16, ways_of(direct, {4, 8, 16}), "hierarchical direct") && good;
        good = latency(2, 4, 16, ways_of(shot, {4, 8, 16}), "one-shot") && good;
    } else {
        std::printf("unknown command %s\n", command.c_str());
        return 2;
    }
    std::printf(good ? "ok %s\n" : "FAILED %s\n", command.c_str());
    return good ? 0 : 1;
}
