// SPDX-License-Identifier: Apache-2.0
// The vector type of the kernels on AVX-512: F16 = 16 floats, U16 = 16 words. simd_avx2.h and
// simd_scalar.h define the same names; kernel headers are included after one of them, inside a
// namespace per ISA, so that no inline function is shared by files with different flags.
#pragma once

#include <immintrin.h>

#include <cstdint>

#ifndef DS_INLINE
#define DS_INLINE inline __attribute__((always_inline))
#endif

namespace ds::DS_ISA {

constexpr int kLanes = 16;
constexpr int kTileRows = 6;  // 6 rows x 4 panels: 24 accumulators, 4 weights, 1 broadcast
constexpr int kTilePanels = 4;
constexpr bool kHasVnni = true;  // where cpu_has_vnni() says so

struct F16 {
  __m512 v;
};
struct U16 {
  __m512i v;
};

DS_INLINE __mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }

DS_INLINE F16 zero() { return {_mm512_setzero_ps()}; }
DS_INLINE F16 set(float x) { return {_mm512_set1_ps(x)}; }
DS_INLINE F16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
DS_INLINE void store(float* p, F16 a) { _mm512_storeu_ps(p, a.v); }
/// First n lanes, 0 <= n <= 16; the others are zero.
DS_INLINE F16 load_n(const float* p, int64_t n) {
  if (__builtin_constant_p(n) && n == 16) return load(p);
  return {_mm512_maskz_loadu_ps(first_lanes(n), p)};
}
DS_INLINE void store_n(float* p, F16 a, int64_t n) {
  if (__builtin_constant_p(n) && n == 16) return store(p, a);
  _mm512_mask_storeu_ps(p, first_lanes(n), a.v);
}
DS_INLINE F16 operator+(F16 a, F16 b) { return {_mm512_add_ps(a.v, b.v)}; }
DS_INLINE F16 operator-(F16 a, F16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
DS_INLINE F16 operator*(F16 a, F16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
DS_INLINE F16 operator/(F16 a, F16 b) { return {_mm512_div_ps(a.v, b.v)}; }
/// a * b + c, rounded once where the ISA can.
DS_INLINE F16 fma(F16 a, F16 b, F16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
/// b where either is NaN.
DS_INLINE F16 max(F16 a, F16 b) { return {_mm512_max_ps(a.v, b.v)}; }
DS_INLINE F16 min(F16 a, F16 b) { return {_mm512_min_ps(a.v, b.v)}; }
DS_INLINE F16 sqrt(F16 a) { return {_mm512_sqrt_ps(a.v)}; }
/// Lanes [0, n) of a, the rest of b.
DS_INLINE F16 splice(F16 a, F16 b, int64_t n) {
  return {_mm512_mask_blend_ps(first_lanes(n), b.v, a.v)};
}
/// a where x > 0, else zero.
DS_INLINE F16 where_positive(F16 x, F16 a) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, _mm512_setzero_ps(), _CMP_GT_OQ), a.v)};
}
/// Bit i set where lane i of a equals lane i of b.
DS_INLINE uint32_t equal_lanes(F16 a, F16 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ); }

/// Fixed tree: lane i + lane i + 8, then + 4, + 2, + 1.
DS_INLINE float reduce_add(F16 a) {
  const __m256 y = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 x = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
  const __m128 z = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(z, _mm_shuffle_ps(z, z, 1)));
}
DS_INLINE float reduce_max(F16 a) {
  const __m256 y = _mm256_max_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 x = _mm_max_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
  const __m128 z = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(z, _mm_shuffle_ps(z, z, 1)));
}

