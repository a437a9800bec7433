// The compander w = a arctan(v / b): split of the work, sums of all of it.

#include "kernels.h"
#include "work.h"

namespace {

// Fixed, so that the sums do not depend on the threads.
constexpr int64_t kBlock = 2048;
constexpr int64_t kBlockCost = kBlock / kwm::kLanes * 16;

// work(first, count) over all blocks of 0 <= i < count.
template <class Work>
void run_blocks(int64_t count, kwm::Threads threads, const Work& work) {
  threads.run(kwm::ceil_div(count, kBlock), kwm::grain(kBlockCost),
              [&](int64_t begin, int64_t end) {
                for (int64_t block = begin; block < end; ++block) {
                  const int64_t first = block * kBlock;
                  work(first, kwm::min(kBlock, count - first));
                }
              });
}

}  // namespace

void kwm_compand(const float* v, int64_t count, float a, float b, float* w,
                 kwm_parallel_for parallel_for, void* pool) {
  const kwm::Kernels& kernels = kwm::kernels_in_use();
  run_blocks(count, {parallel_for, pool}, [&](int64_t first, int64_t here) {
    kernels.compand(v + first, here, a, b, w + first);
  });
}

void kwm_compand_gradient(const float* v, const float* w,
                          const float* upstream, int64_t count, float a,
                          float b, float* dv, float* da, float* db,
                          kwm_parallel_for parallel_for, void* pool) {
  const kwm::Threads threads{parallel_for, pool};
  const kwm::Kernels& kernels = kwm::kernels_in_use();
  if (da == nullptr) {
    run_blocks(count, threads, [&](int64_t first, int64_t here) {
      kernels.compand_gradient[0](v + first, nullptr, upstream + first, here, a,
                                  b, dv + first, nullptr);
    });
    return;
  }
  const int64_t blocks = kwm::ceil_div(count, kBlock);
  const kwm::Scratch<double> sums(2 * blocks);
  run_blocks(count, threads, [&](int64_t first, int64_t here) {
    kernels.compand_gradient[1](v + first, w + first, upstream + first, here, a,
                                b, dv + first,
                                sums.get() + 2 * (first / kBlock));
  });
  double upstream_w = 0, dv_v = 0;
  for (int64_t block = 0; block < blocks; ++block) {
    upstream_w += sums.get()[2 * block];
    dv_v += sums.get()[2 * block + 1];
  }
  *da = static_cast<float>(upstream_w / a);
  *db = static_cast<float>(-dv_v / b);
}
