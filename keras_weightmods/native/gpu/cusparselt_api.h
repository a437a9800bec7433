// What is used of cuSPARSELt, 0.7 to 0.10, declared here since its header comes
// with 170 MB of library. tests/gpu compares this with the header where that
// is installed, and `make gpu-libraries` finds each function in real libraries.

#ifndef KWM_CUSPARSELT_API_H_
#define KWM_CUSPARSELT_API_H_

#include <stddef.h>
#include <stdint.h>

namespace kwm {
namespace cusparselt {

// Room for any of the library's opaque structures, which have 512 bytes or,
// before 0.8, 1024. They are only ever passed by their address.
struct alignas(16) Opaque {
  uint8_t data[1024];
};

constexpr int kNonTranspose = 0;                    // cusparseOperation_t
constexpr int kOrderColumn = 1, kOrderRow = 2;      // cusparseOrder_t
constexpr int kSparsity50 = 0;                      // cusparseLtSparsity_t
constexpr int kCompute32F = 2;                      // cusparseComputeType
constexpr int kAlgorithmDefault = 0;                // cusparseLtMatmulAlg_t
constexpr int kR16F = 2, kR16BF = 14;               // cudaDataType

// The driver's functions that are used here, as cuda.h declares them: its
// handles are pointers, its statuses and devices ints.
struct Driver {
  int (*Init)(unsigned flags);
  int (*DeviceGet)(int* device, int ordinal);
  int (*PrimaryContextRetain)(void** context, int device);
  int (*ContextPush)(void* context);
  int (*ContextPop)(void** context);
};

// The functions, with void* for a stream, int for every enumeration and for
// the status (0 is success). The first two came with 0.8: null before.
struct Functions {
  const char* (*GetErrorString)(int status);
  int (*MatmulAlgSelectionDestroy)(const Opaque* selection);
  int (*Init)(Opaque* handle);
  int (*DenseDescriptorInit)(const Opaque* handle, Opaque* matrix, int64_t rows,
                             int64_t columns, int64_t leading,
                             uint32_t alignment, int type, int order);
  int (*MatDescriptorDestroy)(const Opaque* matrix);
  int (*StructuredDescriptorInit)(const Opaque* handle, Opaque* matrix,
                                  int64_t rows, int64_t columns,
                                  int64_t leading, uint32_t alignment, int type,
                                  int order, int sparsity);
  int (*MatmulDescriptorInit)(const Opaque* handle, Opaque* matmul, int op_a,
                              int op_b, const Opaque* a, const Opaque* b,
                              const Opaque* c, const Opaque* d, int compute);
  int (*MatmulAlgSelectionInit)(const Opaque* handle, Opaque* selection,
                                const Opaque* matmul, int algorithm);
  int (*MatmulPlanInit)(const Opaque* handle, Opaque* plan,
                        const Opaque* matmul, const Opaque* selection);
  int (*MatmulPlanDestroy)(const Opaque* plan);
  int (*MatmulGetWorkspace)(const Opaque* handle, const Opaque* plan,
                            size_t* size);
  int (*Matmul)(const Opaque* handle, const Opaque* plan, const void* alpha,
                const void* a, const void* b, const void* beta, const void* c,
                void* d, void* workspace, void** streams, int32_t stream_count);
  int (*SpMMACompressedSize2)(const Opaque* handle, const Opaque* matrix,
                              size_t* compressed, size_t* workspace);
  int (*SpMMACompress2)(const Opaque* handle, const Opaque* matrix,
                        int is_sparse_a, int operation, const void* dense,
                        void* compressed, void* workspace, void* stream);
};

}  // namespace cusparselt
}  // namespace kwm

#endif  // KWM_CUSPARSELT_API_H_
