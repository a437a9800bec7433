// Products by cuSPARSELt. In its terms D = A B, all transposed: A = W^T (n, k)
// is the structured matrix, row-major; B = x^T (k, rows) and D = y^T (n, rows)
// are column-major, which is x and y as they lie in memory.

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
  return std::string("cuSPARSELt, ") + what + ": " +
         functions.GetErrorString(status) + " (" + std::to_string(status) + ")";
}

Failure load(const char* path) {
  if (ready) return "";
  void* library = nullptr;
  KWM_TRY(kwm::open_library(path, &library));
#define KWM_FIND(name) \
  KWM_TRY(kwm::find(library, "cusparseLt" #name, &functions.name))
  KWM_FIND(GetErrorString);
  KWM_FIND(Init);
  KWM_FIND(GetVersion);
  KWM_FIND(DenseDescriptorInit);
  KWM_FIND(StructuredDescriptorInit);
  KWM_FIND(MatmulDescriptorInit);
  KWM_FIND(MatmulAlgSelectionInit);
  KWM_FIND(MatmulAlgSetAttribute);
  KWM_FIND(MatmulAlgGetAttribute);
  KWM_FIND(MatmulPlanInit);
  KWM_FIND(MatmulGetWorkspace);
  KWM_FIND(Matmul);
  KWM_FIND(SpMMACompressedSize2);
  KWM_FIND(SpMMACompress2);
#undef KWM_FIND
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
      *types = {lt::kR8I, lt::kR32I, lt::kCompute32I};
      return "";
    default:
      return "cuSPARSELt multiplies bfloat16, float16 and int8";
  }
}

Failure init_structured(const Opaque* handle, int64_t k, int64_t n, int type,
                        Opaque* matrix) {
  return explain("structured matrix",
                 functions.StructuredDescriptorInit(
                     handle, matrix, n, k, k, kAlignment, type, lt::kOrderRow,
                     lt::kSparsity50));
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
  Opaque a, b, d, matmul, selection, plan;
  size_t workspace = 0;
};

// All of a plan but the choice of the algorithm.
Failure describe(const Opaque* handle, const Product& product, Plan* plan) {
  Types types;
  KWM_TRY(get_types(product.type, &types));
  KWM_TRY(init_structured(handle, product.k, product.n, types.in, &plan->a));
  KWM_TRY(explain("activations", functions.DenseDescriptorInit(
                                     handle, &plan->b, product.k, product.rows,
                                     product.k, kAlignment, types.in,
                                     lt::kOrderColumn)));
  KWM_TRY(explain("result", functions.DenseDescriptorInit(
                                handle, &plan->d, product.n, product.rows,
                                product.n, kAlignment, types.out,
                                lt::kOrderColumn)));
  KWM_TRY(explain("product",
                  functions.MatmulDescriptorInit(
                      handle, &plan->matmul, lt::kNonTranspose,
                      lt::kNonTranspose, &plan->a, &plan->b, &plan->d, &plan->d,
                      types.compute)));
  return explain("algorithms", functions.MatmulAlgSelectionInit(
                                   handle, &plan->selection, &plan->matmul,
                                   lt::kAlgorithmDefault));
}

// Plans are few, one for each shape, and kept until the process ends.
Failure get_plan(const Opaque* handle, const Product& product,
                 int64_t algorithm, const Plan** plan) {
  static std::map<std::pair<Product, int64_t>, std::unique_ptr<Plan>> plans;
  std::unique_ptr<Plan>& known = plans[{product, algorithm}];
  if (known == nullptr) {
    auto made = std::make_unique<Plan>();
    KWM_TRY(describe(handle, product, made.get()));
    if (algorithm >= 0) {
      const int id = static_cast<int>(algorithm);
      KWM_TRY(explain("choice of the algorithm",
                      functions.MatmulAlgSetAttribute(handle, &made->selection,
                                                      lt::kConfigId, &id,
                                                      sizeof id)));
    }
    KWM_TRY(explain("plan",
                    functions.MatmulPlanInit(handle, &made->plan, &made->matmul,
                                             &made->selection)));
    KWM_TRY(explain("workspace",
                    functions.MatmulGetWorkspace(handle, &made->plan,
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
                  functions.MatmulAlgGetAttribute(handle, &plan.selection,
                                                  lt::kConfigMaxId, &most,
                                                  sizeof most)));
  *count = most;
  return "";
}

Failure multiply(const Product& product, int64_t algorithm, void* stream,
                 const void* x, const void* compressed, void* y,
                 void* workspace) {
  const kwm::Context context(product.device);
  KWM_TRY(context.failure());
  const Opaque* handle;
  KWM_TRY(get_handle(product.device, &handle));
  const Plan* plan;
  KWM_TRY(get_plan(handle, product, algorithm, &plan));
  const float alpha = 1, beta = 0;
  return explain("product", functions.Matmul(handle, &plan->plan, &alpha,
                                             compressed, x, &beta, y, y,
                                             workspace, &stream, 1));
}

Failure compressed_size(int device, int64_t k, int64_t n, int type,
                        int64_t* compressed, int64_t* workspace) {
  const kwm::Context context(device);
  KWM_TRY(context.failure());
  const Opaque* handle;
  KWM_TRY(get_handle(device, &handle));
  Types types;
  KWM_TRY(get_types(type, &types));
  Opaque matrix;
  KWM_TRY(init_structured(handle, k, n, types.in, &matrix));
  size_t size = 0, room = 0;
  KWM_TRY(explain("size", functions.SpMMACompressedSize2(handle, &matrix, &size,
                                                         &room)));
  *compressed = static_cast<int64_t>(size);
  *workspace = static_cast<int64_t>(room);
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
  Opaque matrix;
  KWM_TRY(init_structured(handle, k, n, types.in, &matrix));
  return explain("compression", functions.SpMMACompress2(
                                    handle, &matrix, 1, lt::kNonTranspose,
                                    transposed, compressed, workspace, stream));
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
  return kwm::report(
      compressed_size(device, k, n, type, compressed, workspace));
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
                               void* y, void* workspace) {
  const std::lock_guard<std::mutex> lock(kwm::library_mutex());
  return kwm::report(multiply({device, rows, k, n, type}, algorithm, stream, x,
                              compressed, y, workspace));
}
