// The all-reduce of one block of one rank, for any Transport. docs/nvrar.md explains and proves it.
//
// A Transport is a class with these members (nothing is virtual):
//
//   uint32_t thread(), threads()           this thread's place in its block
//   bool     all(bool)                     barrier of the block; true when every thread said true
//   void     fence()                       what this thread wrote is visible to every rank before what it writes next
//   void     put(int rank, uint64_t line, const Line&)   into the slab of another rank, in two 8-byte atomic halves
//   Line     load(uint64_t line)           from the own slab, each half read whole
//   void     clear(uint64_t line)          zero a line of the own slab
//   void     commit(int rank, uint64_t line, uint64_t lines)   all threads, after their puts of a phase to that rank
//   void     wipe(uint64_t line)           all ones into a line of the own slab (dense format only)
//   uint32_t epoch(uint32_t block), void set_epoch(uint32_t block, uint32_t)
//   uint64_t now_ns(), bool abort_requested(), bool poisoned(), void poison(int rank)
//   bool     fail(const ErrorRecord&)      the first record is kept; true: this thread tells the peers (one of a rank is enough)
//   void     relax()                       between polls
//   static constexpr uint32_t kPollsPerCheck   polls between two looks at clock, abort and poison
// and, where they exist:
//   static constexpr bool kPosts           puts are staged, commit posts those of all threads, which are exactly the
//                                          `lines` lines from `line` on: each phase ends with a barrier
//   void     arrived()                     the first pack of a call came in (for time stamps)
//   float    sum(float)                    over all threads of the blocks that share a row, in one order (for RMSNorm)
#pragma once

#include <cmath>
#include <type_traits>
#include <utility>

#include "layout.h"
#include "numeric.h"

namespace nvrar {

// Two cells. A reader believes it when both flags are its epoch (I8).
struct alignas(16) Line {
    uint32_t data0, flag0, data1, flag1;
};

enum class Reason : uint32_t { kNone = 0, kLate = 1, kAborted = 2, kPeerFailed = 3 };

struct ErrorRecord {
    Reason reason;
    int32_t rank;  // who gave up
    uint32_t epoch;
    Phase phase;
    int32_t step;  // of recursive doubling; S: fold, S + 1: unfold; -1 where there are no steps
    int32_t peer;  // whose data did not come
    uint32_t block;
};

// What follows the sum in the same kernel: residual = round(residual + sum), out = round(round(residual / rms) * weight).
// Rows of `row_packs`; a block has whole rows, or several blocks (Split::parts) share one.
struct Norm {
    void* residual = nullptr;
    const void* weight = nullptr;
    uint32_t row_packs = 0;
    float hidden = 0, eps = 0;
};

struct Args {
    const void* in;
    void* out;  // in, or memory that does not overlap it
    uint64_t count;
    uint32_t grid;  // blocks of this call, at most Layout::blocks
    Algorithm algorithm;
    uint64_t deadline_ns;
    Split split = {};  // of the packs over the grid; empty: a balanced one, made by each block
    Norm norm = {};    // only for kernels that have it
};

// Why these ranks and this slab cannot work together; nullptr when they can. For the host, at init.
inline const char* refuse(const Topology& world, const Layout& layout) {
    if (world.nodes < 1 || world.local < 1 || world.ranks() < 2) return "an all-reduce needs at least two ranks";
    if (world.node < 0 || world.node >= world.nodes || world.index < 0 || world.index >= world.local)
        return "this rank's place is outside of the topology";
    if (layout.blocks == 0) return "the slab has no blocks";
    if (layout.slot_packs == 0 || layout.slot_packs % kGroup != 0) return "slot_packs must be a multiple of 32, not 0";
    if (layout.slots < slots_for(world.nodes, world.local)) return "too few slots for this topology; use slots_for";
    // Lines of an area and packs of a round are counted in 32 bits.
    if (layout.area_lines() >> 32 != 0) return "an area has 2^32 lines or more; make slot_packs smaller";
    if (static_cast<uint64_t>(layout.slot_packs) * static_cast<uint32_t>(world.local) >> 32 != 0)
        return "a round has 2^32 packs or more; make slot_packs smaller";
    return nullptr;
}

// The same for one call; `width` is the size of an element in bytes.
inline const char* refuse(const Layout& layout, const Args& args, size_t width) {
    const uintptr_t in = reinterpret_cast<uintptr_t>(args.in), out = reinterpret_cast<uintptr_t>(args.out);
    if (args.count == 0) return "nothing to sum; return at once instead";
    if (args.count >> 32 != 0) return "count is 2^32 or more";
    if (in == 0 || out == 0) return "in or out is null";
    if (in % width != 0 || out % width != 0) return "in or out is not aligned to its elements";
    const uint64_t bytes = args.count * width;
    if (in != out && in < out + bytes && out < in + bytes) return "in and out overlap without being the same";
    if (args.grid == 0 || args.grid > layout.blocks) return "grid must be 1 to the slab's number of blocks";
    if (args.deadline_ns == 0) return "a deadline of 0 would end every wait";
    return nullptr;
}

// What a norm reads and writes beside the message, as bytes from an address.
inline const char* refuse_norm(const Args& args, const void* residual, const void* weight, uint64_t bytes, uint64_t row_bytes) {
    if (residual == nullptr || weight == nullptr) return "residual or weight is null";
    const auto meet = [](const void* a, uint64_t a_bytes, const void* b, uint64_t b_bytes) {
        const uintptr_t x = reinterpret_cast<uintptr_t>(a), y = reinterpret_cast<uintptr_t>(b);
        return x < y + b_bytes && y < x + a_bytes;
    };
    // Each would be overwritten before it was read.
    if (meet(residual, bytes, args.in, bytes) || meet(residual, bytes, args.out, bytes)) return "residual overlaps in or out";
    if (meet(weight, row_bytes, args.out, bytes) || meet(weight, row_bytes, residual, bytes))
        return "weight overlaps out or residual";
    return nullptr;
}

// And for one with a norm: `in`, `out` and the split are those of Args.
inline const char* refuse(const Args& args, uint32_t per_pack) {
    const Norm& norm = args.norm;
    if (norm.row_packs == 0 || args.count % (static_cast<uint64_t>(norm.row_packs) * per_pack) != 0)
        return "count is not a whole number of rows";
    if (args.split.unit_packs != norm.row_packs) return "blocks must have whole rows";
    if (args.split.parts > 1 && args.split.base + (args.split.rest != 0 ? 1 : 0) > 1)
        return "blocks share a row only where they have no other";
    const uintptr_t all = reinterpret_cast<uintptr_t>(args.in) | reinterpret_cast<uintptr_t>(args.out) |
                          reinterpret_cast<uintptr_t>(norm.residual) | reinterpret_cast<uintptr_t>(norm.weight);
    const uint64_t width = sizeof(Pack) / per_pack;
    if (const char* why = refuse_norm(args, norm.residual, norm.weight, args.count * width, norm.row_packs * sizeof(Pack)))
        return why;
    if (all % 16 != 0) return "in, out, residual and weight must be aligned to 16 bytes";
    return nullptr;
}

NVRAR_PURE float reciprocal_root(float value) {
#if NVRAR_ON_GPU
    return rsqrtf(value);
#else
    return 1.0f / sqrtf(value);
#endif
}

// Variants that bench/nvrar_two_gpus.py builds and measures; off until one is seen to win.
#if defined(NVRAR_FEW_LOOKS)
constexpr bool kFewLooks = true;  // at the poison word
#else
constexpr bool kFewLooks = false;
#endif
#if defined(NVRAR_POLL_LAST)
constexpr bool kPollLast = true;  // the last pack of a batch alone until it is there, then the others
#else
constexpr bool kPollLast = false;
#endif

// Wire formats (docs/nvrar.md): how many lines a pack takes.
struct Cells {
    static constexpr bool kDense = false;
};

// 16 bytes of data in one line. A word of all ones is one that has not come; the reader puts all ones back. Such a word
// is a NaN (or two) in every type, and is sent as another NaN: sums are the same.
struct Dense {
    static constexpr bool kDense = true;
    static constexpr uint32_t kEmpty = 0xFFFFFFFFu, kOtherNan = 0x7FFF7FFFu;

