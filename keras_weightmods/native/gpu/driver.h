// The CUDA driver, opened at run time, and what the GPU's files share.

#ifndef KWM_DRIVER_H_
#define KWM_DRIVER_H_

#include <stddef.h>
#include <stdint.h>

#include <mutex>
#include <string>

namespace kwm {

// A failure, or none if empty.
using Failure = std::string;

// Keeps a failure for the caller of the C interface; NULL if there is none.
const char* report(const Failure& failure);

// The library's own tables; taken by every function of kwm_gpu.h.
std::mutex& library_mutex();

// Opens a shared library, or says why not.
Failure open_library(const char* path, void** library);

// Sets a pointer to a function of the library, or says that it lacks it.
Failure find_symbol(void* library, const char* name, void** symbol);

// A function that some versions of the library lack: null there.
template <typename Function>
void find_optional(void* library, const char* name, Function** function) {
  void* symbol = nullptr;
  find_symbol(library, name, &symbol);
  *function = reinterpret_cast<Function*>(symbol);
}

template <typename Function>
Failure find(void* library, const char* name, Function** function) {
  void* symbol = nullptr;
  const Failure failure = find_symbol(library, name, &symbol);
  *function = reinterpret_cast<Function*>(symbol);
  return failure;
}

// As cuda.h declares CUlaunchAttribute, for the size of a cluster of blocks.
struct LaunchAttribute {
  int id;
  int padding;
  union {
    unsigned cluster[3];
    char bytes[64];
  };
};

// As cuda.h declares CUlaunchConfig.
struct Launch {
  unsigned grid[3], block[3], shared_bytes;
  void* stream;
  LaunchAttribute* attributes;
  unsigned attribute_count;
};

constexpr int kMaxDynamicShared = 8;  // CU_FUNC_ATTRIBUTE_...
constexpr int kClusterDimension = 4;  // CU_LAUNCH_ATTRIBUTE_...

// The driver's functions that are used here, as cuda.h declares them: its
// handles are pointers, its statuses and devices ints.
struct Driver {
  int (*Init)(unsigned flags);
  int (*GetErrorString)(int status, const char** text);
  int (*DeviceGet)(int* device, int ordinal);
  int (*DeviceGetAttribute)(int* value, int attribute, int device);
  int (*PrimaryContextRetain)(void** context, int device);
  int (*ContextPush)(void* context);
  int (*ContextPop)(void** context);
  int (*ModuleLoadData)(void** module, const void* image);
  int (*ModuleGetFunction)(void** function, void* module, const char* name);
  int (*FuncSetAttribute)(void* function, int attribute, int value);
  int (*LaunchKernelEx)(const Launch* launch, void* function, void** arguments,
                        void** extra);
};

// What a status other than 0 means; `what` says what was tried.
Failure explain(const Driver& driver, const char* what, int status);

// The driver, once kwm_gpu_load_driver has opened it.
Failure get_driver(const Driver** driver);

// What a kernel must know of a device, beside its compute capability.
struct Sizes {
  int processors = 0;
  int64_t shared_of_block = 0, shared_of_processor = 0;  // bytes
};

// Makes the context of a device, the one that JAX and torch use, current for
// as long as this lives.
class Context {
 public:
  explicit Context(int device);
  ~Context();
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  const Failure& failure() const { return failure_; }
  // Of the compute capability; valid without a failure.
  int major() const { return major_; }
  int minor() const { return minor_; }
  const Sizes& sizes() const { return sizes_; }

 private:
  const Driver* driver_ = nullptr;
  bool pushed_ = false;
  int major_ = 0, minor_ = 0;
  Sizes sizes_;
  Failure failure_;
};

}  // namespace kwm

// Leaves the function if `expression` is a failure.
#define KWM_TRY(expression)                                   \
  do {                                                        \
    kwm::Failure failure_of_try = (expression);               \
    if (!failure_of_try.empty()) return failure_of_try;       \
  } while (0)

#endif  // KWM_DRIVER_H_
