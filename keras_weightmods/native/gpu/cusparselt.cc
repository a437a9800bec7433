// Products by cuSPARSELt on NVIDIA GPUs, as XLA custom calls that JAX registers
// for the platform CUDA. (torch has bindings of its own.)
//
// In cuSPARSELt's terms D = A B, all transposed: A = W^T (n, k) is the
// structured matrix, row-major; B = x^T (k, rows) and D = y^T (n, rows) are
// column-major, which is x and y as they lie in memory.
//
// Linked with nothing of CUDA: the driver and cuSPARSELt are opened at run time,
// so that the library loads anywhere. Not yet run on a GPU.

#include <dlfcn.h>

#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>

#include "cusparselt_api.h"
#include "kwm_native.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
namespace lt = kwm::cusparselt;

// Leaves the function if `expression` is a failure.
#define KWM_TRY(expression)                                   \
  do {                                                        \
    std::string failure_of_try = (expression);                \
    if (!failure_of_try.empty()) return failure_of_try;       \
  } while (0)

namespace {

// A failure, or none if empty.
using Failure = std::string;
using lt::Opaque;

constexpr uint32_t kAlignment = 16;

lt::Driver driver;
lt::Functions functions;
bool ready = false;

// Guards all that is kept here.
std::mutex& library_mutex() {
  static std::mutex mutex;
  return mutex;
}

template <typename Function>
Failure find(void* library, const char* name, Function** function,
             bool optional = false) {
  *function = reinterpret_cast<Function*>(dlsym(library, name));
  if (*function != nullptr || optional) return "";
  return std::string("a CUDA library lacks ") + name;
}

Failure load(const char* driver_path, const char* path) {
  if (ready) return "";
  void* cuda = dlopen(driver_path, RTLD_NOW | RTLD_LOCAL);
  if (cuda == nullptr) return dlerror();
  KWM_TRY(find(cuda, "cuInit", &driver.Init));
  KWM_TRY(find(cuda, "cuDeviceGet", &driver.DeviceGet));
  KWM_TRY(find(cuda, "cuDevicePrimaryCtxRetain", &driver.PrimaryContextRetain));
  KWM_TRY(find(cuda, "cuCtxPushCurrent_v2", &driver.ContextPush));
  KWM_TRY(find(cuda, "cuCtxPopCurrent_v2", &driver.ContextPop));
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return dlerror();
#define KWM_FIND(name, optional) \
  KWM_TRY(find(library, "cusparseLt" #name, &functions.name, optional))
  KWM_FIND(GetErrorString, true);
  KWM_FIND(MatmulAlgSelectionDestroy, true);
  KWM_FIND(Init, false);
  KWM_FIND(DenseDescriptorInit, false);
  KWM_FIND(MatDescriptorDestroy, false);
  KWM_FIND(StructuredDescriptorInit, false);
  KWM_FIND(MatmulDescriptorInit, false);
  KWM_FIND(MatmulAlgSelectionInit, false);
  KWM_FIND(MatmulPlanInit, false);
  KWM_FIND(MatmulPlanDestroy, false);
  KWM_FIND(MatmulGetWorkspace, false);
  KWM_FIND(Matmul, false);
  KWM_FIND(SpMMACompressedSize2, false);
  KWM_FIND(SpMMACompress2, false);
#undef KWM_FIND
  if (driver.Init(0) != 0) return "the CUDA driver finds no GPU";
  ready = true;
  return "";
}

Failure explain(const char* what, int status) {
  if (status == 0) return "";
  const char* text = "error";
  if (functions.GetErrorString) text = functions.GetErrorString(status);
  return std::string("cuSPARSELt, ") + what + ": " + text + " (" +
         std::to_string(status) + ")";
}

// Makes the primary context of a device, the one that JAX uses, current for as
// long as this lives; retained once and for good, as JAX keeps it too.
class Context {
 public:
  explicit Context(int ordinal) {
    static std::map<int, void*> contexts;
    if (!ready) {
      failure_ = "cuSPARSELt is not loaded";
      return;
    }
    void*& context = contexts[ordinal];
    int device = 0;
    if (context == nullptr && (driver.DeviceGet(&device, ordinal) != 0 ||
                               driver.PrimaryContextRetain(&context, device))) {
      failure_ = "the CUDA driver has no device " + std::to_string(ordinal);
      return;
    }
    pushed_ = driver.ContextPush(context) == 0;
    if (!pushed_) failure_ = "the CUDA driver refused its context";
  }
  ~Context() {
    void* context = nullptr;
    if (pushed_) driver.ContextPop(&context);
  }
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  const Failure& failure() const { return failure_; }

 private:
  bool pushed_ = false;
  Failure failure_;
};

// The handle of the current context's device, kept until the process ends.
Failure get_handle(int device, const Opaque** handle) {
  static std::map<int, std::unique_ptr<Opaque>> handles;
  std::unique_ptr<Opaque>& known = handles[device];
  if (known == nullptr) {
    auto made = std::make_unique<Opaque>();
    KWM_TRY(explain("handle", functions.Init(made.get())));
    known = std::move(made);
  }
  *handle = known.get();
  return "";
}

Failure get_type(ffi::DataType type, int* known) {
  if (type != ffi::BF16 && type != ffi::F16) {
    return "cuSPARSELt multiplies bfloat16 and float16 here";
  }
  *known = type == ffi::BF16 ? lt::kR16BF : lt::kR16F;
  return "";
}

// A structure of the library, with the function that frees what it points to.
class Owned {
 public:
  explicit Owned(int (*lt::Functions::*destroy)(const Opaque*))
      : destroy_(destroy) {}
  ~Owned() {
    const auto destroy = functions.*destroy_;
    if (made_ && destroy) destroy(&opaque_);
  }
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;

  // Fills it by a function of the library, or says what failed.
  template <typename Init>
  Failure init(const char* what, const Init& init) {
    const int status = init(&opaque_);
    made_ = status == 0;
    return explain(what, status);
  }
  Opaque* get() { return &opaque_; }
  const Opaque* get() const { return &opaque_; }

 private:
  int (*lt::Functions::*destroy_)(const Opaque*);
  Opaque opaque_;
  bool made_ = false;
};

struct Descriptor : Owned {
  Descriptor() : Owned(&lt::Functions::MatDescriptorDestroy) {}
};

// A kernel (k, n) of a type, on a device.
struct Kernel {
  const Opaque* handle = nullptr;
  int64_t k = 0, n = 0;
  int type = 0;
  Descriptor matrix;
  size_t compressed = 0, workspace = 0;  // bytes
};

// Kernels and plans are few, one for each shape, and kept until the process
// ends; beyond it too, as the library may be gone before this one.
Failure get_kernel(int device, int64_t k, int64_t n, ffi::DataType type,
                   const Kernel** kernel) {
  using Key = std::tuple<int, int64_t, int64_t, int>;
  static auto& kernels = *new std::map<Key, std::unique_ptr<Kernel>>;
  auto& known = kernels[{device, k, n, static_cast<int>(type)}];
  if (known == nullptr) {
    auto made = std::make_unique<Kernel>();
    made->k = k, made->n = n;
    KWM_TRY(get_handle(device, &made->handle));
    KWM_TRY(get_type(type, &made->type));
    KWM_TRY(made->matrix.init("structured matrix", [&](Opaque* matrix) {
      return functions.StructuredDescriptorInit(
          made->handle, matrix, n, k, k, kAlignment, made->type,
          lt::kOrderRow, lt::kSparsity50);
    }));
    KWM_TRY(explain("size", functions.SpMMACompressedSize2(
                                made->handle, made->matrix.get(),
                                &made->compressed, &made->workspace)));
    known = std::move(made);
  }
  *kernel = known.get();
  return "";
}

struct Plan {
  Descriptor b, d;
  Opaque matmul;
  Owned selection{&lt::Functions::MatmulAlgSelectionDestroy};
  Owned plan{&lt::Functions::MatmulPlanDestroy};
  size_t workspace = 0;
};

Failure make_plan(const Kernel& a, int64_t rows, Plan* plan) {
  const auto init_dense = [&](const char* what, int64_t size,
                              Descriptor* matrix) {
    return matrix->init(what, [&](Opaque* made) {
      return functions.DenseDescriptorInit(a.handle, made, size, rows, size,
                                           kAlignment, a.type,
                                           lt::kOrderColumn);
    });
  };
  KWM_TRY(init_dense("activations", a.k, &plan->b));
  KWM_TRY(init_dense("result", a.n, &plan->d));
  KWM_TRY(explain("product", functions.MatmulDescriptorInit(
                                 a.handle, &plan->matmul, lt::kNonTranspose,
                                 lt::kNonTranspose, a.matrix.get(),
                                 plan->b.get(), plan->d.get(), plan->d.get(),
                                 lt::kCompute32F)));
  KWM_TRY(plan->selection.init("algorithms", [&](Opaque* made) {
    return functions.MatmulAlgSelectionInit(a.handle, made, &plan->matmul,
                                            lt::kAlgorithmDefault);
  }));
  KWM_TRY(plan->plan.init("plan", [&](Opaque* made) {
    return functions.MatmulPlanInit(a.handle, made, &plan->matmul,
                                    plan->selection.get());
  }));
  return explain("workspace", functions.MatmulGetWorkspace(
                                  a.handle, plan->plan.get(),
                                  &plan->workspace));
}

Failure get_plan(const Kernel& kernel, int64_t rows, const Plan** plan) {
  using Key = std::pair<const Kernel*, int64_t>;
  static auto& plans = *new std::map<Key, std::unique_ptr<Plan>>;
  std::unique_ptr<Plan>& known = plans[{&kernel, rows}];
  if (known == nullptr) {
    auto made = std::make_unique<Plan>();
    KWM_TRY(make_plan(kernel, rows, made.get()));
    known = std::move(made);
  }
  *plan = known.get();
  return "";
}

// Memory that is there until the handler returns. XLA aligns it to 256 bytes,
// and refuses to be asked for more than 16. Its address must not outlive the
// call, so no handler here may be recorded into a command buffer.
Failure allocate(ffi::ScratchAllocator& scratch, size_t size,
                 void** workspace) {
  *workspace = nullptr;
  if (size == 0) return "";
  const std::optional<void*> room = scratch.Allocate(size);
  if (!room) return "no memory for the workspace";
  *workspace = *room;
  return "";
}

// The sizes (rows, columns) of a matrix.
struct Matrix {
  template <typename Buffer>
  explicit Matrix(const Buffer& buffer) {
    const auto dims = buffer.dimensions();
    if (dims.size() != 2) return;
    rows = dims[0];
    columns = dims[1];
  }

  int64_t rows = -1, columns = -1;
};

ffi::Error to_error(const Failure& failure) {
  if (failure.empty()) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kInternal, "keras_weightmods: " + failure);
}

Failure compress(void* stream, int device, ffi::ScratchAllocator& scratch,
                 ffi::AnyBuffer transposed,
                 ffi::ResultBuffer<ffi::U8> compressed) {
  const std::lock_guard<std::mutex> lock(library_mutex());
  const Context context(device);
  KWM_TRY(context.failure());
  const Matrix given(transposed);  // (n, k)
  const Kernel* kernel;
  KWM_TRY(get_kernel(device, given.columns, given.rows,
                     transposed.element_type(), &kernel));
  if (kernel->compressed != compressed->size_bytes()) {
    return "the compressed kernel is of another size";
  }
  void* workspace;
  KWM_TRY(allocate(scratch, kernel->workspace, &workspace));
  return explain("compression",
                 functions.SpMMACompress2(
                     kernel->handle, kernel->matrix.get(), 1, lt::kNonTranspose,
                     transposed.untyped_data(), compressed->untyped_data(),
                     workspace, stream));
}

Failure multiply(void* stream, int device, ffi::ScratchAllocator& scratch,
                 ffi::AnyBuffer x, ffi::Buffer<ffi::U8> compressed,
                 ffi::Result<ffi::AnyBuffer> y) {
  const Matrix in(x), out(*y);
  const ffi::DataType type = x.element_type();
  if (in.rows != out.rows || y->element_type() != type) {
    return "the result does not fit the activations";
  }
  const std::lock_guard<std::mutex> lock(library_mutex());
  const Context context(device);
  KWM_TRY(context.failure());
  const Kernel* kernel;
  KWM_TRY(get_kernel(device, in.columns, out.columns, type, &kernel));
  if (kernel->compressed != compressed.size_bytes()) {
    return "the compressed kernel is of another shape or device";
  }
  const Plan* plan;
  KWM_TRY(get_plan(*kernel, in.rows, &plan));
  void* workspace;
  KWM_TRY(allocate(scratch, plan->workspace, &workspace));
  const float alpha = 1, beta = 0;
  return explain(
      "product",
      functions.Matmul(kernel->handle, plan->plan.get(), &alpha,
                       compressed.untyped_data(), x.untyped_data(), &beta,
                       y->untyped_data(), y->untyped_data(), workspace, &stream,
                       1));
}

ffi::Error Compress(void* stream, int32_t device, ffi::ScratchAllocator scratch,
                    ffi::AnyBuffer transposed,
                    ffi::ResultBuffer<ffi::U8> compressed) {
  return to_error(compress(stream, device, scratch, transposed, compressed));
}

ffi::Error Multiply(void* stream, int32_t device, ffi::ScratchAllocator scratch,
                    ffi::AnyBuffer x, ffi::Buffer<ffi::U8> compressed,
                    ffi::Result<ffi::AnyBuffer> y) {
  return to_error(multiply(stream, device, scratch, x, compressed, y));
}

// Keeps a failure for the caller of the C interface; NULL if there is none.
const char* report(const Failure& failure) {
  static thread_local std::string kept;
  kept = failure;
  return kept.empty() ? nullptr : kept.c_str();
}

}  // namespace

extern "C" {
KWM_API XLA_FFI_Error* kwm_gpu_compress(XLA_FFI_CallFrame*);
KWM_API XLA_FFI_Error* kwm_gpu_cusparselt(XLA_FFI_CallFrame*);

// Opens the CUDA driver and cuSPARSELt, the libraries at these paths. Returns
// NULL, or a message that is valid until the thread's next call.
KWM_API const char* kwm_gpu_load(const char* driver_path, const char* path) {
  const std::lock_guard<std::mutex> lock(library_mutex());
  return report(load(driver_path, path));
}

// Stores the bytes of a compressed (k, n) kernel; `type` is one of XLA's.
KWM_API const char* kwm_gpu_compressed_size(int device, int64_t k, int64_t n,
                                            int type, int64_t* bytes) {
  const std::lock_guard<std::mutex> lock(library_mutex());
  const Context context(device);
  if (!context.failure().empty()) return report(context.failure());
  const Kernel* kernel;
  const Failure failure = get_kernel(
      device, k, n, static_cast<ffi::DataType>(type), &kernel);
  if (failure.empty()) *bytes = static_cast<int64_t>(kernel->compressed);
  return report(failure);
}
}  // extern "C"

// (kernel transposed: row-major (n, k)) -> compressed. What it writes is
// cuSPARSELt's own, for this GPU and this version: never to be stored.
XLA_FFI_DEFINE_HANDLER_SYMBOL(kwm_gpu_compress, Compress,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<void*>>()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Ctx<ffi::ScratchAllocator>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::U8>>());

// (x (rows, k), compressed) -> y (rows, n). Sizes are multiples of 16.
XLA_FFI_DEFINE_HANDLER_SYMBOL(kwm_gpu_cusparselt, Multiply,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<void*>>()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Ctx<ffi::ScratchAllocator>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Ret<ffi::AnyBuffer>());