    static NVRAR_PURE uint32_t sendable(uint32_t word) { return word == kEmpty ? kOtherNan : word; }
};

// Whether two ranks exchange everything in one step. That has fewer cases, and a kernel of its own.
NVRAR_PURE bool is_pair(const Topology& world, Algorithm algorithm) {
    return world.ranks() == 2 && (algorithm == Algorithm::kOneShot || world.local == 1);
}

template <class T, class = void>
struct Posts : std::false_type {};
template <class T>
struct Posts<T, std::void_t<decltype(T::kPosts)>> : std::bool_constant<T::kPosts> {};
template <class T, class = void>
struct Stamps : std::false_type {};
template <class T>
struct Stamps<T, std::void_t<decltype(std::declval<T&>().arrived())>> : std::true_type {};

template <class E, class Format, bool kPair, bool kNorm, class Transport>
class Exchange {
public:
    NVRAR_FN Exchange(Transport& transport, const Topology& world, const Layout& layout, const Args& args, uint32_t block)
        : t_(transport),
          top_(kPair || args.algorithm == Algorithm::kOneShot ? world.flat() : world),
          layout_(layout),
          args_(args),
          block_(block),
          // The addresses of both decide: the same instructions on all packs of a call.
          vectors_(((reinterpret_cast<uintptr_t>(args.in) | reinterpret_cast<uintptr_t>(args.out)) & 15u) == 0),
          whole_(kNorm || (vectors_ && args.count % E::kPerPack == 0)) {}