DS_INLINE F16 round_nearest(F16 a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
/// a * 2^n for integral n; gradual underflow.
DS_INLINE F16 scale_by_power(F16 a, F16 n) { return {_mm512_scalef_ps(a.v, n.v)}; }

DS_INLINE U16 load_u(const uint32_t* p) { return {_mm512_loadu_si512(p)}; }
DS_INLINE U16 zero_u() { return {_mm512_setzero_si512()}; }
DS_INLINE void store_u(uint32_t* p, U16 a) { _mm512_storeu_si512(p, a.v); }
DS_INLINE U16 bits(F16 a) { return {_mm512_castps_si512(a.v)}; }
DS_INLINE F16 as_float(U16 a) { return {_mm512_castsi512_ps(a.v)}; }

DS_INLINE U16 set_u(uint32_t x) { return {_mm512_set1_epi32(static_cast<int>(x))}; }
DS_INLINE U16 operator|(U16 a, U16 b) { return {_mm512_or_si512(a.v, b.v)}; }
DS_INLINE U16 operator&(U16 a, U16 b) { return {_mm512_and_si512(a.v, b.v)}; }
template <int kBits>
DS_INLINE U16 shift_left(U16 a) {
  return {_mm512_slli_epi32(a.v, kBits)};
}
template <int kBits>
DS_INLINE U16 shift_right(U16 a) {
  return {_mm512_srli_epi32(a.v, kBits)};
}
/// Words as signed integers.
DS_INLINE F16 float_of(U16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
DS_INLINE U16 to_int(F16 a) { return {_mm512_cvtps_epi32(a.v)}; }
/// a where c > 0, else b.
DS_INLINE F16 select(F16 c, F16 a, F16 b) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(c.v, _mm512_setzero_ps(), _CMP_GT_OQ), b.v, a.v)};
}
/// Per word: acc + the four products of an unsigned byte of u and a signed byte of x; exact.
template <bool kVnni>
DS_INLINE U16 dot_bytes(U16 acc, U16 u, U16 x) {
  if constexpr (kVnni) {  // not the intrinsic: its flag would let the whole file use the
                          // instruction
    asm("vpdpbusd %2, %1, %0" : "+v"(acc.v) : "v"(u.v), "v"(x.v));
    return acc;
  }
  const __m512i even = _mm512_and_si512(u.v, _mm512_set1_epi32(0x00ff00ff));
  const __m512i odd = _mm512_srli_epi16(u.v, 8);
  const __m512i x_even = _mm512_srai_epi16(_mm512_slli_epi16(x.v, 8), 8);
  const __m512i x_odd = _mm512_srai_epi16(x.v, 8);
  return {_mm512_add_epi32(
      acc.v, _mm512_add_epi32(_mm512_madd_epi16(even, x_even), _mm512_madd_epi16(odd, x_odd)))};
}

/// The low and the high bfloat16 of each word: even and odd k of a packed pair.
DS_INLINE F16 even(U16 a) { return as_float({_mm512_slli_epi32(a.v, 16)}); }
DS_INLINE F16 odd(U16 a) {
  return as_float({_mm512_and_si512(a.v, _mm512_set1_epi32(static_cast<int>(0xffff0000u)))});
}
/// Rounded to nearest even, in the high half; NaN stays NaN.
DS_INLINE U16 round_bf16(F16 a) {
  const __m512i u = bits(a).v;
  const __m512i lsb = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i r = _mm512_add_epi32(u, _mm512_add_epi32(lsb, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  return {_mm512_mask_or_epi32(r, nan, u, _mm512_set1_epi32(0x00400000))};
}
DS_INLINE U16 pair_bf16(F16 low, F16 high) {
  return {_mm512_or_si512(_mm512_srli_epi32(round_bf16(low).v, 16), bits(odd(round_bf16(high))).v)};
}
DS_INLINE F16 load_bf16(const uint16_t* p) {
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return as_float({_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)});
}
DS_INLINE F16 load_bf16_n(const uint16_t* p, int64_t n) {
  const __m256i h = _mm256_maskz_loadu_epi16(first_lanes(n), p);
  return as_float({_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)});
}
DS_INLINE void store_bf16_n(uint16_t* p, F16 a, int64_t n) {
  const __m256i h = _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_bf16(a).v, 16));
  _mm256_mask_storeu_epi16(p, first_lanes(n), h);
}

/// rows[i] lane j <-> rows[j] lane i.
DS_INLINE void transpose(U16 (&rows)[16]) {
  __m512i a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(rows[i].v, rows[i + 1].v);
    a[i + 1] = _mm512_unpackhi_epi32(rows[i].v, rows[i + 1].v);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {
    b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i p = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88);
    const __m512i q = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88);
    const __m512i r = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xdd);
    const __m512i s = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xdd);
    rows[i].v = _mm512_shuffle_i32x4(p, q, 0x88);
    rows[i + 8].v = _mm512_shuffle_i32x4(p, q, 0xdd);
    rows[i + 4].v = _mm512_shuffle_i32x4(r, s, 0x88);
    rows[i + 12].v = _mm512_shuffle_i32x4(r, s, 0xdd);
  }
}

DS_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

#ifdef __AVX512BF16__
/// acc + w.low * x.low + w.high * x.high in the instruction's own order.
DS_INLINE F16 dot_bf16(F16 acc, U16 w, uint32_t x) {
  return {_mm512_dpbf16_ps(acc.v, (__m512bh)w.v, (__m512bh)_mm512_set1_epi32(static_cast<int>(x)))};
}
#endif

}  // namespace ds::DS_ISA
