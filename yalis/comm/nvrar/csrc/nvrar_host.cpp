// nvrar.h for processes of one host: protocol.h compiled for the CPU, a rank a process with one thread.
//
// The slabs of all ranks lie in one shared mapping, so a put is a store. The blocks of a call are gone through in order:
// block b waits for block b of the peers only and every phase sends before it waits, so the least block that anybody
// has not finished can always go on.
//
// Waiting. A rank spins with pause, then yields, then sleeps on its own doorbell (futex) in slices; a sender rings it
// after its stores when its owner says that it may be asleep. Neither can miss the other: the sleeper first says so, then
// (fence) polls once more; the sender first stores its cells, then (fence) looks whether somebody sleeps. A rank that sees
// a peer on its own core sleeps at once, since that peer cannot run before it does.
#include "nvrar_host.h"

#include <errno.h>
#include <linux/futex.h>
#include <math.h>
#include <poll.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/random.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <new>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "protocol.h"

namespace {

using namespace nvrar;

constexpr uint32_t kMaxRanks = 64;
constexpr uint32_t kMaxBlocks = 64;
// Of a slot, for each block: 32 KiB of the message are 64 KiB of cells. Longer messages take rounds; both parities of a
// few ranks then stay in the L2 and L3 caches.
constexpr uint64_t kSlotBytes = 32 * 1024;
constexpr uint64_t kDefaultMaxBytes = 64ull << 20;
constexpr uint64_t kMaxHidden = 1ull << 24;
constexpr uint32_t kSpinPolls = 32;
constexpr uint32_t kStamps = 4096;
constexpr uint64_t kSpinNs = 2000, kYieldNs = 200000, kYieldCrowdedNs = 20000;
constexpr long kSleepSliceNs = 2000000;

// ---- words of the shared mapping --------------------------------------------------------------------------------

struct alignas(128) SharedRecord {
    std::atomic<uint32_t> claimed, complete;
    nvrar_error_record record;
};

struct alignas(128) RankWords {
    std::atomic<uint32_t> hello;  // this rank's options, hashed; never 0
    std::atomic<uint32_t> poison;
    std::atomic<uint32_t> left;  // finalized: the end of the process is no failure any more
    alignas(64) std::atomic<int32_t> core;  // where the rank last began to wait, plus 1; 0: unknown. A hint
    std::atomic<uint32_t> sleeping;
    std::atomic<uint32_t> doorbell;
};

static_assert(sizeof(SharedRecord) == 128 && sizeof(RankWords) == 128, "the mapping is laid out in lines of 128 bytes");
static_assert(std::atomic<uint32_t>::is_always_lock_free, "shared words must work between processes");

// Cells, then the memory of the dense format.
uint64_t slab_lines(const Layout& layout) { return layout.lines() + layout.dense_lines(); }

thread_local char last_error[512] = "";

nvrar_status refused(nvrar_status status, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(last_error, sizeof last_error, format, arguments);
    va_end(arguments);
    return status;
}

uint64_t now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return static_cast<uint64_t>(t.tv_sec) * 1000000000ull + static_cast<uint64_t>(t.tv_nsec);
}

void pause_core() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

void ring(RankWords& words) {
    words.doorbell.fetch_add(1, std::memory_order_seq_cst);
    syscall(SYS_futex, &words.doorbell, FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0);
}

}  // namespace

struct nvrar_comm {
    Topology world;
    Layout layout;
    uint64_t max_bytes, timeout_ns, yield_ns;
    SharedRecord* shared;
    RankWords* words;
    Line* slabs;
    std::atomic<uint32_t> abort;
    std::atomic<uint32_t> in_call;
    const volatile int32_t* abort_word;
    int pidfd[kMaxRanks];
    uint32_t epochs[kMaxBlocks];
    bool stamping;
    nvrar_stamp stamp;  // of the call that runs
    uint64_t stamped;   // calls that noted their times
    nvrar_stamp stamps[kStamps];

    uint32_t rank() const { return static_cast<uint32_t>(world.rank()); }
    uint32_t ranks() const { return static_cast<uint32_t>(world.ranks()); }
    Line* slab(uint32_t which) const { return slabs + slab_lines(layout) * which; }
    bool failed() const { return words[rank()].poison.load(std::memory_order_acquire) != 0; }

