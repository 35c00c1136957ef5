// Every interleaving of small cases. The operations of each rank are recorded from the real protocol source, then all
// orders in which ranks can execute them are explored.
//
// Model of one block: a rank is a list of operations: SEND (a line into a peer's slab), RECV (wait until a line of the own
// slab carries an epoch), CLEAR (zero a line of the own slab). Nothing orders blocks of a rank, so one block is the whole
// model, and what holds here needs no kernel boundaries.
//
// Checked in every reachable state:
//   - SEND goes to an empty line: nothing unread there and nothing on its way there; so no order of delivery, delay or
//     repetition (within condition F2) can overwrite an unread cell;
//   - RECV never accepts a cell that was consumed before, was left by an earlier era, or is zeroed memory;
//   - CLEAR meets no unread cell and none on its way;
//   - somebody can move until all are done (termination), and in the end every cell sent was consumed.
//
// Delivery: "late" explores every moment of delivery of every line. "at once" delivers when sent. The second reaches the
// same violations: the first rule looks at lines on their way too, and delivering earlier only enables more.
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <unordered_set>
#include <vector>

#include "protocol.h"

namespace {

using nvrar::Algorithm;
using nvrar::Layout;
using nvrar::Line;
using nvrar::Topology;

struct Op {
    enum Kind { kSend, kRecv, kClear, kWipe } kind;
    int rank;  // whose slab
    uint64_t line;
    uint32_t epoch;
    bool dense = false;
};

// Runs the protocol alone: every poll succeeds at once. Only the first line of a pack is kept; the second goes with it.
class Recorder {
public:
    static constexpr uint32_t kPollsPerCheck = 16;
    Recorder(int rank, uint32_t* word, std::vector<Op>* ops, const Layout& layout)
        : rank_(rank), dense_from_(layout.lines()), word_(word), ops_(ops) {}
    uint32_t thread() const { return 0; }
    uint32_t threads() const { return 1; }
    void fence() {}
    bool all(bool vote) {
        if (!cleared_) now_ = nvrar::next_epoch(now_);
        cleared_ = false;
        return vote;
    }
    void put(int rank, uint64_t line, const Line& l) {
        if (first(line)) ops_->push_back({Op::kSend, rank, line, dense(line) ? now_ : l.flag0, dense(line)});
    }
    Line load(uint64_t line) {
        if (first(line)) ops_->push_back({Op::kRecv, rank_, line, now_, dense(line)});
        if (dense(line)) return {0, 0, 0, 0};  // data, as are any words but all ones
        return {0, now_, 0, now_};
    }
    void wipe(uint64_t line) { ops_->push_back({Op::kWipe, rank_, line, now_, true}); }
    void clear(uint64_t line) {
        cleared_ = true;
        if (first(line)) ops_->push_back({Op::kClear, rank_, line, 0});
    }
    void commit(int, uint64_t, uint64_t) {}
    uint32_t epoch(uint32_t) {
        now_ = nvrar::next_epoch(*word_);
        return *word_;
    }
    void set_epoch(uint32_t, uint32_t epoch) { *word_ = epoch; }
    uint64_t now_ns() { return 0; }
    bool abort_requested() { return true; }  // a poll that does not succeed at once is an error here
    bool poisoned() { return false; }
    void poison(int) {}
    bool fail(const nvrar::ErrorRecord&) {
        std::printf("VIOLATION the recorded protocol waits for an epoch that nobody announced\n");
        std::exit(1);
    }
    void relax() {}

private:
    bool dense(uint64_t line) const { return line >= dense_from_; }
    bool first(uint64_t line) const {
        return dense(line) || line % (2 * nvrar::kGroup) == 0 || line % (2 * nvrar::kGroup) == 1;
    }
    const int rank_;
    const uint64_t dense_from_;
    uint32_t* word_;
    std::vector<Op>* ops_;
    uint32_t now_ = 0;
    bool cleared_ = false;
};

struct Call {
    uint64_t packs;
    uint32_t grid;
    Algorithm algorithm;
    bool dense = false;
};

struct Case {
    int nodes, local;
    uint32_t block, start_epoch;
    uint32_t stale;  // flag that every line holds at first; 0: zeroed memory
    std::vector<Call> calls;
    bool late;
};

struct Statistics {
    uint64_t cases = 0, states = 0, largest = 0;
} statistics;

class Explorer {
public:
    explicit Explorer(const Case& c) : case_(c) { record(); }

