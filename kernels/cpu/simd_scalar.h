// SPDX-License-Identifier: Apache-2.0
// The vector type of the kernels in plain C++ (see simd_avx512.h for what each name means): any
// machine, and the form in which the arithmetic is easiest to read. fma() rounds twice here,
// because a fused one without hardware is a library call.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifndef DS_INLINE
#define DS_INLINE inline __attribute__((always_inline))
#endif

namespace ds::DS_ISA {

constexpr int kLanes = 16;
constexpr int kTileRows = 2;
constexpr int kTilePanels = 1;
constexpr bool kHasVnni = false;

struct F16 {
  float v[16];
};
struct U16 {
  uint32_t v[16];
};

template <typename V, typename F>
DS_INLINE V lanes(F f) {
  V r;
  for (int i = 0; i < 16; ++i) r.v[i] = f(i);
  return r;
}

DS_INLINE F16 zero() {
  return lanes<F16>([](int) { return 0.0f; });
}
DS_INLINE F16 set(float x) {
  return lanes<F16>([=](int) { return x; });
}
DS_INLINE F16 load(const float* p) {
  return lanes<F16>([=](int i) { return p[i]; });
}
DS_INLINE void store(float* p, F16 a) { std::memcpy(p, a.v, sizeof(a.v)); }
DS_INLINE F16 load_n(const float* p, int64_t n) {
  return lanes<F16>([=](int i) { return i < n ? p[i] : 0.0f; });
}
DS_INLINE void store_n(float* p, F16 a, int64_t n) {
  for (int i = 0; i < n; ++i) p[i] = a.v[i];
}
DS_INLINE F16 operator+(F16 a, F16 b) {
  return lanes<F16>([&](int i) { return a.v[i] + b.v[i]; });
}
DS_INLINE F16 operator-(F16 a, F16 b) {
  return lanes<F16>([&](int i) { return a.v[i] - b.v[i]; });
}
DS_INLINE F16 operator*(F16 a, F16 b) {
  return lanes<F16>([&](int i) { return a.v[i] * b.v[i]; });
}
DS_INLINE F16 operator/(F16 a, F16 b) {
  return lanes<F16>([&](int i) { return a.v[i] / b.v[i]; });
}
DS_INLINE F16 fma(F16 a, F16 b, F16 c) {
  return lanes<F16>([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
DS_INLINE F16 max(F16 a, F16 b) {
  return lanes<F16>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
DS_INLINE F16 min(F16 a, F16 b) {
  return lanes<F16>([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
DS_INLINE F16 sqrt(F16 a) {
  return lanes<F16>([&](int i) { return __builtin_sqrtf(a.v[i]); });
}
DS_INLINE F16 splice(F16 a, F16 b, int64_t n) {
  return lanes<F16>([&](int i) { return i < n ? a.v[i] : b.v[i]; });
}
DS_INLINE F16 where_positive(F16 x, F16 a) {
  return lanes<F16>([&](int i) { return x.v[i] > 0.0f ? a.v[i] : 0.0f; });
}
DS_INLINE uint32_t equal_lanes(F16 a, F16 b) {
  uint32_t mask = 0;
  for (int i = 0; i < 16; ++i) mask |= static_cast<uint32_t>(a.v[i] == b.v[i]) << i;
  return mask;
}
DS_INLINE float reduce_add(F16 a) {
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) a.v[i] += a.v[i + half];
  }
  return a.v[0];
}
DS_INLINE float reduce_max(F16 a) {
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) a.v[i] = a.v[i] > a.v[i + half] ? a.v[i] : a.v[i + half];
  }
  return a.v[0];
}
DS_INLINE F16 round_nearest(F16 a) {
  constexpr float kMagic =
      12582912.0f;  // 1.5 * 2^23: adding it leaves no fraction bits, |a| < 2^22
  return lanes<F16>([&](int i) { return (a.v[i] + kMagic) - kMagic; });
}
DS_INLINE float power_of_two(int n) {
  const uint32_t u = static_cast<uint32_t>(n + 127) << 23;
  float f;
  std::memcpy(&f, &u, sizeof(f));
  return f;
}
/// In two factors, so that results below the normal range are reached by one rounding. |n| <= 250.
DS_INLINE F16 scale_by_power(F16 a, F16 n) {
  return lanes<F16>([&](int i) {
    if (n.v[i] != n.v[i]) return n.v[i];
    const int whole = static_cast<int>(n.v[i]);
    const int first = whole / 2;
    return a.v[i] * power_of_two(first) * power_of_two(whole - first);
  });
}

DS_INLINE U16 load_u(const uint32_t* p) {
  return lanes<U16>([=](int i) { return p[i]; });
}
DS_INLINE U16 zero_u() {
  return lanes<U16>([](int) { return 0u; });
}
DS_INLINE void store_u(uint32_t* p, U16 a) { std::memcpy(p, a.v, sizeof(a.v)); }
DS_INLINE U16 bits(F16 a) {
  U16 r;
  std::memcpy(r.v, a.v, sizeof(r.v));
  return r;
}
DS_INLINE F16 as_float(U16 a) {
  F16 r;
  std::memcpy(r.v, a.v, sizeof(r.v));
  return r;
}
DS_INLINE U16 set_u(uint32_t x) {
  return lanes<U16>([=](int) { return x; });
}
DS_INLINE U16 operator|(U16 a, U16 b) {
  return lanes<U16>([&](int i) { return a.v[i] | b.v[i]; });
}
DS_INLINE U16 operator&(U16 a, U16 b) {
  return lanes<U16>([&](int i) { return a.v[i] & b.v[i]; });
}
template <int kBits>
DS_INLINE U16 shift_left(U16 a) {
  return lanes<U16>([&](int i) { return a.v[i] << kBits; });
}
template <int kBits>
DS_INLINE U16 shift_right(U16 a) {
  return lanes<U16>([&](int i) { return a.v[i] >> kBits; });
}
DS_INLINE F16 float_of(U16 a) {
  return lanes<F16>([&](int i) { return static_cast<float>(static_cast<int32_t>(a.v[i])); });
}
/// |a| < 2^22; anything else gives some word.
DS_INLINE U16 to_int(F16 a) {
  const F16 whole = round_nearest(a);
  return lanes<U16>([&](int i) {
    const bool fits = whole.v[i] > -4194304.0f && whole.v[i] < 4194304.0f;
    return static_cast<uint32_t>(fits ? static_cast<int32_t>(whole.v[i]) : INT32_MIN);
  });
}
DS_INLINE F16 select(F16 c, F16 a, F16 b) {
  return lanes<F16>([&](int i) { return c.v[i] > 0.0f ? a.v[i] : b.v[i]; });
}
template <bool kVnni>
DS_INLINE U16 dot_bytes(U16 acc, U16 u, U16 x) {
  return lanes<U16>([&](int i) {
    int32_t sum = static_cast<int32_t>(acc.v[i]);
    for (int b = 0; b < 32; b += 8) {
      sum += static_cast<int32_t>(u.v[i] >> b & 0xff) * static_cast<int8_t>(x.v[i] >> b & 0xff);
    }
    return static_cast<uint32_t>(sum);
  });
}
DS_INLINE F16 even(U16 a) {
  return as_float(lanes<U16>([&](int i) { return a.v[i] << 16; }));
}
DS_INLINE F16 odd(U16 a) {
  return as_float(lanes<U16>([&](int i) { return a.v[i] & 0xffff0000u; }));
}
DS_INLINE U16 round_bf16(F16 a) {
  const U16 u = bits(a);
  return lanes<U16>([&](int i) {
    if (a.v[i] != a.v[i]) return u.v[i] | 0x00400000u;
    return u.v[i] + 0x7fffu + ((u.v[i] >> 16) & 1u);
  });
}
DS_INLINE U16 pair_bf16(F16 low, F16 high) {
  const U16 l = round_bf16(low), h = round_bf16(high);
  return lanes<U16>([&](int i) { return (l.v[i] >> 16) | (h.v[i] & 0xffff0000u); });
}
DS_INLINE F16 load_bf16_n(const uint16_t* p, int64_t n) {
  return as_float(lanes<U16>([=](int i) { return i < n ? uint32_t{p[i]} << 16 : 0u; }));
}
DS_INLINE F16 load_bf16(const uint16_t* p) { return load_bf16_n(p, 16); }
DS_INLINE void store_bf16_n(uint16_t* p, F16 a, int64_t n) {
  const U16 u = round_bf16(a);
  for (int i = 0; i < n; ++i) p[i] = static_cast<uint16_t>(u.v[i] >> 16);
}
DS_INLINE void transpose(U16 (&rows)[16]) {
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < i; ++j) {
      const uint32_t t = rows[i].v[j];
      rows[i].v[j] = rows[j].v[i];
      rows[j].v[i] = t;
    }
  }
}
DS_INLINE void prefetch(const void*) {}

}  // namespace ds::DS_ISA