    // True when the block's part of the sum is in out; false when it gave up and out holds NaN instead.
    NVRAR_FN bool run() {
        const Shard mine = part();
        if (mine.length == 0) return true;  // no exchange, no epoch, alike on every rank (I3)
        const uint32_t limit = layout_.slot_packs * static_cast<uint32_t>(local());
        // A block with one row, or a part of one, whose packs fit into registers keeps the sum there.
        resident_ = kNorm && kPair && mine.length <= args_.norm.row_packs &&
                    mine.length <= kBatch * t_.threads() && mine.length <= limit;
        epoch_ = t_.epoch(block_);
        // Where the variant is on: only by threads that send in the first round, of which a block of a pair has one.
        const bool poisoned = (!kFewLooks || !kPair || t_.thread() < mine.length) && t_.poisoned();
        bool ok = true;
        uint32_t done = 0;
        do {
            const uint32_t left = mine.length - done;
            round_start_ = mine.start + done;
            round_length_ = left < limit ? left : limit;
            // What is sent first is on its way from memory together with the epoch and the poison word.
            Pack ahead[kBatch];
            const Shard first = shard(local() > 1 ? after(index(), local()) : index());
            fetch(ahead, args_.in, first, t_.thread());
            if (poisoned) {
                ok = false;
                if (t_.thread() == 0) t_.fail({Reason::kPeerFailed, top_.rank(), epoch_, Phase::kBetween, -1, -1, block_});
            }
            epoch_ = next_epoch(epoch_);
            area_ = Format::kDense ? layout_.dense_area(block_, epoch_) : layout_.area(block_, epoch_);
            if (sweeps(epoch_)) sweep();
            if (ok) ok = exchange(ahead);
            // What a reader emptied must be empty for everybody before this rank sends again (I12). Between kernels the
            // end of a kernel sees to it.
            if (Format::kDense && done + round_length_ < mine.length) t_.fence();
            // The barrier ends the epoch: after it every thread has read the epoch word and all that came in (I4).
            ok = t_.all(ok);
            if (ok) done += round_length_;
        } while (ok && done < mine.length);
        if (!ok) {
            if (kNorm) done = 0;
            fill_nan({mine.start + done, mine.length - done});
            if constexpr (kNorm) {
                if (args_.split.parts > 1) t_.sum(float_of(F32::kNan));  // the others of this row must not give numbers
            }
            return false;
        }
        if (t_.thread() == 0) t_.set_epoch(block_, epoch_);
        if constexpr (kNorm) normalise(mine);
        return true;
    }

private:
    // Packs of a thread that are loaded and polled together. Two where registers are few: a kernel of one exchange takes
    // half a multiprocessor, so that the next one can be set up beside it; a norm keeps sum, residual and weight; and calls
    // into NVSHMEM take theirs.
    static constexpr int kBatch = kPair || kNorm || Posts<Transport>::value ? 2 : 4;

    // Lines between the two halves of a pack in cells.
    static constexpr uint32_t kApart = Posts<Transport>::value ? 1 : kGroup;

    // Of the one row (part) of a block: the sum, and what it meets next.
    struct Kept {
        Pack sum[kBatch], residual[kBatch], weight[kBatch];
    };

    struct Hop {
        enum Kind { kKeep, kSend, kEveryNode, kFinal } kind;
        int peer;  // kSend: where to; kFinal: the folded node that waits for the result, or -1
        uint32_t slot;
    };

    // A call has fewer than 2^32 elements: packs are counted in 32 bits, as registers are scarce on a GPU.
    struct Shard {
        uint32_t start, length;
    };

    // ---- places -----------------------------------------------------------------------------------------------

    NVRAR_FN Shard part() const {
        const Range r = args_.split.unit_packs != 0
                            ? args_.split.range(block_)
                            : share((args_.count + E::kPerPack - 1) / E::kPerPack, args_.grid, block_);
        return {static_cast<uint32_t>(r.start), static_cast<uint32_t>(r.length)};
    }
    NVRAR_FN int local() const { return kPair ? 1 : top_.local; }
    NVRAR_FN int index() const { return kPair ? 0 : top_.index; }
    static NVRAR_FN int after(int i, int many) { return i + 1 == many ? 0 : i + 1; }
    NVRAR_FN int peer_at(int node, int place) const { return node * local() + place; }
    NVRAR_FN uint32_t between_slot(int which) const { return static_cast<uint32_t>(local() + which); }
    NVRAR_FN uint32_t gather_slot(int place) const {
        return static_cast<uint32_t>(local() + between_slots(top_.nodes) + place);
    }
    NVRAR_FN Shard shard(int place) const {
        if (kPair) return {round_start_, round_length_};
        const uint32_t parts = static_cast<uint32_t>(top_.local), which = static_cast<uint32_t>(place);
        const uint32_t base = round_length_ / parts, rest = round_length_ % parts;
        return {round_start_ + base * which + (which < rest ? which : rest), base + (which < rest ? 1u : 0u)};
    }

    // ---- the message ------------------------------------------------------------------------------------------

    NVRAR_FN Pack load(const void* base, uint32_t pack) const {
        using Bits = typename E::Bits;
        const uint64_t first = static_cast<uint64_t>(pack) * E::kPerPack;
        Pack p{};
        const Bits* at = static_cast<const Bits*>(base) + first;
        if (vectors_ && first + E::kPerPack <= args_.count) {
#if NVRAR_ON_GPU
            p = *reinterpret_cast<const Pack*>(at);
#else
            memcpy(&p, at, sizeof p);
#endif
            return p;
        }
        NVRAR_UNROLL
        for (int k = 0; k < E::kPerPack; ++k) {
            if (first + static_cast<uint64_t>(k) < args_.count) {
                p.w[k * 4 / E::kPerPack] |= static_cast<uint32_t>(at[k])
                                            << (32 / (E::kPerPack / 4) * (k % (E::kPerPack / 4)));
            }
        }
        return p;
    }

