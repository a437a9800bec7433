// A kwm_parallel_for on the OpenMP threads that the process has already.

#ifndef KWM_OPENMP_H_
#define KWM_OPENMP_H_

#include "kwm_native.h"

#ifdef __cplusplus
extern "C" {
#endif

// The pool: the address of GOMP_parallel, and the threads to use.
typedef struct {
  void (*parallel)(void (*function)(void*), void* data, unsigned threads,
                   unsigned flags);
  int64_t threads;
} kwm_openmp;

KWM_API void kwm_openmp_for(void* pool, int64_t count, int64_t grain,
                            kwm_task task, void* context);

#ifdef __cplusplus
}
#endif

#endif  // KWM_OPENMP_H_
