// Ranks as threads: the transports on which the protocol is verified without a GPU.
//
// A thread per (rank, lane); it goes through the blocks of a call in order. No deadlock: block b waits for block b of the
// peers only, all ranks take the blocks in the same order, and every phase sends before it waits; so the least block that
// anybody has not finished can always go on. Several lanes stand for the threads of a GPU block.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "protocol.h"

#if defined(__SANITIZE_THREAD__)
#define NVRAR_TSAN 1
#else
#define NVRAR_TSAN 0
#endif

namespace host {

using nvrar::ErrorRecord;
using nvrar::Layout;
using nvrar::Line;
using nvrar::Topology;

inline uint64_t now_ns() {
    return static_cast<uint64_t>(
        std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
            .count());
}

struct Dice {
    uint64_t state;
    explicit Dice(uint64_t seed) : state(seed * 0x9E3779B97F4A7C15ull + 0x1234567ull) {}
    uint64_t roll() {
        state += 0x9E3779B97F4A7C15ull;
        uint64_t z = state;
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull;
        z = (z ^ z >> 27) * 0x94D049BB133111EBull;
        return z ^ z >> 31;
    }
    uint64_t below(uint64_t n) { return roll() % n; }
    bool one_in(uint64_t n) { return below(n) == 0; }
};

// Barrier of one rank's lanes.
class Lanes {
public:
    uint64_t limit_ns = 60000000000ull;  // only a broken protocol gets here
    explicit Lanes(int count) : count_(count) {}
    bool all(bool vote) {
        if (count_ == 1) return vote;
        const int turn = turn_.load(std::memory_order_acquire);
        if (!vote) good_[turn & 1].store(false, std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count_) {
            arrived_.store(0, std::memory_order_relaxed);
            good_[(turn + 1) & 1].store(true, std::memory_order_relaxed);
            turn_.store(turn + 1, std::memory_order_release);
        } else {
            const uint64_t start = now_ns();
            while (turn_.load(std::memory_order_acquire) == turn) {
                std::this_thread::yield();
                if (now_ns() - start > limit_ns) {
                    std::printf("GAVE UP the lanes of a rank do not meet\n");
                    std::fflush(stdout);
                    std::_Exit(1);
                }
            }
        }
        return good_[turn & 1].load(std::memory_order_relaxed);
    }

private:
    const int count_;
    std::atomic<int> arrived_{0}, turn_{0};
    std::atomic<bool> good_[2] = {{true}, {true}};
};

using Cells = std::unique_ptr<std::atomic<uint64_t>[]>;

// Delivers 8-byte writes late, in any order, two writes to one address included, some twice, with stalls. All that it
// keeps is that a write comes for the second time before a later one to its address (condition F2 of docs/nvrar.md).
class AdversarialNetwork {
public:
    AdversarialNetwork(std::vector<Cells>& slabs, uint64_t seed, bool repeating)
        : slabs_(slabs), repeating_(repeating), dice_(seed), thread_([this] { deliver(); }) {}
    ~AdversarialNetwork() {
        stop_.store(true);
        thread_.join();
    }
    void send(int rank, uint64_t cell, uint64_t value) {
        const std::lock_guard<std::mutex> lock(mutex_);
        box_.push_back({rank, cell, value, nullptr, Part::kWhole, nullptr, due(), 0, false});
    }
    // As a network card does: what is staged is read when it is delivered, each time.
    void post(int rank, uint64_t cell, uint64_t cells, const std::atomic<uint64_t>* staged) {
        const std::lock_guard<std::mutex> lock(mutex_);
        for (uint64_t i = 0; i < cells; ++i)
            box_.push_back({rank, cell + i, 0, staged + i, Part::kWhole, nullptr, due(), 0, false});
    }
    // The same where not even 8 bytes are whole; a signal (cell `signal`; none: 0) comes when all of it is there.
    void post_torn(int rank, uint64_t cell, uint64_t cells, const std::atomic<uint64_t>* staged, uint64_t signal,
                   uint64_t value) {
        const std::lock_guard<std::mutex> lock(mutex_);
        const auto left = std::make_shared<uint64_t>(2 * cells);
        for (uint64_t i = 0; i < cells; ++i) {
            for (const Part part : {Part::kLow, Part::kHigh})
                box_.push_back({rank, cell + i, 0, staged + i, part, left, due(), 0, false});
        }
        if (signal != 0) box_.push_back({rank, signal, value, nullptr, Part::kWhole, left, due(), 0, false});
    }
    uint64_t repeats() const { return repeats_.load(); }
    uint64_t overtakings() const { return overtakings_.load(); }

private:
    enum class Part { kWhole, kLow, kHigh };

