// The CUDA driver, NVRTC and cuSPARSELt, as far as the GPU library calls them,
// on a CPU: device memory is memory, and the decode kernel is emulated. They
// check what they are given by the documentation of the real ones.
//
// Compiled after the variants of the kernel, whose `find_variant` it calls.

#include <stdio.h>

#include "cusparselt_api.h"
#include "driver.h"

// Of fake_rounding.cc.
bool round_rows(int type, int blocks, int threads, const void* x, int rows,
                int k, void* steps, void* scales);

namespace {

using kwm::cusparselt::Opaque;
namespace lt = kwm::cusparselt;

constexpr int kInvalid = 1;      // CUDA_ERROR_INVALID_VALUE
constexpr int kMisaligned = 716;  // CUDA_ERROR_MISALIGNED_ADDRESS
constexpr int kNoDevice = 101;   // CUDA_ERROR_INVALID_DEVICE
constexpr int kLtInvalid = 3;    // CUSPARSE_STATUS_INVALID_VALUE
constexpr int kLtFailed = 6;     // CUSPARSE_STATUS_EXECUTION_FAILED
constexpr int kAlgorithms = 5;
constexpr int kWorkspace = 48;

// Two devices, an H100 and an A100, each with its context; -1 where none is
// current.
constexpr int kDevices = 2;
int contexts[kDevices];
int context_depth = 0;
int current_device = -1;

// Structures of cuSPARSELt that were made and not destroyed.
int live = 0;
// Launches at an address that ends the context of a real device.
int misaligned = 0;
// What goes wrong in a product: 1 a column of the result, 2 all of it.
int broken = 0;
// The last launch: blocks of a cluster, and warps of a block.
int last_split, last_warps;
struct Facts {
  int major, processors, shared_of_block, shared_of_processor;
} facts[kDevices] = {{9, 132, 232448, 233472}, {8, 108, 166912, 167936}};

// What a module or a handle belongs to: another context must not use it.
// Of the rounding kernel `values` and `rows` are -1.
struct Variant {
  int x, values, rows, major, device;
  int shared_limit = 48 << 10;
};

const char* name_of(const Variant& variant) {
  return variant.rows < 0 ? "kwm_round_rows" : "kwm_decode";
}

}  // namespace

#define FAKE extern "C" __attribute__((visibility("default")))

// What a test asks.
FAKE int fake_context_depth() { return context_depth; }
FAKE int fake_live() { return live; }
FAKE int fake_misaligned() { return misaligned; }
FAKE void fake_break(int how) { broken = how; }
FAKE const Account* fake_account() { return &account; }
FAKE void fake_reset() { account = {}; }
FAKE void fake_set_eager(int is_eager) { eager = is_eager; }
FAKE int fake_split() { return last_split; }
FAKE int fake_warps() { return last_warps; }

