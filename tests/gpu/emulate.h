// Runs decode.cu on a CPU: each lane in a coroutine of its own, and the
// instructions of the GPU from their description in the PTX ISA. Included once,
// before the variants of the kernel, each in a namespace of its own.
//
// Copies are done at one of two moments between which a GPU may do them: when
// they are begun, or when they are waited for; the lanes run in rising order in
// one case and in falling order in the other. What is missing or too early then
// shows in the result.

#ifndef KWM_EMULATE_H_
#define KWM_EMULATE_H_

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <deque>
#include <memory>
#include <set>
#include <string>
#include <vector>

#define KWM_EMULATED
#define __device__
#define __global__
#define __forceinline__
#define __launch_bounds__(threads)

struct uint4 {
  uint32_t x, y, z, w;
};
struct uint2 {
  uint32_t x, y;
};
struct Index {
  int x, y;
};

namespace {

using std::max;
using std::min;

// What the kernel did that it must not do, and what it costs.
struct Account {
  int64_t bad_meta;     // metadata that the instruction does not allow
  int64_t bad_address;  // outside of the arrays, or not aligned
  int64_t tiles;        // of 64 by 64, by groups of copies that are not empty
  int64_t wavefronts;   // of shared memory, in copies and loads
  int64_t weight_sectors, x_sectors;  // of 32 bytes of global memory
} account;

bool eager;  // copies are done when they are begun
int x_type;  // KWM_X of the variant that runs

struct Range {
  const char *begin, *end;
  bool is_x;
};
std::vector<Range> arrays;  // that may be read

void yield();

struct Barrier {
  explicit Barrier(int count) : count(count) {}
  void wait() {
    if (++arrived == count) {
      arrived = 0;
      ++round;
      return;
    }
    for (const int64_t here = round; here == round;) yield();
  }
  int count, arrived = 0;
  int64_t round = 0;
};

// An instruction that a warp's lanes come to one after the other.
struct Access {
  int bytes = 0, lanes = 0;
  uint32_t shared[32] = {};  // 0 of lanes that do not take part
  std::vector<const char*> global;
};

// What the lanes of a warp show each other.
struct Warp {
  Barrier barrier{32};
  uint32_t a[32][4], b[32][4], word[32];
  std::deque<Access> open;
  int64_t closed = 0;
};

constexpr uint32_t kSharedStart = 1024;

struct Block {
  Index index;
  Barrier barrier;
  std::vector<Warp> warps;
  uint8_t* shared;
  size_t size;
  Block(Index index, int threads, size_t size)
      : index(index), barrier(threads), warps(threads / 32), size(size) {
    shared = static_cast<uint8_t*>(aligned_alloc(128, (size + 127) / 128 * 128));
    memset(shared, 0xff, size);  // all are NaN
  }
  ~Block() { free(shared); }
};

struct Copy {
  uint8_t* to;
  const char* from;
  int size;
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Index index;
  Block* block;
  Warp* warp;
  bool done = false;
  int64_t accesses = 0;
  std::deque<std::vector<Copy>> groups;
  std::vector<Copy> group;
};

ucontext_t scheduler;
Thread* current;
std::vector<std::unique_ptr<Block>>* cluster;
std::unique_ptr<Barrier> cluster_barrier;
Index block_dim, grid_dim;

void yield() { swapcontext(&current->context, &scheduler); }

#define threadIdx (current->index)
#define blockIdx (current->block->index)
#define blockDim block_dim
#define gridDim grid_dim

uint8_t* at(Block* block, uint32_t address, int bytes) {
  static uint8_t nowhere[16];
  if (address < kSharedStart || address % bytes != 0 ||
      address + bytes > kSharedStart + block->size) {
    ++account.bad_address;
    return nowhere;
  }
  return block->shared + address - kSharedStart;
}

// Lanes share a wavefront as far as they ask for 128 bytes; where a bank would
// give several words, there are as many.
int wavefronts(const Access& access) {
  const int lanes = 128 / access.bytes;
  int total = 0;
  for (int begin = 0; begin < 32; begin += lanes) {
    std::set<uint32_t> words[32];
    size_t most = 0;
    for (int i = begin; i < begin + lanes; ++i) {
      for (int b = 0; access.shared[i] != 0 && b < access.bytes; b += 4) {
        const uint32_t word = (access.shared[i] + b) / 4;
        words[word % 32].insert(word);
      }
    }
    for (const auto& bank : words) most = max(most, bank.size());
    total += static_cast<int>(most);
  }
  return total;
}

void close(const Access& access) {
  account.wavefronts += wavefronts(access);
  std::set<uintptr_t> weights, x;
  for (const char* from : access.global) {
    bool found = false;
    for (const Range& range : arrays) {
      if (from < range.begin || from + 16 > range.end) continue;
      found = true;
      const auto first = reinterpret_cast<uintptr_t>(from) / 32;
      (range.is_x ? x : weights).insert(first);
    }
    if (!found || reinterpret_cast<uintptr_t>(from) % 16 != 0) {
      ++account.bad_address;
    }
  }
  account.weight_sectors += weights.size();
  account.x_sectors += x.size();
}

// The nth access of a lane belongs to the nth of the others.
void record(int bytes, bool wanted, uint32_t shared, const void* global) {
  Warp& warp = *current->warp;
  const int64_t place = current->accesses++ - warp.closed;
  if (place >= static_cast<int64_t>(warp.open.size())) {
    warp.open.resize(place + 1);
  }
  Access& access = warp.open[place];
  access.bytes = bytes;
  if (wanted) access.shared[threadIdx.x % 32] = shared;
  if (wanted && global) {
    access.global.push_back(static_cast<const char*>(global));
  }
  ++access.lanes;
  while (!warp.open.empty() && warp.open.front().lanes == 32) {
    close(warp.open.front());
    warp.open.pop_front();
    ++warp.closed;
  }
}

uint32_t shared_memory() { return kSharedStart; }

uint32_t kept(uint32_t value) { return value; }

void perform(const Copy& copy) {
  memset(copy.to, 0, 16);
  if (copy.size > 0) memcpy(copy.to, copy.from, copy.size);
}

void copy16(uint32_t to, const void* from, int size = 16, bool wanted = true) {
  record(16, wanted, to, size > 0 ? from : nullptr);
  if (!wanted) return;
  const Copy copy = {at(current->block, to, 16), static_cast<const char*>(from),
                     size};
  if (eager) {
    perform(copy);
  } else {
    // Until it is there, what is read is not what was there before.
    memset(copy.to, 0xff, 16);
  }
  current->group.push_back(copy);
}

void commit_copies() {
  if (!current->group.empty() && threadIdx.x % 32 == 0) ++account.tiles;
  current->groups.push_back(current->group);
  current->group.clear();
}

template <int kLeft>
void wait_for_copies() {
  while (current->groups.size() > kLeft) {
    if (!eager) {
      for (const Copy& copy : current->groups.front()) perform(copy);
    }
    current->groups.pop_front();
  }
}

uint4 load4(uint32_t from) {
  record(16, true, from, nullptr);
  uint4 words;
  memcpy(&words, at(current->block, from, 16), sizeof words);
  return words;
}

uint2 load2(uint32_t from) {
  record(8, true, from, nullptr);
  uint2 words;
  memcpy(&words, at(current->block, from, 8), sizeof words);
  return words;
}

float load_float(uint32_t from) {
  float value;
  memcpy(&value, at(current->block, from, 4), sizeof value);
  return value;
}

void store(uint32_t to, float value) {
  memcpy(at(current->block, to, 4), &value, sizeof value);
}

void store(uint32_t to, uint16_t value) {
  memcpy(at(current->block, to, 2), &value, sizeof value);
}

void sync_cluster() { cluster_barrier->wait(); }

float load_from_peer(uint32_t from, int rank) {
  float value;
  memcpy(&value, at((*cluster)[rank].get(), from, 4), sizeof value);
  return value;
}

void __syncthreads() { current->block->barrier.wait(); }

void __syncwarp() { current->warp->barrier.wait(); }

float __uint_as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const int byte = selector >> 4 * i & 7;
    result |= static_cast<uint32_t>(bytes >> 8 * byte & 0xff) << 8 * i;
  }
  return result;
}