    struct Letter {
        int rank;
        uint64_t cell, value;
        const std::atomic<uint64_t>* staged;  // instead of value, if not null
        Part part;     // of the cell
        std::shared_ptr<uint64_t> left;  // parts of its put that have not come; a signal waits until there are none
        uint64_t due;                    // not before
        int held;  // how often it was passed over
        bool repeated;
    };

    // Some take so long that small exchanges come and go meanwhile. Only with mutex_ held.
    uint64_t due() { return dice_.one_in(64) ? now_ns() + dice_.below(2000000) : 0; }

    void deliver() {
        while (!stop_.load()) {
            uint64_t stall_us = 0;
            {
                const std::lock_guard<std::mutex> lock(mutex_);
                for (int burst = 0; burst < 64 && !box_.empty(); ++burst) one();
                if (dice_.one_in(300)) stall_us = dice_.below(1500);
            }
            if (stall_us != 0) std::this_thread::sleep_for(std::chrono::microseconds(stall_us));
            std::this_thread::yield();
        }
    }

    void one() {
        size_t pick = dice_.below(box_.size());
        if (box_[pick].due > now_ns()) return;
        if (box_[pick].held < 3 && dice_.one_in(4)) {
            ++box_[pick].held;
            return;
        }
        for (size_t i = 0; i < pick; ++i) {
            if (box_[i].repeated && box_[i].rank == box_[pick].rank && box_[i].cell == box_[pick].cell &&
                box_[i].part == box_[pick].part)
                pick = i;
        }
        const Letter letter = box_[pick];
        const bool signal = letter.left != nullptr && letter.part == Part::kWhole;
        if (signal && *letter.left != 0) return;
        auto& cell = slabs_[static_cast<size_t>(letter.rank)][letter.cell];
        const uint64_t value = letter.staged != nullptr ? letter.staged->load(std::memory_order_relaxed) : letter.value;
        const uint64_t part = letter.part == Part::kLow ? 0xFFFFFFFFull : letter.part == Part::kHigh ? ~0xFFFFFFFFull : ~0ull;
        // Nobody else writes the cell meanwhile; a signal tells that what came before it is there.
        cell.store((cell.load(std::memory_order_relaxed) & ~part) | (value & part),
                   signal ? std::memory_order_release : std::memory_order_relaxed);
        if (letter.left != nullptr && !signal && !letter.repeated) --*letter.left;
        if (pick > 0) overtakings_.fetch_add(1, std::memory_order_relaxed);
        if (repeating_ && !letter.repeated && dice_.one_in(8)) {
            box_[pick].repeated = true;  // stays: it will be delivered once more
            repeats_.fetch_add(1, std::memory_order_relaxed);
            return;
        }
        box_.erase(box_.begin() + static_cast<std::ptrdiff_t>(pick));
    }

    std::vector<Cells>& slabs_;
    const bool repeating_;
    Dice dice_;
    std::mutex mutex_;
    std::vector<Letter> box_;
    std::atomic<bool> stop_{false};
    std::atomic<uint64_t> repeats_{0}, overtakings_{0};
    std::thread thread_;
};

struct World {
    World(int n, int g, Layout shape, int lanes_of_a_rank, uint64_t start)
        : nodes(n), local(g), layout(shape), lanes_count(lanes_of_a_rank), seed(start) {
        for (int r = 0; r < nodes * local; ++r) {
            const uint64_t cells = layout.lines() * 2, all = cells + layout.dense_lines() * 2;
            slabs.emplace_back(new std::atomic<uint64_t>[all + 2ull * layout.blocks * layout.slots]());
            for (uint64_t i = cells; i < all; ++i) slabs.back()[i].store(~0ull, std::memory_order_relaxed);
            staging.emplace_back(new std::atomic<uint64_t>[cells]());
            epochs.emplace_back(layout.blocks, 0u);
            poison.emplace_back(new std::atomic<uint32_t>(0));
            lanes.emplace_back(new Lanes(lanes_count));
            sums.emplace_back(static_cast<size_t>(lanes_count), 0.0f);
        }
        gave_up.assign(static_cast<size_t>(ranks()), false);
    }
    int ranks() const { return nodes * local; }
    Topology place(int rank) const { return {nodes, local, rank / local, rank % local}; }
    void set_patience(uint64_t deadline_ns) {
        for (auto& l : lanes) l->limit_ns = deadline_ns + 1000000000ull;
    }
    void preset_epochs(uint32_t epoch) {
        for (auto& words : epochs) words.assign(layout.blocks, epoch);
    }

