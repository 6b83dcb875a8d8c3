// Vectors of floats, one struct per instruction set, all with the same members:
//   width      floats in a vector
//   positions  rows of the left matrix that a tile of tiles.h holds in registers
//   sum4       the horizontal sums of four vectors; each one's order of additions is the same whatever the others are
// CALORA_TARGET … CALORA_TARGET_END compile what is between them for an instruction set that the rest of the library
// does not assume: the library must run on every x86-64, and picks at run time.
#pragma once

#include "half.h"

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define CALORA_INLINE [[gnu::always_inline]] static inline
#define CALORA_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define CALORA_TARGET(isa) CALORA_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define CALORA_TARGET_END CALORA_PRAGMA(clang attribute pop)
#else
#define CALORA_TARGET(isa) CALORA_PRAGMA(GCC push_options) CALORA_PRAGMA(GCC target(isa))
#define CALORA_TARGET_END CALORA_PRAGMA(GCC pop_options)
#endif

namespace calora {

#if defined(__aarch64__)

struct Neon {
  struct V {
    float32x4_t low, high;
  };
  static constexpr int width = 8, positions = 2;
  CALORA_INLINE V set(float a) { return {vdupq_n_f32(a), vdupq_n_f32(a)}; }
  CALORA_INLINE V load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
  CALORA_INLINE V load(const Half* p) {
    const float16x8_t h = vreinterpretq_f16_u16(vld1q_u16(reinterpret_cast<const uint16_t*>(p)));
    return {vcvt_f32_f16(vget_low_f16(h)), vcvt_high_f32_f16(h)};
  }
  CALORA_INLINE V load(const int8_t* p) {
    const int16x8_t wide = vmovl_s8(vld1_s8(p));
    return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide))), vcvtq_f32_s32(vmovl_high_s16(wide))};
  }
  CALORA_INLINE void store(float* p, V a) {
    vst1q_f32(p, a.low);
    vst1q_f32(p + 4, a.high);
  }
  CALORA_INLINE V fma(V a, V b, V c) { return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)}; }
  CALORA_INLINE void sum4(const V (&v)[4], float* out) {
    const float32x4_t ab = vpaddq_f32(vaddq_f32(v[0].low, v[0].high), vaddq_f32(v[1].low, v[1].high));
    const float32x4_t cd = vpaddq_f32(vaddq_f32(v[2].low, v[2].high), vaddq_f32(v[3].low, v[3].high));
    vst1q_f32(out, vpaddq_f32(ab, cd));
  }
};

#else

/// What every compiler and processor can do.
struct Plain {
  typedef float V __attribute__((vector_size(16)));
  static constexpr int width = 4, positions = 2;
  CALORA_INLINE V set(float a) { return V{a, a, a, a}; }
  CALORA_INLINE V load(const float* p) { return V{p[0], p[1], p[2], p[3]}; }
  CALORA_INLINE V load(const Half* p) { return V{float(p[0]), float(p[1]), float(p[2]), float(p[3])}; }
  CALORA_INLINE V load(const int8_t* p) { return V{float(p[0]), float(p[1]), float(p[2]), float(p[3])}; }
  CALORA_INLINE void store(float* p, V a) {
    for (int i = 0; i < width; ++i) p[i] = a[i];
  }
  CALORA_INLINE V fma(V a, V b, V c) { return a * b + c; }
  CALORA_INLINE void sum4(const V (&v)[4], float* out) {
    for (int i = 0; i < 4; ++i) out[i] = (v[i][0] + v[i][2]) + (v[i][1] + v[i][3]);
  }
};

#endif

#if defined(__x86_64__)

#define CALORA_AVX2 "avx2,fma,f16c"
#define CALORA_AVX512 "avx2,fma,f16c,avx512f"

CALORA_TARGET(CALORA_AVX2)
struct Avx2 {
  using V = __m256;
  static constexpr int width = 8, positions = 2;
  CALORA_INLINE V set(float a) { return _mm256_set1_ps(a); }
  CALORA_INLINE V load(const float* p) { return _mm256_loadu_ps(p); }
  CALORA_INLINE V load(const Half* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  CALORA_INLINE V load(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  CALORA_INLINE void store(float* p, V a) { _mm256_storeu_ps(p, a); }
  CALORA_INLINE V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  CALORA_INLINE void sum4(const V (&v)[4], float* out) {
    const V all = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
  }
};
CALORA_TARGET_END

CALORA_TARGET(CALORA_AVX512)
struct Avx512 {
  using V = __m512;
  static constexpr int width = 16, positions = 4;
  CALORA_INLINE V set(float a) { return _mm512_set1_ps(a); }
  CALORA_INLINE V load(const float* p) { return _mm512_loadu_ps(p); }
  CALORA_INLINE V load(const Half* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  CALORA_INLINE V load(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  CALORA_INLINE void store(float* p, V a) { _mm512_storeu_ps(p, a); }
  CALORA_INLINE V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  CALORA_INLINE __m256 fold(V a) {
    const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a), 1));
    return _mm256_add_ps(_mm512_castps512_ps256(a), high);
  }
  CALORA_INLINE void sum4(const V (&v)[4], float* out) {
    const __m256 ab = _mm256_hadd_ps(fold(v[0]), fold(v[1])), cd = _mm256_hadd_ps(fold(v[2]), fold(v[3]));
    const __m256 all = _mm256_hadd_ps(ab, cd);
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
  }
};
CALORA_TARGET_END

#endif

} // namespace calora