    bool run() {
        std::string start(programs_.size() + static_cast<size_t>(messages_), '\0');
        seen_.insert(start);
        std::vector<std::string> stack{start};
        while (!stack.empty()) {
            const std::string state = stack.back();
            stack.pop_back();
            bool moved = false, done = true;
            for (size_t r = 0; r < programs_.size(); ++r) {
                const size_t pc = static_cast<uint8_t>(state[r]);
                if (pc == programs_[r].size()) continue;
                done = false;
                std::string next = state;
                const int outcome = step(next, r, programs_[r][pc]);
                if (outcome < 0) return false;
                if (outcome == 0) continue;
                next[r] = static_cast<char>(pc + 1);
                moved = true;
                if (seen_.insert(next).second) stack.push_back(next);
            }
            if (case_.late) {
                for (int m = 0; m < messages_; ++m) {
                    if (status(state, m) != kOnItsWay) continue;
                    std::string next = state;
                    set(next, m, kThere);
                    moved = true;
                    if (seen_.insert(next).second) stack.push_back(next);
                }
            }
            if (done) {
                for (int m = 0; m < messages_; ++m)
                    if (status(state, m) < kConsumed) return complain("a cell was sent and never consumed");
            } else if (!moved) {
                return complain("deadlock");
            }
        }
        statistics.cases += 1;
        statistics.states += seen_.size();
        if (seen_.size() > statistics.largest) statistics.largest = seen_.size();
        return true;
    }

private:
    enum Status : char { kUnsent = 0, kOnItsWay, kThere, kConsumed, kWiped };

    struct Slot {
        std::vector<int> messages;  // in the order in which they are sent: a line has one writer per epoch
    };

    struct Step {
        Op op;
        int message = -1;  // SEND
        Slot* slot = nullptr;
    };

    char status(const std::string& s, int m) const { return s[programs_.size() + static_cast<size_t>(m)]; }
    void set(std::string& s, int m, Status v) const { s[programs_.size() + static_cast<size_t>(m)] = v; }

    void record() {
        const Layout layout{2, nvrar::slots_for(case_.nodes, case_.local), nvrar::kGroup};
        const int ranks = case_.nodes * case_.local;
        for (int r = 0; r < ranks; ++r) {
            std::vector<Op> ops;
            uint32_t word = case_.start_epoch;
            Recorder recorder(r, &word, &ops, layout);
            std::vector<float> data(64);
            for (const Call& call : case_.calls) {
                if (case_.block >= call.grid) continue;
                const nvrar::Args args{data.data(), data.data(), call.packs * 4, call.grid, call.algorithm, 1};
                const Topology place{case_.nodes, case_.local, r / case_.local, r % case_.local};
                if (call.dense) {
                    nvrar::run_block<nvrar::F32, nvrar::Dense>(recorder, place, layout, args, case_.block);
                } else {
                    nvrar::run_block<nvrar::F32>(recorder, place, layout, args, case_.block);
                }
            }
            programs_.emplace_back();
            for (const Op& op : ops) {
                Step step{op};
                step.slot = &slots_[{op.rank, op.line}];
                if (op.kind == Op::kSend) {
                    step.message = messages_++;
                    epochs_.push_back(op.epoch);
                    step.slot->messages.push_back(step.message);
                }
                programs_.back().push_back(step);
            }
        }
        // A wipe of a line that nobody uses is no event.
        for (auto& program : programs_) {
            std::vector<Step> kept;
            for (const Step& step : program)
                if (step.op.kind != Op::kClear || !step.slot->messages.empty()) kept.push_back(step);
            program = kept;
            if (program.size() > 250) {
                std::printf("VIOLATION a program of %zu operations is too long for this model\n", program.size());
                std::exit(1);
            }
        }
    }