    const int nodes, local;
    const Layout layout;
    const int lanes_count;
    const uint64_t seed;
    std::vector<Cells> slabs, staging;
    std::vector<std::vector<uint32_t>> epochs;  // not atomic: ThreadSanitizer watches them
    std::vector<std::unique_ptr<std::atomic<uint32_t>>> poison;
    std::vector<std::unique_ptr<Lanes>> lanes;
    std::vector<std::vector<float>> sums;  // [rank][lane]
    std::atomic<bool> abort{false};
    std::mutex record_mutex;
    ErrorRecord record{};
    std::vector<bool> gave_up;  // by rank
    std::atomic<int> poisonings{0};
    std::unique_ptr<AdversarialNetwork> network;
    bool staged = false;          // puts to other nodes are staged and posted
    bool torn = false;            // cells that are posted do not come whole
    bool signals = false;         // each slot has a word behind the slab that says which epoch is there
    bool data_then_flag = false;  // two cells {data, data}, {flag, flag}: the format that must fail
    uint64_t nap_every = 0;       // a rank sleeps before one in so many looks at its epoch; 0: never
};

class Transport {
public:
    static constexpr uint32_t kPollsPerCheck = 64;

    Transport(World& world, int rank, int lane)
        : w_(world),
          rank_(rank),
          lane_(lane),
          dice_(world.seed * 1000003 + static_cast<uint64_t>(rank * 64 + lane)) {}

    uint32_t thread() const { return static_cast<uint32_t>(lane_); }
    uint32_t threads() const { return static_cast<uint32_t>(w_.lanes_count); }
    bool all(bool vote) { return w_.lanes[index()]->all(vote); }
    void fence() {
#if !NVRAR_TSAN
        std::atomic_thread_fence(std::memory_order_seq_cst);
#endif
    }
    void put(int rank, uint64_t line, const Line& l) {
        wander();
        if (w_.data_then_flag) {
            cell(rank, line * 2, join(l.data0, l.data1));
            cell(rank, line * 2 + 1, join(l.flag0, l.flag1));
            return;
        }
        cell(rank, line * 2, join(l.data0, l.flag0));
        cell(rank, line * 2 + 1, join(l.data1, l.flag1));
    }
    Line load(uint64_t line) {
        auto& slab = w_.slabs[index()];
        if (w_.data_then_flag) {
            const uint64_t flags = slab[line * 2 + 1].load(std::memory_order_acquire);
            const uint64_t data = slab[line * 2].load(std::memory_order_relaxed);
            return {low(data), low(flags), high(data), high(flags)};
        }
        const uint64_t a = slab[line * 2].load(std::memory_order_relaxed);
        wander();  // the two halves of a line are not one
        const uint64_t b = slab[line * 2 + 1].load(std::memory_order_relaxed);
        return {low(a), high(a), low(b), high(b)};
    }
    void clear(uint64_t line) {
        w_.slabs[index()][line * 2].store(0, std::memory_order_relaxed);
        w_.slabs[index()][line * 2 + 1].store(0, std::memory_order_relaxed);
    }
    void wipe(uint64_t line) {
        w_.slabs[index()][line * 2].store(~0ull, std::memory_order_relaxed);
        w_.slabs[index()][line * 2 + 1].store(~0ull, std::memory_order_relaxed);
    }
    void commit(int, uint64_t, uint64_t) {}
    uint32_t epoch(uint32_t block) {
        if (w_.nap_every != 0 && dice_.one_in(w_.nap_every))
            std::this_thread::sleep_for(std::chrono::microseconds(dice_.below(400)));
        return w_.epochs[index()][block];
    }
    void set_epoch(uint32_t block, uint32_t epoch) { w_.epochs[index()][block] = epoch; }
    uint64_t now_ns() { return host::now_ns(); }
    bool abort_requested() { return w_.abort.load(std::memory_order_relaxed); }
    bool poisoned() { return w_.poison[index()]->load(std::memory_order_relaxed) != 0; }
    void poison(int rank) {
        w_.poisonings.fetch_add(1, std::memory_order_relaxed);
        std::this_thread::sleep_for(std::chrono::milliseconds(1));  // other threads give up meanwhile
        w_.poison[static_cast<size_t>(rank)]->store(1, std::memory_order_relaxed);
    }
    bool fail(const ErrorRecord& record) {
        const std::lock_guard<std::mutex> lock(w_.record_mutex);
        if (w_.record.reason == nvrar::Reason::kNone) w_.record = record;
        const bool first = !w_.gave_up[index()];
        w_.gave_up[index()] = true;
        return first;
    }
    void relax() { std::this_thread::yield(); }
    float sum(float value) {  // every lane adds in the same order
        auto& lanes = w_.sums[index()];
        lanes[static_cast<size_t>(lane_)] = value;
        all(true);
        float total = 0;
        for (float lane : lanes) total += lane;
        all(true);
        return total;
    }

protected:
    size_t index() const { return static_cast<size_t>(rank_); }
    static uint64_t join(uint32_t l, uint32_t h) { return l | static_cast<uint64_t>(h) << 32; }
    static uint32_t low(uint64_t v) { return static_cast<uint32_t>(v); }
    static uint32_t high(uint64_t v) { return static_cast<uint32_t>(v >> 32); }
    void wander() {
        if (dice_.one_in(128)) std::this_thread::yield();
    }
    void cell(int rank, uint64_t at, uint64_t value) {
        if (w_.network) {
            w_.network->send(rank, at, value);
        } else {
            w_.slabs[static_cast<size_t>(rank)][at].store(value, std::memory_order_relaxed);
        }
    }

