// XLA custom calls on the CPU: JAX registers them by itself, TensorFlow through
// kwm_xla_register. Built with the oldest FFI header in use, they run under
// all later versions.
//
// The weights of the products are `values`, whose element type is the type
// of the packed weights, `meta` as int32, and `scale` as float32, empty unless
// the values are int8, or as bfloat16 for fewer bits, which are uint8 here.
// Without meta (empty) the matrix is dense, and the third axis of its values is
// as long as they have bits; with four axes meta is a mask. All leading axes of
// an activation are rows.

#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "layout.h"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using Activations = ffi::Buffer<ffi::F32>;
using Result = ffi::ResultBuffer<ffi::F32>;
using Meta = ffi::Buffer<ffi::S32>;
using Scale = ffi::AnyBuffer;

// The rows (m, size) of an activation of shape (..., size).
struct Rows {
  template <typename Buffer>
  explicit Rows(const Buffer& buffer) {
    const auto dims = buffer.dimensions();
    if (dims.size() == 0) return;
    count = std::accumulate(dims.begin(), dims.end() - 1, int64_t{1},
                            std::multiplies<>());
    size = dims.back();
  }

  int64_t count = 0;
  int64_t size = 0;
};

void ParallelFor(void* pool, int64_t count, int64_t grain, kwm_task task,
                 void* context) {
  // Never destroyed: threads of XLA may look at it until the process is gone.
  static auto& helpers = *new kwm::Helpers;
  auto* threads = static_cast<ffi::ThreadPool*>(pool);
  const int64_t size = threads->num_threads();
  // Threads that come late find no chunk, when this call is long over.
  auto chunks =
      std::make_shared<kwm::Chunks>(count, grain, size, task, context);
  helpers.Run(chunks, std::min(size, chunks->total()) - 1,
              [threads](auto help) { threads->Schedule(std::move(help)); });
}

kwm_parallel_for ParallelForOf(const ffi::ThreadPool& threads) {
  return threads.num_threads() > 1 ? ParallelFor : nullptr;
}

ffi::Error Invalid(const char* what) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument,
                    std::string("keras_weightmods: ") + what);
}

// Without KWM_MASKED.
int TypeOf(const ffi::AnyBuffer& values, bool dense = false) {
  switch (values.element_type()) {
    case ffi::F32:
      return KWM_FLOAT32;
    case ffi::BF16:
      return KWM_BFLOAT16;
    case ffi::S8:
      return KWM_INT8;
    case ffi::U8: {
      if (!dense) return KWM_INT4;
      const auto sizes = values.dimensions();
      const int64_t bits = sizes.size() == 5 ? sizes[2] : 0;
      for (int type = KWM_INT4; type < kwm::kTypes; ++type) {
        if (kwm::kTypeBits[type] == bits) return type;
      }
      return -1;
    }
    default:
      return -1;
  }
}

// `scale` is null where there is none.
ffi::Error Check(const Rows& x, const Rows& y, int64_t k, int64_t n,
                 const ffi::AnyBuffer& values, const Meta& meta,
                 const Scale* scale, bool dense = false) {
  const int type = TypeOf(values, dense);
  if (type < 0) return Invalid("values are float32, bfloat16, int8 or uint8");
  if (x.count != y.count) return Invalid("as many rows must come out as go in");
  const auto has = [](const auto& buffer, int64_t bytes) {
    return static_cast<int64_t>(buffer.size_bytes()) == bytes;
  };
  const bool scaled = type >= KWM_INT8;
  if (!has(values, kwm::values_bytes(k, n, type, dense)) ||
      !has(meta, dense ? 0 : kwm::meta_bytes(k, n)) ||
      (scaled && !has(*scale, kwm::scale_bytes(k, n, type)))) {
    return Invalid("the packed weights do not fit the activations' shapes");
  }
  if (scaled &&
      scale->element_type() != (type == KWM_INT8 ? ffi::F32 : ffi::BF16)) {
    return Invalid(
        "scales are float32 for int8 values, bfloat16 for int4 and others");
  }
  return ffi::Error::Success();
}

const uint32_t* Words(const Meta& meta) {
  return reinterpret_cast<const uint32_t*>(meta.typed_data());
}

ffi::Error Matmul(ffi::ThreadPool threads, Activations x,
                  ffi::AnyBuffer values, Meta meta, Scale scale, Result y) {
  const Rows in(x), out(*y);
  const ffi::Error error =
      Check(in, out, in.size, out.size, values, meta, &scale);
  if (error.failure()) return error;
  kwm_matmul(x.typed_data(), in.count, in.size, out.size,
             TypeOf(values), values.untyped_data(), Words(meta),
             scale.untyped_data(), y->typed_data(), ParallelForOf(threads),
             &threads);
  return ffi::Error::Success();
}

