// Vectors as wide as one register of the instruction set, for loops whose speed hangs on what stays in registers.
#pragma once

#include "vec.h"

namespace qwire {

constexpr int kWidth = kLanes;
#if defined(__AVX512F__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

using Floats = f32v;
using Ints = i32v;
using Words = u32v;
typedef uint16_t Shorts __attribute__((vector_size(4 * kWidth)));

// Not by adding to zeros: for floats that is an addition, since -0 + 0 is 0.
#if defined(__AVX512F__)
QWIRE_INLINE Floats broadcast(float x) { return (Floats)_mm512_set1_ps(x); }
#elif defined(__AVX2__)
QWIRE_INLINE Floats broadcast(float x) { return (Floats)_mm256_set1_ps(x); }
#else
QWIRE_INLINE Floats broadcast(float x) { return Floats{x, x, x, x}; }
#endif
QWIRE_INLINE Ints broadcast(int32_t x) { return Ints{} + x; }

QWIRE_INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

// Products of unsigned weights with signed activations, four neighbours along K summed into each 32-bit lane. With VNNI
// that is one instruction on bytes. Without it both are widened to 16 bits, since vpmaddubsw would saturate: weights by
// mask and shift into pairs (k, k + 2) and (k + 1, k + 3), activations when they are quantized.
#if defined(__AVX512VNNI__)
constexpr int kActivationWords = 1;  // 32-bit words that hold four activations

struct Quads {
    Ints bytes;
};

QWIRE_INLINE Quads quads(Ints bytes) { return {bytes}; }

QWIRE_INLINE Ints dot(Ints sum, const Quads& weights, const int32_t* activations) {
    return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weights.bytes, _mm512_set1_epi32(*activations));
}
#else
constexpr int kActivationWords = 2;

struct Quads {
    Ints even, odd;
};

QWIRE_INLINE Quads quads(Ints bytes) {
    return {bytes & 0x00ff00ff, (Ints)((Words)bytes >> 8) & 0x00ff00ff};
}

QWIRE_INLINE Ints dot_pairs(Ints sum, Ints weights, Ints activations) {
#if defined(__AVX512F__)
    return sum + (Ints)_mm512_madd_epi16((__m512i)weights, (__m512i)activations);
#elif defined(__AVX2__)
    return sum + (Ints)_mm256_madd_epi16((__m256i)weights, (__m256i)activations);
#else
    // 255 * 127 fits in 16 bits, so the low half of each product is the product.
    const Ints products = (Ints)((Shorts)weights * (Shorts)activations);
    return sum + (products << 16 >> 16) + (products >> 16);
#endif
}

QWIRE_INLINE Ints dot(Ints sum, const Quads& weights, const int32_t* activations) {
    return dot_pairs(dot_pairs(sum, weights.even, broadcast(activations[0])), weights.odd, broadcast(activations[1]));
}
#endif

// Whether bfloat16 weights are kept as fixed-point values (linear_fixed.h) and multiplied so, and queries become such where
// keys are codes (attention_types.h): where products of 16 bits, two neighbours along K summed into each 32-bit lane, take
// less than those of floats.
#if defined(__AVX512VNNI__) || (defined(__AVX2__) && !defined(__AVX512F__))
constexpr bool kFixedPoint = true;
#else
constexpr bool kFixedPoint = false;
#endif

// Such a product with VNNI: one instruction, which does twice the arithmetic of one of floats.
#if defined(__AVX512VNNI__)
QWIRE_INLINE Ints dot_halves(Ints sum, Ints a, Ints b) {
    return (Ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
}

struct Halves {
    Ints words;
};

QWIRE_INLINE Ints dot(Ints sum, const Halves& weights, const int32_t* activations) {
    return dot_halves(sum, weights.words, broadcast(*activations));
}
#endif

}  // namespace qwire
