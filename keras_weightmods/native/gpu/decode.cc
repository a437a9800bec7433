// Compiles, keeps and launches the kernels of decode.cu.

#include <string.h>

#include <algorithm>
#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "../kwm_native.h"
#include "kwm_gpu.h"
#include "nvrtc.h"

namespace {

using kwm::Failure;

constexpr int64_t kColumns = 64, kRows = 64;    // of a tile of decode.cu
constexpr int64_t kLargest = int64_t{1} << 31;  // sizes are ints in the kernel

kwm::Source decode_source;

struct Variant {
  int x_type, value_type, rows;
};

Failure check(int x_type, int value_type, int64_t rows) {
  if (value_type < KWM_FLOAT32 || value_type > KWM_INT4) {
    return "packed values are float32, bfloat16, int8 or int4";
  }
  const int64_t most = kwm_gpu_decode_rows(x_type);
  if (most == 0) return "activations are float32, bfloat16 or float16";
  if (rows < 1 || rows > most) {
    return "the decode kernel takes 1 to " + std::to_string(most) +
           " rows of this type, not " + std::to_string(rows);
  }
  return "";
}

// The smallest variant that the rows fit in.
Variant variant_of(int x_type, int value_type, int64_t rows) {
  int fits = x_type == KWM_X_FLOAT32 ? 1 : 8;
  while (fits < rows) fits *= 2;
  return {x_type, value_type, fits};
}

// The ring of a warp: decode_ring.cuh has the same, and checks it.
int64_t warp_bytes(const Variant& variant) {
  constexpr int64_t kStages = 4, kMeta = kColumns * kRows / 8;
  const int64_t kept = kColumns * kRows / 2;
  const int64_t values = variant.value_type == KWM_FLOAT32    ? 4 * kept
                         : variant.value_type == KWM_BFLOAT16 ? 2 * kept
                         : variant.value_type == KWM_INT8     ? kept
                                                              : kept / 2;
  const int64_t scales = variant.value_type == KWM_INT4 ? 2 * kColumns : 0;
  const int64_t x =
      variant.rows * kRows * (variant.x_type == KWM_X_FLOAT32 ? 4 : 2);
  return kStages * (values + kMeta + x + scales);
}

// How the work is shared out: blocks for each 64 columns, and their warps.
struct Shares {
  int64_t blocks, split, warps;
};

// Enough warps for all of the memory's bandwidth, at once if they fit: few
// columns are split over the blocks of a cluster, which sm_90 brought.
Shares shares_of(const kwm::Context& context, const Variant& variant, int64_t k,
                 int64_t n) {
  constexpr int64_t kLargestCluster = 8, kWarpsOfProcessor = 16;
  const bool clusters = context.major() >= 9;
  const kwm::Sizes& sizes = context.sizes();
  const int64_t bytes = warp_bytes(variant);
  const int64_t tiles = std::max<int64_t>(1, (k + kRows - 1) / kRows);
  Shares shares = {(n + kColumns - 1) / kColumns, 1, clusters ? 4 : 8};
  shares.warps = std::max<int64_t>(
      1, std::min({shares.warps, tiles, sizes.shared_of_block / bytes}));
  // A block takes 1 KB beside what it asks for.
  const int64_t resident = std::max<int64_t>(
      1, std::min(sizes.shared_of_processor / (shares.warps * bytes + 1024),
                  kWarpsOfProcessor / shares.warps));
  while (clusters && shares.split < kLargestCluster &&
         2 * shares.split * shares.blocks <= resident * sizes.processors &&
         2 * shares.split * shares.warps <= tiles) {
    shares.split *= 2;
  }
  return shares;
}

Failure compile(int major, int minor, const Variant& variant,
                std::vector<char>* code) {
  return decode_source.compile(
      major, minor,
      {"-DKWM_X=" + std::to_string(variant.x_type),
       "-DKWM_VALUES=" + std::to_string(variant.value_type),
       "-DKWM_ROWS=" + std::to_string(variant.rows),
       "-DKWM_WARP_BYTES=" + std::to_string(warp_bytes(variant))},
      code);
}

// In the context of the device. A kernel stays loaded until the process ends.
Failure get_kernel(int device, const kwm::Context& context,
                   const Variant& variant, void** kernel) {
  static std::map<std::tuple<int, int, int, int>, void*> kernels;
  void*& known = kernels[{device, variant.x_type, variant.value_type,
                          variant.rows}];
  if (known == nullptr) {
    std::vector<char> code;
    KWM_TRY(compile(context.major(), context.minor(), variant, &code));
    const kwm::Driver* driver;
    KWM_TRY(kwm::get_driver(&driver));
    void* module = nullptr;
    int status = driver->ModuleLoadData(&module, code.data());
    if (status == 0) {
      status = driver->ModuleGetFunction(&known, module, "kwm_decode");
    }
    if (status == 0) {
      status = driver->FuncSetAttribute(
          known, kwm::kMaxDynamicShared,
          static_cast<int>(context.sizes().shared_of_block));
    }
    if (status != 0) known = nullptr;
    KWM_TRY(kwm::explain(*driver, "loading the decode kernel", status));
  }
  *kernel = known;
  return "";
}

Failure decode(int device, void* stream, int x_type, int value_type,
               const void* x, int64_t rows, int64_t k, int64_t n,
               const void* values, const void* meta, const void* scale,
               void* y) {
  KWM_TRY(check(x_type, value_type, rows));
  if (n <= 0 || k < 0 || n >= kLargest || k >= kLargest) {
    return "k and n must be sizes of less than 2^31";
  }
  // Misaligned copies would end the context. x may lie anywhere.
  for (const void* array :
       {values, meta, value_type == KWM_INT4 ? scale : nullptr}) {
    if (reinterpret_cast<uintptr_t>(array) % 16 != 0) {
      return "packed arrays must be aligned to 16 bytes on a GPU";
    }
  }
  const kwm::Context context(device);
  KWM_TRY(context.failure());
  const Variant variant = variant_of(x_type, value_type, rows);
  void* kernel = nullptr;
  KWM_TRY(get_kernel(device, context, variant, &kernel));

  const Shares shares = shares_of(context, variant, k, n);
  const auto split = static_cast<unsigned>(shares.split);
  kwm::LaunchAttribute cluster = {kwm::kClusterDimension, 0, {{1, split, 1}}};
  const kwm::Launch launch = {
      {static_cast<unsigned>(shares.blocks), split, 1},
      {static_cast<unsigned>(32 * shares.warps), 1, 1},
      static_cast<unsigned>(shares.warps * warp_bytes(variant)),
      stream,
      &cluster,
      split > 1 ? 1u : 0u};
  int row_count = static_cast<int>(rows), k_size = static_cast<int>(k),
      n_size = static_cast<int>(n);
  void* arguments[] = {&x,      &row_count, &k_size, &n_size,
                       &values, &meta,      &scale,  &y};
  const kwm::Driver* driver;
  KWM_TRY(kwm::get_driver(&driver));
  return kwm::explain(
      *driver, "launching the decode kernel",
      driver->LaunchKernelEx(&launch, kernel, arguments, nullptr));
}

}  // namespace