    NVRAR_FN void store(uint32_t pack, const Pack& p) const { store(args_.out, pack, p); }

    NVRAR_FN void store(void* base, uint32_t pack, const Pack& p) const {
        using Bits = typename E::Bits;
        const uint64_t first = static_cast<uint64_t>(pack) * E::kPerPack;
        Bits* at = static_cast<Bits*>(base) + first;
        if (vectors_ && first + E::kPerPack <= args_.count) {
#if NVRAR_ON_GPU
            *reinterpret_cast<Pack*>(at) = p;
#else
            memcpy(at, &p, sizeof p);
#endif
            return;
        }
        NVRAR_UNROLL
        for (int k = 0; k < E::kPerPack; ++k) {
            if (first + static_cast<uint64_t>(k) < args_.count) {
                at[k] = static_cast<Bits>(p.w[k * 4 / E::kPerPack] >>
                                          (32 / (E::kPerPack / 4) * (k % (E::kPerPack / 4))));
            }
        }
    }

    // Packs first, first + threads, ... of a shard, as many as there are; all loads before any use.
    NVRAR_FN void fetch(Pack (&packs)[kBatch], const void* base, const Shard& from, uint32_t first) const {
        const uint32_t stride = t_.threads();
#if NVRAR_ON_GPU
        if (whole_) {
            const Pack* const at = static_cast<const Pack*>(base) + from.start;
            NVRAR_UNROLL
            for (int k = 0; k < kBatch; ++k) {
                const uint32_t i = first + static_cast<uint32_t>(k) * stride;
                packs[k] = i < from.length ? at[i] : Pack{};
            }
            return;
        }
#endif
        NVRAR_UNROLL
        for (int k = 0; k < kBatch; ++k) {
            const uint32_t i = first + static_cast<uint32_t>(k) * stride;
            packs[k] = i < from.length ? load(base, from.start + i) : Pack{};
        }
    }

    NVRAR_FN void fill_nan(const Shard& packs) const {
        float nan[E::kPerPack];
        NVRAR_UNROLL
        for (int k = 0; k < E::kPerPack; ++k) nan[k] = float_of(F32::kNan);
        Pack p;
        E::narrow(nan, p);
        for (uint32_t i = t_.thread(); i < packs.length; i += t_.threads()) store(packs.start + i, p);
    }

    static NVRAR_FN void add(float (&sum)[E::kPerPack], const Pack& p) {
        float v[E::kPerPack];
        E::widen(p, v);
        NVRAR_UNROLL
        for (int k = 0; k < E::kPerPack; ++k) sum[k] += v[k];
    }

    // ---- sending ----------------------------------------------------------------------------------------------

    NVRAR_FN void put(int rank, uint32_t slot, uint32_t i, const Pack& p) {
        const uint64_t at = area_ + line(slot, i);
        if constexpr (Format::kDense) {
            t_.put(rank, at, Line{Format::sendable(p.w[0]), Format::sendable(p.w[1]), Format::sendable(p.w[2]),
                                  Format::sendable(p.w[3])});
        } else {
            t_.put(rank, at, Line{p.w[0], epoch_, p.w[1], epoch_});
            t_.put(rank, at + kApart, Line{p.w[2], epoch_, p.w[3], epoch_});
        }
    }

    NVRAR_FN uint32_t line(uint32_t slot, uint32_t i) const {
        if (Format::kDense) return layout_.dense_line(slot, i);
        return Posts<Transport>::value ? layout_.posted_line(slot, i) : layout_.line(slot, i);
    }

    // Every posted line was put in this epoch and will be polled (I14): a line of an older one could come late and be
    // believed after a wrap, or cover a newer one where the fabric does not order two puts to one address.
    NVRAR_FN void commit(int rank, uint32_t slot, uint32_t packs) {
        t_.commit(rank, area_ + line(slot, 0), Format::kDense ? packs : 2 * packs);
    }

    // Ends a phase: true when all went well, of all threads where their puts are posted together.
    NVRAR_FN bool settle(bool ok) {
        if constexpr (Posts<Transport>::value) {
            t_.fence();  // a network card reads what is staged
            return t_.all(ok);
        } else {
            return ok;
        }
    }

    // Sends pack i of the own shard to where it goes next.
    NVRAR_FN void forward(uint32_t i, const Pack& p, const Hop& hop) {
        if (hop.kind == Hop::kSend) {
            put(hop.peer, hop.slot, i, p);
        } else if (hop.kind == Hop::kEveryNode) {
            for (int d = 1, node = top_.node; d < top_.nodes; ++d) {
                node = after(node, top_.nodes);
                put(peer_at(node, index()), between_slot(top_.node), i, p);
            }
        } else if (hop.kind == Hop::kFinal) {
            if (hop.peer >= 0) put(hop.peer, hop.slot, i, p);
            for (int d = 1, j = index(); d < local(); ++d) {
                j = after(j, local());
                put(peer_at(top_.node, j), gather_slot(index()), i, p);
            }
        }
    }