// The driver.
FAKE int cuInit(unsigned) { return 0; }
FAKE int cuGetErrorString(int, const char** text) {
  *text = "an error of the fake driver";
  return 0;
}
FAKE int cuDeviceGet(int* handle, int ordinal) {
  *handle = ordinal;
  return ordinal < kDevices ? 0 : kNoDevice;
}
FAKE int cuDeviceGetAttribute(int* value, int attribute, int device) {
  switch (attribute) {
    case 75:
      *value = facts[device].major;
      return 0;
    case 76:
      *value = 0;
      return 0;
    case 16:
      *value = facts[device].processors;
      return 0;
    case 97:
      *value = facts[device].shared_of_block;
      return 0;
    case 81:
      *value = facts[device].shared_of_processor;
      return 0;
    default:
      return kInvalid;
  }
}
FAKE int cuDevicePrimaryCtxRetain(void** context, int ordinal) {
  *context = &contexts[ordinal];
  return 0;
}
FAKE int cuCtxPushCurrent_v2(void* context) {
  current_device = static_cast<int>(static_cast<int*>(context) - contexts);
  return ++context_depth == 1 && current_device < kDevices ? 0 : kInvalid;
}
FAKE int cuCtxPopCurrent_v2(void** context) {
  *context = &contexts[current_device];
  current_device = -1;
  return --context_depth < 0 ? kInvalid : 0;
}
FAKE int cuModuleLoadData(void** module, const void* image) {
  auto* variant = new Variant;
  *module = variant;
  const int read =
      sscanf(static_cast<const char*>(image), "fake %d %d %d %d", &variant->x,
             &variant->values, &variant->rows, &variant->major);
  variant->device = current_device;
  return context_depth == 1 && read == 4 &&
                 variant->major == facts[current_device].major
             ? 0
             : kInvalid;
}
FAKE int cuModuleGetFunction(void** function, void* module, const char* name) {
  *function = module;
  const auto& variant = *static_cast<Variant*>(module);
  return strcmp(name, name_of(variant)) == 0 ? 0 : kInvalid;
}
FAKE int cuFuncSetAttribute(void* function, int attribute, int value) {
  if (attribute != 8 || value > facts[current_device].shared_of_block) {
    return kInvalid;
  }
  static_cast<Variant*>(function)->shared_limit = value;
  return 0;
}
FAKE int cuLaunchKernelEx(const kwm::Launch* launch, void* function,
                          void** arguments, void**) {
  const auto& variant = *static_cast<Variant*>(function);
  const auto pointer = [&](int i) { return *static_cast<void**>(arguments[i]); };
  const auto number = [&](int i) { return *static_cast<int*>(arguments[i]); };
  if (variant.rows < 0) {
    const auto address = [&](int i) {
      return reinterpret_cast<uintptr_t>(pointer(i));
    };
    if (address(0) % (variant.x == 0 ? 16 : 8) || address(3) % 4) {
      ++misaligned;
      return kMisaligned;
    }
    const unsigned *grid = launch->grid, *block = launch->block;
    if (context_depth != 1 || variant.device != current_device ||
        launch->shared_bytes != 0 || launch->attribute_count != 0 ||
        grid[1] * grid[2] * block[1] * block[2] != 1 ||
        !round_rows(variant.x, grid[0], block[0], pointer(0), number(1),
                    number(2), pointer(3), pointer(4))) {
      return kInvalid;
    }
    return 0;
  }
  const Arguments given = {pointer(0), number(1),  number(2),  number(3),
                           pointer(4), pointer(5), pointer(6), pointer(7)};
  const unsigned *grid = launch->grid, *block = launch->block;
  unsigned split = 1;
  for (unsigned i = 0; i < launch->attribute_count; ++i) {
    const kwm::LaunchAttribute& attribute = launch->attributes[i];
    if (attribute.id != 4 || attribute.cluster[0] != 1 ||
        attribute.cluster[2] != 1 || facts[current_device].major < 9) {
      return kInvalid;
    }
    split = attribute.cluster[1];
  }
  if (context_depth != 1 || variant.device != current_device ||
      grid[0] != (given.n + 63u) / 64 || grid[1] != split || split > 8 ||
      grid[2] * block[1] * block[2] != 1 || block[0] % 32 != 0 ||
      block[0] == 0 || block[0] > 256 ||
      launch->shared_bytes > static_cast<unsigned>(variant.shared_limit) ||
      given.rows > variant.rows) {
    return kInvalid;
  }
  const Runner run = find_variant(variant.x, variant.values, variant.rows);
  if (run == nullptr) return kInvalid;
  last_split = split;
  last_warps = block[0] / 32;
  run(split, last_warps, launch->shared_bytes, given);
  return 0;
}

// NVRTC, whose machine code names the variant.
FAKE const char* nvrtcGetErrorString(int) { return "an error of fake NVRTC"; }
FAKE int nvrtcCreateProgram(void** program, const char* source, const char*,
                            int, const char* const*, const char* const*) {
  *program = new std::string;
  const bool known = strstr(source, "kwm_decode(") ||
                     strstr(source, "kwm_round_rows(");
  return known ? 0 : kInvalid;
}
FAKE int nvrtcCompileProgram(void* program, int count,
                             const char* const* options) {
  Variant variant;
  variant.x = variant.values = variant.rows = variant.major = -1;
  for (int i = 0; i < count; ++i) {
    sscanf(options[i], "-DKWM_X=%d", &variant.x);
    sscanf(options[i], "-DKWM_VALUES=%d", &variant.values);
    sscanf(options[i], "-DKWM_ROWS=%d", &variant.rows);
    if (sscanf(options[i], "--gpu-architecture=sm_%d", &variant.major) == 1) {
      variant.major /= 10;
    }
  }
  char code[64];
  snprintf(code, sizeof code, "fake %d %d %d %d", variant.x, variant.values,
           variant.rows, variant.major);
  *static_cast<std::string*>(program) = code;
  return variant.major > 0 ? 0 : kInvalid;
}
FAKE int nvrtcGetCUBINSize(void* program, size_t* size) {
  *size = static_cast<std::string*>(program)->size() + 1;
  return 0;
}
FAKE int nvrtcGetCUBIN(void* program, char* code) {
  strcpy(code, static_cast<std::string*>(program)->c_str());
  return 0;
}
FAKE int nvrtcGetProgramLogSize(void*, size_t* size) {
  *size = 4;
  return 0;
}
FAKE int nvrtcGetProgramLog(void*, char* log) {
  strcpy(log, "log");
  return 0;
}
FAKE int nvrtcDestroyProgram(void** program) {
  delete static_cast<std::string*>(*program);
  return 0;
}