float __shfl_xor_sync(uint32_t, float value, int mask) {
  Warp& warp = *current->warp;
  const int lane = threadIdx.x % 32;
  memcpy(&warp.word[lane], &value, sizeof value);
  warp.barrier.wait();
  const float other = __uint_as_float(warp.word[lane ^ mask]);
  warp.barrier.wait();
  return other;
}

// Each lane reads its row when it comes here: it is no barrier for memory.
void load_matrices(uint32_t (&b)[4], uint32_t row) {
  Warp& warp = *current->warp;
  const int lane = threadIdx.x % 32;
  record(16, true, row, nullptr);
  memcpy(warp.b[lane], at(current->block, row, 16), 16);
  warp.barrier.wait();
  for (int i = 0; i < 4; ++i) b[i] = warp.b[8 * i + lane / 4][lane % 4];
  warp.barrier.wait();
}

uint32_t round_bfloat16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// Of finite numbers.
uint32_t round_float16(float value) {
  const uint32_t sign = signbit(value) ? 0x8000 : 0;
  const float size = fabsf(value);
  if (size < ldexpf(1, -14)) {
    return sign | static_cast<uint32_t>(nearbyintf(ldexpf(size, 24)));
  }
  int exponent;
  const float fraction = frexpf(size, &exponent);  // in [1/2, 1)
  const auto steps = static_cast<uint32_t>(nearbyintf(ldexpf(fraction, 11)));
  return sign | min(((exponent + 13u) << 10) + steps, 0x7c00u);
}

uint32_t round_pair(float low, float high) {
  return x_type == 2 ? round_float16(low) | round_float16(high) << 16
                     : round_bfloat16(low) | round_bfloat16(high) << 16;
}

