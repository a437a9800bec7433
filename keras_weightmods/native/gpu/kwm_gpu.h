// 2:4 sparse matmul on NVIDIA GPUs: a decode kernel on the portable packed
// format of kwm_native.h, and cuSPARSELt for large batches.
//
// Built without CUDA and linked with none of it: the driver, NVRTC and
// cuSPARSELt are opened at run time, so that this library loads anywhere and
// every function fails with a message where they, or a GPU, are missing. Not yet
// run on a GPU.
//
// A function that can fail returns NULL, or a message that is valid until the
// thread's next call. Any thread may call; work is enqueued on the stream.

#ifndef KWM_GPU_H_
#define KWM_GPU_H_

#include <stdint.h>

#define KWM_GPU_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

#define KWM_GPU_ABI_VERSION 2

// Types of activations and of what cuSPARSELt multiplies. Those of packed
// values are the ones of kwm_native.h.
enum { KWM_X_FLOAT32 = 0, KWM_X_BFLOAT16 = 1, KWM_X_FLOAT16 = 2, KWM_X_INT8 = 3 };

KWM_GPU_API int kwm_gpu_abi_version(void);

// Opens the CUDA driver, the library at `path`. Whatever needs a GPU needs it.
KWM_GPU_API const char* kwm_gpu_load_driver(const char* path);

// Opens NVRTC, the library at the path `nvrtc`, to compile the decode kernel.
// `source` is the text of decode.cu with what it includes.
KWM_GPU_API const char* kwm_gpu_load_decode(const char* source,
                                            const char* nvrtc);

// Opens cuSPARSELt, the library at `path`.
KWM_GPU_API const char* kwm_gpu_load_cusparselt(const char* path);

// The most rows that the decode kernel takes for a type of x; 0 if none.
KWM_GPU_API int64_t kwm_gpu_decode_rows(int x_type);

// Compiles the decode kernel for compute capability `major`.`minor`; needs no
// GPU. Stores the size of the machine code in bytes, and the code, where `code`
// is not NULL and *bytes is room enough.
KWM_GPU_API const char* kwm_gpu_compile_decode(int major, int minor, int x_type,
                                               int value_type, int64_t rows,
                                               int64_t* bytes, void* code);

// Compiles and loads what a later call of kwm_gpu_decode on `device` needs.
KWM_GPU_API const char* kwm_gpu_prepare_decode(int device, int x_type,
                                               int value_type, int64_t rows);

// y (rows, n) = x (rows, k) @ W. x and y are row-major and of x_type. `values`,
// `meta` and the scales of int4 are aligned to 16 bytes; `scale` is read with int8
// and int4 values alone. x is read fastest where it is aligned to 16 bytes and
// its rows are multiples of that. All are on the device.
KWM_GPU_API const char* kwm_gpu_decode(int device, void* stream, int x_type,
                                       int value_type, const void* x,
                                       int64_t rows, int64_t k, int64_t n,
                                       const void* values, const void* meta,
                                       const void* scale, void* y);

// Opens NVRTC, the library at the path `nvrtc`, for the kernel that rounds
// activations. `text` is that of rounding.cu.
KWM_GPU_API const char* kwm_gpu_load_rounding(const char* text,
                                              const char* nvrtc);

// Compiles it for compute capability `major`.`minor`; needs no GPU. Stores the
// size of the machine code in bytes.
KWM_GPU_API const char* kwm_gpu_compile_rounding(int major, int minor,
                                                 int x_type, int64_t* bytes);

// Compiles and loads what a later call of kwm_gpu_round_rows needs.
KWM_GPU_API const char* kwm_gpu_prepare_rounding(int device, int x_type);

// Rounds each row of x (rows, k) to int8: x is about steps * scale. steps has
// `padded_rows` rows, zeros where x has none; scales are `rows` floats. k is a
// multiple of 4; x is aligned to 8 bytes, if it is float32 to 16.
KWM_GPU_API const char* kwm_gpu_round_rows(int device, void* stream, int x_type,
                                           const void* x, int64_t rows,
                                           int64_t padded_rows, int64_t k,
                                           void* steps, void* scales);

// The version of cuSPARSELt, as that library numbers it; -1 if not loaded.
KWM_GPU_API int kwm_gpu_cusparselt_version(int device);

// Sizes in bytes of a compressed (k, n) kernel and of the workspace to make it.
KWM_GPU_API const char* kwm_gpu_compressed_size(int device, int64_t k,
                                                int64_t n, int type,
                                                int64_t* compressed,
                                                int64_t* workspace);

// Compresses a 2:4 kernel, given transposed: row-major (n, k). What it writes
// is cuSPARSELt's own, for this GPU and this version: never to be stored.
KWM_GPU_API const char* kwm_gpu_compress(int device, void* stream,
                                         const void* transposed, int64_t k,
                                         int64_t n, int type, void* compressed,
                                         void* workspace);

// Makes the plan of a product and keeps it; stores the size of its workspace.
// y is of the type of x, but bfloat16 where that is int8. `algorithm` is one of
// cuSPARSELt's for this product, or -1 for the one it proposes.
KWM_GPU_API const char* kwm_gpu_prepare_cusparselt(int device, int64_t rows,
                                                   int64_t k, int64_t n,
                                                   int type, int64_t algorithm,
                                                   int64_t* workspace);

// How many algorithms there are for a product.
KWM_GPU_API const char* kwm_gpu_cusparselt_algorithms(int device, int64_t rows,
                                                      int64_t k, int64_t n,
                                                      int type, int64_t* count);

// y (rows, n) = x (rows, k) @ W, row-major; sizes are multiples of 16 (k and n
// of 32 with int8). With int8, and only then, each column of y is multiplied by
// its entry of `scale`, n floats on the device, before it is rounded.
KWM_GPU_API const char* kwm_gpu_cusparselt(int device, void* stream,
                                           const void* x, int64_t rows,
                                           int64_t k, int64_t n, int type,
                                           int64_t algorithm,
                                           const void* compressed,
                                           const void* scale, void* y,
                                           void* workspace);

#ifdef __cplusplus
}
#endif

#endif  // KWM_GPU_H_
