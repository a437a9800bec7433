// XLA custom calls on the GPU, as JAX registers them for the platform CUDA.
// Built with the oldest FFI header in use, they run under all later versions.
//
// What may not happen while XLA records a CUDA graph, compiling a kernel or
// planning a product, happens in the initialize stage before.
//
// Not yet run on a GPU.

#include <optional>
#include <string>

#include "../kwm_native.h"
#include "kwm_gpu.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using Stream = ffi::PlatformStream<void*>;

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

ffi::Error Failed(const char* message) {
  return ffi::Error(ffi::ErrorCode::kInternal,
                    std::string("keras_weightmods: ") + message);
}

ffi::Error Invalid(const char* message) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument,
                    std::string("keras_weightmods: ") + message);
}

ffi::Error Result(const char* failure) {
  return failure ? Failed(failure) : ffi::Error::Success();
}

int XType(ffi::DataType type) {
  switch (type) {
    case ffi::F32:
      return KWM_X_FLOAT32;
    case ffi::BF16:
      return KWM_X_BFLOAT16;
    case ffi::F16:
      return KWM_X_FLOAT16;
    case ffi::S8:
      return KWM_X_INT8;
    default:
      return -1;
  }
}

int ValueType(ffi::DataType type) {
  switch (type) {
    case ffi::F32:
      return KWM_FLOAT32;
    case ffi::BF16:
      return KWM_BFLOAT16;
    case ffi::S8:
      return KWM_INT8;
    case ffi::U8:
      return KWM_INT4;
    default:
      return -1;
  }
}

// Memory that is there until the handler returns, aligned to 256 bytes: XLA
// refuses to be asked for more than 16. Its address must not outlive the call,
// so no handler that takes it may be recorded into a command buffer.
ffi::Error Allocate(ffi::ScratchAllocator& scratch, int64_t size,
                    void** workspace) {
  *workspace = nullptr;
  if (size == 0) return ffi::Error::Success();
  const std::optional<void*> room = scratch.Allocate(size);
  if (!room) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                      "keras_weightmods: no memory for the workspace");
  }
  *workspace = *room;
  return ffi::Error::Success();
}

// The sizes of packed arrays: those of meta, and of values and scales in bytes.
bool Fits(const ffi::AnyBuffer& values, const ffi::Buffer<ffi::S32>& meta,
          const ffi::AnyBuffer& scale, int64_t k, int64_t n) {
  const int64_t blocks = (n + 15) / 16, rows = (k + 31) / 32;
  const int64_t words = blocks * rows * 16;
  const int type = ValueType(values.element_type());
  const int64_t size = type == KWM_FLOAT32    ? 64
                       : type == KWM_BFLOAT16 ? 32
                       : type == KWM_INT8     ? 16
                                              : 8;
  const int64_t scales = type == KWM_INT8   ? blocks * 64
                         : type == KWM_INT4 ? blocks * ((rows + 1) / 2) * 32
                                            : 0;
  return static_cast<int64_t>(meta.element_count()) == words &&
         static_cast<int64_t>(values.size_bytes()) == words * size &&
         static_cast<int64_t>(scale.size_bytes()) == scales;
}

ffi::Error DecodeInitialize(int32_t device, ffi::AnyBuffer x,
                            ffi::AnyBuffer values, ffi::Buffer<ffi::S32>,
                            ffi::AnyBuffer, ffi::Result<ffi::AnyBuffer>) {
  return Result(kwm_gpu_prepare_decode(device, XType(x.element_type()),
                                       ValueType(values.element_type()),
                                       Matrix(x).rows));
}

ffi::Error Decode(void* stream, int32_t device, ffi::AnyBuffer x,
                  ffi::AnyBuffer values, ffi::Buffer<ffi::S32> meta,
                  ffi::AnyBuffer scale, ffi::Result<ffi::AnyBuffer> y) {
  const Matrix in(x), out(*y);
  if (in.rows != out.rows || x.element_type() != y->element_type() ||
      !Fits(values, meta, scale, in.columns, out.columns)) {
    return Invalid("the packed weights do not fit the activations");
  }
  return Result(kwm_gpu_decode(
      device, stream, XType(x.element_type()),
      ValueType(values.element_type()), x.untyped_data(), in.rows, in.columns,
      out.columns, values.untyped_data(), meta.untyped_data(),
      scale.untyped_data(), y->untyped_data()));
}

ffi::Error RoundRowsInitialize(int32_t device, ffi::AnyBuffer x,
                               ffi::ResultBuffer<ffi::S8>,
                               ffi::ResultBuffer<ffi::F32>) {
  return Result(kwm_gpu_prepare_rounding(device, XType(x.element_type())));
}

ffi::Error RoundRows(void* stream, int32_t device, ffi::AnyBuffer x,
                     ffi::ResultBuffer<ffi::S8> steps,
                     ffi::ResultBuffer<ffi::F32> scales) {
  const Matrix in(x), out(*steps);
  if (in.columns != out.columns || in.rows > out.rows ||
      static_cast<int64_t>(scales->element_count()) != in.rows) {
    return Invalid("what is rounded does not fit the activations");
  }
  return Result(kwm_gpu_round_rows(
      device, stream, XType(x.element_type()), x.untyped_data(), in.rows,
      out.rows, in.columns, steps->untyped_data(), scales->untyped_data()));
}

