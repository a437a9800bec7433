// Threads that help with one product after the other.

#ifndef KWM_HELPERS_H_
#define KWM_HELPERS_H_

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>

#include "chunks.h"

namespace kwm {

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

#endif  // KWM_HELPERS_H_