    // The first record of all ranks is kept.
    void fail(const nvrar_error_record& record) {
        if (shared->claimed.exchange(1) != 0) return;
        shared->record = record;
        shared->complete.store(1, std::memory_order_release);
    }
    void poison(uint32_t who) {
        words[who].poison.store(1, std::memory_order_release);
        ring(words[who]);
    }
    // A peer whose process ended before it said that it was done.
    bool peer_gone() const {
        for (uint32_t r = 0; r < ranks(); ++r) {
            if (pidfd[r] < 0 || words[r].left.load(std::memory_order_relaxed) != 0) continue;
            pollfd ended = {pidfd[r], POLLIN, 0};
            if (::poll(&ended, 1, 0) != 1) continue;
            // It may have finalized and ended between the two looks.
            if (words[r].left.load(std::memory_order_acquire) == 0) return true;
        }
        return false;
    }
};

namespace {

class HostTransport {
public:
    static constexpr uint32_t kPollsPerCheck = 16;

    explicit HostTransport(nvrar_comm& comm)
        : c_(comm), own_(comm.slab(comm.rank())), words_(comm.words[comm.rank()]) {}
    ~HostTransport() { awake(); }

    uint32_t thread() const { return 0; }
    uint32_t threads() const { return 1; }
    bool all(bool vote) {
        std::atomic_signal_fence(std::memory_order_seq_cst);
        return vote;
    }
    void fence() { std::atomic_thread_fence(std::memory_order_seq_cst); }

    void put(int rank, uint64_t line, const Line& l) { store(c_.slab(static_cast<uint32_t>(rank)) + line, l); }
    void clear(uint64_t line) { store(own_ + line, Line{0, 0, 0, 0}); }
    void wipe(uint64_t line) { store(own_ + line, Line{~0u, ~0u, ~0u, ~0u}); }

#if defined(__x86_64__)
    // One access of 16 bytes; only its 8-byte halves are relied on to be whole. volatile: it is neither moved nor dropped.
    static void store(Line* at, const Line& l) {
        __m128i v;
        memcpy(&v, &l, sizeof v);
        *reinterpret_cast<volatile __m128i*>(at) = v;
    }
    Line load(uint64_t line) const {
        const __m128i v = *reinterpret_cast<const volatile __m128i*>(own_ + line);
        Line l;
        memcpy(&l, &v, sizeof l);
        return l;
    }
#else
    static void store(Line* at, const Line& l) {
        uint64_t halves[2];
        memcpy(halves, &l, sizeof halves);
        uint64_t* to = reinterpret_cast<uint64_t*>(at);
        __atomic_store_n(to, halves[0], __ATOMIC_RELAXED);
        __atomic_store_n(to + 1, halves[1], __ATOMIC_RELAXED);
    }
    Line load(uint64_t line) const {
        const uint64_t* from = reinterpret_cast<const uint64_t*>(own_ + line);
        const uint64_t halves[2] = {__atomic_load_n(from, __ATOMIC_RELAXED), __atomic_load_n(from + 1, __ATOMIC_RELAXED)};
        Line l;
        memcpy(&l, halves, sizeof l);
        return l;
    }
#endif

    // Wakes the receiver if it may be asleep. The fence stands between the cells and the look (head of this file).
    void commit(int rank, uint64_t, uint64_t) {
        awake();
        std::atomic_thread_fence(std::memory_order_seq_cst);
        RankWords& theirs = c_.words[rank];
        if (theirs.sleeping.load(std::memory_order_relaxed) != 0) ring(theirs);
    }

    uint32_t epoch(uint32_t block) {
        awake();
        // What the last call emptied is empty for everybody before this one sends (I12).
        std::atomic_thread_fence(std::memory_order_release);
        return c_.epochs[block];
    }
    void set_epoch(uint32_t block, uint32_t epoch) { c_.epochs[block] = epoch; }

    void arrived() {
        if (c_.stamping && c_.stamp.arrived_ns == 0) c_.stamp.arrived_ns = now();
    }

