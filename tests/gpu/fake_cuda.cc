// The CUDA driver and cuSPARSELt, as far as the library calls them, on a CPU:
// device memory is memory. They check what they are given by the documentation
// of the real ones.

#include <math.h>
#include <string.h>

#include "cusparselt_api.h"
#include "layout.h"

#define FAKE extern "C" __attribute__((visibility("default")))

namespace {

using kwm::cusparselt::Opaque;
namespace lt = kwm::cusparselt;

constexpr int kNoDevice = 101;  // CUDA_ERROR_INVALID_DEVICE
constexpr int kLtInvalid = 3;   // CUSPARSE_STATUS_INVALID_VALUE
constexpr int kLtFailed = 6;    // CUSPARSE_STATUS_EXECUTION_FAILED
constexpr int kWorkspace = 48;

// Two devices; -1 where the context of none is current.
int contexts[2] = {0, 1};
int current_device = -1, context_depth = 0;
int64_t live = 0;  // structures that were not destroyed
int broken = 0;    // 1: wrong results, 2: an error

// Numbers that are normal as float16.
float half_to_float(uint16_t half) {
  const int exponent = half >> 10 & 31;
  const float size = exponent == 0
                         ? ldexpf(half & 1023, -24)
                         : ldexpf((half & 1023) + 1024, exponent - 25);
  return half >> 15 ? -size : size;
}

uint16_t float_to_half(float value) {
  int exponent;
  const float fraction = frexpf(fabsf(value), &exponent);  // 0.5 to 1
  if (value == 0 || exponent < -13) return 0;
  const auto bits = static_cast<int>(nearbyintf(ldexpf(fraction, 11)));
  const int found = ((exponent + 14) << 10) + bits - 1024;
  return static_cast<uint16_t>(found | (value < 0 ? 0x8000 : 0));
}

}  // namespace

FAKE int64_t fake_live() { return live; }
FAKE int fake_context_depth() { return context_depth; }
FAKE void fake_break(int how) { broken = how; }

FAKE int cuInit(unsigned) { return 0; }
FAKE int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return ordinal < 2 ? 0 : kNoDevice;
}
FAKE int cuDevicePrimaryCtxRetain(void** context, int device) {
  *context = &contexts[device];
  return 0;
}
FAKE int cuCtxPushCurrent_v2(void* context) {
  current_device = *static_cast<int*>(context);
  ++context_depth;
  return 0;
}
FAKE int cuCtxPopCurrent_v2(void**) {
  current_device = -1;
  --context_depth;
  return 0;
}

// cuSPARSELt.
namespace {

struct Matrix {
  int64_t rows, columns;
  int type, order;
  bool structured;

  // Of the element in row i and column j.
  int64_t offset(int64_t i, int64_t j) const {
    return order == lt::kOrderRow ? i * columns + j : j * rows + i;
  }

  float get(const void* data, int64_t i, int64_t j) const {
    const int64_t at = offset(i, j);
    const uint16_t bits = static_cast<const uint16_t*>(data)[at];
    if (type == lt::kR16F) return half_to_float(bits);
    return kwm::bfloat16_to_float(bits);
  }

  void set(void* data, int64_t i, int64_t j, float value) const {
    const int64_t at = offset(i, j);
    static_cast<uint16_t*>(data)[at] = type == lt::kR16F
                                           ? float_to_half(value)
                                           : kwm::float_to_bfloat16(value);
  }
};

struct Matmul {
  Matrix a, b, d;
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
  const int multiple = structured ? 16 : 8;
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
  made = {as<Matrix>(a), as<Matrix>(b), as<Matrix>(d)};
  const bool fits =
      op_a == 0 && op_b == 0 && c == d && made.a.structured &&
      made.a.columns == made.b.rows && made.a.rows == made.d.rows &&
      made.b.columns == made.d.columns && made.a.type == made.b.type &&
      compute == lt::kCompute32F && made.d.type == made.a.type;
  return fits ? 0 : kLtInvalid;
}
FAKE int cusparseLtMatmulAlgSelectionInit(const Opaque*, Opaque* selection,
                                          const Opaque* matmul, int algorithm) {
  as<Matmul>(selection) = as<Matmul>(matmul);
  ++live;
  return algorithm == 0 ? 0 : kLtInvalid;
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
  *compressed = a.rows * a.columns * 2;
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
  memcpy(compressed, dense, a.rows * a.columns * 2);
  return 0;
}
FAKE int cusparseLtMatmul(const Opaque* handle, const Opaque* plan, const void* alpha,
                          const void* a, const void* b, const void* beta,
                          const void* c, void* d, void* workspace,
                          void** streams, int32_t stream_count) {
  const Matmul& matmul = as<Matmul>(plan);
  if (*static_cast<const float*>(alpha) != 1 ||
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
      matmul.d.set(d, i, j, static_cast<float>(sum));
    }
  }
  return 0;
}
