// The types that keys and values are kept in: to vectors of floats and back, and as many rows as a vector has lanes
// turned into columns.
#pragma once

#include <type_traits>

#include "registers.h"

namespace qwire {

struct Bf16 {
    uint16_t bits;
};

struct Half {
    uint16_t bits;
};

enum class KvType : int { kFloat32, kBfloat16, kFloat16, kInt8, kInt16 };

// Whether an element is a code, to be multiplied by the scale of its vector.
template <class T>
constexpr bool kScaled = std::is_integral_v<T>;
// The greatest code: of 16 bits one that leaves room for queries and weights of 13 and more where products are summed in 32.
template <class T>
constexpr int kMostCode = sizeof(T) == 1 ? 127 : 8191;
constexpr int64_t kMaxHeadDim = 1024;

// Whether queries and weights become fixed-point values, two to a unit, whose products with codes are summed exactly;
// else they, and keys and values, are multiplied as floats, each a unit.
template <class T>
constexpr bool kPaired = kFixedPoint && kScaled<T>;
template <class T>
using Unit = std::conditional_t<kPaired<T>, int32_t, float>;
template <class T>
using Units = std::conditional_t<kPaired<T>, i32v, f32v>;  // sums too
template <class T>
constexpr int kUnitSize = kPaired<T> ? 2 : 1;
// The largest such value. kMaxHeadDim of its products with codes of 8 bits stay below 2^31 in sum; where codes have 16 bits,
// values are so small that their sum is kMostSum at most, before each is rounded (16 are for how the sum itself is).
constexpr int kMostFixed = 16383;
template <class T>
constexpr bool kSumsBound = kScaled<T> && sizeof(T) == 2;
constexpr float kMostSum = float(INT32_MAX / kMostCode<int16_t> - kMaxHeadDim / 2 - 16);
static_assert(kMaxHeadDim * kMostFixed * kMostCode<int8_t> <= INT32_MAX);

// Calls f(T{}) with the type's element.
template <class F>
QWIRE_INLINE void with_type(KvType type, F&& f) {
    switch (type) {
        case KvType::kFloat32: return f(float{});
        case KvType::kBfloat16: return f(Bf16{});
        case KvType::kFloat16: return f(Half{});
        case KvType::kInt8: return f(int8_t{});
        case KvType::kInt16: return f(int16_t{});
    }
}

QWIRE_INLINE f32v widen_half(u16v x) {
#if defined(__AVX512F__)
    return (f32v)_mm512_maskz_cvtph_ps(0xffff, (__m256i)x);
#elif defined(__F16C__)
    return (f32v)_mm256_cvtph_ps((__m128i)x);
#else
    // The exponent and mantissa moved into place are 2^112 too small, denormals included; infinities come out as 2^16
    // or more and get the greatest exponent.
    const u32v bits = __builtin_convertvector(x, u32v);
    const f32v scaled = (f32v)((bits & 0x7fffu) << 13) * 0x1p112f;
    const u32v special = (u32v)(scaled >= 65536.0f) & 0x7f800000u;
    return (f32v)((u32v)scaled | special | (bits & 0x8000u) << 16);
#endif
}

// To the nearest half, ties to even; NaN stays NaN.
QWIRE_INLINE u16v narrow_half(f32v x) {
#if defined(__AVX512F__)
    return (u16v)_mm512_maskz_cvtps_ph(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
    return (u16v)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#else
    const u32v bits = (u32v)x, sign = bits & 0x80000000u, size = bits ^ sign;
    // Normal halves: rounded where the mantissa is cut. Smaller ones: adding 0.5 rounds to multiples of 2^-24.
    const u32v normal = (size + 0xfffu + ((size >> 13) & 1u) - (112u << 23)) >> 13;
    const u32v small = (u32v)((f32v)size + 0.5f) - 0x3f000000u;
    u32v half = size < (113u << 23) ? small : normal;
    half = size >= 0x477ff000u ? u32v{} + 0x7c00u : half;
    half = size > 0x7f800000u ? u32v{} + 0x7e00u : half;
    return __builtin_convertvector(half | sign >> 16, u16v);
#endif
}

QWIRE_INLINE f32v widen(const float* from) { return load<f32v>(from); }
QWIRE_INLINE f32v widen(const Bf16* from) { return widen_bf16(load<u16v>(from)); }
QWIRE_INLINE f32v widen(const Half* from) { return widen_half(load<u16v>(from)); }
QWIRE_INLINE f32v widen(const int8_t* from) {
#if defined(__AVX512F__)
    return (f32v)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load<__m128i>(from)));
#elif defined(__AVX2__)
    return (f32v)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
    return __builtin_convertvector(__builtin_convertvector(load<i8v>(from), i32v), f32v);
#endif
}

