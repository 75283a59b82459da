// What the launchers share.
#pragma once
#include <cuda_runtime.h>

#include "sod/cuda_api.h"

namespace sod {

inline const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

inline int num_multiprocessors() {
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count > 0 ? count : 1;
}

// Two resident blocks per multiprocessor walk over all rows.
inline int persistent_blocks(int64_t rows) {
  const int64_t most = 2 * num_multiprocessors();
  return int(rows < most ? rows : most);
}

inline int64_t element_bytes(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

inline bool on_16_bytes(const void* p, int64_t stride, DType dtype) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride * element_bytes(dtype) % 16 == 0;
}

// Vectors of 16 bytes need every row of every tensor to start on 16 bytes.
inline bool aligned(const Logits& in) {
  return on_16_bytes(in.student, in.student_stride, in.dtype) &&
         (in.teacher == nullptr || on_16_bytes(in.teacher, in.teacher_stride, in.dtype));
}

#define SOD_DISPATCH(dtype, fn, ...)                                  \
  switch (dtype) {                                                    \
    case DType::kBFloat16: fn<__nv_bfloat16>(__VA_ARGS__); break;     \
    case DType::kFloat16: fn<__half>(__VA_ARGS__); break;             \
    case DType::kFloat32: fn<float>(__VA_ARGS__); break;              \
    case DType::kFloat64: fn<double>(__VA_ARGS__); break;             \
  }

}  // namespace sod