// cuSPARSELt.
namespace {

struct Matrix {
  int64_t rows, columns;
  int type, order;
  bool structured;

  int size() const { return type == lt::kR8I ? 1 : 2; }

  // Of the element in row i and column j.
  int64_t offset(int64_t i, int64_t j) const {
    return order == lt::kOrderRow ? i * columns + j : j * rows + i;
  }

  float get(const void* data, int64_t i, int64_t j) const {
    const int64_t at = offset(i, j);
    if (type == lt::kR8I) return static_cast<const int8_t*>(data)[at];
    x_type = type == lt::kR16F ? 2 : 1;
    return widen(static_cast<const uint16_t*>(data)[at]);
  }

  void set(void* data, int64_t i, int64_t j, float value) const {
    const int64_t at = offset(i, j);
    x_type = type == lt::kR16F ? 2 : 1;
    static_cast<uint16_t*>(data)[at] = round_pair(value, 0) & 0xffff;
  }
};

struct Matmul {
  Matrix a, b, d;
  int algorithm;
  int alpha_is_vector;
};

template <typename T>
T& as(Opaque* opaque) {
  static_assert(sizeof(T) <= 512, "the library's structures are that small");
  return *reinterpret_cast<T*>(opaque->data);
}

template <typename T>
const T& as(const Opaque* opaque) {
  return *reinterpret_cast<const T*>(opaque->data);
}

int init_matrix(Opaque* matrix, int64_t rows, int64_t columns, int64_t leading,
                uint32_t alignment, int type, int order, bool structured) {
  Matrix& made = as<Matrix>(matrix);
  made = {rows, columns, type, order, structured};
  ++live;
  // Of 16-bit types; twice as much of 8-bit ones.
  const int multiple = (structured ? 16 : 8) * (type == lt::kR8I ? 2 : 1);
  const bool fits = rows % multiple == 0 && columns % multiple == 0;
  const int64_t line = order == lt::kOrderRow ? columns : rows;
  const bool is_valid =
      fits && leading == line && alignment == 16 && rows > 0 && columns > 0;
  if (!is_valid) --live;
  return is_valid ? 0 : kLtInvalid;
}

// A handle names the device whose context it was made in.
bool is_current(const Opaque* handle) {
  return context_depth == 1 && as<int>(handle) == current_device;
}

}  // namespace