    // 1: done, 0: must wait, -1: violation.
    int step(std::string& state, size_t rank, const Step& step) {
        if (step.op.dense) return dense_step(state, rank, step);
        int there = -1, busy = -1;
        bool written = false, again = false;
        for (int m : step.slot->messages) {
            const char s = status(state, m);
            if (s == kThere) there = m;
            if (s == kThere || s == kOnItsWay) busy = m;
            written = written || s == kConsumed;
            again = again || (s == kConsumed && epochs_[static_cast<size_t>(m)] == step.op.epoch);
        }
        if (step.op.kind == Op::kSend) {
            if (busy >= 0) return complain("an unread cell would be overwritten", static_cast<int>(rank), step.op) - 1;
            set(state, step.message, case_.late ? kOnItsWay : kThere);
            return 1;
        }
        if (step.op.kind == Op::kClear) {
            if (busy >= 0) return complain("an unread cell would be wiped", static_cast<int>(rank), step.op) - 1;
            return 1;
        }
        if (there >= 0 && epochs_[static_cast<size_t>(there)] == step.op.epoch) {
            set(state, there, kConsumed);
            return 1;
        }
        // What lies in the line besides unread cells: consumed ones, those of the earlier era, zeroes. None may match.
        const uint32_t left = written || swept(rank, step, state) ? 0u : case_.stale;
        if (there < 0 && (again || left == step.op.epoch))
            return complain("a stale cell would be believed", static_cast<int>(rank), step.op) - 1;
        return 0;
    }

    // A line of the dense format is empty (nothing sent yet, or wiped) or holds the last message delivered.
    int dense_step(std::string& state, size_t rank, const Step& step) {
        int there = -1, left = -1, coming = -1;
        for (int m : step.slot->messages) {
            const char s = status(state, m);
            if (s == kThere) there = m;
            if (s == kConsumed) left = m;
            if (s == kOnItsWay) coming = m;
        }
        if (step.op.kind == Op::kSend) {
            if (there >= 0 || coming >= 0)
                return complain("an unread cell would be overwritten", static_cast<int>(rank), step.op) - 1;
            if (left >= 0) return complain("a line that was not emptied is sent to", static_cast<int>(rank), step.op) - 1;
            set(state, step.message, case_.late ? kOnItsWay : kThere);
            return 1;
        }
        if (step.op.kind == Op::kWipe) {
            if (there >= 0 || coming >= 0)
                return complain("an unread cell would be wiped", static_cast<int>(rank), step.op) - 1;
            if (left >= 0) set(state, left, kWiped);
            return 1;
        }
        if (left >= 0) return complain("a stale cell would be believed", static_cast<int>(rank), step.op) - 1;
        if (there < 0) return 0;
        if (epochs_[static_cast<size_t>(there)] != step.op.epoch)
            return complain("a cell of another epoch would be believed", static_cast<int>(rank), step.op) - 1;
        set(state, there, kConsumed);
        return 1;
    }

    // Has its owner, which is at this step, wiped the line?
    bool swept(size_t rank, const Step& at, const std::string& state) const {
        for (size_t i = static_cast<uint8_t>(state[rank]); i-- > 0;) {
            const Step& before = programs_[rank][i];
            if (before.slot == at.slot && before.op.kind == Op::kClear) return true;
        }
        return false;
    }

    bool complain(const char* what) const {
        return complain(what, -1, Op{Op::kSend, -1, 0, 0});
    }
    bool complain(const char* what, int rank, const Op& op) const {
        std::printf("VIOLATION %s: %dx%d, block %u, start epoch %u, rank %d, line %llu of rank %d, epoch %u; calls", what,
                    case_.nodes, case_.local, case_.block, case_.start_epoch, rank,
                    static_cast<unsigned long long>(op.line), op.rank, op.epoch);
        for (const Call& c : case_.calls)
            std::printf(" (%llu packs, grid %u, algorithm %u, %s)", static_cast<unsigned long long>(c.packs), c.grid,
                        static_cast<unsigned>(c.algorithm), c.dense ? "dense" : "cells");
        std::printf("\n");
        return false;
    }