    NVRAR_FN void commit(const Hop& hop) {
        const uint32_t packs = shard(index()).length;
        if (hop.kind == Hop::kSend || (hop.kind == Hop::kFinal && hop.peer >= 0)) commit(hop.peer, hop.slot, packs);
        if (hop.kind == Hop::kEveryNode) {
            for (int node = 0; node < top_.nodes; ++node)
                if (node != top_.node) commit(peer_at(node, index()), between_slot(top_.node), packs);
        }
        if (hop.kind == Hop::kFinal) {
            for (int j = 0; j < local(); ++j)
                if (j != index()) commit(peer_at(top_.node, j), gather_slot(index()), packs);
        }
    }

    // ---- receiving --------------------------------------------------------------------------------------------

    // Polls the packs at lines at[k] of the area, k in need, until all are there; pack k comes from
    // first_peer + k * peer_step.
    NVRAR_FN bool receive(Pack (&got)[kBatch], const uint32_t (&at)[kBatch], int first_peer, int peer_step,
                          uint32_t need, Phase phase, int step) {
        uint32_t polls = 0;
        bool all = !kPollLast;
        for (;;) {
            const uint32_t look = all ? need : need & ~(need >> 1 | need >> 2 | need >> 3);
            Line low[kBatch] = {}, high[kBatch] = {};
            NVRAR_UNROLL
            for (int k = 0; k < kBatch; ++k) {  // all loads first, so that their latencies overlap
                if (look >> k & 1u) {
                    low[k] = t_.load(area_ + at[k]);
                    if constexpr (!Format::kDense) high[k] = t_.load(area_ + at[k] + kApart);
                }
            }
            NVRAR_UNROLL
            for (int k = 0; k < kBatch; ++k) {
                if constexpr (Format::kDense) {
                    const bool whole = low[k].data0 != Format::kEmpty && low[k].flag0 != Format::kEmpty &&
                                       low[k].data1 != Format::kEmpty && low[k].flag1 != Format::kEmpty;
                    if ((look >> k & 1u) && whole) {
                        got[k] = Pack{{low[k].data0, low[k].flag0, low[k].data1, low[k].flag1}};
                        t_.wipe(area_ + at[k]);  // empty for the next epoch of this parity (I12)
                        need &= ~(1u << k);
                    }
                } else {
                    const bool whole = low[k].flag0 == epoch_ && low[k].flag1 == epoch_ &&  // all four cells (I8)
                                       high[k].flag0 == epoch_ && high[k].flag1 == epoch_;
                    if ((look >> k & 1u) && whole) {
                        got[k] = Pack{{low[k].data0, low[k].data1, high[k].data0, high[k].data1}};
                        need &= ~(1u << k);
                    }
                }
            }
            if (kPollLast && (need & look) == 0) all = true;
            if (need == 0) {
                if constexpr (Stamps<Transport>::value) t_.arrived();
                return true;
            }
            if (++polls % Transport::kPollsPerCheck == 0) {
                int missing = -1;
                NVRAR_UNROLL
                for (int k = kBatch - 1; k >= 0; --k)
                    if (need >> k & 1u) missing = first_peer + k * peer_step;
                if (!patient(phase, step, missing)) return false;
            }
            t_.relax();
        }
    }

    // The slow look: false ends every wait of this thread.
    NVRAR_FN bool patient(Phase phase, int step, int peer) {
        if (t_.poisoned()) {  // somebody gave up; where that was a peer, this rank has no record yet
            t_.fail({Reason::kPeerFailed, top_.rank(), epoch_, phase, step, peer, block_});
            return false;
        }
        Reason reason = Reason::kAborted;
        if (!t_.abort_requested()) {
            const uint64_t now = t_.now_ns();
            if (since_ == 0) since_ = now;
            if (now - since_ < args_.deadline_ns) return true;
            reason = Reason::kLate;
        }
        // One thread of a rank tells the peers; all that expire at once would be tens of thousands of messages.
        if (t_.fail({reason, top_.rank(), epoch_, phase, step, peer, block_}))
            for (int rank = 0; rank < top_.ranks(); ++rank) t_.poison(rank);
        return false;
    }

    // w = round(own + what comes from peer), for the own shard; own lies in `own_values`, its first packs maybe in `ahead`.
    NVRAR_FN bool combine(const void* own_values, const Pack (*ahead)[kBatch], int peer, uint32_t slot, Phase phase, int step,
                          const Hop& next) {
        const Shard own = shard(index());
        const uint32_t stride = t_.threads();
        bool ok = true;
        for (uint32_t first = t_.thread(); first < own.length; first += kBatch * stride) {
            Pack got[kBatch] = {}, mine[kBatch];
            uint32_t at[kBatch];
            uint32_t need = 0;
            if (ahead != nullptr && first < stride) {
                NVRAR_UNROLL
                for (int k = 0; k < kBatch; ++k) mine[k] = (*ahead)[k];
            } else {
                fetch(mine, own_values, own, first);
            }
            NVRAR_UNROLL
            for (int k = 0; k < kBatch; ++k) {
                const uint32_t i = first + static_cast<uint32_t>(k) * stride;
                at[k] = line(slot, i);
                if (i < own.length) need |= 1u << k;
            }
            ok = receive(got, at, peer, 0, need, phase, step);
            if (!ok) break;
            NVRAR_UNROLL
            for (int k = 0; k < kBatch; ++k) {
                const uint32_t i = first + static_cast<uint32_t>(k) * stride;
                if (i < own.length) {
                    float sum[E::kPerPack];
                    E::widen(mine[k], sum);  // as it was sent, rounded: both sides add the same two numbers (I9)
                    add(sum, got[k]);
                    if (kNorm && kPair && resident_) {  // goes on from there
                        E::narrow(sum, kept_.sum[k]);
                    } else {
                        emit(own.start, i, sum, next);
                    }
                }
            }
        }
        if (!settle(ok)) return false;
        commit(next);
        return true;
    }

