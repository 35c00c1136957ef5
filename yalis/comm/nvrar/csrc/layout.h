// Who owns which part of a message, where a pack lies in a slab, and how epochs count. Pure functions.
// docs/nvrar.md has the picture and the proofs; I1.. are the invariants there.
#pragma once

#include "portable.h"

namespace nvrar {

enum class Algorithm : uint32_t {
    kOneShot,  // every rank sends everything to every rank
    kDoubling,  // reduce-scatter in the node, recursive doubling (with fold) between nodes, all-gather; N = 1: two-shot
    kDirect,  // the same with one exchange among all nodes
};

enum class Phase : uint32_t { kReduce = 1, kBetween = 2, kGather = 3 };

struct Topology {
    int nodes, local;  // N, G
    int node, index;   // this rank's place

    NVRAR_PURE int ranks() const { return nodes * local; }
    NVRAR_PURE int rank() const { return node * local + index; }
    // One-shot is the direct exchange of a world in which every rank is a node.
    NVRAR_PURE Topology flat() const { return {ranks(), 1, rank(), 0}; }
};

NVRAR_PURE int log2_floor(int n) {
    int steps = 0;
    while ((n >> (steps + 1)) != 0) ++steps;
    return steps;
}

// Slots of the exchange between nodes: one per doubling step, then fold and unfold; or one per node.
NVRAR_PURE int between_slots(int nodes) {
    const int doubling = log2_floor(nodes) + 2;
    return nodes > doubling ? nodes : doubling;
}

struct Range {
    uint64_t start, length;
};

// Balanced: the first (count % parts) parts are one longer (I10).
NVRAR_PURE Range share(uint64_t count, uint32_t parts, uint32_t part) {
    const uint64_t base = count / parts, rest = count % parts;
    return {base * part + (part < rest ? part : rest), base + (part < rest ? 1 : 0)};
}

// 0 is what zeroed memory holds (I1). 1 is left out after a wrap so that parity keeps alternating (I2).
NVRAR_PURE uint32_t next_epoch(uint32_t epoch) { return epoch == 0xFFFFFFFFu ? 2u : epoch + 1u; }

// In four epochs of an era, twice for each parity, a block empties cells (I6). Twice, for what a network delivers again
// after it was read: if that comes later than one sweep, the next is still half an era before its flag could match.
NVRAR_PURE bool sweeps(uint32_t epoch) { return (epoch & 0x7FFFFFFEu) == 0x7FFFFFFEu; }

constexpr uint32_t kGroup = 32;  // packs whose first halves are neighbours: one warp's store

struct Layout {
    uint32_t blocks;      // most blocks that a call may use
    uint32_t slots;       // per area
    uint32_t slot_packs;  // capacity of a slot, a multiple of kGroup

    NVRAR_PURE uint64_t area_lines() const { return static_cast<uint64_t>(slots) * slot_packs * 2; }
    NVRAR_PURE uint64_t lines() const { return area_lines() * 2 * blocks; }
    static NVRAR_PURE uint32_t parity(uint32_t epoch) { return epoch & 1u; }
    // Capacities only, never the size of a call (I5).
    NVRAR_PURE uint64_t area(uint32_t block, uint32_t epoch) const {
        return (static_cast<uint64_t>(block) * 2 + parity(epoch)) * area_lines();
    }
    // Line of the first half of a pack, from the start of the area; the second half is kGroup lines on. An area has
    // fewer than 2^32 lines (64 GiB).
    NVRAR_PURE uint32_t line(uint32_t slot, uint32_t pack) const {
        return slot * slot_packs * 2 + pack / kGroup * (2 * kGroup) + pack % kGroup;
    }

    // The same where puts are posted: the second half follows the first, so that the used part of a slot is a stretch of
    // lines that all belong to this call.
    NVRAR_PURE uint32_t posted_line(uint32_t slot, uint32_t pack) const { return (slot * slot_packs + pack) * 2; }

    // The dense format has memory of its own behind the cells: it takes another kind of empty.
    NVRAR_PURE uint64_t dense_lines() const { return static_cast<uint64_t>(slots) * slot_packs * 2 * blocks; }
    NVRAR_PURE uint64_t dense_area(uint32_t block, uint32_t epoch) const {
        return lines() + (static_cast<uint64_t>(block) * 2 + parity(epoch)) * slots * slot_packs;
    }
    NVRAR_PURE uint32_t dense_line(uint32_t slot, uint32_t pack) const { return slot * slot_packs + pack; }
};

// Which packs each block of a call has: contiguous, in units that are not divided (a pack, or a row of an RMSNorm).
// Divided once on the host: a 64-bit division costs a GPU thread a tenth of a microsecond.
struct Split {
    uint32_t base = 0, rest = 0;  // units per group of blocks; the first `rest` groups have one more
    uint32_t unit_packs = 0;      // 0: not yet divided
    uint32_t parts = 1;           // blocks of a group; more than one only where a group has at most one unit

    static NVRAR_PURE Split of(uint64_t units, uint32_t unit_packs, uint32_t grid, uint32_t parts) {
        const uint32_t groups = grid / parts;
        return {static_cast<uint32_t>(units / groups), static_cast<uint32_t>(units % groups), unit_packs, parts};
    }
    NVRAR_PURE Range range(uint32_t block) const {
        const uint32_t group = parts == 1 ? block : block / parts;
        const uint32_t first = base * group + (group < rest ? group : rest), units = base + (group < rest ? 1u : 0u);
        const uint32_t start = first * unit_packs;
        if (parts == 1) return {start, units * unit_packs};
        if (units == 0) return {start, 0};
        const uint32_t each = unit_packs / parts, more = unit_packs % parts, part = block % parts;
        return {start + each * part + (part < more ? part : more), each + (part < more ? 1u : 0u)};
    }
};

// Enough slots for all three algorithms.
NVRAR_PURE uint32_t slots_for(int nodes, int local) {
    const int layered = 2 * local + between_slots(nodes);
    const int flat = 2 + between_slots(nodes * local);
    return static_cast<uint32_t>(layered > flat ? layered : flat);
}

}  // namespace nvrar