ffi::Error MatmulBFloat16(ffi::ThreadPool threads, ffi::Buffer<ffi::BF16> x,
                          ffi::AnyBuffer values, Meta meta,
                          ffi::ResultBuffer<ffi::BF16> y) {
  const Rows in(x), out(*y);
  if (values.element_type() != ffi::BF16) return Invalid("values are bfloat16");
  const ffi::Error error =
      Check(in, out, in.size, out.size, values, meta, nullptr);
  if (error.failure()) return error;
  kwm_matmul_bfloat16(static_cast<const uint16_t*>(x.untyped_data()), in.count,
                      in.size, out.size, values.untyped_data(), Words(meta),
                      static_cast<uint16_t*>(y->untyped_data()),
                      ParallelForOf(threads), &threads);
  return ffi::Error::Success();
}

// Of one x by the matrices that give each result: values, meta and scale of one
// after the other. 2:4 ones are of one type, and not beside others.
ffi::Error MatmulInt8(ffi::ThreadPool threads, Activations x,
                      ffi::RemainingArgs weights, ffi::RemainingRets results) {
  const Rows in(x);
  std::vector<kwm_product> products;
  int sparse = 0;  // the type of 2:4 matrices, or -1
  if (results.size() == 0 || weights.size() != 3 * results.size()) {
    return Invalid("three arrays of weights make a result");
  }
  products.reserve(results.size());
  for (size_t i = 0; i < results.size(); ++i) {
    const auto values = weights.get<ffi::AnyBuffer>(3 * i);
    const auto meta = weights.get<Meta>(3 * i + 1);
    const auto scale = weights.get<Scale>(3 * i + 2);
    auto y = results.get<ffi::Buffer<ffi::F32>>(i);
    if (!values || !meta || !scale || !y) {
      return Invalid("meta is of int32, and results are of float32");
    }
    const bool is_dense = meta->element_count() == 0;
    const bool is_masked = !is_dense && meta->dimensions().size() == 4;
    const int type = TypeOf(*values, is_dense);
    const int own = is_dense || is_masked ? -1 : type;
    if (i == 0) sparse = own;
    if (type < KWM_INT8) {
      return Invalid(
          "int8 activations need values of int8, or uint8 of 2 to 6 bits");
    }
    if (own != sparse) {
      return Invalid("beside a 2:4 matrix all are 2:4, and of its type");
    }
    const Rows out(**y);
    const ffi::Error error =
        Check(in, out, in.size, out.size, *values, *meta, &*scale, is_dense);
    if (error.failure()) return error;
    products.push_back({out.size, type + (is_masked ? KWM_MASKED : 0),
                        values->untyped_data(),
                        is_dense ? nullptr : Words(*meta),
                        scale->untyped_data(), (*y)->typed_data()});
  }
  kwm_matmul_int8_many(x.typed_data(), in.count, in.size, products.data(),
                       static_cast<int64_t>(products.size()),
                       ParallelForOf(threads), &threads);
  return ffi::Error::Success();
}

ffi::Error MatmulTransposed(ffi::ThreadPool threads, Activations dy,
                            ffi::AnyBuffer values, Meta meta, Scale scale,
                            Result dx) {
  const Rows in(dy), out(*dx);
  const ffi::Error error =
      Check(in, out, out.size, in.size, values, meta, &scale);
  if (error.failure()) return error;
  kwm_matmul_transposed(dy.typed_data(), in.count, out.size, in.size,
                        TypeOf(values), values.untyped_data(),
                        Words(meta), scale.untyped_data(), dx->typed_data(),
                        ParallelForOf(threads), &threads);
  return ffi::Error::Success();
}

ffi::Error ValuesGradient(ffi::ThreadPool threads, Activations x,
                          Activations dy, Meta meta, Result dvalues) {
  const Rows in(x), out(dy);
  if (in.count != out.count) return Invalid("x and dy differ in rows");
  if (static_cast<int64_t>(meta.size_bytes()) !=
          kwm::meta_bytes(in.size, out.size) ||
      static_cast<int64_t>(dvalues->size_bytes()) !=
          kwm::values_bytes(in.size, out.size, KWM_FLOAT32, false)) {
    return Invalid("the packed weights do not fit the activations' shapes");
  }
  kwm_values_gradient(x.typed_data(), dy.typed_data(), in.count, in.size,
                      out.size, Words(meta), dvalues->typed_data(),
                      ParallelForOf(threads), &threads);
  return ffi::Error::Success();
}