    // w = round(sum in order of `many` sources, own included), for the own shard. Source s writes slot first_slot + s and
    // is rank first_peer + s * peer_step.
    NVRAR_FN bool sum_in_order(const void* own_values, int many, int self,
                               uint32_t first_slot, int first_peer, int peer_step, Phase phase, const Hop& next) {
        if (many == 2) {  // the order of two does not matter, and combine overlaps several packs
            const int other = 1 - self;
            return combine(own_values, nullptr, first_peer + other * peer_step, first_slot + static_cast<uint32_t>(other),
                           phase, -1, next);
        }
        const Shard own = shard(index());
        bool ok = true;
        for (uint32_t i = t_.thread(); ok && i < own.length; i += t_.threads()) {
            float sum[E::kPerPack] = {};
            const Pack mine = load(own_values, own.start + i);
            for (int base = 0; base < many; base += kBatch) {
                Pack got[kBatch] = {};
                uint32_t at[kBatch];
                uint32_t need = 0;
                NVRAR_UNROLL
                for (int k = 0; k < kBatch; ++k) {
                    at[k] = line(first_slot + static_cast<uint32_t>(base + k), i);
                    if (base + k < many && base + k != self) need |= 1u << k;
                }
                ok = receive(got, at, first_peer + base * peer_step, peer_step, need, phase, -1);
                if (!ok) break;
                NVRAR_UNROLL
                for (int k = 0; k < kBatch; ++k) {
                    if (base + k >= many) continue;
                    Pack term = got[k];  // a copy: a reference to either would put both into local memory
                    if (base + k == self) term = mine;
                    if (base + k == 0) {
                        E::widen(term, sum);  // not 0 + term: a sum of -0 is -0
                    } else {
                        add(sum, term);
                    }
                }
            }
            if (ok) emit(own.start, i, sum, next);
        }
        if (!settle(ok)) return false;
        commit(next);
        return true;
    }

    NVRAR_FN void emit(uint32_t start, uint32_t i, const float (&sum)[E::kPerPack], const Hop& next) {
        Pack w;
        E::narrow(sum, w);
        store(start + i, w);
        forward(i, w, next);
    }

    // ---- phases -----------------------------------------------------------------------------------------------

    // `ahead`: the first packs that this thread sends.
    NVRAR_FN bool exchange(const Pack (&ahead)[kBatch]) {
        if constexpr (kPair) {
            send_own(ahead, Hop{Hop::kSend, 1 - top_.node, between_slot(top_.node)});
            if (kNorm && resident_) {
                const Shard own = shard(0);
                fetch(kept_.residual, args_.norm.residual, own, t_.thread());
                fetch(kept_.weight, args_.norm.weight, {column(own.start), own.length}, t_.thread());
            }
            const int other = 1 - top_.node;
            return combine(args_.in, &ahead, other, between_slot(other), Phase::kBetween, -1, Hop{Hop::kKeep, -1, 0});
        } else {
            return layered(ahead);
        }
    }

    NVRAR_FN bool layered(const Pack (&ahead)[kBatch]) {
        const bool one_node = top_.nodes == 1;
        const bool direct = args_.algorithm != Algorithm::kDoubling;
        const int steps = log2_floor(top_.nodes), power = 1 << steps, extras = top_.nodes - power;
        const int fold = steps, unfold = steps + 1;
        const Hop final_hop{Hop::kFinal,
                            !one_node && !direct && top_.node < extras ? peer_at(top_.node + power, top_.index) : -1,
                            between_slot(unfold)};
        const bool extra = !direct && top_.node >= power;
        const bool folded_into = !direct && top_.node < extras;

        Hop first = step_hop(0, steps, final_hop);
        if (one_node) first = final_hop;
        else if (direct) first = Hop{Hop::kEveryNode, -1, 0};
        else if (extra) first = Hop{Hop::kSend, peer_at(top_.node - power, top_.index), between_slot(fold)};
        else if (folded_into) first = Hop{Hop::kKeep, -1, 0};

        if (top_.local > 1) {
            scatter(ahead);
            if (!sum_in_order(args_.in, top_.local, top_.index, 0, peer_at(top_.node, 0), 1, Phase::kReduce, first))
                return false;
        } else {
            send_own(ahead, first);
        }
        // This rank's rounded partial sum; nothing was summed yet where it is alone in its node.
        const void* w = top_.local > 1 ? args_.out : args_.in;
        if (!one_node) {
            if (direct) {
                if (!sum_in_order(w, top_.nodes, top_.node, between_slot(0), peer_at(0, top_.index), top_.local,
                                  Phase::kBetween, final_hop))
                    return false;
            } else if (extra) {
                if (!copy_in(top_.index, between_slot(unfold), peer_at(top_.node - power, top_.index), Phase::kBetween,
                             unfold, final_hop))
                    return false;
            } else {
                // Fold, if there is one, is step -1 of this loop: one copy of combine for both.
                for (int step = folded_into ? -1 : 0; step < steps; ++step) {
                    const int peer = step < 0 ? top_.node + power : top_.node ^ 1 << step;
                    const int place = step < 0 ? fold : step;
                    if (!combine(w, nullptr, peer_at(peer, top_.index), between_slot(place), Phase::kBetween, place,
                                 step_hop(step + 1, steps, final_hop)))
                        return false;
                    w = args_.out;
                }
            }
        }
        for (int d = 1, j = top_.index; d < top_.local; ++d) {
            j = after(j, top_.local);
            if (!copy_in(j, gather_slot(j), peer_at(top_.node, j), Phase::kGather, -1, Hop{Hop::kKeep, -1, 0}))
                return false;
        }
        return true;
    }