QWIRE_INLINE f32v widen(const int16_t* from) {
    return __builtin_convertvector((i32v)(widen_u16(load<u16v>(from)) << 16) >> 16, f32v);
}

QWIRE_INLINE void narrow(float* to, f32v x) { store(to, x); }
QWIRE_INLINE void narrow(Bf16* to, f32v x) { store(to, narrow_bf16(x)); }
QWIRE_INLINE void narrow(Half* to, f32v x) { store(to, narrow_half(x)); }
// To the nearest whole number, ties to even; within the greatest code.
template <class Codes>
QWIRE_INLINE Codes codes(f32v x) {
    const f32v magic = splat(12582912.0f);  // 1.5 * 2^23
    return __builtin_convertvector((i32v)(x + magic) - (i32v)magic, Codes);
}
QWIRE_INLINE void narrow(int8_t* to, f32v x) { store(to, codes<i8v>(x)); }
QWIRE_INLINE void narrow(int16_t* to, f32v x) { store(to, codes<s16v>(x)); }

// A unit in every lane, and sums with a product of units added.
QWIRE_INLINE f32v repeat(float x) { return splat(x); }
QWIRE_INLINE i32v repeat(int32_t x) { return broadcast(x); }
QWIRE_INLINE f32v add_products(f32v sum, f32v a, f32v b) { return fma(a, b, sum); }

// Of codes in fixed point: codes at the same place of two rows as units, and codes of each lane as units: four of 8 bits as
// two, the first and the third, the second and the fourth; two of 16 bits as they are.
#if defined(__AVX512VNNI__)
QWIRE_INLINE i32v add_products(i32v sum, i32v a, i32v b) { return dot_halves(sum, a, b); }

QWIRE_INLINE i32v pair_up(const int8_t* first, const int8_t* second) {
    const __m128i a = load<__m128i>(first), b = load<__m128i>(second);
    const __m256i pairs = _mm256_set_m128i(_mm_unpackhi_epi8(a, b), _mm_unpacklo_epi8(a, b));
    return (i32v)_mm512_cvtepi8_epi16(pairs);
}

QWIRE_INLINE i32v pair_up(const int16_t* first, const int16_t* second) {
    typedef int16_t Both __attribute__((vector_size(64)));
    const Both order = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(load<__m256i>(first)), load<__m256i>(second), 1);
    return (i32v)_mm512_permutexvar_epi16((__m512i)order, both);
}

QWIRE_INLINE void unpack(u32v x, int8_t, i32v (&parts)[2]) {
    parts[0] = (i32v)_mm512_srai_epi16(_mm512_slli_epi16((__m512i)x, 8), 8);
    parts[1] = (i32v)_mm512_srai_epi16((__m512i)x, 8);
}
#elif defined(__AVX2__) && !defined(__AVX512F__)
QWIRE_INLINE i32v add_products(i32v sum, i32v a, i32v b) { return dot_pairs(sum, a, b); }

QWIRE_INLINE i32v pair_up(const int8_t* first, const int8_t* second) {
    const auto half = [](const int8_t* from) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)); };
    return (i32v)_mm256_cvtepi8_epi16(_mm_unpacklo_epi8(half(first), half(second)));
}

QWIRE_INLINE i32v pair_up(const int16_t* first, const int16_t* second) {
    const __m128i a = load<__m128i>(first), b = load<__m128i>(second);
    return (i32v)_mm256_set_m128i(_mm_unpackhi_epi16(a, b), _mm_unpacklo_epi16(a, b));
}

QWIRE_INLINE void unpack(u32v x, int8_t, i32v (&parts)[2]) {
    parts[0] = (i32v)_mm256_srai_epi16(_mm256_slli_epi16((__m256i)x, 8), 8);
    parts[1] = (i32v)_mm256_srai_epi16((__m256i)x, 8);
}
#endif

// How floats are fixed: so that `size`, without signs the largest of them or their sum, becomes `fixed`.
struct Size {
    float size, fixed;
};

// `sum` counts where codes of type T bound it.
template <class T>
QWIRE_INLINE Size size_of(float largest, [[maybe_unused]] float sum) {
    if (kSumsBound<T> && sum > largest * (kMostSum / kMostFixed)) return {sum, kMostSum};
    return {largest, kMostFixed};
}

