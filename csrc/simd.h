// Sixteen float lanes, the same on every instruction set, so that a sum over channels has one order.
//
// `Vec` exists three times, in the namespaces `portable`, `avx2` and `avx512`. The lane count and the order in which
// `sum` folds the lanes are part of the contract: with fused multiply-add (avx2, avx512) results agree bit for bit.
// The portable one has no fused multiply-add and agrees to rounding.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace dit_fast {

constexpr int kLanes = 16;

inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t bits_from_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline uint16_t bfloat16_from_float(float value) {
  const uint32_t bits = bits_from_float(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float float_from_half(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t exponent = (half >> 10) & 31u, mantissa = half & 0x3ffu;
  if (exponent == 31) return float_from_bits(sign | 0x7f800000u | (mantissa << 13));
  if (exponent == 0) {
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  return float_from_bits(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

inline uint16_t half_from_float(float value) {
  const uint32_t bits = bits_from_float(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const float magnitude = std::fabs(value);
  if (magnitude != magnitude) return sign | 0x7e00u;
  if (magnitude >= 65520.0f) return sign | 0x7c00u;
  if (magnitude < 0x1p-14f) return sign | static_cast<uint16_t>(std::nearbyint(magnitude * 0x1p24f));
  const uint32_t rebased = (bits & 0x7fffffffu) - (112u << 23);
  return sign | static_cast<uint16_t>((rebased + 0xfffu + ((rebased >> 13) & 1u)) >> 13);
}

namespace portable {

typedef float Quad __attribute__((vector_size(16)));
typedef int32_t QuadBits __attribute__((vector_size(16)));
constexpr int kQuads = kLanes / 4;

struct Vec {
  static constexpr int kGramRows = 2;
  static constexpr int kMixColumns = 1;
  static constexpr int kTileRows = 4;
  static constexpr int kRegisters = 4;
  Quad part[kQuads];

  static inline Vec set(float value) {
    Vec out;
    for (Quad& quad : out.part) quad = Quad{value, value, value, value};
    return out;
  }
  static inline Vec load(const float* from) {
    Vec out;
    std::memcpy(out.part, from, sizeof out.part);
    return out;
  }
  template <typename Widen>
  static inline Vec load_each(const uint16_t* from, Widen widen) {
    float wide[kLanes];
    for (int i = 0; i < kLanes; ++i) wide[i] = widen(from[i]);
    return load(wide);
  }
  static inline Vec load_bfloat16(const uint16_t* from) {
    return load_each(from, [](uint16_t x) { return float_from_bits(static_cast<uint32_t>(x) << 16); });
  }
  static inline Vec load_half(const uint16_t* from) { return load_each(from, float_from_half); }
  inline void store(float* to) const { std::memcpy(to, part, sizeof part); }
  template <typename Narrow>
  inline void store_each(uint16_t* to, Narrow narrow) const {
    float wide[kLanes];
    store(wide);
    for (int i = 0; i < kLanes; ++i) to[i] = narrow(wide[i]);
  }
  inline void store_bfloat16(uint16_t* to) const { store_each(to, bfloat16_from_float); }
  inline void store_half(uint16_t* to) const { store_each(to, half_from_float); }
  inline Vec operator+(const Vec& other) const {
    Vec out;
    for (int i = 0; i < kQuads; ++i) out.part[i] = part[i] + other.part[i];
    return out;
  }
  inline Vec operator-(const Vec& other) const {
    Vec out;
    for (int i = 0; i < kQuads; ++i) out.part[i] = part[i] - other.part[i];
    return out;
  }
  inline Vec operator*(const Vec& other) const {
    Vec out;
    for (int i = 0; i < kQuads; ++i) out.part[i] = part[i] * other.part[i];
    return out;
  }
  inline Vec operator/(const Vec& other) const {
    Vec out;
    for (int i = 0; i < kQuads; ++i) out.part[i] = part[i] / other.part[i];
    return out;
  }
  inline Vec root() const {
    Vec out;
    for (int i = 0; i < kLanes; ++i) out.part[i / 4][i % 4] = std::sqrt(part[i / 4][i % 4]);
    return out;
  }
  inline Vec abs() const {
    Vec out;
    for (int i = 0; i < kQuads; ++i) out.part[i] = (Quad)((QuadBits)part[i] & INT32_MAX);
    return out;
  }
  // The larger and the smaller of both; of a NaN in `this`, it.
  inline Vec at_least(const Vec& limit) const {
    Vec out;
    for (int i = 0; i < kLanes; ++i) {
      const float value = part[i / 4][i % 4], other = limit.part[i / 4][i % 4];
      out.part[i / 4][i % 4] = value < other ? other : value;
    }
    return out;
  }
  inline Vec at_most(const Vec& limit) const {
    Vec out;
    for (int i = 0; i < kLanes; ++i) {
      const float value = part[i / 4][i % 4], other = limit.part[i / 4][i % 4];
      out.part[i / 4][i % 4] = value > other ? other : value;
    }
    return out;
  }
  // The float whose exponent field is the low bits of this one's mantissa.
  inline Vec as_exponent() const {
    Vec out;
    for (int i = 0; i < kQuads; ++i) out.part[i] = (Quad)((QuadBits)part[i] << 23);
    return out;
  }
  // this * factor + addend
  inline Vec times_plus(const Vec& factor, const Vec& addend) const {
    Vec out;
    for (int i = 0; i < kQuads; ++i) out.part[i] = part[i] * factor.part[i] + addend.part[i];
    return out;
  }
  // this * sign(of), zero where `of` is zero
  inline Vec times_sign(const Vec& of) const {
    Vec out;
    for (int i = 0; i < kQuads; ++i) {
      const QuadBits flipped = (QuadBits)part[i] ^ ((QuadBits)of.part[i] & INT32_MIN);
      out.part[i] = (Quad)(flipped & ((of.part[i] > 0.0f) | (of.part[i] < 0.0f)));
    }
    return out;
  }
  // `to` [kLanes, kLanes] is the transpose of `from`; both in rows so many floats apart.
  static inline void transpose(const float* from, int64_t from_row, float* to, int64_t to_row) {
    for (int i = 0; i < kLanes; ++i)
      for (int j = 0; j < kLanes; ++j) to[i * to_row + j] = from[j * from_row + i];
  }
  inline float sum() const {
    const Quad four = (part[0] + part[2]) + (part[1] + part[3]);
    return (four[0] + four[2]) + (four[1] + four[3]);
  }
};

}  // namespace portable

#if defined(__x86_64__)

#if defined(__clang__)
#define DIT_FAST_TARGET_AVX2 \
  _Pragma("clang attribute push(__attribute__((target(\"avx2,fma,f16c\"))), apply_to = function)")
#define DIT_FAST_TARGET_AVX512 \
  _Pragma("clang attribute push(__attribute__((target(\"avx512f,avx512bw,avx2,fma,f16c\"))), apply_to = function)")
#define DIT_FAST_TARGET_END _Pragma("clang attribute pop")
#else
#define DIT_FAST_TARGET_AVX2 _Pragma("GCC push_options") _Pragma("GCC target(\"avx2,fma,f16c\")")
#define DIT_FAST_TARGET_AVX512 _Pragma("GCC push_options") _Pragma("GCC target(\"avx512f,avx512bw,avx2,fma,f16c\")")
#define DIT_FAST_TARGET_END _Pragma("GCC pop_options")
#endif

DIT_FAST_TARGET_AVX2
namespace avx2 {

inline void transpose_eight(const float* from, int64_t from_row, float* to, int64_t to_row) {
  __m256 row[8], pair[8], four[8];
  for (int i = 0; i < 8; ++i) row[i] = _mm256_loadu_ps(from + i * from_row);
  for (int i = 0; i < 8; i += 2) {
    pair[i] = _mm256_unpacklo_ps(row[i], row[i + 1]);
    pair[i + 1] = _mm256_unpackhi_ps(row[i], row[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      four[i + 2 * j] = _mm256_shuffle_ps(pair[i + j], pair[i + j + 2], 0x44);
      four[i + 2 * j + 1] = _mm256_shuffle_ps(pair[i + j], pair[i + j + 2], 0xee);
    }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(to + i * to_row, _mm256_permute2f128_ps(four[i], four[i + 4], 0x20));
    _mm256_storeu_ps(to + (i + 4) * to_row, _mm256_permute2f128_ps(four[i], four[i + 4], 0x31));
  }
}

struct Vec {
  static constexpr int kGramRows = 2;
  static constexpr int kMixColumns = 1;
  static constexpr int kTileRows = 6;
  static constexpr int kRegisters = 8;
  __m256 low, high;

  static inline Vec set(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
  static inline Vec load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
  static inline __m256 widen_bfloat16(const uint16_t* from) {
    const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
  }
  static inline Vec load_bfloat16(const uint16_t* from) { return {widen_bfloat16(from), widen_bfloat16(from + 8)}; }
  static inline Vec load_half(const uint16_t* from) {
    const __m128i* raw = reinterpret_cast<const __m128i*>(from);
    return {_mm256_cvtph_ps(_mm_loadu_si128(raw)), _mm256_cvtph_ps(_mm_loadu_si128(raw + 1))};
  }
  inline void store(float* to) const {
    _mm256_storeu_ps(to, low);
    _mm256_storeu_ps(to + 8, high);
  }
  static inline __m256i narrow_bfloat16(__m256 value) {
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40));
    const __m256 unordered = _mm256_cmp_ps(value, value, _CMP_UNORD_Q);
    return _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(unordered));
  }
  inline void store_bfloat16(uint16_t* to) const {
    const __m256i mixed = _mm256_packus_epi32(narrow_bfloat16(low), narrow_bfloat16(high));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(mixed, 0xd8));
  }
  inline void store_half(uint16_t* to) const {
    __m128i* out = reinterpret_cast<__m128i*>(to);
    _mm_storeu_si128(out, _mm256_cvtps_ph(low, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    _mm_storeu_si128(out + 1, _mm256_cvtps_ph(high, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  inline Vec operator+(const Vec& other) const {
    return {_mm256_add_ps(low, other.low), _mm256_add_ps(high, other.high)};
  }
  inline Vec operator-(const Vec& other) const {
    return {_mm256_sub_ps(low, other.low), _mm256_sub_ps(high, other.high)};
  }
  inline Vec operator*(const Vec& other) const {
    return {_mm256_mul_ps(low, other.low), _mm256_mul_ps(high, other.high)};
  }
  inline Vec operator/(const Vec& other) const {
    return {_mm256_div_ps(low, other.low), _mm256_div_ps(high, other.high)};
  }
  inline Vec root() const { return {_mm256_sqrt_ps(low), _mm256_sqrt_ps(high)}; }
  inline Vec abs() const {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, low), _mm256_andnot_ps(sign, high)};
  }
  inline Vec at_least(const Vec& limit) const { return {_mm256_max_ps(limit.low, low), _mm256_max_ps(limit.high, high)}; }
  inline Vec at_most(const Vec& limit) const { return {_mm256_min_ps(limit.low, low), _mm256_min_ps(limit.high, high)}; }
  static inline __m256 shifted(__m256 value) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(value), 23));
  }
  inline Vec as_exponent() const { return {shifted(low), shifted(high)}; }
  inline Vec times_plus(const Vec& factor, const Vec& addend) const {
    return {_mm256_fmadd_ps(low, factor.low, addend.low), _mm256_fmadd_ps(high, factor.high, addend.high)};
  }
  static inline __m256 signed_by(__m256 value, __m256 of) {
    const __m256 flipped = _mm256_xor_ps(value, _mm256_and_ps(of, _mm256_set1_ps(-0.0f)));
    return _mm256_and_ps(flipped, _mm256_cmp_ps(of, _mm256_setzero_ps(), _CMP_NEQ_OQ));
  }
  inline Vec times_sign(const Vec& of) const { return {signed_by(low, of.low), signed_by(high, of.high)}; }
  static inline void transpose(const float* from, int64_t from_row, float* to, int64_t to_row) {
    for (int i = 0; i < kLanes; i += 8)
      for (int j = 0; j < kLanes; j += 8)
        transpose_eight(from + j * from_row + i, from_row, to + i * to_row + j, to_row);
  }
  inline float sum() const {
    const __m256 eight = _mm256_add_ps(low, high);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
  }
};

}  // namespace avx2
DIT_FAST_TARGET_END

DIT_FAST_TARGET_AVX512
namespace avx512 {

struct Vec {
  static constexpr int kGramRows = 4;
  static constexpr int kMixColumns = 4;
  static constexpr int kTileRows = 8;
  static constexpr int kRegisters = 32;
  __m512 all;

  static inline Vec set(float value) { return {_mm512_set1_ps(value)}; }
  static inline Vec load(const float* from) { return {_mm512_loadu_ps(from)}; }
  static inline Vec load_bfloat16(const uint16_t* from) {
    const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16))};
  }
  static inline Vec load_half(const uint16_t* from) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))};
  }
  inline void store(float* to) const { _mm512_storeu_ps(to, all); }
  inline void store_bfloat16(uint16_t* to) const {
    const __m512i bits = _mm512_castps_si512(all);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    const __m512i quiet = _mm512_or_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
    const __mmask16 unordered = _mm512_cmp_ps_mask(all, all, _CMP_UNORD_Q);
    const __m512i chosen = _mm512_mask_blend_epi32(unordered, rounded, quiet);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(chosen));
  }
  inline void store_half(uint16_t* to) const {
    const __m256i out = _mm512_cvtps_ph(all, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), out);
  }
  inline Vec operator+(const Vec& other) const { return {_mm512_add_ps(all, other.all)}; }
  inline Vec operator-(const Vec& other) const { return {_mm512_sub_ps(all, other.all)}; }
  inline Vec operator*(const Vec& other) const { return {_mm512_mul_ps(all, other.all)}; }
  inline Vec operator/(const Vec& other) const { return {_mm512_div_ps(all, other.all)}; }
  inline Vec root() const { return {_mm512_sqrt_ps(all)}; }
  inline Vec abs() const {
    return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(all), _mm512_set1_epi32(0x7fffffff)))};
  }
  inline Vec at_least(const Vec& limit) const { return {_mm512_max_ps(limit.all, all)}; }
  inline Vec at_most(const Vec& limit) const { return {_mm512_min_ps(limit.all, all)}; }
  inline Vec as_exponent() const {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(all), 23))};
  }
  inline Vec times_plus(const Vec& factor, const Vec& addend) const {
    return {_mm512_fmadd_ps(all, factor.all, addend.all)};
  }
  inline Vec times_sign(const Vec& of) const {
    const __m512i sign = _mm512_and_si512(_mm512_castps_si512(of.all), _mm512_set1_epi32(INT32_MIN));
    const __m512i flipped = _mm512_xor_si512(_mm512_castps_si512(all), sign);
    const __mmask16 nonzero = _mm512_cmp_ps_mask(of.all, _mm512_setzero_ps(), _CMP_NEQ_OQ);
    return {_mm512_castsi512_ps(_mm512_maskz_mov_epi32(nonzero, flipped))};
  }
  static inline void transpose(const float* from, int64_t from_row, float* to, int64_t to_row) {
    for (int i = 0; i < kLanes; i += 8)
      for (int j = 0; j < kLanes; j += 8)
        avx2::transpose_eight(from + j * from_row + i, from_row, to + i * to_row + j, to_row);
  }
  inline float sum() const {
    const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(all), 1));
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(all), high);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
  }
};

}  // namespace avx512
DIT_FAST_TARGET_END

#endif

}  // namespace dit_fast
