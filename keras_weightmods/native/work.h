// Memory to work in, and threads to share the work.

#ifndef KWM_WORK_H_
#define KWM_WORK_H_

#include <memory>
#include <new>

#include "layout.h"

namespace kwm {

// Memory that begins at a cache line.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t size)
      : data_(static_cast<T*>(::operator new(
            static_cast<size_t>(size) * sizeof(T), kAlignment))) {}
  T* get() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Delete {
    void operator()(T* data) const { ::operator delete(data, kAlignment); }
  };
  std::unique_ptr<T, Delete> data_;
};

struct Threads {
  kwm_parallel_for parallel_for;
  void* pool;

  // work(begin, end) over 0 <= i < count.
  template <class Work>
  void run(int64_t count, int64_t grain, const Work& work) const {
    if (count <= 0) return;
    if (parallel_for == nullptr || count <= grain) return work(0, count);
    parallel_for(
        pool, count, grain,
        [](void* context, int64_t begin, int64_t end) {
          (*static_cast<const Work*>(context))(begin, end);
        },
        const_cast<Work*>(&work));
  }
};

// So many items that a thread has work for some microseconds. An item costs as
// much as that many multiply-adds of 16 lanes.
inline int64_t grain(int64_t cost_of_item) {
  return ceil_div(int64_t{1} << 14, cost_of_item > 0 ? cost_of_item : 1);
}

}  // namespace kwm

#endif  // KWM_WORK_H_
