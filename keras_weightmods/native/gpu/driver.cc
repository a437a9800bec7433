#include "driver.h"

#include <dlfcn.h>

#include <map>
#include <utility>

#include "kwm_gpu.h"

namespace kwm {

namespace {

// Of CUdevice_attribute.
constexpr int kMajor = 75, kMinor = 76, kProcessors = 16;
constexpr int kSharedOfBlock = 97, kSharedOfProcessor = 81;

// The primary contexts, by device: retained once and for good, as JAX and
// torch keep them too.
struct Device {
  void* context;
  int major, minor;
  Sizes sizes;
};

Driver opened;
bool ready = false;

Failure load(const char* path) {
  if (ready) return "";
  void* library = nullptr;
  KWM_TRY(open_library(path, &library));
  Driver* driver = &opened;
  KWM_TRY(find(library, "cuInit", &driver->Init));
  KWM_TRY(find(library, "cuGetErrorString", &driver->GetErrorString));
  KWM_TRY(find(library, "cuDeviceGet", &driver->DeviceGet));
  KWM_TRY(find(library, "cuDeviceGetAttribute", &driver->DeviceGetAttribute));
  KWM_TRY(find(library, "cuDevicePrimaryCtxRetain",
               &driver->PrimaryContextRetain));
  KWM_TRY(find(library, "cuCtxPushCurrent_v2", &driver->ContextPush));
  KWM_TRY(find(library, "cuCtxPopCurrent_v2", &driver->ContextPop));
  KWM_TRY(find(library, "cuModuleLoadData", &driver->ModuleLoadData));
  KWM_TRY(find(library, "cuModuleGetFunction", &driver->ModuleGetFunction));
  KWM_TRY(find(library, "cuFuncSetAttribute", &driver->FuncSetAttribute));
  KWM_TRY(find(library, "cuLaunchKernelEx", &driver->LaunchKernelEx));
  KWM_TRY(explain(*driver, "cuInit", driver->Init(0)));
  ready = true;
  return "";
}

Failure open_device(const Driver& driver, int ordinal, Device* device) {
  int handle = 0;
  KWM_TRY(explain(driver, "cuDeviceGet", driver.DeviceGet(&handle, ordinal)));
  int of_block = 0, of_processor = 0;
  for (const auto& [value, attribute] :
       {std::pair(&device->major, kMajor), std::pair(&device->minor, kMinor),
        std::pair(&device->sizes.processors, kProcessors),
        std::pair(&of_block, kSharedOfBlock),
        std::pair(&of_processor, kSharedOfProcessor)}) {
    KWM_TRY(explain(driver, "cuDeviceGetAttribute",
                    driver.DeviceGetAttribute(value, attribute, handle)));
  }
  device->sizes.shared_of_block = of_block;
  device->sizes.shared_of_processor = of_processor;
  return explain(driver, "cuDevicePrimaryCtxRetain",
                 driver.PrimaryContextRetain(&device->context, handle));
}

}  // namespace

const char* report(const Failure& failure) {
  static thread_local std::string kept;
  kept = failure;
  return kept.empty() ? nullptr : kept.c_str();
}

std::mutex& library_mutex() {
  static std::mutex mutex;
  return mutex;
}

Failure open_library(const char* path, void** library) {
  *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  return *library ? "" : dlerror();
}

Failure find_symbol(void* library, const char* name, void** symbol) {
  *symbol = dlsym(library, name);
  return *symbol ? "" : std::string("a CUDA library lacks ") + name;
}

Failure explain(const Driver& driver, const char* what, int status) {
  if (status == 0) return "";
  const char* text = nullptr;
  driver.GetErrorString(status, &text);
  return std::string(what) + ": " + (text ? text : "unknown error") + " (" +
         std::to_string(status) + ")";
}

Failure get_driver(const Driver** driver) {
  *driver = &opened;
  return ready ? "" : "the CUDA driver is not loaded";
}

Context::Context(int ordinal) {
  static std::map<int, Device> devices;
  failure_ = get_driver(&driver_);
  if (!failure_.empty()) return;
  auto known = devices.find(ordinal);
  if (known == devices.end()) {
    Device device;
    failure_ = open_device(*driver_, ordinal, &device);
    if (!failure_.empty()) return;
    known = devices.emplace(ordinal, device).first;
  }
  major_ = known->second.major;
  minor_ = known->second.minor;
  sizes_ = known->second.sizes;
  failure_ = explain(*driver_, "cuCtxPushCurrent",
                     driver_->ContextPush(known->second.context));
  pushed_ = failure_.empty();
}

Context::~Context() {
  void* context = nullptr;
  if (pushed_) driver_->ContextPop(&context);
}

}  // namespace kwm

const char* kwm_gpu_load_driver(const char* path) {
  const std::lock_guard<std::mutex> lock(kwm::library_mutex());
  return kwm::report(kwm::load(path));
}
