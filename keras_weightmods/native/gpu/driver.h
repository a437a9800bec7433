// The CUDA driver, opened at run time, and what the GPU's files share.

#ifndef KWM_DRIVER_H_
#define KWM_DRIVER_H_

#include <stddef.h>

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
  int (*LaunchKernel)(void* function, unsigned grid_x, unsigned grid_y,
                      unsigned grid_z, unsigned block_x, unsigned block_y,
                      unsigned block_z, unsigned shared_bytes, void* stream,
                      void** arguments, void** extra);
};

// What a status other than 0 means; `what` says what was tried.
Failure explain(const Driver& driver, const char* what, int status);

// The driver, once kwm_gpu_load_driver has opened it.
Failure get_driver(const Driver** driver);

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

 private:
  const Driver* driver_ = nullptr;
  bool pushed_ = false;
  int major_ = 0, minor_ = 0;
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