int kwm_gpu_abi_version(void) { return KWM_GPU_ABI_VERSION; }

int64_t kwm_gpu_decode_rows(int x_type) {
  switch (x_type) {
    case KWM_X_FLOAT32:
      return 8;
    case KWM_X_BFLOAT16:
    case KWM_X_FLOAT16:
      return 16;
    default:
      return 0;
  }
}

const char* kwm_gpu_load_decode(const char* source, const char* nvrtc) {
  const std::lock_guard<std::mutex> lock(kwm::library_mutex());
  return kwm::report(decode_source.load(nvrtc, "decode.cu", source));
}

const char* kwm_gpu_compile_decode(int major, int minor, int x_type,
                                   int value_type, int64_t rows,
                                   int64_t* bytes, void* code_to) {
  const std::lock_guard<std::mutex> lock(kwm::library_mutex());
  std::vector<char> code;
  Failure failure = check(x_type, value_type, rows);
  if (failure.empty()) {
    failure =
        compile(major, minor, variant_of(x_type, value_type, rows), &code);
  }
  const int64_t size = static_cast<int64_t>(code.size());
  if (code_to != nullptr && size <= *bytes) {
    memcpy(code_to, code.data(), code.size());
  }
  *bytes = size;
  return kwm::report(failure);
}

const char* kwm_gpu_prepare_decode(int device, int x_type, int value_type,
                                   int64_t rows) {
  const std::lock_guard<std::mutex> lock(kwm::library_mutex());
  Failure failure = check(x_type, value_type, rows);
  if (!failure.empty()) return kwm::report(failure);
  const kwm::Context context(device);
  failure = context.failure();
  void* kernel = nullptr;
  if (failure.empty()) {
    failure = get_kernel(device, context,
                         variant_of(x_type, value_type, rows), &kernel);
  }
  return kwm::report(failure);
}

const char* kwm_gpu_decode(int device, void* stream, int x_type, int value_type,
                           const void* x, int64_t rows, int64_t k, int64_t n,
                           const void* values, const void* meta,
                           const void* scale, void* y) {
  const std::lock_guard<std::mutex> lock(kwm::library_mutex());
  return kwm::report(decode(device, stream, x_type, value_type, x, rows, k, n,
                            values, meta, scale, y));
}