float widen(uint32_t bits) {
  if (x_type != 2) return __uint_as_float(bits << 16);
  const int exponent = bits >> 10 & 31;
  const float fraction = bits & 0x3ff;
  const float size = exponent == 31  ? NAN
                     : exponent == 0 ? ldexpf(fraction, -24)
                                     : ldexpf(1024 + fraction, exponent - 25);
  return bits & 0x8000 ? -size : size;
}

uint32_t subtract_pair(uint32_t a, uint32_t b) {
  return round_pair(widen(a & 0xffff) - widen(b & 0xffff),
                    widen(a >> 16) - widen(b >> 16));
}

// mma.sp::ordered_metadata.m16n8k32 with 16-bit types, by the figures of the PTX
// ISA: A and its metadata, B, and the sums.
template <int kSelector>
void sparse_mma(float (&sums)[4], const uint32_t (&a)[4],
                const uint32_t (&b)[4], uint32_t meta) {
  Warp& warp = *current->warp;
  const int lane = threadIdx.x % 32;
  memcpy(warp.a[lane], a, sizeof a);
  memcpy(warp.b[lane], b, sizeof b);
  warp.word[lane] = meta;
  warp.barrier.wait();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int group = 0; group < 8; ++group) {
      const uint32_t kept =
          warp.a[row % 8 * 4 + group % 4][row / 8 + group / 4 * 2];
      const uint32_t places =
          warp.word[row % 8 * 4 + 2 * kSelector + group / 4] >>
          (row / 8 * 16 + group % 4 * 4);
      if ((places & 3) >= (places >> 2 & 3)) ++account.bad_meta;
      for (int t = 0; t < 2; ++t) {
        const int k = 4 * group + (places >> 2 * t & 3);
        const uint32_t pair = warp.b[column * 4 + k % 8 / 2][k / 8];
        sums[i] += widen(kept >> 16 * t & 0xffff) *
                   widen(pair >> k % 2 * 16 & 0xffff);
      }
    }
  }
  warp.barrier.wait();
}

struct Arguments {
  const void* x;
  int rows, k, n;
  const void *values, *meta, *scale;
  void* y;
};

void (*entry)(const Arguments&);
const Arguments* entry_arguments;

void run_thread() {
  entry(*entry_arguments);
  current->done = true;
  yield();
}

// Runs a grid, one cluster of blocks after the other.
void emulated(void (*kernel)(const Arguments&), int type, int value_type,
              int split, int warps, size_t shared_bytes,
              const Arguments& arguments) {
  const int blocks = (arguments.n + 15) / 16, rows = (arguments.k + 31) / 32;
  const size_t words = size_t{64} * blocks * rows;
  const auto range = [&](const void* begin, size_t size, bool is_x) {
    const char* from = static_cast<const char*>(begin);
    arrays.push_back({from, from + size, is_x});
  };
  arrays.clear();
  const size_t x_size = static_cast<size_t>(arguments.rows) * arguments.k;
  range(arguments.x, x_size * (type == 0 ? 4 : 2), true);
  range(arguments.values, words * (16 >> value_type), false);
  range(arguments.meta, words, false);
  if (value_type == 3) {
    range(arguments.scale, size_t{32} * blocks * ((rows + 1) / 2), false);
  }
  x_type = type;
  entry = kernel;
  entry_arguments = &arguments;
  block_dim = {32 * warps, 1};
  const int groups = (arguments.n + 63) / 64;
  grid_dim = {groups, split};
  for (int group = 0; group < groups; ++group) {
    std::vector<std::unique_ptr<Block>> made;
    std::vector<std::unique_ptr<Thread>> threads;
    cluster = &made;
    cluster_barrier = std::make_unique<Barrier>(split * block_dim.x);
    for (int rank = 0; rank < split; ++rank) {
      made.push_back(std::make_unique<Block>(Index{group, rank}, block_dim.x,
                                             shared_bytes));
      for (int i = 0; i < block_dim.x; ++i) {
        constexpr size_t kStack = 1 << 16;
        auto thread = std::make_unique<Thread>();
        thread->stack.reset(new char[kStack]);
        thread->index = {i, 0};
        thread->block = made.back().get();
        thread->warp = &made.back()->warps[i / 32];
        getcontext(&thread->context);
        thread->context.uc_stack.ss_sp = thread->stack.get();
        thread->context.uc_stack.ss_size = kStack;
        thread->context.uc_link = nullptr;
        makecontext(&thread->context, run_thread, 0);
        threads.push_back(std::move(thread));
      }
    }
    if (eager) std::reverse(threads.begin(), threads.end());
    for (size_t left = threads.size(); left > 0;) {
      for (auto& thread : threads) {
        if (thread->done) continue;
        current = thread.get();
        swapcontext(&scheduler, &thread->context);
        if (thread->done) --left;
      }
    }
  }
}

// `emulated` for one variant of the kernel.
typedef void (*Runner)(int split, int warps, size_t shared_bytes,
                       const Arguments& arguments);

}  // namespace

#endif  // KWM_EMULATE_H_