    uint64_t now_ns() const { return now(); }
    bool poisoned() const { return c_.failed(); }
    void poison(int rank) { c_.poison(static_cast<uint32_t>(rank)); }
    bool abort_requested() {
        if (c_.abort.load(std::memory_order_relaxed) != 0 || (c_.abort_word != nullptr && *c_.abort_word != 0)) return true;
        if (!slept_through_) return false;  // whoever comes soon is alive: only a wasted sleep is worth a system call
        slept_through_ = false;
        return c_.peer_gone();
    }
    // Every rank tells: the one whose record was first may be dead before it could.
    bool fail(const ErrorRecord& r) {
        c_.fail({static_cast<uint32_t>(r.reason), r.rank, r.epoch, static_cast<uint32_t>(r.phase), r.step, r.peer, r.block});
        return true;
    }

    void relax() {
        if (++polls_ < kSpinPolls) return pause_core();
        if (polls_ == kSpinPolls) {
            since_ = now();
            const int32_t core = sched_getcpu() + 1;
            words_.core.store(core, std::memory_order_relaxed);
            crowded_ = false;
            for (uint32_t r = 0; r < c_.ranks(); ++r)
                crowded_ |= r != c_.rank() && c_.words[r].core.load(std::memory_order_relaxed) == core;
        }
        if (!crowded_ && !may_sleep_) {
            const uint64_t waited = now() - since_;
            if (waited < kSpinNs) {
                for (int i = 0; i < 8; ++i) pause_core();
                return;
            }
            if (waited < kSpinNs + c_.yield_ns) {
                sched_yield();
                return;
            }
        }
        if (!may_sleep_) {
            seen_ = words_.doorbell.load(std::memory_order_relaxed);
            words_.sleeping.store(1, std::memory_order_relaxed);
            std::atomic_thread_fence(std::memory_order_seq_cst);
            may_sleep_ = true;  // after one more poll
            return;
        }
        timespec slice = {0, kSleepSliceNs};
        const long slept = syscall(SYS_futex, &words_.doorbell, FUTEX_WAIT, seen_, &slice, nullptr, 0);
        slept_through_ |= slept == -1 && errno == ETIMEDOUT;
        awake();
    }

private:
    void awake() {
        polls_ = 0;
        if (!may_sleep_) return;
        may_sleep_ = false;
        words_.sleeping.store(0, std::memory_order_relaxed);
    }

    nvrar_comm& c_;
    Line* const own_;
    RankWords& words_;
    uint32_t polls_ = 0, seen_ = 0;
    uint64_t since_ = 0;
    bool crowded_ = false, may_sleep_ = false, slept_through_ = false;
};

// ---- element types ----------------------------------------------------------------------------------------------

// Eight halves at a time: the compiler does not find this in the portable conversions. Same bits.
#if defined(__AVX2__) && defined(__F16C__)
__m256 chosen(__m256 mask, __m256 yes, __m256 no) { return _mm256_blendv_ps(no, yes, mask); }

struct FastBF16 : BF16 {
    static void widen(const Pack& p, float (&v)[8]) {
        const __m128i halves = _mm_load_si128(reinterpret_cast<const __m128i*>(&p));
        _mm256_storeu_ps(v, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16)));
    }
    static void narrow(const float (&v)[8], Pack& p) {
        const __m256 value = _mm256_loadu_ps(v);
        const __m256i bits = _mm256_castps_si256(value);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i rounded =
            _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF))), 16);
        const __m256 is_nan = _mm256_cmp_ps(value, value, _CMP_UNORD_Q);
        const __m256i words = _mm256_castps_si256(
            chosen(is_nan, _mm256_castsi256_ps(_mm256_set1_epi32(0x7FFF)), _mm256_castsi256_ps(rounded)));
        _mm_store_si128(reinterpret_cast<__m128i*>(&p),
                        _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
    }
};

struct FastF16 : F16 {
    static void widen(const Pack& p, float (&v)[8]) {
        _mm256_storeu_ps(v, _mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i*>(&p))));
    }
    static void narrow(const float (&v)[8], Pack& p) {
        const __m256 value = _mm256_loadu_ps(v);
        const __m256 canonical = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FFFFFFF));  // becomes 0x7FFF
        const __m256 is_nan = _mm256_cmp_ps(value, value, _CMP_UNORD_Q);
        _mm_store_si128(reinterpret_cast<__m128i*>(&p),
                        _mm256_cvtps_ph(chosen(is_nan, canonical, value), _MM_FROUND_TO_NEAREST_INT));
    }
};
#else
using FastBF16 = BF16;
using FastF16 = F16;
#endif

// ---- options ----------------------------------------------------------------------------------------------------

