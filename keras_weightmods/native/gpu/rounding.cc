// Compiles, keeps and launches the kernel of rounding.cu.

#include <map>
#include <utility>
#include <vector>

#include "kwm_gpu.h"
#include "nvrtc.h"

namespace {

using kwm::Failure;

constexpr int64_t kLargest = int64_t{1} << 31;  // sizes are ints in the kernel
constexpr int64_t kMaxThreads = 256;            // of rounding.cu

kwm::Source source;

Failure compile(int major, int minor, int x_type, std::vector<char>* code) {
  if (x_type < KWM_X_FLOAT32 || x_type > KWM_X_FLOAT16) {
    return "rounded are float32, bfloat16 and float16";
  }
  return source.compile(major, minor, {"-DKWM_X=" + std::to_string(x_type)},
                        code);
}

// In the context of the device. A kernel stays loaded until the process ends.
Failure get_kernel(int device, const kwm::Context& context, int x_type,
                   void** kernel) {
  static std::map<std::pair<int, int>, void*> kernels;
  void*& known = kernels[{device, x_type}];
  if (known == nullptr) {
    std::vector<char> code;
    KWM_TRY(compile(context.major(), context.minor(), x_type, &code));
    const kwm::Driver* driver;
    KWM_TRY(kwm::get_driver(&driver));
    void* module = nullptr;
    int status = driver->ModuleLoadData(&module, code.data());
    if (status == 0) {
      status = driver->ModuleGetFunction(&known, module, "kwm_round_rows");
    }
    KWM_TRY(kwm::explain(*driver, "loading the rounding kernel", status));
  }
  *kernel = known;
  return "";
}

Failure prepare(int device, int x_type) {
  const kwm::Context context(device);
  KWM_TRY(context.failure());
  void* kernel;
  return get_kernel(device, context, x_type, &kernel);
}

Failure round_rows(int device, void* stream, int x_type, const void* x,
                   int64_t rows, int64_t padded_rows, int64_t k, void* steps,
                   void* scales) {
  if (rows < 0 || rows > padded_rows || padded_rows < 1 || k < 4 || k % 4 ||
      padded_rows >= kLargest || k >= kLargest) {
    return "rows of a multiple of 4 entries are rounded, not (" +
           std::to_string(rows) + ", " + std::to_string(k) + ")";
  }
  // The kernel loads four entries at once; a misaligned load would end the
  // context.
  const int64_t bytes = x_type == KWM_X_FLOAT32 ? 16 : 8;
  if (reinterpret_cast<uintptr_t>(x) % bytes != 0) {
    return "activations must be aligned to " + std::to_string(bytes) +
           " bytes on a GPU";
  }
  const kwm::Context context(device);
  KWM_TRY(context.failure());
  void* kernel = nullptr;
  KWM_TRY(get_kernel(device, context, x_type, &kernel));
  int64_t threads = (k / 4 + 31) / 32 * 32;
  if (threads > kMaxThreads) threads = kMaxThreads;
  int row_count = static_cast<int>(rows), k_size = static_cast<int>(k);
  void* arguments[] = {&x, &row_count, &k_size, &steps, &scales};
  const kwm::Driver* driver;
  KWM_TRY(kwm::get_driver(&driver));
  const kwm::Launch launch = {{static_cast<unsigned>(padded_rows), 1, 1},
                              {static_cast<unsigned>(threads), 1, 1},
                              0,
                              stream,
                              nullptr,
                              0};
  return kwm::explain(
      *driver, "launching the rounding kernel",
      driver->LaunchKernelEx(&launch, kernel, arguments, nullptr));
}

}  // namespace

const char* kwm_gpu_load_rounding(const char* text, const char* nvrtc) {
  const std::lock_guard<std::mutex> lock(kwm::library_mutex());
  return kwm::report(source.load(nvrtc, "rounding.cu", text));
}

const char* kwm_gpu_compile_rounding(int major, int minor, int x_type,
                                     int64_t* bytes) {
  const std::lock_guard<std::mutex> lock(kwm::library_mutex());
  std::vector<char> code;
  const Failure failure = compile(major, minor, x_type, &code);
  *bytes = static_cast<int64_t>(code.size());
  return kwm::report(failure);
}

const char* kwm_gpu_prepare_rounding(int device, int x_type) {
  const std::lock_guard<std::mutex> lock(kwm::library_mutex());
  return kwm::report(prepare(device, x_type));
}

const char* kwm_gpu_round_rows(int device, void* stream, int x_type,
                               const void* x, int64_t rows,
                               int64_t padded_rows, int64_t k, void* steps,
                               void* scales) {
  const std::lock_guard<std::mutex> lock(kwm::library_mutex());
  return kwm::report(round_rows(device, stream, x_type, x, rows, padded_rows, k,
                                steps, scales));
}
