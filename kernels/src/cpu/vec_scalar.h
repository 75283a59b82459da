// One-lane vectors: every machine, and float64 logits on all of them.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "sod/portable.h"

// Everything under this name exists once per instruction set: without it the linker would keep one
// copy of each template, possibly one that this machine cannot execute.
#ifndef SOD_ISA
#error "define SOD_ISA before including the CPU kernels"
#endif

namespace sod {
inline namespace SOD_ISA {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

SOD_HD float as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
SOD_HD uint32_t as_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

SOD_HD float load_one(const bf16* p) { return as_float(uint32_t(p->bits) << 16); }
SOD_HD float load_one(const float* p) { return *p; }
SOD_HD double load_one(const double* p) { return *p; }
SOD_HD float load_one(const fp16* p) {
  const uint32_t sign = uint32_t(p->bits & 0x8000u) << 16, body = p->bits & 0x7fffu;
  if (body >= 0x7c00u) return as_float(sign | 0x7f800000u | ((body & 0x3ffu) << 13));
  if (body >= 0x400u) return as_float(sign | ((body + 0x1c000u) << 13));
  const float tiny = float(body) * 5.9604644775390625e-8f;  // subnormal: body * 2^-24, exact
  return sign ? -tiny : tiny;
}

// Round to nearest, ties to even; NaN stays NaN.
SOD_HD void store_one(bf16* p, float x) {
  const uint32_t bits = as_bits(x);
  p->bits = x != x ? 0x7fc0u : uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
SOD_HD void store_one(float* p, float x) { *p = x; }
SOD_HD void store_one(double* p, double x) { *p = x; }
SOD_HD void store_one(fp16* p, float x) {
  const uint32_t bits = as_bits(x), sign = (bits >> 16) & 0x8000u, body = bits & 0x7fffffffu;
  uint32_t half;
  if (body > 0x7f800000u) {
    half = 0x7e00u;
  } else if (body >= 0x477ff000u) {  // rounds past the largest finite half
    half = 0x7c00u;
  } else if (body < 0x38800000u) {  // subnormal half: let float addition do the rounding
    half = as_bits(as_float(body) + 0.5f) - 0x3f000000u;
  } else {
    half = (body + 0xfffu + ((body >> 13) & 1u) - 0x38000000u) >> 13;
  }
  p->bits = uint16_t(sign | half);
}

template <typename S>
struct VecScalar {
  using T = S;  // lane type
  using V = S;
  static constexpr int64_t kLanes = 1;
  SOD_HD V set(T x) { return x; }
  SOD_HD V add(V a, V b) { return a + b; }
  SOD_HD V sub(V a, V b) { return a - b; }
  SOD_HD V mul(V a, V b) { return a * b; }
  SOD_HD V div(V a, V b) { return a / b; }
  SOD_HD V fma(V a, V b, V c) { return std::fma(a, b, c); }  // a * b + c
  SOD_HD V fms(V a, V b, V c) { return std::fma(a, b, -c); }
  SOD_HD V at_least(V floor, V x) { return x < floor ? floor : x; }  // NaN stays
  SOD_HD V max_skip_nan(V x, V acc) { return x > acc ? x : acc; }
  SOD_HD V exp2(V x) { return std::exp2(x); }
  SOD_HD V log2(V x) { return std::log2(x); }
  SOD_HD V abs(V x) { return std::fabs(x); }
  SOD_HD V select_less(V a, V b, V yes, V no) { return a < b ? yes : no; }
  SOD_HD T sum(V x) { return x; }
  SOD_HD T max(V x) { return x; }
  template <typename E>
  SOD_HD void load2(const E* p, V& a, V& b) {
    a = load_one(p), b = load_one(p + 1);
  }
  template <typename E>
  SOD_HD void store2(E* p, V a, V b) {
    store_one(p, a), store_one(p + 1, b);
  }
};

}  // namespace SOD_ISA
}  // namespace sod
