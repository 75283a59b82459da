// Eight float lanes: AVX2, FMA, F16C.
#pragma once
#include <immintrin.h>

#include "vec_scalar.h"

namespace sod {
inline namespace SOD_ISA {

struct VecAvx2 {
  using T = float;
  using V = __m256;
  static constexpr int64_t kLanes = 8;
  SOD_HD V set(T x) { return _mm256_set1_ps(x); }
  SOD_HD V add(V a, V b) { return _mm256_add_ps(a, b); }
  SOD_HD V sub(V a, V b) { return _mm256_sub_ps(a, b); }
  SOD_HD V mul(V a, V b) { return _mm256_mul_ps(a, b); }
  SOD_HD V div(V a, V b) { return _mm256_div_ps(a, b); }
  SOD_HD V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  SOD_HD V fms(V a, V b, V c) { return _mm256_fmsub_ps(a, b, c); }
  // max returns its second operand when one is NaN: here NaN stays, below it is skipped.
  SOD_HD V at_least(V floor, V x) { return _mm256_max_ps(floor, x); }
  SOD_HD V max_skip_nan(V x, V acc) { return _mm256_max_ps(x, acc); }
  SOD_HD V abs(V x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
  SOD_HD V select_less(V a, V b, V yes, V no) {
    return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
  }

  // 2^x for x <= 0: 2^floor(x) through the exponent bits times a degree-5 polynomial on [0, 1)
  // (relative minimax, pinned to 1 at 0, 8.2e-8). Below 2^-126 exactly 0; NaN stays.
  SOD_HD V exp2(V x) {
    const V n = _mm256_floor_ps(x), f = _mm256_sub_ps(x, n);
    V p = _mm256_fmadd_ps(set(1.8671302133e-03f), f, set(9.0170300187e-03f));
    p = _mm256_fmadd_ps(p, f, set(5.5799913321e-02f));
    p = _mm256_fmadd_ps(p, f, set(2.4016445010e-01f));
    p = _mm256_fmadd_ps(p, f, set(6.9315131181e-01f));
    p = _mm256_fmadd_ps(p, f, set(1.0f));
    const __m256i shift = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
    const V scaled = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), shift));
    return _mm256_and_ps(scaled, _mm256_cmp_ps(x, set(-126.0f), _CMP_NLT_UQ));
  }

  // log2 of a positive normal number: exponent + 2/ln2 * artanh((r - 1)/(r + 1)), r in [.71, 1.42)
  SOD_HD V log2(V x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i biased = _mm256_sub_epi32(bits, _mm256_set1_epi32(0x3f3504f3));  // sqrt(1/2)
    const __m256i exponent = _mm256_srai_epi32(biased, 23);
    const V r = _mm256_castsi256_ps(_mm256_sub_epi32(bits, _mm256_slli_epi32(exponent, 23)));
    const V s = _mm256_div_ps(_mm256_sub_ps(r, set(1.0f)), _mm256_add_ps(r, set(1.0f)));
    const V s2 = _mm256_mul_ps(s, s);
    V p = _mm256_fmadd_ps(set(2.8853900818f / 9), s2, set(2.8853900818f / 7));
    p = _mm256_fmadd_ps(p, s2, set(2.8853900818f / 5));
    p = _mm256_fmadd_ps(p, s2, set(2.8853900818f / 3));
    p = _mm256_fmadd_ps(p, s2, set(2.8853900818f));
    return _mm256_fmadd_ps(p, s, _mm256_cvtepi32_ps(exponent));
  }

  SOD_HD T sum(V x) {
    const __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
  }
  SOD_HD T max(V x) {
    const __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 pair = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(pair, _mm_movehdup_ps(pair)));
  }

  // Sixteen bf16 in one load: even elements shifted up, odd ones masked in place. The order of
  // lanes is the same for student, teacher and store2, and nothing else depends on it.
  SOD_HD void load2(const bf16* p, V& a, V& b) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    a = _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
    b = _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(int(0xffff0000u))));
  }
  SOD_HD void load2(const fp16* p, V& a, V& b) {
    a = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    b = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)));
  }
  SOD_HD void load2(const float* p, V& a, V& b) {
    a = _mm256_loadu_ps(p), b = _mm256_loadu_ps(p + 8);
  }

  SOD_HD __m256i rounded_bits(V x) {  // bf16 in the high half, round to nearest even, NaN kept
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const V nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
    return _mm256_castps_si256(_mm256_blendv_ps(
        _mm256_castsi256_ps(up), _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000)), nan));
  }
  SOD_HD void store2(bf16* p, V a, V b) {
    const __m256i even = _mm256_srli_epi32(rounded_bits(a), 16);
    const __m256i odd = _mm256_and_si256(rounded_bits(b), _mm256_set1_epi32(int(0xffff0000u)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_or_si256(even, odd));
  }
  SOD_HD void store2(fp16* p, V a, V b) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, 0));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(b, 0));
  }
  SOD_HD void store2(float* p, V a, V b) {
    _mm256_storeu_ps(p, a), _mm256_storeu_ps(p + 8, b);
  }
};

}  // namespace SOD_ISA
}  // namespace sod
