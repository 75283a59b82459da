// Sixteen float lanes: AVX-512 F, BW, DQ, VL.
#pragma once
#include <immintrin.h>

#include "vec_scalar.h"

namespace sod {
inline namespace SOD_ISA {

struct VecAvx512 {
  using T = float;
  using V = __m512;
  static constexpr int64_t kLanes = 16;
  SOD_HD V set(T x) { return _mm512_set1_ps(x); }
  SOD_HD V add(V a, V b) { return _mm512_add_ps(a, b); }
  SOD_HD V sub(V a, V b) { return _mm512_sub_ps(a, b); }
  SOD_HD V mul(V a, V b) { return _mm512_mul_ps(a, b); }
  SOD_HD V div(V a, V b) { return _mm512_div_ps(a, b); }
  SOD_HD V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  SOD_HD V fms(V a, V b, V c) { return _mm512_fmsub_ps(a, b, c); }
  SOD_HD V at_least(V floor, V x) { return _mm512_max_ps(floor, x); }
  SOD_HD V max_skip_nan(V x, V acc) { return _mm512_max_ps(x, acc); }
  SOD_HD V abs(V x) { return _mm512_abs_ps(x); }
  SOD_HD V select_less(V a, V b, V yes, V no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
  }

  // 2^x: the same polynomial as AVX2's; reduce takes x - floor(x), scalef multiplies by 2^floor(x)
  // and underflows to 0 by itself. NaN stays.
  SOD_HD V exp2(V x) {
    const V f = _mm512_reduce_ps(x, 0x01);
    V p = _mm512_fmadd_ps(set(1.8671302133e-03f), f, set(9.0170300187e-03f));
    p = _mm512_fmadd_ps(p, f, set(5.5799913321e-02f));
    p = _mm512_fmadd_ps(p, f, set(2.4016445010e-01f));
    p = _mm512_fmadd_ps(p, f, set(6.9315131181e-01f));
    p = _mm512_fmadd_ps(p, f, set(1.0f));
    return _mm512_scalef_ps(p, x);
  }

  SOD_HD V log2(V x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i biased = _mm512_sub_epi32(bits, _mm512_set1_epi32(0x3f3504f3));  // sqrt(1/2)
    const __m512i exponent = _mm512_srai_epi32(biased, 23);
    const V r = _mm512_castsi512_ps(_mm512_sub_epi32(bits, _mm512_slli_epi32(exponent, 23)));
    const V s = _mm512_div_ps(_mm512_sub_ps(r, set(1.0f)), _mm512_add_ps(r, set(1.0f)));
    const V s2 = _mm512_mul_ps(s, s);
    V p = _mm512_fmadd_ps(set(2.8853900818f / 9), s2, set(2.8853900818f / 7));
    p = _mm512_fmadd_ps(p, s2, set(2.8853900818f / 5));
    p = _mm512_fmadd_ps(p, s2, set(2.8853900818f / 3));
    p = _mm512_fmadd_ps(p, s2, set(2.8853900818f));
    return _mm512_fmadd_ps(p, s, _mm512_cvtepi32_ps(exponent));
  }

  SOD_HD T sum(V x) { return _mm512_reduce_add_ps(x); }
  SOD_HD T max(V x) { return _mm512_reduce_max_ps(x); }

  SOD_HD void load2(const bf16* p, V& a, V& b) {
    const __m512i x = _mm512_loadu_si512(p);
    a = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
    b = _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(int(0xffff0000u))));
  }
  SOD_HD void load2(const fp16* p, V& a, V& b) {
    a = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    b = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16)));
  }
  SOD_HD void load2(const float* p, V& a, V& b) {
    a = _mm512_loadu_ps(p), b = _mm512_loadu_ps(p + 16);
  }

  SOD_HD __m512i rounded_bits(V x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_mask_blend_epi32(nan, up, _mm512_set1_epi32(0x7fc00000));
  }
  SOD_HD void store2(bf16* p, V a, V b) {
    const __m512i even = _mm512_srli_epi32(rounded_bits(a), 16);
    const __m512i odd = _mm512_and_si512(rounded_bits(b), _mm512_set1_epi32(int(0xffff0000u)));
    _mm512_storeu_si512(p, _mm512_or_si512(even, odd));
  }
  SOD_HD void store2(fp16* p, V a, V b) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a, 0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 16), _mm512_cvtps_ph(b, 0));
  }
  SOD_HD void store2(float* p, V a, V b) {
    _mm512_storeu_ps(p, a), _mm512_storeu_ps(p + 16, b);
  }
};

}  // namespace SOD_ISA
}  // namespace sod
