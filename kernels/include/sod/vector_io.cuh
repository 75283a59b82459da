// 16-byte global loads and stores of logits as float (or double) lanes.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "sod/portable.h"

namespace sod {

template <typename E>
struct Element {
  using T = float;  // arithmetic type
};
template <>
struct Element<double> {
  using T = double;
};

__device__ __forceinline__ float log2_fast(float x) { return __log2f(x); }
__device__ __forceinline__ double log2_fast(double x) { return log2(x); }

// max(x, floor), NaN stays: fmaxf would turn a NaN logit into an absent column.
__device__ __forceinline__ float at_least(float x, float floor) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(floor));
  return y;
}
__device__ __forceinline__ double at_least(double x, double floor) { return x < floor ? floor : x; }

struct Raw16 {
  uint32_t word[4];
};

// Streamed once: past L1, and through the read-only path where nothing in the kernel writes it.
__device__ __forceinline__ Raw16 load_readonly(const void* p) {
  Raw16 r;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r.word[0]), "=r"(r.word[1]), "=r"(r.word[2]), "=r"(r.word[3])
               : "l"(p));
  return r;
}
__device__ __forceinline__ Raw16 load_plain(const void* p) {
  Raw16 r;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r.word[0]), "=r"(r.word[1]), "=r"(r.word[2]), "=r"(r.word[3])
               : "l"(p)
               : "memory");
  return r;
}
__device__ __forceinline__ void store16(void* p, const Raw16& r) {
  asm volatile("st.global.L1::no_allocate.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(r.word[0]),
               "r"(r.word[1]), "r"(r.word[2]), "r"(r.word[3])
               : "memory");
}

template <typename E>
struct Lanes;  // kLanes elements in 16 bytes, and how they unpack

template <>
struct Lanes<__nv_bfloat16> {
  static constexpr int kLanes = 8;
  __device__ static float get(const Raw16& r, int i) {
    const uint32_t w = r.word[i / 2];
    return __uint_as_float(i % 2 ? w & 0xffff0000u : w << 16);
  }
  __device__ static void put(Raw16& r, int i, float a, float b) {  // elements i and i + 1
    const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
    r.word[i / 2] = *reinterpret_cast<const uint32_t*>(&pair);
  }
};

template <>
struct Lanes<__half> {
  static constexpr int kLanes = 8;
  __device__ static float get(const Raw16& r, int i) {
    const __half2 pair = *reinterpret_cast<const __half2*>(&r.word[i / 2]);
    return i % 2 ? __high2float(pair) : __low2float(pair);
  }
  __device__ static void put(Raw16& r, int i, float a, float b) {
    const __half2 pair = __floats2half2_rn(a, b);
    r.word[i / 2] = *reinterpret_cast<const uint32_t*>(&pair);
  }
};

template <>
struct Lanes<float> {
  static constexpr int kLanes = 4;
  __device__ static float get(const Raw16& r, int i) { return __uint_as_float(r.word[i]); }
  __device__ static void put(Raw16& r, int i, float a, float b) {
    r.word[i] = __float_as_uint(a), r.word[i + 1] = __float_as_uint(b);
  }
};

template <>
struct Lanes<double> {
  static constexpr int kLanes = 2;
  __device__ static double get(const Raw16& r, int i) {
    return __hiloint2double(int(r.word[2 * i + 1]), int(r.word[2 * i]));
  }
  __device__ static void put(Raw16& r, int, double a, double b) {
    r.word[0] = uint32_t(__double2loint(a)), r.word[1] = uint32_t(__double2hiint(a));
    r.word[2] = uint32_t(__double2loint(b)), r.word[3] = uint32_t(__double2hiint(b));
  }
};

__device__ __forceinline__ float to_number(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_number(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_number(float x) { return x; }
__device__ __forceinline__ double to_number(double x) { return x; }

__device__ __forceinline__ void from_number(__nv_bfloat16* p, float x) { *p = __float2bfloat16(x); }
__device__ __forceinline__ void from_number(__half* p, float x) { *p = __float2half(x); }
__device__ __forceinline__ void from_number(float* p, float x) { *p = x; }
__device__ __forceinline__ void from_number(double* p, double x) { *p = x; }

}  // namespace sod
