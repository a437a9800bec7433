// Products by cuSPARSELt. In its terms D = A B, all transposed: A = W^T (n, k)
// is the structured matrix, row-major; B = x^T (k, rows) and D = y^T (n, rows)
// are column-major, which is x and y as they lie in memory.
//
// int8 gives bfloat16: the sums are scaled in the epilogue, in float32, by a
// vector along the rows of D, which are the columns of y. That takes the scale
// of each column of W, and nothing of the size of D is ever int32.
//
// Not yet run on a GPU.

#include <map>
#include <memory>
#include <tuple>

#include "cusparselt_api.h"
#include "driver.h"
#include "kwm_gpu.h"

namespace {

using kwm::Failure;
using kwm::cusparselt::Opaque;
namespace lt = kwm::cusparselt;

constexpr uint32_t kAlignment = 16;

lt::Functions functions;
bool ready = false;

Failure explain(const char* what, int status) {
  if (status == 0) return "";
  const char* text = "error";
  if (functions.GetErrorString) text = functions.GetErrorString(status);
  return std::string("cuSPARSELt, ") + what + ": " + text + " (" +
         std::to_string(status) + ")";
}

Failure load(const char* path) {
  if (ready) return "";
  void* library = nullptr;
  KWM_TRY(kwm::open_library(path, &library));
#define KWM_FIND(name) \
  KWM_TRY(kwm::find(library, "cusparseLt" #name, &functions.name))
#define KWM_FIND_OPTIONAL(name) \
  kwm::find_optional(library, "cusparseLt" #name, &functions.name)
  KWM_FIND_OPTIONAL(GetErrorString);
  KWM_FIND_OPTIONAL(MatmulAlgSelectionDestroy);
  KWM_FIND(Init);
  KWM_FIND(GetVersion);
  KWM_FIND(DenseDescriptorInit);
  KWM_FIND(MatDescriptorDestroy);
  KWM_FIND(StructuredDescriptorInit);
  KWM_FIND(MatmulDescriptorInit);
  KWM_FIND(MatmulDescSetAttribute);
  KWM_FIND(MatmulAlgSelectionInit);
  KWM_FIND(MatmulAlgSetAttribute);
  KWM_FIND(MatmulAlgGetAttribute);
  KWM_FIND(MatmulPlanInit);
  KWM_FIND(MatmulPlanDestroy);
  KWM_FIND(MatmulGetWorkspace);
  KWM_FIND(Matmul);
  KWM_FIND(SpMMACompressedSize2);
  KWM_FIND(SpMMACompress2);
#undef KWM_FIND
#undef KWM_FIND_OPTIONAL
  ready = true;
  return "";
}

// The handle of the current context's device, kept until the process ends.
Failure get_handle(int device, const Opaque** handle) {
  static std::map<int, std::unique_ptr<Opaque>> handles;
  if (!ready) return "cuSPARSELt is not loaded";
  std::unique_ptr<Opaque>& known = handles[device];
  if (known == nullptr) {
    auto made = std::make_unique<Opaque>();
    KWM_TRY(explain("handle", functions.Init(made.get())));
    known = std::move(made);
  }
  *handle = known.get();
  return "";
}

struct Types {
  int in, out, compute;
};

Failure get_types(int type, Types* types) {
  switch (type) {
    case KWM_X_BFLOAT16:
      *types = {lt::kR16BF, lt::kR16BF, lt::kCompute32F};
      return "";
    case KWM_X_FLOAT16:
      *types = {lt::kR16F, lt::kR16F, lt::kCompute32F};
      return "";
    case KWM_X_INT8:
      *types = {lt::kR8I, lt::kR16BF, lt::kCompute32I};
      return "";
    default:
      return "cuSPARSELt multiplies bfloat16, float16 and int8";
  }
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

struct Matrix : Owned {
  Matrix() : Owned(&lt::Functions::MatDescriptorDestroy) {}
};

Failure init_structured(const Opaque* handle, int64_t k, int64_t n, int type,
                        Matrix* matrix) {
  return matrix->init("structured matrix", [&](Opaque* made) {
    return functions.StructuredDescriptorInit(handle, made, n, k, k, kAlignment,
                                              type, lt::kOrderRow,
                                              lt::kSparsity50);
  });
}

Failure init_dense(const Opaque* handle, const char* what, int64_t rows,
                   int64_t columns, int type, Matrix* matrix) {
  return matrix->init(what, [&](Opaque* made) {
    return functions.DenseDescriptorInit(handle, made, rows, columns, rows,
                                         kAlignment, type, lt::kOrderColumn);
  });
}

struct Product {
  int device;
  int64_t rows, k, n;
  int type;

  bool operator<(const Product& other) const {
    return std::tie(device, rows, k, n, type) <
           std::tie(other.device, other.rows, other.k, other.n, other.type);
  }
};

struct Plan {
  Matrix a, b, d;
  Opaque matmul;
  Owned selection{&lt::Functions::MatmulAlgSelectionDestroy};
  Owned plan{&lt::Functions::MatmulPlanDestroy};
  size_t workspace = 0;
};

// All of a plan but the choice of the algorithm.
Failure describe(const Opaque* handle, const Product& product, Plan* plan) {
  Types types;
  KWM_TRY(get_types(product.type, &types));
  KWM_TRY(init_structured(handle, product.k, product.n, types.in, &plan->a));
  KWM_TRY(init_dense(handle, "activations", product.k, product.rows, types.in,
                     &plan->b));
  KWM_TRY(init_dense(handle, "result", product.n, product.rows, types.out,
                     &plan->d));
  KWM_TRY(explain("product",
                  functions.MatmulDescriptorInit(
                      handle, &plan->matmul, lt::kNonTranspose,
                      lt::kNonTranspose, plan->a.get(), plan->b.get(),
                      plan->d.get(), plan->d.get(), types.compute)));
  if (product.type == KWM_X_INT8) {
    const int enabled = 1;
    KWM_TRY(explain("scales in the epilogue",
                    functions.MatmulDescSetAttribute(
                        handle, &plan->matmul, lt::kAlphaVector, &enabled,
                        sizeof enabled)));
  }
  return plan->selection.init("algorithms", [&](Opaque* made) {
    return functions.MatmulAlgSelectionInit(handle, made, &plan->matmul,
                                            lt::kAlgorithmDefault);
  });
}

// Plans are few, one for each shape, and kept until the process ends; beyond
// it too, as the library may be gone before this one.
Failure get_plan(const Opaque* handle, const Product& product,
                 int64_t algorithm, const Plan** plan) {
  static auto& plans =
      *new std::map<std::pair<Product, int64_t>, std::unique_ptr<Plan>>;
  std::unique_ptr<Plan>& known = plans[{product, algorithm}];
  if (known == nullptr) {
    auto made = std::make_unique<Plan>();
    KWM_TRY(describe(handle, product, made.get()));
    if (algorithm >= 0) {
      const int id = static_cast<int>(algorithm);
      KWM_TRY(explain("choice of the algorithm",
                      functions.MatmulAlgSetAttribute(
                          handle, made->selection.get(), lt::kConfigId, &id,
                          sizeof id)));
    }
    KWM_TRY(made->plan.init("plan", [&](Opaque* plan) {
      return functions.MatmulPlanInit(handle, plan, &made->matmul,
                                      made->selection.get());
    }));
    KWM_TRY(explain("workspace",
                    functions.MatmulGetWorkspace(handle, made->plan.get(),
                                                 &made->workspace)));
    known = std::move(made);
  }
  *plan = known.get();
  return "";
}

Failure prepare(const Product& product, int64_t algorithm,
                int64_t* workspace) {
  const kwm::Context context(product.device);
  KWM_TRY(context.failure());
  const Opaque* handle;
  KWM_TRY(get_handle(product.device, &handle));
  const Plan* plan;
  KWM_TRY(get_plan(handle, product, algorithm, &plan));
  *workspace = static_cast<int64_t>(plan->workspace);
  return "";
}

Failure count_algorithms(const Product& product, int64_t* count) {
  const kwm::Context context(product.device);
  KWM_TRY(context.failure());
  const Opaque* handle;
  KWM_TRY(get_handle(product.device, &handle));
  Plan plan;
  KWM_TRY(describe(handle, product, &plan));
  int most = 0;  // ids are below it
  KWM_TRY(explain("number of algorithms",
                  functions.MatmulAlgGetAttribute(handle, plan.selection.get(),
                                                  lt::kConfigMaxId, &most,
                                                  sizeof most)));
  *count = most;
  return "";
}

Failure multiply(const Product& product, int64_t algorithm, void* stream,
                 const void* x, const void* compressed, const void* scale,
                 void* y, void* workspace) {
  const bool is_scaled = product.type == KWM_X_INT8;
  if (is_scaled != (scale != nullptr)) {
    return is_scaled ? "int8 needs a scale for each column"
                     : "int8 alone takes scales";
  }
  const kwm::Context context(product.device);
  KWM_TRY(context.failure());
  const Opaque* handle;
  KWM_TRY(get_handle(product.device, &handle));
  const Plan* plan;
  KWM_TRY(get_plan(handle, product, algorithm, &plan));
  const float one = 1, beta = 0;
  const void* alpha = is_scaled ? scale : &one;
  return explain("product", functions.Matmul(handle, plan->plan.get(), alpha,
                                             compressed, x, &beta, y, y,
                                             workspace, &stream, 1));
}

struct Sizes {
  size_t compressed = 0, workspace = 0;
};

// Kept, since each execution asks.
Failure compressed_size(int device, int64_t k, int64_t n, int type,
                        Sizes* sizes) {
  static std::map<std::tuple<int, int64_t, int64_t, int>, Sizes> all;
  const auto key = std::make_tuple(device, k, n, type);
  const auto known = all.find(key);
  if (known == all.end()) {
    const kwm::Context context(device);
    KWM_TRY(context.failure());
    const Opaque* handle;
    KWM_TRY(get_handle(device, &handle));
    Types types;
    KWM_TRY(get_types(type, &types));
    Matrix matrix;
    KWM_TRY(init_structured(handle, k, n, types.in, &matrix));
    KWM_TRY(explain("size", functions.SpMMACompressedSize2(
                                handle, matrix.get(), &sizes->compressed,
                                &sizes->workspace)));
    all.emplace(key, *sizes);
  } else {
    *sizes = known->second;
  }
  return "";
}

Failure compress(int device, void* stream, const void* transposed, int64_t k,
                 int64_t n, int type, void* compressed, void* workspace) {
  const kwm::Context context(device);
  KWM_TRY(context.failure());
  const Opaque* handle;
  KWM_TRY(get_handle(device, &handle));
  Types types;
  KWM_TRY(get_types(type, &types));
  Matrix matrix;
  KWM_TRY(init_structured(handle, k, n, types.in, &matrix));
  return explain("compression",
                 functions.SpMMACompress2(handle, matrix.get(), 1,
                                          lt::kNonTranspose, transposed,
                                          compressed, workspace, stream));
}

int version(int device) {
  const kwm::Context context(device);
  const Opaque* handle;
  int number = -1;
  if (!context.failure().empty() || !get_handle(device, &handle).empty() ||
      functions.GetVersion(handle, &number) != 0) {
    return -1;
  }
  return number;
}

}  // namespace

const char* kwm_gpu_load_cusparselt(const char* path) {
  const std::lock_guard<std::mutex> lock(kwm::library_mutex());
  return kwm::report(load(path));
}

int kwm_gpu_cusparselt_version(int device) {
  const std::lock_guard<std::mutex> lock(kwm::library_mutex());
  return version(device);
}

const char* kwm_gpu_compressed_size(int device, int64_t k, int64_t n, int type,
                                    int64_t* compressed, int64_t* workspace) {
  const std::lock_guard<std::mutex> lock(kwm::library_mutex());
  Sizes sizes;
  const Failure failure = compressed_size(device, k, n, type, &sizes);
  *compressed = static_cast<int64_t>(sizes.compressed);
  *workspace = static_cast<int64_t>(sizes.workspace);
  return kwm::report(failure);
}

const char* kwm_gpu_compress(int device, void* stream, const void* transposed,
                             int64_t k, int64_t n, int type, void* compressed,
                             void* workspace) {
  const std::lock_guard<std::mutex> lock(kwm::library_mutex());
  return kwm::report(
      compress(device, stream, transposed, k, n, type, compressed, workspace));
}

const char* kwm_gpu_prepare_cusparselt(int device, int64_t rows, int64_t k,
                                       int64_t n, int type, int64_t algorithm,
                                       int64_t* workspace) {
  const std::lock_guard<std::mutex> lock(kwm::library_mutex());
  return kwm::report(
      prepare({device, rows, k, n, type}, algorithm, workspace));
}

const char* kwm_gpu_cusparselt_algorithms(int device, int64_t rows, int64_t k,
                                          int64_t n, int type, int64_t* count) {
  const std::lock_guard<std::mutex> lock(kwm::library_mutex());
  return kwm::report(count_algorithms({device, rows, k, n, type}, count));
}

const char* kwm_gpu_cusparselt(int device, void* stream, const void* x,
                               int64_t rows, int64_t k, int64_t n, int type,
                               int64_t algorithm, const void* compressed,
                               const void* scale, void* y, void* workspace) {
  const std::lock_guard<std::mutex> lock(kwm::library_mutex());
  return kwm::report(multiply({device, rows, k, n, type}, algorithm, stream, x,
                              compressed, scale, y, workspace));
}
