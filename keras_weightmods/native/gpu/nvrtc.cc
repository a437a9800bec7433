#include "nvrtc.h"

namespace kwm {

Failure Source::load(const char* path, const char* name, const char* text) {
  if (ready_) return "";
  void* library = nullptr;
  KWM_TRY(open_library(path, &library));
#define KWM_FIND(name) KWM_TRY(find(library, "nvrtc" #name, &functions_.name))
  KWM_FIND(GetErrorString);
  KWM_FIND(CreateProgram);
  KWM_FIND(CompileProgram);
  KWM_FIND(GetCUBINSize);
  KWM_FIND(GetCUBIN);
  KWM_FIND(GetProgramLogSize);
  KWM_FIND(GetProgramLog);
  KWM_FIND(DestroyProgram);
#undef KWM_FIND
  name_ = name;
  text_ = text;
  ready_ = true;
  return "";
}

Failure Source::compile(int major, int minor,
                        const std::vector<std::string>& options,
                        std::vector<char>* code) const {
  if (!ready_) return "NVRTC is not loaded";
  const std::string architecture =
      "--gpu-architecture=sm_" + std::to_string(10 * major + minor);
  std::vector<const char*> texts = {architecture.c_str(), "--std=c++17"};
  for (const std::string& option : options) texts.push_back(option.c_str());

  void* program = nullptr;
  int status = functions_.CreateProgram(&program, text_.c_str(), name_.c_str(),
                                        0, nullptr, nullptr);
  if (status == 0) {
    status = functions_.CompileProgram(program, static_cast<int>(texts.size()),
                                       texts.data());
  }
  size_t size = 0;
  if (status == 0) status = functions_.GetCUBINSize(program, &size);
  code->resize(size);
  if (status == 0) status = functions_.GetCUBIN(program, code->data());
  Failure failure;
  if (status != 0) {
    failure = "NVRTC, " + name_ + ": " + functions_.GetErrorString(status) +
              ", for " + architecture;
    if (program) failure += "\n" + log_of(program);
  }
  if (program) functions_.DestroyProgram(&program);
  return failure;
}

std::string Source::log_of(void* program) const {
  size_t size = 0;
  if (functions_.GetProgramLogSize(program, &size) != 0 || size == 0) return "";
  std::string log(size, '\0');
  functions_.GetProgramLog(program, &log[0]);
  return log.c_str();
}

}  // namespace kwm
