// Many callers at once share the threads of threads.h: each item of each call is done
// exactly once, before the call returns. Made to run under a thread sanitizer.
//
//     check_helpers SECONDS

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "threads.h"

namespace {

using Clock = std::chrono::steady_clock;

// Threads that sleep until there is something in a queue.
class Pool {
 public:
  explicit Pool(int threads) {
    for (int i = 0; i < threads; ++i) {
      std::thread([this] { Loop(); }).detach();
    }
  }

  void Schedule(std::function<void()> task) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      tasks_.push_back(std::move(task));
    }
    some_.notify_one();
  }

 private:
  void Loop() {
    for (;;) {
      std::unique_lock<std::mutex> lock(mutex_);
      some_.wait(lock, [this] { return !tasks_.empty(); });
      const auto task = std::move(tasks_.front());
      tasks_.pop_front();
      lock.unlock();
      task();
    }
  }

  std::mutex mutex_;
  std::condition_variable some_;
  std::deque<std::function<void()>> tasks_;
};

struct Counts {
  std::vector<std::atomic<int>> done;
};

void Count(void* context, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    ++static_cast<Counts*>(context)->done[static_cast<size_t>(i)];
  }
}

}  // namespace

int main(int argc, char** argv) {
  const double seconds = argc > 1 ? atof(argv[1]) : 1;
  auto& pool = *new Pool(3);
  auto& helpers = *new kwm::Helpers;
  std::atomic<int64_t> calls{0}, wrong{0};
  std::vector<std::thread> callers;
  for (unsigned caller = 0; caller < 3; ++caller) {
    callers.emplace_back([&, caller] {
      std::mt19937 random(caller);
      const auto end = Clock::now() + std::chrono::duration<double>(seconds);
      while (Clock::now() < end) {
        const int64_t count = random() % 40;
        const int64_t threads = 1 + random() % 4;
        Counts counts{std::vector<std::atomic<int>>(count)};
        auto chunks = std::make_shared<kwm::Chunks>(count, 1 + random() % 3,
                                                    threads, Count, &counts);
        helpers.Run(chunks, std::min(threads, chunks->total()) - 1,
                    [&](auto help) { pool.Schedule(help); });
        for (auto& done : counts.done) wrong += done.load() != 1;
        ++calls;
        // Sometimes longer than a helper waits.
        const auto pause = random() % 20 == 0 ? random() % 500 : random() % 20;
        std::this_thread::sleep_for(std::chrono::microseconds(pause));
      }
    });
  }
  for (auto& caller : callers) caller.join();
  printf("%lld calls, %lld items wrong\n", static_cast<long long>(calls),
         static_cast<long long>(wrong));
  fflush(stdout);
  // Threads may still wait for work.
  _exit(wrong != 0 || calls == 0);
}
