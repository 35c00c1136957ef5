/* The all-reduce of yalis from C: no Python, no torch, no MPI.
 *
 * Every rank runs this program with its number, the number of ranks, and the path of a file that all can see, which must
 * not exist yet. Through that file rank 0 hands the others the id. Each rank sums a vector ten times and checks it.
 *
 *     ./nvrar_example RANK RANKS /shared/id
 *
 * README.md has the commands that build it. Without NVRAR_ON_CUDA it uses the host library: processes of one host.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "nvrar.h"

#ifdef NVRAR_ON_CUDA
#include <cuda_runtime.h>
#endif

#define COUNT 10000
#define TIMEOUT_S 20

#define CHECK(call)                                                                           \
    do {                                                                                      \
        const nvrar_status status_ = (call);                                                  \
        if (status_ != NVRAR_OK) {                                                            \
            fprintf(stderr, "%s: status %d: %s\n", #call, (int)status_, nvrar_last_error());  \
            exit(1);                                                                          \
        }                                                                                     \
    } while (0)

static void fail(const char *what) {
    perror(what);
    exit(1);
}

/* Rank 0 publishes `bytes` by an atomic rename; the others wait for the file, but not for ever. */
static void hand_round(int rank, const char *path, void *bytes, size_t size) {
    if (rank == 0) {
        char draft[4096];
        snprintf(draft, sizeof draft, "%s.draft", path);
        FILE *file = fopen(draft, "wb");
        if (!file || fwrite(bytes, 1, size, file) != size || fclose(file) != 0 || rename(draft, path) != 0) fail(path);
        return;
    }
    const struct timespec nap = {0, 10000000};
    for (int waited = 0; waited < TIMEOUT_S * 100; waited++, nanosleep(&nap, NULL)) {
        FILE *file = fopen(path, "rb");
        if (!file) continue;
        if (fread(bytes, 1, size, file) != size) fail(path);
        fclose(file);
        return;
    }
    fprintf(stderr, "rank %d: %s did not appear within %d s\n", rank, path, TIMEOUT_S);
    exit(1);
}

#ifdef NVRAR_ON_CUDA
static void *shared_memory(const nvrar_options *options, const char *path) {
    (void)options, (void)path;
    return NULL;
}
static float *device_memory(void) {
    void *memory = NULL;
    if (cudaMalloc(&memory, COUNT * sizeof(float)) != cudaSuccess) exit(1);
    return memory;
}
static void free_device(float *memory) { cudaFree(memory); }
static void to_device(float *to, const float *from) {
    cudaMemcpy(to, from, COUNT * sizeof(float), cudaMemcpyHostToDevice);
}
/* The all-reduce is asynchronous: its failure shows after the stream has been waited for. */
static void from_device(float *to, const float *from, cudaStream_t stream) {
    cudaStreamSynchronize(stream);
    cudaMemcpy(to, from, COUNT * sizeof(float), cudaMemcpyDeviceToHost);
}
#else
typedef void *cudaStream_t;
/* Zeroed memory that all ranks map: here a file; any other way to share memory will do. */
static void *shared_memory(const nvrar_options *options, const char *path) {
    char name[4096];
    snprintf(name, sizeof name, "%s.memory", path);
    const uint64_t bytes = nvrar_host_bytes(options);
    const int fd = open(name, O_RDWR | O_CREAT, 0600);
    if (fd < 0 || ftruncate(fd, (off_t)bytes) != 0) fail(name);
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (memory == MAP_FAILED) fail(name);
    close(fd);
    return memory;
}
static float *device_memory(void) { return malloc(COUNT * sizeof(float)); }
static void free_device(float *memory) { free(memory); }
static void to_device(float *to, const float *from) { memcpy(to, from, COUNT * sizeof(float)); }
static void from_device(float *to, const float *from, cudaStream_t stream) {
    (void)stream;
    memcpy(to, from, COUNT * sizeof(float));
}
#endif

int main(int argc, char **argv) {
    if (argc != 4) {
        fprintf(stderr, "usage: %s RANK RANKS FILE\n", argv[0]);
        return 2;
    }
    const int rank = atoi(argv[1]), ranks = atoi(argv[2]);
#ifdef NVRAR_ON_CUDA
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || cudaSetDevice(rank % devices) != cudaSuccess) return 1;
#endif
    unsigned char id[NVRAR_UNIQUE_ID_BYTES];
    if (rank == 0) CHECK(nvrar_get_unique_id(id));
    hand_round(rank, argv[3], id, sizeof id);

    nvrar_options options = {0}; /* 0 stands for the library's default */
    options.abi_version = NVRAR_ABI_VERSION;
    options.nodes = 1; /* with more: rank = node * local + index */
    options.local = ranks;
    options.node = 0;
    options.index = rank;
    options.timeout_ns = TIMEOUT_S * 1000000000ull;
    options.host_memory = shared_memory(&options, argv[3]);
    nvrar_comm *comm = NULL;
    CHECK(nvrar_init(&comm, &options, id));
    nvrar_info info;
    CHECK(nvrar_query(comm, &info));

    static float host[COUNT];
    float *x = device_memory();
    cudaStream_t stream = 0;
    /* The plan must be the same on every rank. */
    const nvrar_plan plan = {NVRAR_ONE_SHOT, NVRAR_CELLS, 1, info.threads, 0};
    for (int call = 0; call < 10; call++) {
        for (int i = 0; i < COUNT; i++) host[i] = (float)(i % 100 + rank + call);
        to_device(x, host);
        CHECK(nvrar_all_reduce(comm, x, x, COUNT, NVRAR_F32, &plan, stream));
        from_device(host, x, stream);
        nvrar_error_record record;
        CHECK(nvrar_error(comm, &record));
        for (int i = 0; i < COUNT; i++) {
            const float expected = (float)(ranks * (i % 100 + call) + ranks * (ranks - 1) / 2);
            if (host[i] != expected) {
                fprintf(stderr, "rank %d, call %d: x[%d] is %g, not %g\n", rank, call, i, host[i], expected);
                return 1;
            }
        }
    }
    CHECK(nvrar_finalize(comm));
    free_device(x);
    printf("rank %d of %d: 10 sums of %d floats are right\n", rank, ranks, COUNT);
    return 0;
}