    NVRAR_FN Hop step_hop(int step, int steps, const Hop& final_hop) const {
        if (step >= steps) return final_hop;
        return Hop{Hop::kSend, peer_at(top_.node ^ 1 << step, top_.index), between_slot(step)};
    }

    // The rank's own input, where nothing is summed before it is sent.
    NVRAR_FN void send_own(const Pack (&ahead)[kBatch], const Hop& hop) {
        const Shard own = shard(index());
        send(ahead, own, hop);
        settle(true);
        commit(hop);
    }

    NVRAR_FN void send(const Pack (&ahead)[kBatch], const Shard& from, const Hop& hop) {
        const uint32_t stride = t_.threads();
        Pack packs[kBatch];
        NVRAR_UNROLL
        for (int k = 0; k < kBatch; ++k) packs[k] = ahead[k];
        for (uint32_t first = t_.thread(); first < from.length; first += kBatch * stride) {
            if (first >= stride) fetch(packs, args_.in, from, first);
            NVRAR_UNROLL
            for (int k = 0; k < kBatch; ++k) {
                const uint32_t i = first + static_cast<uint32_t>(k) * stride;
                if (i < from.length) forward(i, packs[k], hop);
            }
        }
    }

    NVRAR_FN void scatter(const Pack (&ahead)[kBatch]) {
        Pack packs[kBatch];
        NVRAR_UNROLL
        for (int k = 0; k < kBatch; ++k) packs[k] = ahead[k];
        for (int d = 1, j = top_.index; d < top_.local; ++d) {
            j = after(j, top_.local);
            const Shard part = shard(j);
            if (d > 1) fetch(packs, args_.in, part, t_.thread());
            send(packs, part, Hop{Hop::kSend, peer_at(top_.node, j), static_cast<uint32_t>(top_.index)});
        }
        settle(true);
        for (int j = 0; j < top_.local; ++j) {
            if (j != top_.index) commit(peer_at(top_.node, j), static_cast<uint32_t>(top_.index), shard(j).length);
        }
    }

    // Finished values of shard j, bit for bit, into out (and on, for a node that was folded).
    NVRAR_FN bool copy_in(int j, uint32_t slot, int peer, Phase phase, int step, const Hop& next) {
        const Shard part = shard(j);
        const uint32_t stride = t_.threads();
        bool ok = true;
        for (uint32_t first = t_.thread(); first < part.length; first += kBatch * stride) {
            Pack got[kBatch] = {};
            uint32_t at[kBatch];
            uint32_t need = 0;
            NVRAR_UNROLL
            for (int k = 0; k < kBatch; ++k) {
                const uint32_t i = first + static_cast<uint32_t>(k) * stride;
                at[k] = line(slot, i);
                if (i < part.length) need |= 1u << k;
            }
            ok = receive(got, at, peer, 0, need, phase, step);
            if (!ok) break;
            NVRAR_UNROLL
            for (int k = 0; k < kBatch; ++k) {
                const uint32_t i = first + static_cast<uint32_t>(k) * stride;
                if (i < part.length) {
                    store(part.start + i, got[k]);
                    forward(i, got[k], next);
                }
            }
        }
        if (!settle(ok)) return false;
        commit(next);
        return true;
    }

    // ---- RMSNorm ----------------------------------------------------------------------------------------------

    // Of a pack in its row.
    NVRAR_FN uint32_t column(uint32_t pack) const { return pack % args_.norm.row_packs; }

    // residual + sum, rounded and stored; returns it, and adds its squares.
    NVRAR_FN Pack add_residual(uint32_t pack, const Pack& residual, const Pack& sum, float& squares) const {
        float v[E::kPerPack], x[E::kPerPack];
        E::widen(residual, v);
        E::widen(sum, x);
        NVRAR_UNROLL
        for (int k = 0; k < E::kPerPack; ++k) v[k] += x[k];
        Pack rounded;
        E::narrow(v, rounded);
        E::widen(rounded, v);
        NVRAR_UNROLL
        for (int k = 0; k < E::kPerPack; ++k) squares += v[k] * v[k];
        store(args_.norm.residual, pack, rounded);
        return rounded;
    }