// `count` floats (a multiple of a vector's lanes) to fixed point, in the order that `unpack` gives to codes where
// `spread`, and else as they come. Returns what a value of 1 stands for: 0 where the size is below 1e-30, NaN where one isn't
// finite.
template <bool spread>
QWIRE_INLINE float fix(const float* from, int64_t count, Size size, int16_t* to) {
    const f32v inverse = splat(size.size < 1e-30f ? 0.0f : size.fixed / size.size), magic = splat(12582912.0f);
    f32v zeros{};
    for (int64_t i = 0; i < count; i += kLanes) {  // 12582912 is 1.5 * 2^23: adding it rounds to an integer
        const f32v x = load<f32v>(from + i);
        zeros = fma(x, f32v{}, zeros);
        const i32v rounded = (i32v)fma(x, inverse, magic) - (i32v)magic;
        s16v narrow = __builtin_convertvector(rounded, s16v);
#if defined(__AVX512VNNI__)
        if (spread) narrow = __builtin_shuffle(narrow, s16v{0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15});
#elif defined(__AVX2__) && !defined(__AVX512F__)
        if (spread) narrow = __builtin_shuffle(narrow, s16v{0, 2, 1, 3, 4, 6, 5, 7});
#endif
        store(to + i, narrow);
    }
    return (size.size < 1e-30f ? 0.0f : size.size / size.fixed) + sum(zeros);
}

// The neighbours packed in each lane, apart.
QWIRE_INLINE void unpack(u32v x, float, f32v (&parts)[1]) { parts[0] = (f32v)x; }
QWIRE_INLINE void unpack(u32v x, Bf16, f32v (&parts)[2]) {
    parts[0] = (f32v)(x << 16);
    parts[1] = (f32v)(x & 0xffff0000u);
}
QWIRE_INLINE void unpack(u32v x, Half, f32v (&parts)[2]) {
    parts[0] = widen_half(__builtin_convertvector(x, u16v));
    parts[1] = widen_half(__builtin_convertvector(x >> 16, u16v));
}
QWIRE_INLINE void unpack(u32v x, int16_t, i32v (&parts)[1]) { parts[0] = (i32v)x; }
QWIRE_INLINE void unpack(u32v x, int16_t, f32v (&parts)[2]) {
    parts[0] = __builtin_convertvector((i32v)(x << 16) >> 16, f32v);
    parts[1] = __builtin_convertvector((i32v)x >> 16, f32v);
}
QWIRE_INLINE void unpack(u32v x, int8_t, f32v (&parts)[4]) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) parts[i] = __builtin_convertvector((i32v)(x << (24 - 8 * i)) >> 24, f32v);
}

#if defined(__AVX512F__)
QWIRE_INLINE u32v even_quarters(u32v a, u32v b) {
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
}
QWIRE_INLINE u32v odd_quarters(u32v a, u32v b) {
    return __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}
#endif

// x[i][j] to x[j][i].
QWIRE_INLINE void transpose(u32v (&x)[kLanes]) {
#if defined(__AVX512F__)
    u32v t[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        t[i] = __builtin_shufflevector(x[i], x[i + 1], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
        t[i + 1] = __builtin_shufflevector(x[i], x[i + 1], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {  // then quarter q of x[4i + j] holds column 4q + j of rows 4i to 4i + 3
        const int j = i / 4 * 4 + i % 4 / 2;
        x[i] = __builtin_shufflevector(t[j], t[j + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
        x[i + 1] = __builtin_shufflevector(t[j], t[j + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
        const u32v a = even_quarters(x[j], x[4 + j]), b = odd_quarters(x[j], x[4 + j]);
        const u32v c = even_quarters(x[8 + j], x[12 + j]), d = odd_quarters(x[8 + j], x[12 + j]);
        x[j] = even_quarters(a, c);
        x[4 + j] = even_quarters(b, d);
        x[8 + j] = odd_quarters(a, c);
        x[12 + j] = odd_quarters(b, d);
    }
#elif defined(__AVX2__)
    __m256i r[8], t[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_epi32((__m256i)x[i], (__m256i)x[i + 1]);
        t[i + 1] = _mm256_unpackhi_epi32((__m256i)x[i], (__m256i)x[i + 1]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 4; ++i) {
        x[i] = (u32v)_mm256_permute2x128_si256(r[i], r[i + 4], 0x20);
        x[i + 4] = (u32v)_mm256_permute2x128_si256(r[i], r[i + 4], 0x31);
    }
#else
    const u32v a = __builtin_shuffle(x[0], x[1], u32v{0, 4, 1, 5}), b = __builtin_shuffle(x[2], x[3], u32v{0, 4, 1, 5});
    const u32v c = __builtin_shuffle(x[0], x[1], u32v{2, 6, 3, 7}), d = __builtin_shuffle(x[2], x[3], u32v{2, 6, 3, 7});
    x[0] = __builtin_shuffle(a, b, u32v{0, 1, 4, 5});
    x[1] = __builtin_shuffle(a, b, u32v{2, 3, 6, 7});
    x[2] = __builtin_shuffle(c, d, u32v{0, 1, 4, 5});
    x[3] = __builtin_shuffle(c, d, u32v{2, 3, 6, 7});
#endif
}

}  // namespace qwire