bool plan_memory(const nvrar_options& o, Topology& world, Layout& layout, uint64_t& max_bytes, const char*& reason) {
    reason = nullptr;
    if (o.abi_version != NVRAR_ABI_VERSION) reason = "abi_version is not NVRAR_ABI_VERSION: rebuild against this nvrar.h";
    else if (o.nodes < 1 || o.local < 1 || o.nodes > 4096 || o.local > 4096 ||
             o.nodes * o.local > static_cast<int32_t>(kMaxRanks))
        reason = "nodes x local must be 2 to 64 ranks";
    else if (o.blocks > kMaxBlocks) reason = "more than 64 blocks";
    else if (o.relay != 0) reason = "relay: the host library has no network";
    if (reason != nullptr) return false;
    world = {o.nodes, o.local, o.node, o.index};
    max_bytes = o.max_bytes != 0 ? o.max_bytes : kDefaultMaxBytes;
    const uint64_t slot = max_bytes < kSlotBytes ? max_bytes : kSlotBytes;
    layout.blocks = o.blocks != 0 ? o.blocks : 1;
    layout.slots = slots_for(o.nodes, o.local);
    layout.slot_packs = static_cast<uint32_t>((slot + 16 * kGroup - 1) / (16 * kGroup) * kGroup);
    reason = refuse(world, layout);
    return reason == nullptr;
}

// Ranks with other options would wait for each other; 0 is kept for a rank that has not come.
uint32_t fingerprint(const Topology& world, const Layout& layout, uint64_t max_bytes) {
    uint64_t h = 1469598103934665603ull;
    const uint64_t parts[] = {NVRAR_ABI_VERSION, static_cast<uint64_t>(world.nodes), static_cast<uint64_t>(world.local),
                              layout.blocks,     layout.slot_packs,                  max_bytes};
    for (const uint64_t part : parts) h = (h ^ part) * 1099511628211ull;
    return static_cast<uint32_t>(h >> 32) | 1u;
}

size_t width_of(uint32_t dtype) { return dtype == NVRAR_F32 ? 4 : 2; }

nvrar_status check_call(const nvrar_comm* comm, const void* in, void* out, uint64_t count, uint32_t dtype,
                        const nvrar_plan* plan, Args& args) {
    if (comm == nullptr || plan == nullptr) return refused(NVRAR_INVALID, "comm or plan is null");
    if (dtype > NVRAR_F32) return refused(NVRAR_INVALID, "dtype %u: must be 0 (bf16), 1 (f16) or 2 (f32)", dtype);
    if (plan->algorithm > NVRAR_DIRECT) return refused(NVRAR_INVALID, "plan.algorithm %u: must be 0 to 2", plan->algorithm);
    if (plan->format > NVRAR_DENSE) return refused(NVRAR_INVALID, "plan.format %u: must be 0 or 1", plan->format);
    if (plan->threads != 1) return refused(NVRAR_INVALID, "plan.threads %u: the host library takes 1", plan->threads);
    if (count > UINT64_MAX / 16 || count * width_of(dtype) > comm->max_bytes)
        return refused(NVRAR_TOO_LARGE, "%llu elements of %zu bytes exceed the capacity of %llu bytes",
                       static_cast<unsigned long long>(count), width_of(dtype),
                       static_cast<unsigned long long>(comm->max_bytes));
    args = Args{in, out, count, plan->blocks, static_cast<Algorithm>(plan->algorithm), comm->timeout_ns, {}};
    const char* reason = refuse(comm->layout, args, width_of(dtype));
    return reason == nullptr ? NVRAR_OK : refused(NVRAR_INVALID, "%s", reason);
}

nvrar_status failure(const nvrar_comm& comm) {
    if (comm.shared->complete.load(std::memory_order_acquire) == 0)
        return refused(NVRAR_FAILED, "the communicator has failed; finalize it and make a new one");
    const nvrar_error_record& r = comm.shared->record;
    return refused(NVRAR_FAILED, "rank %d %s for rank %d (phase %u, step %d, block %u, epoch %u)", r.rank,
                   r.reason == NVRAR_LATE ? "waited past the deadline" : "was aborted while it waited", r.peer, r.phase,
                   r.step, r.block, r.epoch);
}