ffi::Error Compress(void* stream, int32_t device, ffi::ScratchAllocator scratch,
                    ffi::AnyBuffer transposed,
                    ffi::ResultBuffer<ffi::U8> compressed) {
  const Matrix kernel(transposed);
  const int type = XType(transposed.element_type());
  int64_t size = 0, room = 0;
  if (const char* failure =
          kwm_gpu_compressed_size(device, kernel.columns, kernel.rows, type,
                                  &size, &room)) {
    return Failed(failure);
  }
  if (size != static_cast<int64_t>(compressed->size_bytes())) {
    return Invalid("the compressed kernel is of another size");
  }
  void* workspace;
  const ffi::Error error = Allocate(scratch, room, &workspace);
  if (error.failure()) return error;
  return Result(kwm_gpu_compress(device, stream, transposed.untyped_data(),
                                 kernel.columns, kernel.rows, type,
                                 compressed->untyped_data(), workspace));
}

ffi::Error CusparseltInitialize(int32_t device, ffi::AnyBuffer x,
                                ffi::Buffer<ffi::U8>, ffi::Buffer<ffi::F32>,
                                ffi::Result<ffi::AnyBuffer> y,
                                int64_t algorithm) {
  const Matrix in(x), out(*y);
  int64_t room = 0;
  return Result(kwm_gpu_prepare_cusparselt(device, in.rows, in.columns,
                                           out.columns, XType(x.element_type()),
                                           algorithm, &room));
}

ffi::Error Cusparselt(void* stream, int32_t device,
                      ffi::ScratchAllocator scratch, ffi::AnyBuffer x,
                      ffi::Buffer<ffi::U8> compressed,
                      ffi::Buffer<ffi::F32> scale,
                      ffi::Result<ffi::AnyBuffer> y, int64_t algorithm) {
  const Matrix in(x), out(*y);
  const int type = XType(x.element_type());
  const bool is_scaled = type == KWM_X_INT8;
  if (in.rows != out.rows ||
      y->element_type() != (is_scaled ? ffi::BF16 : x.element_type())) {
    return Invalid("the result does not fit the activations");
  }
  if (is_scaled &&
      static_cast<int64_t>(scale.element_count()) != out.columns) {
    return Invalid("the scales do not fit the result");
  }
  int64_t room = 0, size = 0, unused = 0;
  const char* failure = kwm_gpu_prepare_cusparselt(
      device, in.rows, in.columns, out.columns, type, algorithm, &room);
  if (!failure) {
    failure = kwm_gpu_compressed_size(device, in.columns, out.columns, type,
                                      &size, &unused);
  }
  if (failure) return Failed(failure);
  if (size != static_cast<int64_t>(compressed.size_bytes())) {
    return Invalid("the compressed kernel is of another shape or device");
  }
  void* workspace;
  const ffi::Error error = Allocate(scratch, room, &workspace);
  if (error.failure()) return error;
  return Result(kwm_gpu_cusparselt(device, stream, x.untyped_data(), in.rows,
                                   in.columns, out.columns, type, algorithm,
                                   compressed.untyped_data(),
                                   is_scaled ? scale.untyped_data() : nullptr,
                                   y->untyped_data(), workspace));
}

}  // namespace

#define KWM_GPU_HANDLER(name) \
  extern "C" KWM_GPU_API XLA_FFI_Error* name(XLA_FFI_CallFrame* call_frame)
KWM_GPU_HANDLER(kwm_gpu_xla_decode_initialize);
KWM_GPU_HANDLER(kwm_gpu_xla_decode);
KWM_GPU_HANDLER(kwm_gpu_xla_round_rows_initialize);
KWM_GPU_HANDLER(kwm_gpu_xla_round_rows);
KWM_GPU_HANDLER(kwm_gpu_xla_compress);
KWM_GPU_HANDLER(kwm_gpu_xla_cusparselt_initialize);
KWM_GPU_HANDLER(kwm_gpu_xla_cusparselt);

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    kwm_gpu_xla_decode_initialize, DecodeInitialize,
    ffi::Ffi::Bind<ffi::ExecutionStage::kInitialize>()
        .Ctx<ffi::DeviceOrdinal>()
        .Arg<ffi::AnyBuffer>()
        .Arg<ffi::AnyBuffer>()
        .Arg<ffi::Buffer<ffi::S32>>()
        .Arg<ffi::AnyBuffer>()
        .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(kwm_gpu_xla_decode, Decode,
                              ffi::Ffi::Bind()
                                  .Ctx<Stream>()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>(),
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    kwm_gpu_xla_round_rows_initialize, RoundRowsInitialize,
    ffi::Ffi::Bind<ffi::ExecutionStage::kInitialize>()
        .Ctx<ffi::DeviceOrdinal>()
        .Arg<ffi::AnyBuffer>()
        .Ret<ffi::Buffer<ffi::S8>>()
        .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(kwm_gpu_xla_round_rows, RoundRows,
                              ffi::Ffi::Bind()
                                  .Ctx<Stream>()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::S8>>()
                                  .Ret<ffi::Buffer<ffi::F32>>(),
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(kwm_gpu_xla_compress, Compress,
                              ffi::Ffi::Bind()
                                  .Ctx<Stream>()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Ctx<ffi::ScratchAllocator>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::U8>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    kwm_gpu_xla_cusparselt_initialize, CusparseltInitialize,
    ffi::Ffi::Bind<ffi::ExecutionStage::kInitialize>()
        .Ctx<ffi::DeviceOrdinal>()
        .Arg<ffi::AnyBuffer>()
        .Arg<ffi::Buffer<ffi::U8>>()
        .Arg<ffi::Buffer<ffi::F32>>()
        .Ret<ffi::AnyBuffer>()
        .Attr<int64_t>("algorithm"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(kwm_gpu_xla_cusparselt, Cusparselt,
                              ffi::Ffi::Bind()
                                  .Ctx<Stream>()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Ctx<ffi::ScratchAllocator>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("algorithm"));
