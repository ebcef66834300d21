/* SPDX-License-Identifier: Apache-2.0
 * The host's compute pool as a C type: kernels and plugins split work through it and never start
 * threads of their own. */
#ifndef DS_PARALLEL_H
#define DS_PARALLEL_H
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif

typedef void (*ds_task_fn)(void* user, int64_t index);

/* run() calls task(user, i) once for each i in [0, count), in any order and on any of the pool's
 * threads, and returns when all are done. The index, never the thread, decides what a task
 * computes, so results do not depend on the number of threads. A task should last 50 us to 1 ms:
 * tasks are the points at which background work yields to a waiting engine step. Tasks do not call
 * run() themselves. */
typedef struct ds_parallel {
  uint32_t size;    /* sizeof(ds_parallel) as compiled by the host */
  uint32_t threads; /* upper bound on concurrent tasks; a hint for how finely to split */
  void* ctx;        /* passed back as the first argument */
  void (*run)(void* ctx, int64_t count, ds_task_fn task, void* user);
} ds_parallel;

#ifdef __cplusplus
}
#endif
#endif