    World& w_;
    const int rank_, lane_;
    Dice dice_;
};

// Ranks of other nodes through staged puts, those of the own node by stores.
class StagedTransport : public Transport {
public:
    static constexpr bool kPosts = true;
    using Transport::Transport;

    void put(int rank, uint64_t line, const Line& l) {
        epoch_ = l.flag0;
        if (near(rank)) {
            w_.slabs[static_cast<size_t>(rank)][line * 2].store(join(l.data0, l.flag0), std::memory_order_relaxed);
            w_.slabs[static_cast<size_t>(rank)][line * 2 + 1].store(join(l.data1, l.flag1), std::memory_order_relaxed);
            return;
        }
        w_.staging[index()][line * 2].store(join(l.data0, l.flag0), std::memory_order_relaxed);
        w_.staging[index()][line * 2 + 1].store(join(l.data1, l.flag1), std::memory_order_relaxed);
    }
    void commit(int rank, uint64_t line, uint64_t lines) {
        if (lane_ != 0 || lines == 0) return;
        const uint64_t epoch = w_.staging[index()][line * 2].load(std::memory_order_relaxed) >> 32;
        if (near(rank)) {
            if (w_.signals) w_.slabs[static_cast<size_t>(rank)][signal(line)].store(epoch_, std::memory_order_release);
        } else if (w_.torn) {
            w_.network->post_torn(rank, line * 2, lines * 2, &w_.staging[index()][line * 2], w_.signals ? signal(line) : 0, epoch);
        } else {
            w_.network->post(rank, line * 2, lines * 2, &w_.staging[index()][line * 2]);
        }
    }
    // As in relay.cuh: a cell counts when the word of its slot says the same.
    Line load(uint64_t line) {
        if (!w_.signals) return Transport::load(line);
        const uint64_t epoch = w_.slabs[index()][signal(line)].load(std::memory_order_acquire);
        Line l = Transport::load(line);
        if (l.flag0 != epoch) l.flag0 = 0;
        if (l.flag1 != epoch) l.flag1 = 0;
        return l;
    }
    void clear(uint64_t line) {
        Transport::clear(line);
        w_.slabs[index()][signal(line)].store(0, std::memory_order_relaxed);
    }

private:
    bool near(int rank) const { return rank / w_.local == rank_ / w_.local; }
    uint64_t signal(uint64_t line) const {
        return (w_.layout.lines() + w_.layout.dense_lines()) * 2 + line / (2 * w_.layout.slot_packs);
    }
    uint32_t epoch_ = 0;  // of what was put last
};

}  // namespace host
