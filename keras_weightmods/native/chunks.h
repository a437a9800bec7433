// The loop of a kwm_parallel_for, shared by threads that come when they can.

#ifndef KWM_CHUNKS_H_
#define KWM_CHUNKS_H_

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>

#include "kwm_native.h"

namespace kwm {

// The items 0 <= i < count in chunks that are taken from one counter, so that
// no thread waits for one that is late or never comes.
class Chunks {
 public:
  Chunks(int64_t count, int64_t grain, int64_t threads, kwm_task task,
         void* context)
      : count_(count), task_(task), context_(context) {
    grain = std::max<int64_t>(grain, 1);
    // A few for each thread even out what other programs take of a core.
    const int64_t share = count / (kPerThread * threads) + 1;
    size_ = (share + grain - 1) / grain * grain;
    total_ = (count + size_ - 1) / size_;
  }

  int64_t total() const { return total_; }

  // Runs chunks until none is left to take.
  void Work() {
    for (;;) {
      const int64_t chunk = next_.fetch_add(1, std::memory_order_relaxed);
      if (chunk >= total_) return;
      const int64_t begin = chunk * size_;
      task_(context_, begin, std::min(begin + size_, count_));
      if (done_.fetch_add(1, std::memory_order_acq_rel) + 1 == total_) {
        std::lock_guard<std::mutex> lock(mutex_);
        all_done_.notify_all();
      }
    }
  }

  // Waits, after Work, for the chunks that other threads have started.
  void Wait() {
    for (int i = 0; i < kSpins; ++i) {
      if (Done()) return;
      std::this_thread::yield();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    all_done_.wait(lock, [this] { return Done(); });
  }

 private:
  static constexpr int64_t kPerThread = 4;
  // The last chunk takes microseconds, as long as a sleep and its end.
  static constexpr int kSpins = 100;

  bool Done() const {
    return done_.load(std::memory_order_acquire) == total_;
  }

  const int64_t count_;
  const kwm_task task_;
  void* const context_;
  int64_t size_ = 0;
  int64_t total_ = 0;
  std::atomic<int64_t> next_{0};
  std::atomic<int64_t> done_{0};
  std::mutex mutex_;
  std::condition_variable all_done_;
};

}  // namespace kwm

#endif  // KWM_CHUNKS_H_
