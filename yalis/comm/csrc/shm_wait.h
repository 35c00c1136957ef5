/* Waiting for a process of the same host: a number in shared memory that only grows, and how to wait for it.
 *
 * Spin with pause, then yield, then sleep on the number (futex), in slices: each slice looks at the abort words, at the
 * peer's process and at the clock, so that no wait is unbounded. Who last saw the peer on its own core sleeps at once:
 * the peer cannot run before it does, and sched_yield is no help where the scheduler finds that the peer has had its
 * share (measured: the whole spin budget is lost, twice per call).
 */
#ifndef YALIS_SHM_WAIT_H
#define YALIS_SHM_WAIT_H

#include <errno.h>
#include <linux/futex.h>
#include <poll.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define LINE 128 /* two cache lines: adjacent-line prefetch must not drag a neighbour's number along */
#define SLEEP_SLICE_NS 5000000L

enum { OK = 0, LATE = 1, ABORTED = 2, GONE = 3, MISMATCH = 4 };

/* Written by one process, read by the others. Only differences of `value` count, so it may wrap. */
typedef struct {
    _Atomic uint32_t value;
    _Atomic uint32_t sleepers; /* processes that may be asleep on `value` */
    _Atomic int32_t core;      /* where the writer ran when it last published or began to wait; a hint */
} beacon;

typedef struct {
    int64_t timeout_ns, spin_ns, yield_ns;
    const volatile int32_t *abort_word; /* NULL: none */
} patience;

static inline void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

static inline int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static inline int beacon_reached(const beacon *b, uint32_t value) {
    return (int32_t)(atomic_load_explicit(&b->value, memory_order_acquire) - value) >= 0;
}

/* Make `value` and all that was written before it known. */
static inline void beacon_publish(beacon *mine, uint32_t value) {
    atomic_store_explicit(&mine->core, sched_getcpu(), memory_order_relaxed);
    /* Sequentially consistent, both this store and the load after it: a peer first counts itself among the sleepers and
     * then looks at the value, so one of us sees the other. */
    atomic_store(&mine->value, value);
    if (atomic_load(&mine->sleepers)) syscall(SYS_futex, &mine->value, FUTEX_WAKE, INT32_MAX, NULL, NULL, 0);
}

/* Return when `theirs` has reached `value` (OK), or say why not. mine: where this process tells its core; pidfd: of the
 * peer, -1 where unknown; stop: a word of this process that ends the wait like the abort word, or NULL. */
static inline int beacon_wait(const patience *p, beacon *mine, beacon *theirs, uint32_t value, int pidfd,
                              const _Atomic int32_t *stop) {
    int64_t start = now_ns(), deadline = start + p->timeout_ns;
    for (;;) {
        int core = sched_getcpu();
        atomic_store_explicit(&mine->core, core, memory_order_relaxed);
        if (core == atomic_load_explicit(&theirs->core, memory_order_relaxed)) break;
        for (int i = 0; i < 32; i++) {
            if (beacon_reached(theirs, value)) return OK;
            relax();
        }
        if ((p->abort_word && *p->abort_word) || (stop && *stop)) return ABORTED;
        int64_t waited = now_ns() - start;
        if (waited > p->spin_ns + p->yield_ns) break;
        if (waited > p->spin_ns) sched_yield();
    }
    for (;;) {
        int64_t left = deadline - now_ns();
        if (left <= 0) return LATE;
        struct timespec slice = {0, left < SLEEP_SLICE_NS ? left : SLEEP_SLICE_NS};
        atomic_fetch_add(&theirs->sleepers, 1);
        uint32_t seen = atomic_load(&theirs->value);
        long slept = 0;
        if ((int32_t)(seen - value) < 0) slept = syscall(SYS_futex, &theirs->value, FUTEX_WAIT, seen, &slice, NULL, 0);
        int timed_out = slept == -1 && errno == ETIMEDOUT;
        atomic_fetch_sub(&theirs->sleepers, 1);
        if (beacon_reached(theirs, value)) return OK;
        if ((p->abort_word && *p->abort_word) || (stop && *stop)) return ABORTED;
        if (timed_out && pidfd >= 0) {
            struct pollfd ended = {pidfd, POLLIN, 0};
            /* It may have published and ended in good order between our look and this one. */
            if (poll(&ended, 1, 0) == 1) return beacon_reached(theirs, value) ? OK : GONE;
        }
    }
}

#endif
