// The loop of a kwm_parallel_for, shared by threads that come when they can, and
// threads that help with one product after the other.

#ifndef KWM_THREADS_H_
#define KWM_THREADS_H_

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>

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

// To wake a thread that sleeps takes longer than most products of one row. So a
// thread that has helped stays awake for a moment and looks for more to do: a
// language model multiplies every few microseconds. Any number of callers may
// be at it; helpers go to the one that came last, and none waits for a helper
// that does not come.
class Helpers {
 public:
  // Runs all chunks, with the help of up to `wanted` other threads.
  // schedule(function) runs a function on a thread of its own some time.
  template <class Schedule>
  void Run(const std::shared_ptr<Chunks>& chunks, int64_t wanted,
           const Schedule& schedule) {
    if (wanted > 0) {
      const uint64_t job = Publish(chunks);
      for (int64_t awake = awake_.load(); awake < wanted; ++awake) {
        ++awake_;
        schedule([this, chunks, job] { Help(chunks, job); });
      }
    }
    chunks->Work();
    chunks->Wait();
  }

 private:
  using Clock = std::chrono::steady_clock;
  // Longer than what a language model does from one product to the next.
  static constexpr std::chrono::microseconds kAwake{200};

  uint64_t Publish(std::shared_ptr<Chunks> chunks) {
    std::lock_guard<std::mutex> lock(mutex_);
    last_.swap(chunks);
    return ++job_;
  }

  void Help(std::shared_ptr<Chunks> chunks, uint64_t job) {
    do {
      chunks->Work();
      chunks.reset();
    } while (Next(&chunks, &job));
  }

  // Waits a moment for a job after this one. False, and no longer counted as
  // awake, if there is none.
  bool Next(std::shared_ptr<Chunks>* chunks, uint64_t* job) {
    const auto end = Clock::now() + kAwake;
    while (job_.load() == *job) {
      if (Clock::now() < end) {
        std::this_thread::yield();
      } else {
        --awake_;
        // Who published meanwhile may have counted on this thread.
        if (job_.load() == *job) return false;
        ++awake_;
      }
    }
    std::lock_guard<std::mutex> lock(mutex_);
    *chunks = last_;
    *job = job_;
    return true;
  }

  std::atomic<uint64_t> job_{0};
  std::atomic<int64_t> awake_{0};  // or about to be
  std::mutex mutex_;
  std::shared_ptr<Chunks> last_;
};

}  // namespace kwm

#endif  // KWM_THREADS_H_
