/* What only the host library has, beside nvrar.h. */
#ifndef NVRAR_HOST_H
#define NVRAR_HOST_H

#include "nvrar.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Ends every wait of this communicator, as nvrar_abort does, once *abort_word is not 0 or a peer's process has ended
 * without nvrar_finalize. `abort_word` may be NULL; `pidfds`: one descriptor of pidfd_open per rank, -1 where unknown;
 * they are copied, and must stay open until nvrar_finalize. Call it before the first all-reduce. */
NVRAR_API nvrar_status nvrar_host_watch(nvrar_comm *comm, const volatile int32_t *abort_word, const int *pidfds);

#ifdef __cplusplus
}
#endif

#endif