template <class E>
bool sum(nvrar_comm& comm, const Args& args, bool dense) {
    HostTransport transport(comm);
    bool good = true;
    for (uint32_t block = 0; block < args.grid; ++block)
        good &= dense ? run_block<E, Dense>(transport, comm.world, comm.layout, args, block)
                      : run_block<E, Cells>(transport, comm.world, comm.layout, args, block);
    return good;
}

nvrar_status run(nvrar_comm& comm, const Args& args, uint32_t dtype, bool dense) {
    comm.in_call.store(1);
    if (comm.stamping) comm.stamp = {now(), 0, 0};
    const bool good = dtype == NVRAR_BF16  ? sum<FastBF16>(comm, args, dense)
                      : dtype == NVRAR_F16 ? sum<FastF16>(comm, args, dense)
                                           : sum<F32>(comm, args, dense);
    if (comm.stamping) {
        comm.stamp.left_ns = now();
        comm.stamps[comm.stamped++ % kStamps] = comm.stamp;
    }
    comm.in_call.store(0);
    return good ? NVRAR_OK : failure(comm);
}

// ---- add and norm -----------------------------------------------------------------------------------------------

template <class E>
struct Element;
template <>
struct Element<F32> {
    static float wide(uint32_t bits) { return float_of(bits); }
    static uint32_t narrow(float value) { return bits_of(value); }
};
template <class Half>
struct HalfElement {
    static float wide(uint16_t bits) { return Half::to_float(bits); }
    static uint16_t narrow(float value) { return Half::from_float(value); }
};
template <>
struct Element<BF16> : HalfElement<HalfBrain> {};
template <>
struct Element<F16> : HalfElement<HalfIeee> {};

// As torch does it in the dtype: the new residual, the scaled row and its product with the weight are each rounded.
template <class E>
void norm_rows(void* out, void* residual, const void* weight, uint64_t rows, uint64_t hidden, float eps) {
    using Bits = typename E::Bits;
    using Kind = Element<E>;
    constexpr uint64_t kLanes = 16;
    for (uint64_t row = 0; row < rows; ++row) {
        Bits* const x = static_cast<Bits*>(out) + row * hidden;
        Bits* const r = static_cast<Bits*>(residual) + row * hidden;
        const Bits* const w = static_cast<const Bits*>(weight);
        float squares[kLanes] = {};
        const uint64_t whole = hidden / kLanes * kLanes;
        for (uint64_t i = 0; i < whole; i += kLanes) {
            for (uint64_t k = 0; k < kLanes; ++k) {
                r[i + k] = Kind::narrow(Kind::wide(r[i + k]) + Kind::wide(x[i + k]));
                const float v = Kind::wide(r[i + k]);
                squares[k] += v * v;
            }
        }
        for (uint64_t i = whole; i < hidden; ++i) {
            r[i] = Kind::narrow(Kind::wide(r[i]) + Kind::wide(x[i]));
            squares[i - whole] += Kind::wide(r[i]) * Kind::wide(r[i]);
        }
        float total = 0.0f;
        for (const float s : squares) total += s;
        const float scale = 1.0f / sqrtf(total / static_cast<float>(hidden) + eps);
        for (uint64_t i = 0; i < hidden; ++i)
            x[i] = Kind::narrow(Kind::wide(Kind::narrow(Kind::wide(r[i]) * scale)) * Kind::wide(w[i]));
    }
}

}  // namespace

// ---- the interface ----------------------------------------------------------------------------------------------

