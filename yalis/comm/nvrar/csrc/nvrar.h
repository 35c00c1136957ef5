/* NVRAR as a library: a C ABI without torch, Python or MPI.
 *
 * Two shared objects implement it: the CUDA one (peers through NVSHMEM, calls ordered on a CUDA stream, safe to capture
 * in a graph) and the host one (peers are processes of one host that map the same memory, calls return when done).
 *
 * Every function returns a status; `nvrar_last_error` has the words, per thread. Nothing here waits without a limit.
 * docs/nvrar.md has the protocol, its conditions of use and the proofs.
 */
#ifndef NVRAR_H
#define NVRAR_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define NVRAR_ABI_VERSION 2
#define NVRAR_UNIQUE_ID_BYTES 128
#define NVRAR_API __attribute__((visibility("default")))

typedef struct nvrar_comm nvrar_comm;

typedef enum nvrar_status {
    NVRAR_OK = 0,
    NVRAR_INVALID = 1,   /* an argument is out of range; nothing was launched and the communicator is as before */
    NVRAR_TOO_LARGE = 2, /* the message exceeds the capacity chosen at init; use another all-reduce */
    NVRAR_SYSTEM = 3,    /* CUDA, NVSHMEM or the operating system refused */
    NVRAR_FAILED = 4,    /* a peer did not come or abort was called: see nvrar_error; only finalize is left */
} nvrar_status;

typedef enum nvrar_dtype { NVRAR_BF16 = 0, NVRAR_F16 = 1, NVRAR_F32 = 2 } nvrar_dtype;

/* docs/nvrar.md, "Phases". DOUBLING with one node is the two-shot. */
typedef enum nvrar_algorithm { NVRAR_ONE_SHOT = 0, NVRAR_DOUBLING = 1, NVRAR_DIRECT = 2 } nvrar_algorithm;

/* docs/nvrar.md, "Wire formats". */
typedef enum nvrar_format { NVRAR_CELLS = 0, NVRAR_DENSE = 1 } nvrar_format;

/* How one call is run; the same on every rank. */
typedef struct nvrar_plan {
    uint32_t algorithm; /* nvrar_algorithm */
    uint32_t format;    /* nvrar_format */
    uint32_t blocks;    /* 1 to nvrar_info.blocks */
    uint32_t threads;   /* per block: a multiple of 32, at most nvrar_info.threads; the host takes 1 */
    uint32_t parts;     /* with a norm on CUDA: blocks that share a row, 1, 2, 4 or 8, fewer where blocks or the GPU do not
                           have as many; 0: as many as there are */
} nvrar_plan;

typedef struct nvrar_options {
    uint32_t abi_version; /* NVRAR_ABI_VERSION */
    int32_t nodes;        /* N; a node is what the caller declares one */
    int32_t local;        /* G, ranks of every node; rank = node * local + index */
    int32_t node;         /* this rank's node, 0 .. N-1 */
    int32_t index;        /* and place in it, 0 .. G-1 */
    uint32_t blocks;      /* most blocks of a call; 0: the default */
    uint32_t relay;       /* 1: send between nodes through NVSHMEM puts even where peers are mapped */
    uint32_t whole_cells; /* 1: the network is known to keep aligned writes of 8 bytes whole (docs/nvrar.md, F1), so puts
                             go without a signal; wrong sums where it does not */
    uint32_t ordinary_launch; /* 1: no programmatic dependent launch, see nvrar_all_reduce */
    uint64_t max_bytes;   /* largest message of a call; 0: the default */
    uint64_t timeout_ns;  /* a wait longer than this ends the communicator */
    void *host_memory;    /* host library only: memory that all ranks mapped, zeroed, nvrar_host_bytes() long */
} nvrar_options;

typedef struct nvrar_info {
    uint32_t ranks, rank;
    uint32_t blocks, threads; /* limits of a plan */
    uint32_t mapped_peers;    /* ranks that this one writes by plain stores, itself included */
    uint32_t formats;         /* bit (1 << nvrar_format): usable between all ranks */
    uint32_t relay;           /* 0: stores to all ranks; 1: puts between nodes, in whole cells; 2: puts with signals */
    uint32_t parts;           /* most blocks that may share a row */
    uint64_t max_bytes;       /* capacity of one call */
    uint64_t slab_bytes;      /* symmetric memory in use */
    uint64_t max_hidden;      /* longest row of all_reduce_rmsnorm, in elements; 0: not available */
} nvrar_info;

