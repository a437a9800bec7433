// A kwm_parallel_for on the OpenMP threads that the process has already.
//
// torch brings its own OpenMP runtime, whose idle threads keep their cores busy
// for a while: a second pool would compete with them. GOMP_parallel is the
// entry that compilers call, in GNU's runtime and in LLVM's alike. It is found
// at run time, so that this library needs neither.

#include "threads.h"

namespace {

void Work(void* chunks) { static_cast<kwm::Chunks*>(chunks)->Work(); }

}  // namespace

void kwm_openmp_for(void* pool, int64_t count, int64_t grain, kwm_task task,
                    void* context) {
  const auto* openmp = static_cast<const kwm_openmp*>(pool);
  kwm::Chunks chunks(count, grain, openmp->threads, task, context);
  if (chunks.total() <= 1) {
    chunks.Work();
  } else {
    openmp->parallel(Work, &chunks, static_cast<unsigned>(openmp->threads), 0);
  }
}