// q and out are of shape (batch, queries, heads, size); mask
// (batch, queries, places).
ffi::Error Attend(ffi::ThreadPool threads, Activations q, Activations keys,
                  Activations values, ffi::Buffer<ffi::PRED> mask, float scale,
                  Result out) {
  const auto of = q.dimensions(), to = keys.dimensions();
  if (of.size() != 4 || to.size() != 4 || of[0] != to[0] ||
      of[3] != to[3] || to[2] == 0 || of[2] % to[2] != 0 || of[3] % 16 != 0 ||
      values.element_count() != keys.element_count() ||
      mask.element_count() != static_cast<size_t>(to[0] * of[1] * to[1]) ||
      out->element_count() != q.element_count()) {
    return Invalid("queries, keys, values and mask do not fit each other");
  }
  kwm_attend(q.typed_data(), keys.typed_data(), values.typed_data(),
             to[1] * to[2] * to[3],
             reinterpret_cast<const uint8_t*>(mask.typed_data()), to[0], of[1],
             to[1], of[2], to[2], of[3], scale, out->typed_data(),
             ParallelForOf(threads), &threads);
  return ffi::Error::Success();
}

// The arguments and results of all products.
auto Product() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<Activations>()
      .Arg<ffi::AnyBuffer>()
      .Arg<Meta>()
      .Arg<Scale>()
      .Ret<ffi::Buffer<ffi::F32>>();
}

}  // namespace

#define KWM_XLA_HANDLER(name, function, ...)                   \
  extern "C" KWM_API XLA_FFI_Error* name(XLA_FFI_CallFrame*); \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(name, function, __VA_ARGS__)

KWM_XLA_HANDLER(kwm_xla_matmul, Matmul, Product());

KWM_XLA_HANDLER(kwm_xla_matmul_bfloat16, MatmulBFloat16,
                ffi::Ffi::Bind()
                    .Ctx<ffi::ThreadPool>()
                    .Arg<ffi::Buffer<ffi::BF16>>()
                    .Arg<ffi::AnyBuffer>()
                    .Arg<Meta>()
                    .Ret<ffi::Buffer<ffi::BF16>>());

KWM_XLA_HANDLER(kwm_xla_matmul_int8, MatmulInt8,
                ffi::Ffi::Bind()
                    .Ctx<ffi::ThreadPool>()
                    .Arg<Activations>()
                    .RemainingArgs()
                    .RemainingRets());

KWM_XLA_HANDLER(kwm_xla_matmul_transposed, MatmulTransposed, Product());

KWM_XLA_HANDLER(kwm_xla_values_gradient, ValuesGradient,
                ffi::Ffi::Bind()
                    .Ctx<ffi::ThreadPool>()
                    .Arg<Activations>()
                    .Arg<Activations>()
                    .Arg<Meta>()
                    .Ret<ffi::Buffer<ffi::F32>>());

KWM_XLA_HANDLER(kwm_xla_attend, Attend,
                ffi::Ffi::Bind()
                    .Ctx<ffi::ThreadPool>()
                    .Arg<Activations>()
                    .Arg<Activations>()
                    .Arg<Activations>()
                    .Arg<ffi::Buffer<ffi::PRED>>()
                    .Attr<float>("scale")
                    .Ret<ffi::Buffer<ffi::F32>>());

// Registers a handler where no Python function does. Returns 0, or 1 if XLA
// refused.
extern "C" KWM_API int kwm_xla_register(const XLA_FFI_Api* api,
                                        const char* name, const char* platform,
                                        XLA_FFI_Handler* handler) {
  XLA_FFI_Handler_Register_Args args;
  std::memset(&args, 0, sizeof(args));
  args.struct_size = XLA_FFI_Handler_Register_Args_STRUCT_SIZE;
  args.name = {name, std::strlen(name)};
  args.platform = {platform, std::strlen(platform)};
  args.bundle.execute = handler;
  XLA_FFI_Error* error = api->XLA_FFI_Handler_Register(&args);
  if (error == nullptr) return 0;
  XLA_FFI_Error_Destroy_Args destroy;
  std::memset(&destroy, 0, sizeof(destroy));
  destroy.struct_size = XLA_FFI_Error_Destroy_Args_STRUCT_SIZE;
  destroy.error = error;
  api->XLA_FFI_Error_Destroy(&destroy);
  return 1;
}
