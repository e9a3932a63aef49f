// Vectors as wide as one register of the instruction set, by the compiler's vector extension.
//
// Not wider: a vector of several registers has no register of its own, and g++ 12 keeps it in memory. Arrays of these
// with constant indexes stay in registers, which arrays of __m512 do not.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace qwire {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float f32v __attribute__((vector_size(4 * kLanes)));
typedef int32_t i32v __attribute__((vector_size(4 * kLanes)));
typedef uint32_t u32v __attribute__((vector_size(4 * kLanes)));
typedef uint16_t u16v __attribute__((vector_size(2 * kLanes)));
typedef int16_t s16v __attribute__((vector_size(2 * kLanes)));
typedef int8_t i8v __attribute__((vector_size(kLanes)));

#define QWIRE_INLINE inline __attribute__((always_inline))

template <class V>
QWIRE_INLINE V load(const void* from) {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

template <class V>
QWIRE_INLINE void store(void* to, V v) {
    std::memcpy(to, &v, sizeof v);
}

// Past the caches, where the instruction set can (`to` aligned to a vector); finish_past_caches() before others read.
QWIRE_INLINE void store_past_caches(float* to, f32v v) {
#if defined(__AVX512F__)
    _mm512_stream_ps(to, (__m512)v);
#else
    store(to, v);
#endif
}

QWIRE_INLINE void finish_past_caches() {
#if defined(__AVX512F__)
    _mm_sfence();
#endif
}

// Asks for the bytes [from, from + count), into the second-level cache: on Zen 4 random blocks of 4 KB came in at 10 GB/s a
// thread so, and at 6, no faster than without asking, into the first-level one.
QWIRE_INLINE void prefetch(const void* from, int64_t count) {
    for (int64_t at = 0; at < count; at += 64) __builtin_prefetch(static_cast<const char*>(from) + at, 0, 2);
}

// A difference, because x - 0 is x: the compiler may drop it, which it may not with x + 0 (-0 + 0 is 0).
QWIRE_INLINE f32v splat(float x) { return x - f32v{}; }

// a * b + c, rounded once where the instruction set has it.
QWIRE_INLINE f32v fma(f32v a, f32v b, f32v c) {
#if defined(__AVX512F__)
    return (f32v)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (f32v)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

QWIRE_INLINE f32v max(f32v a, f32v b) { return a > b ? a : b; }

// Each element as 32 bits.
QWIRE_INLINE u32v widen_u16(u16v x) {
#if defined(__AVX512F__)
    return (u32v)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)x);  // g++ 12 makes four instructions of convertvector
#elif defined(__AVX2__)
    return (u32v)_mm256_cvtepu16_epi32((__m128i)x);
#else
    return __builtin_convertvector(x, u32v);
#endif
}

QWIRE_INLINE f32v widen_bf16(u16v x) { return (f32v)(widen_u16(x) << 16); }

// To the nearest bf16, ties to even; NaN stays NaN.
QWIRE_INLINE u16v narrow_bf16(f32v x) {
    const u32v bits = (u32v)x;
    const u32v rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const u32v quiet = (bits >> 16) | 0x40u;
    return __builtin_convertvector((i32v)(x == x) ? rounded : quiet, u16v);
}

// Folds a vector in halves: lane 0 is f of the lanes, by a tree in which lane i first meets lane i + kLanes / 2.
template <class V, class F>
QWIRE_INLINE V fold(V x, F&& f) {
    u32v lanes;
    for (int i = 0; i < kLanes; ++i) lanes[i] = uint32_t(i);
#pragma GCC unroll 4
    for (uint32_t apart = kLanes / 2; apart; apart /= 2) x = f(x, __builtin_shuffle(x, lanes ^ apart));
    return x;
}

// The sum of all lanes, in one fixed order.
QWIRE_INLINE float sum(f32v x) {
    return fold(x, [](f32v a, f32v b) __attribute__((always_inline)) { return a + b; })[0];
}

QWIRE_INLINE float max(f32v x) {
    return fold(x, [](f32v a, f32v b) __attribute__((always_inline)) { return max(a, b); })[0];
}

// Adds neighbours: lane i is the sum of lanes 2i and 2i + 1 of a and b, one behind the other.
QWIRE_INLINE i32v pair_sums(i32v a, i32v b) {
#if defined(__AVX512F__)
    return __builtin_shuffle(a, b, i32v{0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30}) +
           __builtin_shuffle(a, b, i32v{1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31});
#elif defined(__AVX2__)
    const __m256i sums = _mm256_hadd_epi32((__m256i)a, (__m256i)b);  // half by half
    return (i32v)_mm256_permute4x64_epi64(sums, 0b11011000);
#else
    return __builtin_shuffle(a, b, i32v{0, 2, 4, 6}) + __builtin_shuffle(a, b, i32v{1, 3, 5, 7});
#endif
}

// Lane i is the sum of all lanes of x[i]: far fewer shuffles than sums one by one.
QWIRE_INLINE i32v totals(i32v (&x)[kLanes]) {
    for (int width = kLanes; width > 1; width /= 2)
        for (int i = 0; i < width / 2; ++i) x[i] = pair_sums(x[2 * i], x[2 * i + 1]);
    return x[0];
}

// exp(x), within 2 ulp; 0 below -87.3. Cody and Waite's reduction, then a polynomial of degree 6.
QWIRE_INLINE f32v exp(f32v x) {
    const f32v low = splat(-87.33654f), high = splat(88.3762626647950f);
    const auto under = x < low;
    x = x > high ? high : x;
    x = under ? low : x;
    const f32v magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const f32v shifted = fma(x, splat(1.44269504088896341f), magic);
    const f32v n = shifted - magic;
    f32v r = fma(n, splat(-0.693359375f), x);
    r = fma(n, splat(2.12194440e-4f), r);
    f32v p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(p, r * r, r + splat(1.0f));
    const i32v power = __builtin_convertvector(n, i32v);
    const f32v scaled = (f32v)((i32v)p + (power << 23));
    return under ? f32v{} : scaled;
}

}  // namespace qwire
