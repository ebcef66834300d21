// SPDX-License-Identifier: Apache-2.0
// The vector type of the kernels on AVX2 + FMA: two registers of 8 lanes (see simd_avx512.h for
// what each name means).
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#ifndef DS_INLINE
#define DS_INLINE inline __attribute__((always_inline))
#endif

namespace ds::DS_ISA {

constexpr int kLanes = 16;
constexpr int kTileRows = 4;  // 4 rows x 1 panel: 8 accumulators, 2 weights, 1 broadcast of 16
constexpr int kTilePanels = 1;
constexpr bool kHasVnni = false;

struct F16 {
  __m256 lo, hi;
};
struct U16 {
  __m256i lo, hi;
};

DS_INLINE __m256i first_8(int64_t n) {
  const __m256i iota = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), iota);
}

DS_INLINE F16 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
DS_INLINE F16 set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
DS_INLINE F16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
DS_INLINE void store(float* p, F16 a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
DS_INLINE F16 load_n(const float* p, int64_t n) {
  if (__builtin_constant_p(n) && n == 16) return load(p);
  return {_mm256_maskload_ps(p, first_8(n)), _mm256_maskload_ps(p + 8, first_8(n - 8))};
}
DS_INLINE void store_n(float* p, F16 a, int64_t n) {
  if (__builtin_constant_p(n) && n == 16) return store(p, a);
  _mm256_maskstore_ps(p, first_8(n), a.lo);
  _mm256_maskstore_ps(p + 8, first_8(n - 8), a.hi);
}
DS_INLINE F16 operator+(F16 a, F16 b) {
  return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
}
DS_INLINE F16 operator-(F16 a, F16 b) {
  return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
}
DS_INLINE F16 operator*(F16 a, F16 b) {
  return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
}
DS_INLINE F16 operator/(F16 a, F16 b) {
  return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)};
}
DS_INLINE F16 fma(F16 a, F16 b, F16 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
DS_INLINE F16 max(F16 a, F16 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
DS_INLINE F16 min(F16 a, F16 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
DS_INLINE F16 sqrt(F16 a) { return {_mm256_sqrt_ps(a.lo), _mm256_sqrt_ps(a.hi)}; }
DS_INLINE F16 splice(F16 a, F16 b, int64_t n) {
  return {_mm256_blendv_ps(b.lo, a.lo, _mm256_castsi256_ps(first_8(n))),
          _mm256_blendv_ps(b.hi, a.hi, _mm256_castsi256_ps(first_8(n - 8)))};
}
DS_INLINE F16 where_positive(F16 x, F16 a) {
  const __m256 z = _mm256_setzero_ps();
  return {_mm256_and_ps(_mm256_cmp_ps(x.lo, z, _CMP_GT_OQ), a.lo),
          _mm256_and_ps(_mm256_cmp_ps(x.hi, z, _CMP_GT_OQ), a.hi)};
}
DS_INLINE uint32_t equal_lanes(F16 a, F16 b) {
  const int lo = _mm256_movemask_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_EQ_OQ));
  const int hi = _mm256_movemask_ps(_mm256_cmp_ps(a.hi, b.hi, _CMP_EQ_OQ));
  return static_cast<uint32_t>(lo | hi << 8);
}
DS_INLINE float reduce_add(F16 a) {
  const __m256 y = _mm256_add_ps(a.lo, a.hi);
  const __m128 x = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
  const __m128 z = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(z, _mm_shuffle_ps(z, z, 1)));
}
DS_INLINE float reduce_max(F16 a) {
  const __m256 y = _mm256_max_ps(a.lo, a.hi);
  const __m128 x = _mm_max_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
  const __m128 z = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(z, _mm_shuffle_ps(z, z, 1)));
}
DS_INLINE F16 round_nearest(F16 a) {
  constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.lo, kMode), _mm256_round_ps(a.hi, kMode)};
}
DS_INLINE __m256 scale_8(__m256 a, __m256 n) {
  const __m256i whole = _mm256_cvtps_epi32(n);
  const __m256i first = _mm256_srai_epi32(whole, 1);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256i f = _mm256_slli_epi32(_mm256_add_epi32(first, bias), 23);
  const __m256i g = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(whole, first), bias), 23);
  const __m256 r = _mm256_mul_ps(_mm256_mul_ps(a, _mm256_castsi256_ps(f)), _mm256_castsi256_ps(g));
  return _mm256_blendv_ps(r, n, _mm256_cmp_ps(n, n, _CMP_UNORD_Q));
}
/// In two factors, so that results below the normal range are reached by one rounding. |n| <= 250.
DS_INLINE F16 scale_by_power(F16 a, F16 n) { return {scale_8(a.lo, n.lo), scale_8(a.hi, n.hi)}; }

