// Runs the protocol with threads as ranks and checks every result. One subcommand per kind of run; prints "ok ..." and
// ends with 0, or says what was wrong and ends with 1. Arguments: COMMAND SEED SCALE.
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <string>

#include "host_world.h"

namespace {

using host::Dice;
using host::World;
using nvrar::Algorithm;
using nvrar::Args;
using nvrar::Layout;

enum class Type { kF32, kBf16, kF16 };
enum class Values { kIntegers, kReals, kSpecial };

struct Call {
    Type type;
    uint64_t count;
    uint32_t grid;
    Algorithm algorithm;
    Values values;
    bool in_place;
    int in_shift, out_shift;  // elements past a 16-byte boundary
    bool dense = false;
    uint32_t row_packs = 0;  // not 0: with residual and RMSNorm; count is then whole rows
};

constexpr float kEps = 1e-5f;

constexpr int kGuard = 16;  // untouched elements on both sides of a buffer
constexpr uint8_t kCanary = 0xA5;

size_t width(Type type) { return type == Type::kF32 ? 4 : 2; }

double widened(Type type, const void* at) {
    if (type == Type::kF32) {
        float v;
        memcpy(&v, at, 4);
        return static_cast<double>(v);
    }
    uint16_t half;
    memcpy(&half, at, 2);
    return static_cast<double>(type == Type::kBf16 ? nvrar::HalfBrain::to_float(half)
                                                   : nvrar::HalfIeee::to_float(half));
}

void narrowed(Type type, double value, void* at) {
    const float v = static_cast<float>(value);
    if (type == Type::kF32) {
        memcpy(at, &v, 4);
    } else {
        const uint16_t half =
            type == Type::kBf16 ? nvrar::HalfBrain::from_float(v) : nvrar::HalfIeee::from_float(v);
        memcpy(at, &half, 2);
    }
}

double smallest(Type type) {
    return type == Type::kF32 ? std::ldexp(1.0, -149) : std::ldexp(1.0, type == Type::kBf16 ? -133 : -24);
}

// What rank contributes at a position of a call. Integers up to 8 sum exactly in every type up to 20 ranks, so a cell
// that is stale, lost or counted twice shows.
// Small enough that squares of rows sum exactly in any order: every bit of a norm is known.
double norm_contribution(uint64_t key, int rank, uint64_t position) {
    Dice dice(key ^ position * 0x2545F491ull ^ static_cast<uint64_t>(rank + 1) << 40);
    return static_cast<double>(dice.below(5)) - 2.0;
}

// Where the input is the NaN that the dense format takes for empty: whole words of ones.
bool all_ones(const Call& call, uint64_t position) { return call.values == Values::kSpecial && position % 32 >= 30; }

double contribution(const Call& call, uint64_t key, int rank, int ranks, uint64_t position) {
    Dice dice(key ^ position * 0x51ED270Bull ^ static_cast<uint64_t>(rank) << 48);
    const double integer = static_cast<double>(dice.below(17)) - 8.0;
    if (call.values == Values::kReals) return static_cast<double>(dice.below(1u << 20)) / (1 << 19) - 1.0;
    if (call.values == Values::kIntegers) return integer;
    if (all_ones(call, position)) return std::nan("");
    const int chosen = static_cast<int>(position / 8 % static_cast<uint64_t>(ranks));
    switch (position % 8) {
        case 0: return -0.0;
        case 1: return rank == chosen ? 0.0 : -0.0;
        case 2: return rank == chosen ? std::nan("") : integer;
        case 3: return rank == chosen ? HUGE_VAL : integer;
        case 4: return rank == chosen ? HUGE_VAL : (rank == (chosen + 1) % ranks ? -HUGE_VAL : integer);
        case 5: return integer * smallest(call.type);
        case 6: return rank == chosen ? -std::nan("7") : std::nan("9");
        default: return integer;
    }
}

struct Buffers {
    std::vector<uint8_t> in, out;
    std::vector<float> residual, weight;  // of a call with a norm (fp32)
    uint8_t* source = nullptr;
    uint8_t* target = nullptr;
};

uint8_t* element(std::vector<uint8_t>& bytes, const Call& call, int shift) {
    const uintptr_t base = (reinterpret_cast<uintptr_t>(bytes.data()) + 63) & ~uintptr_t{63};
    return reinterpret_cast<uint8_t*>(base) + (static_cast<size_t>(shift) + kGuard) * width(call.type);
}

uint64_t key_of(const World& world, size_t index) { return world.seed * 7919 + index * 104729 + 1; }

void prepare(const World& world, const Call& call, size_t index, int rank, Buffers& b) {
    const size_t bytes = (call.count + 2 * kGuard + 16) * width(call.type) + 64;
    b.in.assign(bytes, kCanary);
    b.source = element(b.in, call, call.in_shift);
    if (call.in_place) {
        b.target = b.source;
    } else {
        b.out.assign(bytes, kCanary);
        b.target = element(b.out, call, call.out_shift);
    }
    if (call.row_packs != 0) {
        b.residual.resize(call.count);
        b.weight.resize(call.row_packs * 4);
        for (uint64_t i = 0; i < call.count; ++i) {
            const float value = static_cast<float>(norm_contribution(key_of(world, index), rank, i));
            memcpy(b.source + i * 4, &value, 4);
            b.residual[i] = static_cast<float>(norm_contribution(key_of(world, index), -1, i));
        }
        for (size_t i = 0; i < b.weight.size(); ++i) b.weight[i] = 1.0f + static_cast<float>(i % 7) / 8;
        return;
    }
    for (uint64_t i = 0; i < call.count; ++i) {
        uint8_t* at = b.source + i * width(call.type);
        narrowed(call.type, contribution(call, key_of(world, index), rank, world.ranks(), i), at);
        if (all_ones(call, i)) memset(at, 0xFF, width(call.type));
    }
}

template <class E, class Transport>
bool run_as(Transport& transport, const nvrar::Topology& place, const Layout& layout, const Args& args, uint32_t block,
            bool dense) {
    if constexpr (!nvrar::Posts<Transport>::value) {
        if (dense) return nvrar::run_block<E, nvrar::Dense>(transport, place, layout, args, block);
    }
    return nvrar::run_block<E>(transport, place, layout, args, block);
}

template <class Transport>
bool run_call(World& world, Transport& transport, int rank, const Call& call, Buffers& b, uint64_t deadline_ns) {
    Args args{b.source, b.target, call.count, call.grid, call.algorithm, deadline_ns};
    if (call.row_packs != 0) {
        args.split = nvrar::Split::of(call.count / 4 / call.row_packs, call.row_packs, call.grid, 1);
        args.norm = {b.residual.data(), b.weight.data(), call.row_packs, static_cast<float>(call.row_packs * 4), kEps};
    }
    bool ok = true;
    for (uint32_t block = 0; block < call.grid; ++block) {
        const auto place = world.place(rank);
        bool good = true;
        if (call.row_packs != 0) {
            good = call.dense && !nvrar::Posts<Transport>::value
                       ? nvrar::run_block_norm<nvrar::F32, nvrar::Dense>(transport, place, world.layout, args, block)
                       : nvrar::run_block_norm<nvrar::F32>(transport, place, world.layout, args, block);
            ok = ok && good;
            continue;
        }
        if (call.type == Type::kF32) good = run_as<nvrar::F32>(transport, place, world.layout, args, block, call.dense);
#if !defined(NVRAR_FEW_TYPES)
        if (call.type == Type::kF16) good = run_as<nvrar::F16>(transport, place, world.layout, args, block, call.dense);
#endif
        if (call.type == Type::kBf16) good = run_as<nvrar::BF16>(transport, place, world.layout, args, block, call.dense);
        ok = ok && good;
    }
    return transport.all(ok);  // stands for the end of the kernel
}

const char* name(Algorithm a) {
    return a == Algorithm::kOneShot ? "one-shot" : a == Algorithm::kDoubling ? "doubling" : "direct";
}

std::string describe(const World& world, const Call& call, size_t index) {
    char text[240];
    std::snprintf(text, sizeof text, "%dx%d call %zu: %s, %s, %llu elements of %zu bytes, grid %u, lanes %d, %s, seed %llu",
                  world.nodes, world.local, index, name(call.algorithm), call.dense ? "dense" : "cells", static_cast<unsigned long long>(call.count),
                  width(call.type), call.grid, world.lanes_count, call.in_place ? "in place" : "out of place",
                  static_cast<unsigned long long>(world.seed));
    return text;
}

bool untouched(const uint8_t* from, const uint8_t* to) {
    for (; from < to; ++from)
        if (*from != kCanary) return false;
    return true;
}

template <class Complain>
bool check_norm(const World& world, const Call& call, size_t index, const std::vector<Buffers>& all, Complain complain) {
    const uint64_t hidden = call.row_packs * 4;
    const uint64_t key = key_of(world, index);
    for (uint64_t row = 0; row < call.count / hidden; ++row) {
        std::vector<float> want(hidden);
        float squares = 0;
        for (uint64_t c = 0; c < hidden; ++c) {
            double sum = norm_contribution(key, -1, row * hidden + c);
            for (int r = 0; r < world.ranks(); ++r) sum += norm_contribution(key, r, row * hidden + c);
            want[c] = static_cast<float>(sum);
            squares += want[c] * want[c];
        }
        const float factor = 1.0f / sqrtf(squares / static_cast<float>(hidden) + kEps);
        for (int r = 0; r < world.ranks(); ++r) {
            const Buffers& b = all[static_cast<size_t>(r)];
            for (uint64_t c = 0; c < hidden; ++c) {
                const uint64_t i = row * hidden + c;
                float got;
                memcpy(&got, b.target + i * 4, 4);
                const float scaled = want[c] * factor, result = scaled * b.weight[c];
                if (b.residual[i] != want[c])
                    return complain(r, i, "residual not exact", static_cast<double>(b.residual[i]), static_cast<double>(want[c]));
                if (got != result)
                    return complain(r, i, "norm not exact", static_cast<double>(got), static_cast<double>(result));
            }
        }
    }
    return true;
}

bool check(const World& world, const Call& call, size_t index, std::vector<Buffers>& all) {
    const size_t w = width(call.type);
    const int ranks = world.ranks();
    auto complain = [&](int rank, uint64_t at, const char* what, double got, double want) {
        std::printf("WRONG %s; rank %d, element %llu: %s, got %.9g, want %.9g\n", describe(world, call, index).c_str(),
                    rank, static_cast<unsigned long long>(at), what, got, want);
        return false;
    };
    for (int r = 0; r < ranks; ++r) {
        Buffers& b = all[static_cast<size_t>(r)];
        const uint8_t* end = b.target + call.count * w;
        if (!untouched(b.target - kGuard * w, b.target) || !untouched(end, end + kGuard * w))
            return complain(r, call.count, "wrote outside of out", 0, 0);
    }
    if (call.row_packs != 0) return check_norm(world, call, index, all, complain);
    std::vector<uint8_t> box(16);
    for (uint64_t i = 0; i < call.count; ++i) {
        double want = 0, size = 0;
        for (int r = 0; r < ranks; ++r) {
            narrowed(call.type, contribution(call, key_of(world, index), r, ranks, i), box.data());
            const double term = widened(call.type, box.data());
            want = r == 0 ? term : want + term;
            size += std::fabs(term);
        }
        const uint8_t* first = all[0].target + i * w;
        const double got = widened(call.type, first);
        if (std::isnan(want)) {
            if (!std::isnan(got)) return complain(0, i, "not NaN", got, want);
        } else if (call.values == Values::kReals) {
            // Every stage rounds once; there are at most 2 + log2(N) + fold, plus the fp32 sum itself.
            const double unit = std::ldexp(1.0, call.type == Type::kF32 ? -24 : call.type == Type::kBf16 ? -9 : -12);
            const double bound = size * (unit * (3 + nvrar::log2_floor(world.nodes)) + ranks * std::ldexp(1.0, -24));
            if (!(std::fabs(got - want) <= bound)) return complain(0, i, "too far off", got, want);
        } else if (got != want || std::signbit(got) != std::signbit(want)) {
            return complain(0, i, "not exact", got, want);
        }
        for (int r = 1; r < ranks; ++r) {
            const uint8_t* other = all[static_cast<size_t>(r)].target + i * w;
            if (memcmp(first, other, w) != 0)
                return complain(r, i, "bits differ from rank 0", widened(call.type, other), got);
        }
    }
    return true;
}

// Every rank makes all calls without meeting the others in between, so that they run apart as far as the protocol lets.
bool run_all(World& world, const std::vector<Call>& calls, uint64_t deadline_ns) {
    const size_t ranks = static_cast<size_t>(world.ranks());
    std::vector<std::vector<Buffers>> buffers(calls.size());
    for (size_t c = 0; c < calls.size(); ++c) {
        buffers[c].resize(ranks);
        for (size_t r = 0; r < ranks; ++r) prepare(world, calls[c], c, static_cast<int>(r), buffers[c][r]);
    }
    std::atomic<bool> ok{true};
    std::vector<std::thread> threads;
    for (size_t r = 0; r < ranks; ++r) {
        for (int lane = 0; lane < world.lanes_count; ++lane) {
            threads.emplace_back([&, r, lane] {
                auto make_all = [&](auto transport) {
                    for (size_t c = 0; c < calls.size(); ++c)
                        if (!run_call(world, transport, static_cast<int>(r), calls[c], buffers[c][r], deadline_ns)) ok = false;
                };
                if (world.staged) {
                    make_all(host::StagedTransport(world, static_cast<int>(r), lane));
                } else {
                    make_all(host::Transport(world, static_cast<int>(r), lane));
                }
            });
        }
    }
    for (auto& t : threads) t.join();
    if (!ok) {
        const auto& e = world.record;
        std::printf("GAVE UP %dx%d seed %llu: reason %u, rank %d waited for rank %d, epoch %u, phase %u, step %d, block %u\n",
                    world.nodes, world.local, static_cast<unsigned long long>(world.seed),
                    static_cast<unsigned>(e.reason), e.rank, e.peer, e.epoch, static_cast<unsigned>(e.phase), e.step,
                    e.block);
        return false;
    }
    for (size_t c = 0; c < calls.size(); ++c)
        if (!check(world, calls[c], c, buffers[c])) return false;
    return true;
}

Call random_call(Dice& dice, uint32_t blocks, uint64_t most) {
    const uint64_t caps[] = {4, 40, 300, 1200, 4097};
    uint64_t cap = caps[dice.below(5)];
    if (cap > most) cap = most;
    Call call{};
#if defined(NVRAR_FEW_TYPES)
    call.type = dice.one_in(2) ? Type::kF32 : Type::kBf16;
#else
    call.type = static_cast<Type>(dice.below(3));
#endif
    call.count = 1 + dice.below(cap);
    call.grid = 1 + static_cast<uint32_t>(dice.below(blocks));
    call.algorithm = static_cast<Algorithm>(dice.below(3));
    call.values = static_cast<Values>(dice.below(3));
    call.in_place = dice.one_in(2);
    call.in_shift = dice.one_in(2) ? 0 : static_cast<int>(dice.below(8));
    call.out_shift = dice.one_in(2) ? 0 : static_cast<int>(dice.below(8));
    call.dense = dice.one_in(2);
    return call;
}

Call random_norm(Dice& dice, uint32_t blocks) {
    Call call{};
    call.type = Type::kF32;
    const uint64_t rows = 1 + dice.below(9);
    call.row_packs = 1 + static_cast<uint32_t>(dice.below(dice.one_in(4) ? 150 : 30));
    call.count = rows * call.row_packs * 4;
    call.grid = 1 + static_cast<uint32_t>(dice.below(blocks));
    call.algorithm = static_cast<Algorithm>(dice.below(3));
    call.in_place = dice.one_in(2);
    call.dense = dice.one_in(2);
    return call;
}

Layout layout_for(int nodes, int local, uint32_t blocks, uint32_t slot_packs) {
    return {blocks, nvrar::slots_for(nodes, local), slot_packs};
}

constexpr int kShapes[][2] = {{1, 2}, {2, 1}, {3, 1}, {2, 2}, {4, 1}, {1, 3}, {5, 1}, {3, 2}, {2, 4},
                              {4, 2}, {1, 8}, {7, 1}, {5, 4}, {2, 3}, {5, 2}, {6, 1}};
constexpr uint64_t kSecond = 1000000000ull;

enum class Wire { kMemory, kCells, kDataThenFlag, kDense, kDenseRepeated, kStaged, kTorn, kSignals };

struct Style {
    int shapes;
    uint64_t most;  // elements
    Wire wire;      // kMemory: stores, both formats mixed; else the hostile network, one format
    uint64_t deadline_ns;
    bool norm = false;  // every second call
};

int sequences(const Style& style, uint64_t seed, int scale) {
    Dice dice(seed);
    int calls_made = 0;
    uint64_t repeats = 0, overtakings = 0;
    for (int s = 0; s < style.shapes; ++s) {
        const int nodes = kShapes[s][0], local = kShapes[s][1], ranks = nodes * local;
        const int lanes = ranks <= 4 ? 1 + static_cast<int>(dice.below(3)) : 1;
        World world(nodes, local, layout_for(nodes, local, 4, dice.one_in(2) ? 32 : 64), lanes, dice.roll() >> 20);
        if (style.wire != Wire::kMemory)
            world.network = std::make_unique<host::AdversarialNetwork>(world.slabs, dice.roll(), style.wire != Wire::kDense);
        world.data_then_flag = style.wire == Wire::kDataThenFlag;
        world.staged = style.wire >= Wire::kStaged;
        world.torn = style.wire >= Wire::kTorn;
        world.signals = style.wire == Wire::kSignals;
        world.nap_every = 16;
        world.set_patience(style.deadline_ns);
        const uint32_t starts[] = {0u, 0xFFFFFFF8u, 0xFFFFFFFDu, 0x7FFFFFFBu};
        world.preset_epochs(starts[dice.below(4)]);
        std::vector<Call> calls;
        const uint64_t most = ranks > 8 ? style.most / 4 : style.most;
        for (int c = 0; c < scale; ++c) {
            calls.push_back(style.norm && c % 2 == 0 ? random_norm(dice, 4) : random_call(dice, 4, most > 1 ? most : 1));
            if (style.wire != Wire::kMemory)
                calls.back().dense = style.wire == Wire::kDense || style.wire == Wire::kDenseRepeated;
        }
        if (!run_all(world, calls, style.deadline_ns)) return 1;
        calls_made += scale;
        if (world.network) {
            repeats += world.network->repeats();
            overtakings += world.network->overtakings();
        }
    }
    std::printf("ok %d calls on %d shapes", calls_made, style.shapes);
    if (style.wire != Wire::kMemory)
        std::printf(", %llu cells delivered twice, %llu out of order", static_cast<unsigned long long>(repeats),
                    static_cast<unsigned long long>(overtakings));
    std::printf("\n");
    return 0;
}

Call plain(uint64_t count, uint32_t grid, Algorithm algorithm, Type type = Type::kF32) {
    return {type, count, grid, algorithm, Values::kIntegers, false, 0, 0};
}

// Long messages in epochs 1 to 12, a jump to just before the wrap, short messages across it up to epoch 10, then long ones
// in epochs 11 and 12 again, whose first cells are still in the slab unless the wrap swept them.
int wrap(uint64_t seed, int scale) {
    for (int turn = 0; turn < scale; ++turn) {
        World world(2, 1, layout_for(2, 1, 1, 256), 1, seed + static_cast<uint64_t>(turn));
        world.nap_every = 2;
        if (!run_all(world, std::vector<Call>(12, plain(1024, 1, Algorithm::kDoubling)), 20 * kSecond)) return 1;
        world.preset_epochs(0xFFFFFFFCu);
        std::vector<Call> calls(12, plain(1, 1, Algorithm::kDoubling));  // FD, FE, FF, 2, ..., 10
        calls.insert(calls.end(), 3, plain(1024, 1, Algorithm::kDoubling));
        if (!run_all(world, calls, 20 * kSecond)) return 1;
        if (world.epochs[0][0] != 13u) {
            std::printf("WRONG epoch %u after the wrap, want 13\n", world.epochs[0][0]);
            return 1;
        }
    }
    std::printf("ok %d wraps\n", scale);
    return 0;
}

// Cells of a long message come for the second time when the sweep at the end of their era is over. The sweep in the middle
// of the next one takes them.
int late_repeat(uint64_t seed, int scale) {
    const Call small = plain(4, 1, Algorithm::kDoubling), large = plain(128, 1, Algorithm::kDoubling);
    for (int turn = 0; turn < scale; ++turn) {
        World world(2, 1, layout_for(2, 1, 1, 64), 1, seed + static_cast<uint64_t>(turn));
        const auto run = [&world](uint32_t epoch, const std::vector<Call>& calls) {
            world.preset_epochs(epoch);
            return run_all(world, calls, 20 * kSecond);
        };
        if (!run(0xFFFFFFFCu, {large})) return 1;
        std::vector<std::vector<uint64_t>> kept;
        for (const auto& slab : world.slabs) kept.emplace_back(slab.get(), slab.get() + world.layout.lines() * 2);
        if (!run(0xFFFFFFFDu, std::vector<Call>(6, small))) return 1;  // FE, FF, 2, ...
        for (size_t r = 0; r < kept.size(); ++r) {
            for (size_t i = 0; i < kept[r].size(); ++i) {  // what nobody has written since
                if (kept[r][i] >> 32 == 0xFFFFFFFDu && world.slabs[r][i] == 0) world.slabs[r][i] = kept[r][i];
            }
        }
        if (!run(0x7FFFFFFCu, std::vector<Call>(6, small))) return 1;
        if (!run(0xFFFFFFFBu, {small, large})) return 1;  // another message in epoch FD
    }
    std::printf("ok %d late repeats\n", scale);
    return 0;
}

// A long message in an even epoch just before the wrap, short ones until its end, and a long one in the same epoch of the
// next era: nothing of the first may reach the receiver again.
int staged_wrap(uint64_t seed, int scale, bool signals) {
    const Call small = plain(4, 1, Algorithm::kDoubling), large = plain(128, 1, Algorithm::kDoubling);
    for (int turn = 0; turn < scale; ++turn) {
        World world(2, 1, layout_for(2, 1, 1, 64), 1, seed + static_cast<uint64_t>(turn));
        world.staged = true;
        world.torn = world.signals = signals;
        world.network = std::make_unique<host::AdversarialNetwork>(world.slabs, world.seed, false);
        world.preset_epochs(0xFFFFFFFCu);
        std::vector<Call> calls{small, large};  // FD, FE
        calls.insert(calls.end(), 9, small);    // FF, 2, ..., 9
        if (!run_all(world, calls, 20 * kSecond)) return 1;
        world.preset_epochs(0xFFFFFFFAu);
        if (!run_all(world, {small, small, small, large, small}, 20 * kSecond)) return 1;
    }
    std::printf("ok %d wraps of staged puts\n", scale);
    return 0;
}

// The bits of doubling when sums do not fit the type: a rank that adds its unrounded value would differ.
int bits(uint64_t seed, int scale) {
    for (int turn = 0; turn < scale; ++turn) {
        const int nodes = 2 + turn % 7, local = 1 + turn % 3;
        World world(nodes, local, layout_for(nodes, local, 2, 64), 1, seed + static_cast<uint64_t>(turn));
        std::vector<Call> calls;
        for (int c = 0; c < 6; ++c) {
            Call call = plain(700, 2, static_cast<Algorithm>(c % 3), Type::kBf16);
            call.dense = c >= 3;
            call.values = Values::kReals;
            calls.push_back(call);
        }
        if (!run_all(world, calls, 20 * kSecond)) return 1;
    }
    std::printf("ok bits of %d worlds\n", scale);
    return 0;
}

bool all_nan(const Call& call, const Buffers& b) {
    for (uint64_t i = 0; i < call.count; ++i)
        if (!std::isnan(widened(call.type, b.target + i * width(call.type)))) return false;
    return true;
}

// One rank never comes. The others end in time, name the missing one, return NaN, and refuse the next call.
int lost(bool by_abort, uint64_t seed, int scale) {
    for (int turn = 0; turn < scale; ++turn) {
        const int nodes = turn % 3 + 1, local = nodes == 1 ? 3 : 2, missing = turn % (nodes * local);
        World world(nodes, local, layout_for(nodes, local, 2, 32), 2, seed + static_cast<uint64_t>(turn));
        world.preset_epochs(41);
        Call call = plain(333, 2, static_cast<Algorithm>(turn % 3), turn % 2 ? Type::kBf16 : Type::kF32);
        call.dense = turn / 3 % 2 == 1;
        world.staged = turn % 3 == 2;
        if (world.staged) world.network = std::make_unique<host::AdversarialNetwork>(world.slabs, seed, true);
        const uint64_t deadline = by_abort ? 600 * kSecond : kSecond / 5;
        const size_t ranks = static_cast<size_t>(world.ranks());
        std::vector<std::vector<Buffers>> b(2, std::vector<Buffers>(ranks));
        std::atomic<int> succeeded{0};
        std::vector<std::thread> threads;
        const uint64_t start = host::now_ns();
        for (size_t r = 0; r < ranks; ++r) {
            for (size_t c = 0; c < 2; ++c) prepare(world, call, c, static_cast<int>(r), b[c][r]);
            for (int lane = 0; lane < 2 && static_cast<int>(r) != missing; ++lane) {
                threads.emplace_back([&, r, lane] {
                    auto make_both = [&](auto transport) {
                        for (size_t c = 0; c < 2; ++c)
                            // The second call must be refused at once: its own deadline is far.
                            if (run_call(world, transport, static_cast<int>(r), call, b[c][r],
                                         c == 0 ? deadline : 600 * kSecond))
                                ++succeeded;
                    };
                    if (world.staged) {
                        make_both(host::StagedTransport(world, static_cast<int>(r), lane));
                    } else {
                        make_both(host::Transport(world, static_cast<int>(r), lane));
                    }
                });
            }
        }
        if (by_abort) {
            std::this_thread::sleep_for(std::chrono::milliseconds(30));
            world.abort = true;
        }
        for (auto& t : threads) t.join();
        const double seconds = static_cast<double>(host::now_ns() - start) * 1e-9;
        const auto& e = world.record;
        const auto want = by_abort ? nvrar::Reason::kAborted : nvrar::Reason::kLate;
        bool nan = true;
        for (size_t r = 0; r < ranks; ++r)
            if (static_cast<int>(r) != missing) nan = nan && all_nan(call, b[0][r]) && all_nan(call, b[1][r]);
        // Somebody may report a rank that itself waits for the missing one, but never itself.
        const bool record = e.reason == want && e.epoch == 42 && e.rank != missing && e.peer != e.rank && e.peer >= 0 &&
                            e.peer < world.ranks() && e.block < 2;
        bool kept = true;
        for (const auto& words : world.epochs)
            for (uint32_t word : words) kept = kept && word == 41;
        // Each rank tells each once, however many of its threads gave up.
        const bool calm = world.poisonings <= world.ranks() * world.ranks();
        if (succeeded != 0 || !nan || !record || !kept || !calm || seconds > 5) {
            std::printf("WRONG missing rank %d of %dx%d: %d calls succeeded, NaN %d, record ok %d (reason %u rank %d peer %d "
                        "epoch %u), epochs kept %d, %d poisonings, %.2f s\n",
                        missing, nodes, local, succeeded.load(), nan, record, static_cast<unsigned>(e.reason), e.rank,
                        e.peer, e.epoch, kept, world.poisonings.load(), seconds);
            return 1;
        }
    }
    std::printf("ok %d worlds with a missing rank\n", scale);
    return 0;
}

// Conversions against the definition, over every 16-bit pattern and the ties between neighbours.
int numerics() {
    for (uint32_t h = 0; h < 0x10000u; ++h) {
        const uint16_t half = static_cast<uint16_t>(h);
        const float brain = nvrar::HalfBrain::to_float(half), ieee = nvrar::HalfIeee::to_float(half);
        const int exponent = static_cast<int>(h >> 10 & 31u), mantissa = static_cast<int>(h & 1023u);
        double want = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(mantissa + 1024, exponent - 25);
        if (exponent == 31) want = mantissa ? std::nan("") : HUGE_VAL;
        if (h & 0x8000u) want = -want;
        const bool same = std::isnan(want) ? std::isnan(ieee) : static_cast<double>(ieee) == want;
        const bool back = (std::isnan(brain) ? nvrar::HalfBrain::from_float(brain) == 0x7FFF
                                             : nvrar::HalfBrain::from_float(brain) == half) &&
                          (std::isnan(ieee) ? nvrar::HalfIeee::from_float(ieee) == 0x7FFF
                                            : nvrar::HalfIeee::from_float(ieee) == half);
        bool ties = true;
        if (exponent != 31 && (h & 0x7FFFu) != 0x7BFFu) {  // half way to the next of larger size: to even
            const float next = nvrar::HalfIeee::to_float(static_cast<uint16_t>(half + 1));
            const float middle = static_cast<float>((static_cast<double>(ieee) + static_cast<double>(next)) / 2);
            const uint16_t even = half & 1u ? static_cast<uint16_t>(half + 1) : half;
            ties = nvrar::HalfIeee::from_float(middle) == even &&
                   nvrar::HalfIeee::from_float(std::nextafterf(middle, ieee)) == half &&
                   nvrar::HalfIeee::from_float(std::nextafterf(middle, next)) == half + 1;
        }
        if (!same || !back || !ties) {
            std::printf("WRONG conversion of %04x: value %d, back %d, ties %d\n", h, same, back, ties);
            return 1;
        }
    }
    const bool edge = nvrar::HalfIeee::from_float(65519.0f) == 0x7BFF && nvrar::HalfIeee::from_float(65520.0f) == 0x7C00 &&
                      nvrar::HalfIeee::from_float(1e30f) == 0x7C00 &&
                      nvrar::HalfBrain::from_float(nvrar::float_of(0x3F808000u)) == 0x3F80 &&
                      nvrar::HalfBrain::from_float(nvrar::float_of(0x3F818000u)) == 0x3F82 &&
                      nvrar::HalfBrain::from_float(nvrar::float_of(0x7F7FFFFFu)) == 0x7F80;
    std::printf(edge ? "ok conversions\n" : "WRONG conversion at an edge\n");
    return edge ? 0 : 1;
}

// Every condition of use, violated alone.
int refusals() {
    alignas(16) static float box[64];
    const nvrar::Topology place{2, 2, 1, 0};
    const Layout fine = layout_for(2, 2, 4, 32);
    const Args call{box, box + 32, 32, 4, Algorithm::kDirect, 1};
    int accepted = 0;
    auto world = [&accepted](nvrar::Topology t, Layout l) { accepted += nvrar::refuse(t, l) == nullptr; };
    auto calls = [&accepted, &fine](Args a) { accepted += nvrar::refuse(fine, a, 4) == nullptr; };
    world({1, 1, 0, 0}, fine);
    world({2, 2, 2, 0}, fine);
    world({2, 2, 0, -1}, fine);
    world({4, 4, 0, 0}, fine);
    world(place, {0, fine.slots, 32});
    world(place, {4, fine.slots, 0});
    world(place, {4, fine.slots, 48});
    world(place, {4, fine.slots - 1, 32});
    world(place, {4, fine.slots, 0x20000000u});
    calls({box, box + 32, 0, 4, Algorithm::kDirect, 1});
    calls({box, box + 32, uint64_t{1} << 32, 4, Algorithm::kDirect, 1});
    calls({nullptr, box, 4, 4, Algorithm::kDirect, 1});
    calls({box, reinterpret_cast<char*>(box) + 129, 4, 4, Algorithm::kDirect, 1});
    calls({box, box + 31, 32, 4, Algorithm::kDirect, 1});
    calls({box, box + 32, 32, 0, Algorithm::kDirect, 1});
    calls({box, box + 32, 32, 5, Algorithm::kDirect, 1});
    calls({box, box + 32, 32, 4, Algorithm::kDirect, 0});
    // Rows of 16 floats; in place; residual and weight apart from everything, then each of them not.
    auto norms = [](const float* in, float* out, float* residual, const float* weight) {
        Args a{in, out, 16, 1, Algorithm::kDirect, 1};
        a.split = nvrar::Split::of(1, 4, 1, 1);
        a.norm = {residual, weight, 4, 16.0f, 1e-5f};
        return nvrar::refuse(a, 4) == nullptr;
    };
    accepted += norms(box, box, box, box + 48) + norms(box, box + 16, box + 4, box + 48) + norms(box, box + 16, box + 28, box + 48);
    accepted += norms(box, box, box + 16, box + 12) + norms(box, box, box + 16, box + 28) + norms(box, box, nullptr, box + 48);
    const Args same{box, box, 64, 1, Algorithm::kDirect, 1};
    const bool good = nvrar::refuse(place, fine) == nullptr && nvrar::refuse(fine, call, 4) == nullptr &&
                      nvrar::refuse(fine, same, 4) == nullptr && norms(box, box + 32, box + 16, box + 48) &&
                      norms(box, box, box + 16, box + 48);
    std::printf(accepted == 0 && good ? "ok 23 refusals\n" : "WRONG accepted %d bad ones, good ones %d\n", accepted, good);
    return accepted == 0 && good ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
    const std::string command = argc > 1 ? argv[1] : "";
    const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
    const int scale = argc > 3 ? std::atoi(argv[3]) : 10;
    const uint64_t patience = (argc > 4 ? std::strtoull(argv[4], nullptr, 10) : 30) * kSecond;
    const int shapes = static_cast<int>(sizeof kShapes / sizeof *kShapes);
    if (command == "numerics") return numerics();
    if (command == "refusals") return refusals();
    if (command == "direct") return sequences({shapes, 4097, Wire::kMemory, patience}, seed, scale);
    if (command == "direct-small") return sequences({10, 600, Wire::kMemory, patience}, seed, scale);
    if (command == "network") return sequences({8, 300, Wire::kCells, patience}, seed, scale);
    if (command == "norm") return sequences({10, 600, Wire::kMemory, patience, true}, seed, scale);
    if (command == "data-then-flag") return sequences({8, 300, Wire::kDataThenFlag, patience}, seed, scale);
    if (command == "staged") return sequences({8, 300, Wire::kStaged, patience}, seed, scale);
    if (command == "torn") return sequences({8, 300, Wire::kTorn, patience}, seed, scale);
    if (command == "signals") return sequences({8, 300, Wire::kSignals, patience}, seed, scale);
    if (command == "network-dense") return sequences({8, 300, Wire::kDense, patience}, seed, scale);
    if (command == "dense-repeated") return sequences({8, 300, Wire::kDenseRepeated, patience}, seed, scale);
    if (command == "wrap") return wrap(seed, scale);
    if (command == "staged-wrap") return staged_wrap(seed, scale, false);
    if (command == "signals-wrap") return staged_wrap(seed, scale, true);
    if (command == "late-repeat") return late_repeat(seed, scale);
    if (command == "bits") return bits(seed, scale);
    if (command == "silent") return lost(false, seed, scale);
    if (command == "abort") return lost(true, seed, scale);
    std::printf("unknown command '%s'\n", command.c_str());
    return 2;
}
