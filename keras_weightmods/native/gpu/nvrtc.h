// NVRTC, which compiles a kernel's source for the GPU that is there.

#ifndef KWM_NVRTC_H_
#define KWM_NVRTC_H_

#include <string>
#include <vector>

#include "driver.h"

namespace kwm {

// One source, compiled with different options. Not for several threads.
class Source {
 public:
  // Opens NVRTC, the library at `path`, for a text named `name` in messages.
  Failure load(const char* path, const char* name, const char* text);

  // The machine code for a compute capability; `options` are added to it.
  Failure compile(int major, int minor, const std::vector<std::string>& options,
                  std::vector<char>* code) const;

 private:
  // The functions of NVRTC that are used, as nvrtc.h declares them.
  struct Functions {
    const char* (*GetErrorString)(int status);
    int (*CreateProgram)(void** program, const char* source, const char* name,
                         int headers, const char* const* header_sources,
                         const char* const* header_names);
    int (*CompileProgram)(void* program, int options,
                          const char* const* option_texts);
    int (*GetCUBINSize)(void* program, size_t* size);
    int (*GetCUBIN)(void* program, char* code);
    int (*GetProgramLogSize)(void* program, size_t* size);
    int (*GetProgramLog)(void* program, char* log);
    int (*DestroyProgram)(void** program);
  };

  std::string log_of(void* program) const;

  Functions functions_;
  std::string name_, text_;
  bool ready_ = false;
};

}  // namespace kwm

#endif  // KWM_NVRTC_H_