FAKE const char* cusparseLtGetErrorString(int) {
  return "an error of fake cuSPARSELt";
}
FAKE int cusparseLtInit(Opaque* handle) {
  as<int>(handle) = current_device;
  return context_depth == 1 ? 0 : kLtInvalid;
}
FAKE int cusparseLtMatDescriptorDestroy(const Opaque*) { return --live < 0; }
FAKE int cusparseLtMatmulAlgSelectionDestroy(const Opaque*) {
  return --live < 0;
}
FAKE int cusparseLtMatmulPlanDestroy(const Opaque*) { return --live < 0; }
FAKE int cusparseLtGetVersion(const Opaque*, int* version) {
  *version = 1234;
  return 0;
}
FAKE int cusparseLtDenseDescriptorInit(const Opaque*, Opaque* matrix,
                                       int64_t rows, int64_t columns,
                                       int64_t leading, uint32_t alignment,
                                       int type, int order) {
  return init_matrix(matrix, rows, columns, leading, alignment, type, order,
                     false);
}
FAKE int cusparseLtStructuredDescriptorInit(const Opaque*, Opaque* matrix,
                                            int64_t rows, int64_t columns,
                                            int64_t leading, uint32_t alignment,
                                            int type, int order, int sparsity) {
  return sparsity == 0 ? init_matrix(matrix, rows, columns, leading, alignment,
                                     type, order, true)
                       : kLtInvalid;
}
FAKE int cusparseLtMatmulDescriptorInit(const Opaque*, Opaque* matmul, int op_a,
                                        int op_b, const Opaque* a,
                                        const Opaque* b, const Opaque* c,
                                        const Opaque* d, int compute) {
  Matmul& made = as<Matmul>(matmul);
  made = {as<Matrix>(a), as<Matrix>(b), as<Matrix>(d), -1, 0};
  const bool integer = made.a.type == lt::kR8I;
  const bool fits =
      op_a == 0 && op_b == 0 && c == d && made.a.structured &&
      made.a.columns == made.b.rows && made.a.rows == made.d.rows &&
      made.b.columns == made.d.columns && made.a.type == made.b.type &&
      compute == (integer ? lt::kCompute32I : lt::kCompute32F) &&
      made.d.type == (integer ? lt::kR16BF : made.a.type);
  return fits ? 0 : kLtInvalid;
}
FAKE int cusparseLtMatmulDescSetAttribute(const Opaque*, Opaque* matmul,
                                          int attribute, const void* data,
                                          size_t size) {
  if (attribute != lt::kAlphaVector || size != sizeof(int)) return kLtInvalid;
  as<Matmul>(matmul).alpha_is_vector = *static_cast<const int*>(data);
  return 0;
}
FAKE int cusparseLtMatmulAlgSelectionInit(const Opaque*, Opaque* selection,
                                          const Opaque* matmul, int algorithm) {
  as<Matmul>(selection) = as<Matmul>(matmul);
  ++live;
  return algorithm == 0 ? 0 : kLtInvalid;
}
FAKE int cusparseLtMatmulAlgSetAttribute(const Opaque*, Opaque* selection,
                                         int attribute, const void* data,
                                         size_t size) {
  if (attribute != lt::kConfigId || size != sizeof(int)) return kLtInvalid;
  as<Matmul>(selection).algorithm = *static_cast<const int*>(data);
  return as<Matmul>(selection).algorithm < kAlgorithms ? 0 : kLtInvalid;
}
FAKE int cusparseLtMatmulAlgGetAttribute(const Opaque*, const Opaque*,
                                         int attribute, void* data,
                                         size_t size) {
  if (attribute != lt::kConfigMaxId || size != sizeof(int)) return kLtInvalid;
  *static_cast<int*>(data) = kAlgorithms;
  return 0;
}
FAKE int cusparseLtMatmulPlanInit(const Opaque*, Opaque* plan,
                                  const Opaque* matmul, const Opaque*) {
  as<Matmul>(plan) = as<Matmul>(matmul);
  ++live;
  return 0;
}
FAKE int cusparseLtMatmulGetWorkspace(const Opaque*, const Opaque*,
                                      size_t* size) {
  *size = kWorkspace;
  return 0;
}
FAKE int cusparseLtSpMMACompressedSize2(const Opaque*, const Opaque* matrix,
                                        size_t* compressed, size_t* workspace) {
  const Matrix& a = as<Matrix>(matrix);
  *compressed = a.rows * a.columns * a.size();
  *workspace = kWorkspace;
  return a.structured ? 0 : kLtInvalid;
}
// A copy; the kernel must be 2:4 along its columns.
FAKE int cusparseLtSpMMACompress2(const Opaque* handle, const Opaque* matrix,
                                  int is_sparse_a, int operation,
                                  const void* dense, void* compressed,
                                  void* workspace, void*) {
  const Matrix& a = as<Matrix>(matrix);
  if (!is_current(handle) || !is_sparse_a || operation != 0 || !a.structured || !workspace) {
    return kLtInvalid;
  }
  for (int64_t i = 0; i < a.rows; ++i) {
    for (int64_t j = 0; j < a.columns; j += 4) {
      int nonzeros = 0;
      for (int64_t t = j; t < j + 4; ++t) nonzeros += a.get(dense, i, t) != 0;
      if (nonzeros > 2) return kLtInvalid;
    }
  }
  memset(workspace, 1, kWorkspace);
  memcpy(compressed, dense, a.rows * a.columns * a.size());
  return 0;
}
FAKE int cusparseLtMatmul(const Opaque* handle, const Opaque* plan, const void* alpha,
                          const void* a, const void* b, const void* beta,
                          const void* c, void* d, void* workspace,
                          void** streams, int32_t stream_count) {
  const Matmul& matmul = as<Matmul>(plan);
  const auto* scale = static_cast<const float*>(alpha);
  // A vector of scales lies along the rows of D; int8 sums are integers.
  const bool is_vector = matmul.alpha_is_vector;
  if ((!is_vector && *scale != 1) ||
      *static_cast<const float*>(beta) != 0 || c != d || !workspace ||
      !streams || stream_count != 1 || !is_current(handle)) {
    return kLtInvalid;
  }
  if (broken == 2) return kLtFailed;
  memset(workspace, 1, kWorkspace);
  for (int64_t i = 0; i < matmul.d.rows; ++i) {
    for (int64_t j = 0; j < matmul.d.columns; ++j) {
      double sum = broken == 1 && i == 3 ? 1000 : 0;
      for (int64_t t = 0; t < matmul.a.columns; ++t) {
        sum += matmul.a.get(a, i, t) * matmul.b.get(b, t, j);
      }
      const float rounded = static_cast<float>(sum);
      matmul.d.set(d, i, j, is_vector ? scale[i] * rounded : rounded);
    }
  }
  return 0;
}