    const Case& case_;
    std::vector<std::vector<Step>> programs_;
    std::map<std::pair<int, uint64_t>, Slot> slots_;
    std::vector<uint32_t> epochs_;
    int messages_ = 0;
    std::unordered_set<std::string> seen_;
};

// All sequences of `length` calls out of `menu`.
bool sequences(int nodes, int local, const std::vector<Call>& menu, int length, uint32_t block, uint32_t start,
               uint32_t stale, bool late) {
    uint64_t total = 1;
    for (int i = 0; i < length; ++i) total *= menu.size();
    for (uint64_t code = 0; code < total; ++code) {
        Case c{nodes, local, block, start, stale, {}, late};
        uint64_t rest = code;
        for (int i = 0; i < length; ++i, rest /= menu.size()) c.calls.push_back(menu[rest % menu.size()]);
        Explorer explorer(c);
        if (!explorer.run()) return false;
    }
    return true;
}

}  // namespace

int main() {
    const Algorithm shot = Algorithm::kOneShot, doubling = Algorithm::kDoubling, direct = Algorithm::kDirect;
    // Seen from block 1: one pack in three ways, no pack (idle), not launched, two packs.
    const std::vector<Call> mixed{{2, 2, shot}, {2, 2, doubling}, {2, 2, direct},
                                  {1, 2, doubling}, {1, 1, shot}, {4, 2, doubling}};
    const std::vector<Call> layered{{2, 2, doubling}, {1, 2, doubling}, {4, 2, doubling}};
    // The dense format, alone and between calls in cells.
    const std::vector<Call> packed{{2, 2, shot, true}, {4, 2, doubling, true}, {2, 2, direct, true}, {1, 2, shot, true},
                                   {2, 2, doubling}};
    const uint32_t wrap = 0xFFFFFFFDu;
    bool ok = true;
    // Two ranks, each moment of delivery. The stale flags are those of an earlier era.
    for (const int nodes : {1, 2}) {
        for (const uint32_t start : {0u, wrap}) ok = ok && sequences(nodes, 3 - nodes, mixed, 4, 1, start, 0, true);
        for (const uint32_t stale : {2u, 3u}) ok = ok && sequences(nodes, 3 - nodes, layered, 4, 1, wrap, stale, true);
    }
    for (const int nodes : {1, 2}) ok = ok && sequences(nodes, 3 - nodes, packed, 4, 1, wrap, 0, true);
    // Three ranks, fold included (3x1).
    for (const int nodes : {3, 1}) {
        ok = ok && sequences(nodes, 4 - nodes, packed, 3, 1, 0, 0, false);
        for (const uint32_t start : {0u, wrap}) ok = ok && sequences(nodes, 4 - nodes, mixed, 3, 1, start, 0, false);
        ok = ok && sequences(nodes, 4 - nodes, layered, 3, 1, wrap, 2, false);
        ok = ok && sequences(nodes, 4 - nodes, layered, 3, 1, 0, 0, true);
    }
    // Four ranks.
    for (const int nodes : {2, 4, 1}) {
        ok = ok && sequences(nodes, 4 / nodes, packed, 3, 1, 0, 0, false);
        for (const uint32_t start : {0u, wrap}) ok = ok && sequences(nodes, 4 / nodes, mixed, 3, 1, start, 0, false);
        ok = ok && sequences(nodes, 4 / nodes, layered, 3, 1, wrap, 2, false);
    }
    if (!ok) return 1;
    std::printf("ok %llu cases, %llu states, largest %llu\n", static_cast<unsigned long long>(statistics.cases),
                static_cast<unsigned long long>(statistics.states),
                static_cast<unsigned long long>(statistics.largest));
    return 0;
}