DS_INLINE U16 load_u(const uint32_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8))};
}
DS_INLINE U16 zero_u() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
DS_INLINE void store_u(uint32_t* p, U16 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.lo);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), a.hi);
}
DS_INLINE U16 bits(F16 a) { return {_mm256_castps_si256(a.lo), _mm256_castps_si256(a.hi)}; }
DS_INLINE F16 as_float(U16 a) { return {_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)}; }
DS_INLINE U16 set_u(uint32_t x) {
  const __m256i v = _mm256_set1_epi32(static_cast<int>(x));
  return {v, v};
}
DS_INLINE U16 operator|(U16 a, U16 b) {
  return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)};
}
DS_INLINE U16 operator&(U16 a, U16 b) {
  return {_mm256_and_si256(a.lo, b.lo), _mm256_and_si256(a.hi, b.hi)};
}
template <int kBits>
DS_INLINE U16 shift_left(U16 a) {
  return {_mm256_slli_epi32(a.lo, kBits), _mm256_slli_epi32(a.hi, kBits)};
}
template <int kBits>
DS_INLINE U16 shift_right(U16 a) {
  return {_mm256_srli_epi32(a.lo, kBits), _mm256_srli_epi32(a.hi, kBits)};
}
DS_INLINE F16 float_of(U16 a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
DS_INLINE U16 to_int(F16 a) { return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)}; }
DS_INLINE F16 select(F16 c, F16 a, F16 b) {
  const __m256 z = _mm256_setzero_ps();
  return {_mm256_blendv_ps(b.lo, a.lo, _mm256_cmp_ps(c.lo, z, _CMP_GT_OQ)),
          _mm256_blendv_ps(b.hi, a.hi, _mm256_cmp_ps(c.hi, z, _CMP_GT_OQ))};
}
DS_INLINE __m256i dot_bytes_8(__m256i acc, __m256i u, __m256i x) {
  const __m256i even = _mm256_and_si256(u, _mm256_set1_epi32(0x00ff00ff));
  const __m256i odd = _mm256_srli_epi16(u, 8);
  const __m256i x_even = _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8);
  const __m256i x_odd = _mm256_srai_epi16(x, 8);
  return _mm256_add_epi32(
      acc, _mm256_add_epi32(_mm256_madd_epi16(even, x_even), _mm256_madd_epi16(odd, x_odd)));
}
template <bool kVnni>
DS_INLINE U16 dot_bytes(U16 acc, U16 u, U16 x) {
  return {dot_bytes_8(acc.lo, u.lo, x.lo), dot_bytes_8(acc.hi, u.hi, x.hi)};
}
DS_INLINE F16 even(U16 a) {
  return as_float({_mm256_slli_epi32(a.lo, 16), _mm256_slli_epi32(a.hi, 16)});
}
DS_INLINE F16 odd(U16 a) {
  const __m256i m = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  return as_float({_mm256_and_si256(a.lo, m), _mm256_and_si256(a.hi, m)});
}
DS_INLINE __m256i round_bf16_8(__m256 a) {
  const __m256i u = _mm256_castps_si256(a);
  const __m256i lsb = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i r = _mm256_add_epi32(u, _mm256_add_epi32(lsb, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x00400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(r, quiet, nan);
}
DS_INLINE U16 round_bf16(F16 a) { return {round_bf16_8(a.lo), round_bf16_8(a.hi)}; }
DS_INLINE U16 pair_bf16(F16 low, F16 high) {
  const U16 l = round_bf16(low), h = bits(odd(round_bf16(high)));
  return {_mm256_or_si256(_mm256_srli_epi32(l.lo, 16), h.lo),
          _mm256_or_si256(_mm256_srli_epi32(l.hi, 16), h.hi)};
}
DS_INLINE F16 load_bf16(const uint16_t* p) {
  const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8));
  return as_float({_mm256_slli_epi32(_mm256_cvtepu16_epi32(a), 16),
                   _mm256_slli_epi32(_mm256_cvtepu16_epi32(b), 16)});
}
DS_INLINE F16 load_bf16_n(const uint16_t* p, int64_t n) {
  alignas(32) uint16_t copy[16] = {};
  for (int64_t i = 0; i < n; ++i) copy[i] = p[i];
  return load_bf16(copy);
}
DS_INLINE void store_bf16_n(uint16_t* p, F16 a, int64_t n) {
  alignas(32) uint32_t words[16];
  store_u(words, round_bf16(a));
  for (int64_t i = 0; i < n; ++i) p[i] = static_cast<uint16_t>(words[i] >> 16);
}
DS_INLINE void transpose(U16 (&rows)[16]) {
  alignas(32) uint32_t m[16][16];
  for (int i = 0; i < 16; ++i) store_u(m[i], rows[i]);
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < i; ++j) {
      const uint32_t t = m[i][j];
      m[i][j] = m[j][i];
      m[j][i] = t;
    }
  }
  for (int i = 0; i < 16; ++i) rows[i] = load_u(m[i]);
}
DS_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

}  // namespace ds::DS_ISA
