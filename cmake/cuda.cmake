# The CUDA part of the build: imbsam_cuda says whether there is one, imbsam_add_cuda adds it.
set(imbsam_cuda OFF)
set(IMBSAM_CUDA_ARCHITECTURES "" CACHE STRING
  "CUDA architectures in CMake's notation; empty: those of this machine's devices, without any \
those of a wheel; wheel: sm_75 and the first of every newer generation, and PTX of compute_75")

if(NOT IMBSAM_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "IMBSAM_CUDA is '${IMBSAM_CUDA}', expected AUTO, ON or OFF")
endif()
if(NOT IMBSAM_CUDA STREQUAL "OFF")
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    enable_language(CUDA)
    set(imbsam_cuda ON)
    set(missing)
    if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.1)  # no kernel arguments of 32 KB before
      set(missing "nvcc 12.1 or newer (${CMAKE_CUDA_COMPILER} is ${CMAKE_CUDA_COMPILER_VERSION})")
    endif()
  else()
    set(missing "a working nvcc (set CUDACXX to its path)")
  endif()
  if(missing)
    set(imbsam_cuda OFF)
    if(IMBSAM_CUDA STREQUAL "ON")
      message(FATAL_ERROR "IMBSAM_CUDA is ON, which needs ${missing}")
    endif()
    message(STATUS "imbsam_fast: building for the CPU only; CUDA needs ${missing}")
  endif()
else()
  message(STATUS "imbsam_fast: building for the CPU only, IMBSAM_CUDA is OFF")
endif()

# sm_75 and every sm_N0 that this nvcc knows: what is built for one runs on all of its generation,
# and kernels that wait for memory gain nothing from more. PTX of the oldest for all others: systems
# on a chip, and what is yet to come.
function(imbsam_cuda_architectures result)
  if(IMBSAM_CUDA_ARCHITECTURES AND NOT IMBSAM_CUDA_ARCHITECTURES STREQUAL "wheel")
    set(${result} ${IMBSAM_CUDA_ARCHITECTURES} PARENT_SCOPE)
    return()
  endif()
  execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --list-gpu-arch
    OUTPUT_VARIABLE known COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCHALL "[0-9]+" known "${known}")
  list(FILTER known EXCLUDE REGEX "^([1-6].|7[0-4])$")
  # What CMake 3.24 and newer found out by running a program, where nvcc knows all of it.
  string(REGEX MATCHALL "[0-9]+-real" devices "${CMAKE_CUDA_ARCHITECTURES_NATIVE}")
  set(unknown ${devices})
  list(TRANSFORM unknown REPLACE "-real" "")
  list(REMOVE_ITEM unknown ${known})
  if(devices AND NOT unknown AND NOT IMBSAM_CUDA_ARCHITECTURES STREQUAL "wheel")
    set(${result} ${devices} PARENT_SCOPE)
    return()
  endif()
  list(FILTER known INCLUDE REGEX "^(75|[89]0|[0-9]+[0-9]0)$")
  list(SORT known COMPARE NATURAL)
  list(TRANSFORM known APPEND "-real")
  set(${result} ${known} 75-virtual PARENT_SCOPE)
endfunction()

function(imbsam_add_cuda target)
  imbsam_cuda_architectures(architectures)
  message(STATUS "imbsam_fast: building for CUDA ${CMAKE_CUDA_COMPILER_VERSION}, ${architectures}")
  set(bit_exact csrc/cuda/adam_update.cu csrc/cuda/perturb.cu csrc/cuda/rmsprop_update.cu
    csrc/cuda/sgd_update.cu)
  add_library(imbsam_cuda OBJECT
    ${bit_exact}
    csrc/cuda/merge.cu
    csrc/cuda/runtime.cu
    csrc/cuda/soft_cross_entropy.cu
    csrc/cuda/split_cross_entropy.cu
    csrc/cuda/squared_norm.cu
    csrc/cuda/updates.cu)
  # Without fused multiply-add the updates of weights have the bits of the CPU kernels.
  set_source_files_properties(${bit_exact} PROPERTIES COMPILE_OPTIONS -fmad=false)
  # What runtime.cu compares the machine's devices with.
  list(JOIN architectures "," with_commas)
  set_source_files_properties(csrc/cuda/runtime.cu PROPERTIES
    COMPILE_DEFINITIONS "IMBSAM_CUDA_ARCHITECTURES=\"${with_commas}\"")
  target_compile_options(imbsam_cuda PRIVATE
    "$<$<COMPILE_LANGUAGE:CUDA>:SHELL:-Xfatbin -compress-all>" -Xcompiler=-Wall)
  set_target_properties(imbsam_cuda PROPERTIES
    CUDA_ARCHITECTURES "${architectures}"
    CUDA_STANDARD 17
    CUDA_STANDARD_REQUIRED ON
    CUDA_EXTENSIONS OFF
    CUDA_VISIBILITY_PRESET hidden
    CUDA_RUNTIME_LIBRARY Static)
  target_compile_definitions(${target} PRIVATE IMBSAM_CUDA)
  target_link_libraries(${target} PRIVATE imbsam_cuda)
  # The runtime is linked in, so that the module loads without a driver. Its names stay inside:
  # torch brings another copy of them.
  set_target_properties(${target} PROPERTIES CUDA_RUNTIME_LIBRARY Static)
  target_link_options(${target} PRIVATE -Wl,--exclude-libs,ALL)
endfunction()