typedef enum nvrar_reason {
    NVRAR_NO_ERROR = 0,
    NVRAR_LATE = 1,        /* the deadline passed */
    NVRAR_ABORTED = 2,     /* nvrar_abort on this rank */
    NVRAR_PEER_FAILED = 3, /* another rank gave up and said so; its own record has the cause */
} nvrar_reason;

typedef struct nvrar_error_record {
    uint32_t reason; /* nvrar_reason */
    int32_t rank;    /* who gave up */
    uint32_t epoch;
    uint32_t phase;  /* 1 reduce, 2 between nodes, 3 gather */
    int32_t step;    /* of recursive doubling, -1 where there are none */
    int32_t peer;    /* whose data did not come */
    uint32_t block;
} nvrar_error_record;

/* Rank 0 makes an id, the caller brings it to the others; at least NVRAR_UNIQUE_ID_BYTES. */
NVRAR_API nvrar_status nvrar_get_unique_id(void *id);

/* Bytes of shared memory that the host library needs for these options; 0 in the CUDA library. */
NVRAR_API uint64_t nvrar_host_bytes(const nvrar_options *options);

/* Collective. On the CUDA device that is current in the calling thread. */
NVRAR_API nvrar_status nvrar_init(nvrar_comm **comm, const nvrar_options *options, const void *id);
NVRAR_API nvrar_status nvrar_query(const nvrar_comm *comm, nvrar_info *info);

/* out = sum of in over all ranks, the same bits on every rank. `in` and `out`: `count` elements, equal or not
 * overlapping, any alignment to the element (16 bytes is fast), no registration. `stream`: a CUDA stream.
 *
 * All ranks make the same calls in the same order, with the same count, dtype and plan. That is not checked: a rank with
 * another count makes some ranks wait for their deadline, and others may have summed the wrong elements by then.
 *
 * On GPUs of compute capability 9 and above these kernels are launched ahead (programmatic dependent launch): each waits
 * for all kernels before it in the stream before it touches memory. A kernel of yours that is launched in the same way
 * right after one of these must do so, too (griddepcontrol.wait, cudaGridDependencySynchronize), before it reads `out`
 * and before it ends; one that ends without having waited lets the next of these start beside the one before. Where that
 * cannot be had, set `ordinary_launch`. */
NVRAR_API nvrar_status nvrar_all_reduce(nvrar_comm *comm, const void *in, void *out, uint64_t count, uint32_t dtype,
                                        const nvrar_plan *plan, void *stream);

/* residual += sum of in over all ranks; out = residual / sqrt(mean(residual^2) + eps) * weight, row by row.
 * in, residual, out: rows x hidden, contiguous, out may be in, nothing else may overlap; weight: hidden. The sum is rounded
 * to dtype, then the new residual, which is what is normalised: the same bits as the three steps one after another. */
NVRAR_API nvrar_status nvrar_all_reduce_rmsnorm(nvrar_comm *comm, const void *in, void *residual, const void *weight,
                                                void *out, uint64_t rows, uint64_t hidden, float eps, uint32_t dtype,
                                                const nvrar_plan *plan, void *stream);

/* Times of one call on this rank's clock (the GPU's, of its block 0; the host's). Up to `arrived` it waited for the first
 * peer, after that it received the rest. */
typedef struct nvrar_stamp {
    uint64_t entered_ns; /* the kernels before this one in the stream were complete */
    uint64_t arrived_ns; /* the first data from a peer was there; 0: the call needed none */
    uint64_t left_ns;    /* block 0 was done */
} nvrar_stamp;

/* Calls made (or captured) after this note their times when `on` is 1; costs them some 10 ns, on the host 60. */
NVRAR_API nvrar_status nvrar_stamps(nvrar_comm *comm, uint32_t on);

/* The last calls that noted their times, oldest first, at most `most` (4096 are kept). Waits for the device to be idle. */
NVRAR_API nvrar_status nvrar_read_stamps(nvrar_comm *comm, nvrar_stamp *stamps, uint32_t most, uint32_t *count);

/* NVRAR_OK and reason 0 as long as all is well, else NVRAR_FAILED and the first failure. Never blocks; any thread. */
NVRAR_API nvrar_status nvrar_error(const nvrar_comm *comm, nvrar_error_record *record);

/* Ends every wait of this communicator, on this rank and, through them, on its peers. Any thread. */
NVRAR_API nvrar_status nvrar_abort(nvrar_comm *comm);

/* Frees everything. After a failure it does not wait for peers (and gives back less). */
NVRAR_API nvrar_status nvrar_finalize(nvrar_comm *comm);

/* Words for the last status of this thread that was not NVRAR_OK; never NULL. */
NVRAR_API const char *nvrar_last_error(void);

#ifdef __cplusplus
}
#endif

#endif
