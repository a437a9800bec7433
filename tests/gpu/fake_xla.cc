// Calls an XLA handler as XLA would on a GPU: with a stream, the ordinal of a
// device, memory to allocate and buffers. As strict as XLA's
// allocator of scratch memory, which refuses alignments above 16, and stricter
// about what it gives: full of noise, and noise again once it is given back.

#include <stdlib.h>
#include <string.h>

#include <string>
#include <vector>

#include "xla/ffi/api/c_api.h"

struct XLA_FFI_Error {
  std::string message;
};

namespace {

constexpr int kNoise = 0xee;  // as bfloat16 and float32 a large number
int64_t allocated = 0, allocations = 0;
int device_ordinal = 0;

XLA_FFI_Error* ErrorCreate(XLA_FFI_Error_Create_Args* args) {
  return new XLA_FFI_Error{args->message};
}

XLA_FFI_Error* StreamGet(XLA_FFI_Stream_Get_Args* args) {
  args->stream = nullptr;
  return nullptr;
}

XLA_FFI_Error* OrdinalGet(XLA_FFI_DeviceOrdinal_Get_Args* args) {
  args->device_ordinal = device_ordinal;
  return nullptr;
}

XLA_FFI_Error* Allocate(XLA_FFI_DeviceMemory_Allocate_Args* args) {
  if (args->alignment > 16) {
    return new XLA_FFI_Error{"Requested alignment must be no more than 16"};
  }
  ++allocated;
  ++allocations;
  args->data = aligned_alloc(256, (args->size + 255) / 256 * 256);
  memset(args->data, kNoise, args->size);
  return nullptr;
}

XLA_FFI_Error* Free(XLA_FFI_DeviceMemory_Free_Args* args) {
  --allocated;
  memset(args->data, kNoise, args->size);
  free(args->data);
  return nullptr;
}

void MessageGet(XLA_FFI_Error_GetMessage_Args* args) {
  args->message = args->error->message.c_str();
}

void ErrorDestroy(XLA_FFI_Error_Destroy_Args* args) { delete args->error; }

XLA_FFI_Api MakeApi() {
  XLA_FFI_Api api;
  memset(&api, 0, sizeof api);
  api.struct_size = XLA_FFI_Api_STRUCT_SIZE;
  api.api_version = {XLA_FFI_Api_Version_STRUCT_SIZE, nullptr,
                     XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR};
  api.XLA_FFI_Error_Create = ErrorCreate;
  api.XLA_FFI_Error_GetMessage = MessageGet;
  api.XLA_FFI_Error_Destroy = ErrorDestroy;
  api.XLA_FFI_Stream_Get = StreamGet;
  api.XLA_FFI_DeviceOrdinal_Get = OrdinalGet;
  api.XLA_FFI_DeviceMemory_Allocate = Allocate;
  api.XLA_FFI_DeviceMemory_Free = Free;
  return api;
}

XLA_FFI_CallFrame MakeFrame(const XLA_FFI_Api* api) {
  XLA_FFI_CallFrame frame;
  memset(&frame, 0, sizeof frame);
  frame.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
  frame.api = api;
  frame.args.struct_size = XLA_FFI_Args_STRUCT_SIZE;
  frame.rets.struct_size = XLA_FFI_Rets_STRUCT_SIZE;
  frame.attrs.struct_size = XLA_FFI_Attrs_STRUCT_SIZE;
  return frame;
}

std::string text;

}  // namespace

extern "C" {

int64_t fake_xla_traits(XLA_FFI_Handler* handler);

// The device that the next calls run on.
void fake_xla_set_device(int ordinal) { device_ordinal = ordinal; }

// An array, of up to 5 axes.
struct Array {
  int64_t dtype;
  int64_t rank;
  int64_t dims[5];
  void* data;
};

// The first `inputs` arrays are operands, the others results. Returns NULL or
// what went wrong.
const char* fake_xla_call(XLA_FFI_Handler* handler, Array* arrays, int count,
                          int inputs) {
  const XLA_FFI_Api api = MakeApi();
  XLA_FFI_CallFrame frame = MakeFrame(&api);
  frame.stage = XLA_FFI_ExecutionStage_EXECUTE;
  std::vector<XLA_FFI_Buffer> buffers(count);
  std::vector<void*> pointers(count);
  for (int i = 0; i < count; ++i) {
    buffers[i] = {XLA_FFI_Buffer_STRUCT_SIZE,
                  nullptr,
                  static_cast<XLA_FFI_DataType>(arrays[i].dtype),
                  arrays[i].data,
                  arrays[i].rank,
                  arrays[i].dims};
    pointers[i] = &buffers[i];
  }
  std::vector<XLA_FFI_ArgType> arg_types(count, XLA_FFI_ArgType_BUFFER);
  std::vector<XLA_FFI_RetType> ret_types(count, XLA_FFI_RetType_BUFFER);
  frame.args.size = inputs;
  frame.args.types = arg_types.data();
  frame.args.args = pointers.data();
  frame.rets.size = count - inputs;
  frame.rets.types = ret_types.data();
  frame.rets.rets = pointers.data() + inputs;

  allocations = 0;
  XLA_FFI_Error* error = handler(&frame);
  // The graph would replay with the address of memory that is given back.
  if (error == nullptr && allocations > 0 && fake_xla_traits(handler) & 1) {
    return "a command buffer keeps the address of scratch memory";
  }
  if (error == nullptr) return nullptr;
  text = error->message;
  delete error;
  return text.c_str();
}

// Blocks of memory that were not given back.
int64_t fake_xla_allocated() { return allocated; }

// The traits that a handler names when it is registered.
int64_t fake_xla_traits(XLA_FFI_Handler* handler) {
  const XLA_FFI_Api api = MakeApi();
  XLA_FFI_CallFrame frame = MakeFrame(&api);
  XLA_FFI_Metadata metadata;
  memset(&metadata, 0, sizeof metadata);
  metadata.struct_size = XLA_FFI_Metadata_STRUCT_SIZE;
  XLA_FFI_Metadata_Extension extension;
  memset(&extension, 0, sizeof extension);
  extension.extension_base.struct_size = XLA_FFI_Metadata_Extension_STRUCT_SIZE;
  extension.extension_base.type = XLA_FFI_Extension_Metadata;
  extension.metadata = &metadata;
  frame.extension_start = &extension.extension_base;
  delete handler(&frame);
  return metadata.traits;
}

}  // extern "C"
