# The GPU library, which needs no CUDA to be built and none to be loaded.
add_library(kwm_gpu MODULE)
file(GLOB gpu_sources CONFIGURE_DEPENDS "${native}/gpu/*.cc")
list(REMOVE_ITEM gpu_sources "${native}/gpu/xla_gpu.cc")
target_sources(kwm_gpu PRIVATE ${gpu_sources})
target_compile_features(kwm_gpu PRIVATE cxx_std_17)
target_link_libraries(kwm_gpu PRIVATE ${CMAKE_DL_LIBS})
set_target_properties(kwm_gpu PROPERTIES
  PREFIX ""
  CXX_VISIBILITY_PRESET hidden
  VISIBILITY_INLINES_HIDDEN ON
)
if(has_xla)
  target_sources(kwm_gpu PRIVATE "${native}/gpu/xla_gpu.cc")
  target_include_directories(kwm_gpu SYSTEM PRIVATE "${xla_include}")
endif()
if(SKBUILD_STATE STREQUAL "editable" OR NOT DEFINED SKBUILD)
  set_target_properties(kwm_gpu PROPERTIES
    LIBRARY_OUTPUT_DIRECTORY "$<1:${native}/lib>"
  )
endif()
install(TARGETS kwm_gpu LIBRARY DESTINATION "${package_path}/lib")