extern "C" {

nvrar_status nvrar_get_unique_id(void* id) {
    if (id == nullptr) return refused(NVRAR_INVALID, "id is null");
    if (getrandom(id, NVRAR_UNIQUE_ID_BYTES, 0) != NVRAR_UNIQUE_ID_BYTES)
        return refused(NVRAR_SYSTEM, "getrandom gave no id");
    return NVRAR_OK;
}

uint64_t nvrar_host_bytes(const nvrar_options* options) {
    if (options == nullptr) return 0;
    Topology world;
    Layout layout;
    uint64_t max_bytes;
    const char* reason;
    if (!plan_memory(*options, world, layout, max_bytes, reason)) {
        refused(NVRAR_INVALID, "%s", reason);
        return 0;
    }
    const uint64_t ranks = static_cast<uint64_t>(world.ranks());
    return sizeof(SharedRecord) + ranks * sizeof(RankWords) + ranks * slab_lines(layout) * sizeof(Line);
}

nvrar_status nvrar_init(nvrar_comm** comm, const nvrar_options* options, const void*) {
    if (comm == nullptr || options == nullptr) return refused(NVRAR_INVALID, "comm or options is null");
    *comm = nullptr;
    if (options->host_memory == nullptr || reinterpret_cast<uintptr_t>(options->host_memory) % 128 != 0)
        return refused(NVRAR_INVALID, "host_memory is null or not aligned to 128 bytes");
    if (options->timeout_ns == 0) return refused(NVRAR_INVALID, "timeout_ns is 0: every wait would end at once");
    Topology world;
    Layout layout;
    uint64_t max_bytes;
    const char* reason;
    if (!plan_memory(*options, world, layout, max_bytes, reason)) return refused(NVRAR_INVALID, "%s", reason);

    void* memory = nullptr;
    if (posix_memalign(&memory, 128, sizeof(nvrar_comm)) != 0) return refused(NVRAR_SYSTEM, "out of memory");
    nvrar_comm* c = new (memory) nvrar_comm{};
    c->world = world;
    c->layout = layout;
    c->max_bytes = max_bytes;
    c->timeout_ns = options->timeout_ns;
    c->shared = static_cast<SharedRecord*>(options->host_memory);
    c->words = reinterpret_cast<RankWords*>(c->shared + 1);
    c->slabs = reinterpret_cast<Line*>(c->words + c->ranks());
    for (int& fd : c->pidfd) fd = -1;
    cpu_set_t cores;
    const bool known = sched_getaffinity(0, sizeof cores, &cores) == 0;
    c->yield_ns = known && static_cast<uint32_t>(CPU_COUNT(&cores)) >= c->ranks() ? kYieldNs : kYieldCrowdedNs;

    // All ones are empty in the dense format. Nobody sends before it has seen everybody's hello.
    memset(static_cast<void*>(c->slab(c->rank()) + layout.lines()), 0xFF, layout.dense_lines() * sizeof(Line));
    const uint32_t mine = fingerprint(world, layout, max_bytes);
    c->words[c->rank()].hello.store(mine, std::memory_order_release);
    const uint64_t start = now();
    for (uint32_t r = 0; r < c->ranks(); ++r) {
        uint32_t theirs;
        while ((theirs = c->words[r].hello.load(std::memory_order_acquire)) == 0) {
            if (now() - start > options->timeout_ns) {
                free(c);
                return refused(NVRAR_FAILED, "rank %u did not come to nvrar_init within %.3g s", r,
                               static_cast<double>(options->timeout_ns) * 1e-9);
            }
            const timespec nap = {0, 50000};
            nanosleep(&nap, nullptr);
        }
        if (theirs != mine) {
            free(c);
            return refused(NVRAR_INVALID, "rank %u was given other options (nodes, local, blocks or max_bytes)", r);
        }
    }
    *comm = c;
    return NVRAR_OK;
}

nvrar_status nvrar_host_watch(nvrar_comm* comm, const volatile int32_t* abort_word, const int* pidfds) {
    if (comm == nullptr || pidfds == nullptr) return refused(NVRAR_INVALID, "comm or pidfds is null");
    comm->abort_word = abort_word;
    for (uint32_t r = 0; r < comm->ranks(); ++r) comm->pidfd[r] = r == comm->rank() ? -1 : pidfds[r];
    return NVRAR_OK;
}

nvrar_status nvrar_query(const nvrar_comm* comm, nvrar_info* info) {
    if (comm == nullptr || info == nullptr) return refused(NVRAR_INVALID, "comm or info is null");
    *info = {comm->ranks(), comm->rank(),    comm->layout.blocks, 1, comm->ranks(),
             1u << NVRAR_CELLS | 1u << NVRAR_DENSE, 0, 1, comm->max_bytes, slab_lines(comm->layout) * sizeof(Line), kMaxHidden};
    return NVRAR_OK;
}

nvrar_status nvrar_all_reduce(nvrar_comm* comm, const void* in, void* out, uint64_t count, uint32_t dtype,
                              const nvrar_plan* plan, void*) {
    if (count == 0 && comm != nullptr) return comm->failed() ? failure(*comm) : NVRAR_OK;
    Args args;
    const nvrar_status status = check_call(comm, in, out, count, dtype, plan, args);
    return status == NVRAR_OK ? run(*comm, args, dtype, plan->format == NVRAR_DENSE) : status;
}

nvrar_status nvrar_all_reduce_rmsnorm(nvrar_comm* comm, const void* in, void* residual, const void* weight, void* out,
                                      uint64_t rows, uint64_t hidden, float eps, uint32_t dtype, const nvrar_plan* plan,
                                      void*) {
    if (comm == nullptr) return refused(NVRAR_INVALID, "comm is null");
    if (hidden == 0 || hidden > kMaxHidden) return refused(NVRAR_INVALID, "hidden must be 1 to 2^24");
    if (rows > UINT64_MAX / kMaxHidden) return refused(NVRAR_INVALID, "too many rows");
    if (rows == 0) return comm->failed() ? failure(*comm) : NVRAR_OK;
    Args args;
    nvrar_status status = check_call(comm, in, out, rows * hidden, dtype, plan, args);
    if (status != NVRAR_OK) return status;
    const uint64_t row_bytes = hidden * width_of(dtype);
    if (const char* why = refuse_norm(args, residual, weight, rows * row_bytes, row_bytes))
        return refused(NVRAR_INVALID, "%s", why);
    status = run(*comm, args, dtype, plan->format == NVRAR_DENSE);
    if (status != NVRAR_OK) return status;
    if (dtype == NVRAR_BF16) norm_rows<BF16>(out, residual, weight, rows, hidden, eps);
    else if (dtype == NVRAR_F16) norm_rows<F16>(out, residual, weight, rows, hidden, eps);
    else norm_rows<F32>(out, residual, weight, rows, hidden, eps);
    return NVRAR_OK;
}

nvrar_status nvrar_stamps(nvrar_comm* comm, uint32_t on) {
    if (comm == nullptr || on > 1) return refused(NVRAR_INVALID, "comm must not be null, on must be 0 or 1");
    comm->stamping = on == 1;
    return NVRAR_OK;
}

nvrar_status nvrar_read_stamps(nvrar_comm* comm, nvrar_stamp* stamps, uint32_t most, uint32_t* count) {
    if (comm == nullptr || stamps == nullptr || count == nullptr)
        return refused(NVRAR_INVALID, "comm, stamps and count must not be null");
    const uint64_t kept = comm->stamped < kStamps ? comm->stamped : kStamps, given = kept < most ? kept : most;
    for (uint64_t i = 0; i < given; ++i) stamps[i] = comm->stamps[(comm->stamped - given + i) % kStamps];
    *count = static_cast<uint32_t>(given);
    return NVRAR_OK;
}

nvrar_status nvrar_error(const nvrar_comm* comm, nvrar_error_record* record) {
    if (comm == nullptr || record == nullptr) return refused(NVRAR_INVALID, "comm or record is null");
    *record = {};
    if (!comm->failed()) return NVRAR_OK;
    if (comm->shared->complete.load(std::memory_order_acquire) != 0) *record = comm->shared->record;
    // Poisoned by a rank that has not written its record, or died while it did.
    else *record = {NVRAR_ABORTED, -1, 0, 0, -1, -1, 0};
    return NVRAR_FAILED;
}

nvrar_status nvrar_abort(nvrar_comm* comm) {
    if (comm == nullptr) return refused(NVRAR_INVALID, "comm is null");
    comm->abort.store(1);
    ring(comm->words[comm->rank()]);
    // A waiting call records where it stood; without one, nobody would tell the peers.
    for (int i = 0; i < 100 && comm->in_call.load() != 0 && !comm->failed(); ++i) {
        const timespec nap = {0, 100000};
        nanosleep(&nap, nullptr);
    }
    if (comm->failed()) return NVRAR_OK;
    comm->fail({NVRAR_ABORTED, static_cast<int32_t>(comm->rank()), 0, 0, -1, -1, 0});
    for (uint32_t r = 0; r < comm->ranks(); ++r) comm->poison(r);
    return NVRAR_OK;
}

nvrar_status nvrar_finalize(nvrar_comm* comm) {
    if (comm == nullptr) return refused(NVRAR_INVALID, "comm is null");
    // Peers write into the mapping, which is theirs as well: nothing to wait for.
    if (!comm->failed()) comm->words[comm->rank()].left.store(1, std::memory_order_release);
    comm->~nvrar_comm();
    free(comm);
    return NVRAR_OK;
}

const char* nvrar_last_error(void) { return last_error; }

}  // extern "C"