    NVRAR_FN void scale(uint32_t pack, const Pack& value, const Pack& weight, float factor) const {
        float v[E::kPerPack], w[E::kPerPack];
        E::widen(value, v);
        E::widen(weight, w);
        NVRAR_UNROLL
        for (int k = 0; k < E::kPerPack; ++k) v[k] *= factor;
        Pack p;
        E::narrow(v, p);
        E::widen(p, v);
        NVRAR_UNROLL
        for (int k = 0; k < E::kPerPack; ++k) v[k] *= w[k];
        E::narrow(v, p);
        store(pack, p);
    }

    // The rows of this block, whose sums are in `out` (or kept). All threads; what others stored is seen after the barrier
    // of the last round.
    NVRAR_FN void normalise(const Shard& mine) {
        const Norm& norm = args_.norm;
        const uint32_t stride = t_.threads();
        const uint32_t length = args_.split.parts > 1 ? mine.length : norm.row_packs;
        const uint32_t first_column = args_.split.parts > 1 ? column(mine.start) : 0;
        for (uint32_t start = mine.start; start < mine.start + mine.length; start += length) {
            float squares = 0;
            const Shard row{start, length};
            Pack values[kBatch], weight[kBatch];
            for (uint32_t first = t_.thread(); first < length; first += kBatch * stride) {
                Pack residual[kBatch], sum[kBatch], rounded[kBatch];
                if (kPair && resident_) {
                    NVRAR_UNROLL
                    for (int k = 0; k < kBatch; ++k) {
                        residual[k] = kept_.residual[k];
                        sum[k] = kept_.sum[k];
                    }
                } else {
                    fetch(residual, norm.residual, row, first);
                    fetch(sum, args_.out, row, first);
                }
                NVRAR_UNROLL
                for (int k = 0; k < kBatch; ++k) {
                    const uint32_t i = first + static_cast<uint32_t>(k) * stride;
                    rounded[k] = Pack{};
                    if (i < length) rounded[k] = add_residual(start + i, residual[k], sum[k], squares);
                }
                if (first < stride) {
                    NVRAR_UNROLL
                    for (int k = 0; k < kBatch; ++k) values[k] = rounded[k];
                }
            }
            const float total = t_.sum(squares);
            const float factor = reciprocal_root(total / norm.hidden + norm.eps);
            for (uint32_t first = t_.thread(); first < length; first += kBatch * stride) {
                if (first >= stride) fetch(values, norm.residual, row, first);
                if (kPair && resident_) {
                    NVRAR_UNROLL
                    for (int k = 0; k < kBatch; ++k) weight[k] = kept_.weight[k];
                } else {
                    fetch(weight, norm.weight, {first_column, length}, first);
                }
                NVRAR_UNROLL
                for (int k = 0; k < kBatch; ++k) {
                    const uint32_t i = first + static_cast<uint32_t>(k) * stride;
                    if (i < length) scale(start + i, values[k], weight[k], factor);
                }
            }
        }
    }

    // Zero the cells of the next epoch: nobody writes there before this rank sends in this one (I6). A call in the dense
    // format sweeps them, too: the next one may use cells.
    NVRAR_FN void sweep() {
        const uint64_t other = layout_.area(block_, next_epoch(epoch_));
        for (uint64_t i = t_.thread(); i < layout_.area_lines(); i += t_.threads()) t_.clear(other + i);
        t_.fence();
        t_.all(true);
    }

    Transport& t_;
    const Topology top_;
    const Layout& layout_;
    const Args& args_;
    const uint32_t block_;
    const bool vectors_;
    const bool whole_;  // and no pack is cut
    uint32_t epoch_ = 0;
    uint64_t area_ = 0;
    bool resident_ = false;
    Kept kept_{};
    uint32_t round_start_ = 0;
    uint32_t round_length_ = 0;
    uint64_t since_ = 0;
};

// Sums one block's part. Every thread of the block calls it, with the same arguments on all ranks but in and out.
template <class E, class Format = Cells, class Transport>
NVRAR_FN bool run_block(Transport& transport, const Topology& world, const Layout& layout, const Args& args,
                        uint32_t block) {
    if (is_pair(world, args.algorithm))
        return Exchange<E, Format, true, false, Transport>(transport, world, layout, args, block).run();
    return Exchange<E, Format, false, false, Transport>(transport, world, layout, args, block).run();
}

// The same with args.norm. `in` may be `out`; `residual` must not overlap either.
template <class E, class Format = Cells, class Transport>
NVRAR_FN bool run_block_norm(Transport& transport, const Topology& world, const Layout& layout, const Args& args,
                             uint32_t block) {
    if (is_pair(world, args.algorithm))
        return Exchange<E, Format, true, true, Transport>(transport, world, layout, args, block).run();
    return Exchange<E, Format, false, true, Transport>(transport, world, layout, args, block).run();
}

}  // namespace nvrar
