// How weights of bfloat16 are kept where kFixedPoint says so: as fixed point of 13 bits, which are read in 13/16 of the time.
//
// A panel is groups of 128 along K: [16 words] of scales, laid out as bfloat16, then blocks of 16. A scale is a power of
// two that makes the group's largest weight 2048 to 4080: weights of 1/16 of it and more are as they were, smaller ones to
// the nearest multiple. A block is 8 steps along K of two vectors each, of the low 16 columns and of the high ones, whose
// 16-bit values are [column][2]. It has of each value, at the same place of vectors of 16-bit words:
//
//   [5]  the low 5 bits: vector i's in word i / 3, from bit 5 (i % 3) on, and the last one's in bit 15 of all five
//   [8]  the high 8 bits of a step: low columns' in the low byte, high ones' in the other
//
// in the order in which they are first read.
#pragma once

#include <array>

#include "linear.h"
#include "registers.h"

namespace qwire {

constexpr int kFixedSteps = 8, kFixedBlock = 2 * kFixedSteps;  // of a block; values of K
constexpr int kFixedLows = 5;                                  // vectors
constexpr int64_t kFixedBlockBytes = (kFixedLows + kFixedSteps) * 64;
constexpr int64_t kFixedGroupBytes = 64 + kFixedGroup / kFixedBlock * kFixedBlockBytes;

// Where in a block they are.
constexpr int64_t fixed_low(int i) { return std::array{0, 2, 5, 7, 10}[size_t(i)] * 64; }
constexpr int64_t fixed_high(int step) { return std::array{1, 3, 4, 6, 8, 9, 11, 12}[size_t(step)] * 64; }

// One weight of a panel, in scales.
inline int fixed_value(const char* panel, int64_t column, int64_t k) {
    const int half = int(column / 16), step = int(k % kFixedBlock / 2), vector = 2 * step + half;
    const char* block = panel + k / kFixedGroup * kFixedGroupBytes + 64 + k % kFixedGroup / kFixedBlock * kFixedBlockBytes;
    const auto word = [&](int64_t at) {
        return int(reinterpret_cast<const uint16_t*>(block + at)[column % 16 * 2 + k % 2]);
    };
    int low = 0;
    if (vector < 3 * kFixedLows) low = word(fixed_low(vector / 3)) >> vector % 3 * 5 & 31;
    else for (int i = 0; i < kFixedLows; ++i) low |= word(fixed_low(i)) >> 15 << i;
    return int8_t(word(fixed_high(step)) >> half * 8) * 32 + low;
}

#if defined(__AVX512VNNI__) || (defined(__AVX2__) && !defined(__AVX512F__))
typedef int16_t SignedShorts __attribute__((vector_size(4 * kWidth)));

#if defined(__AVX512F__)
// Where `mask` has ones those of `other`, else those of `x`.
QWIRE_INLINE Shorts replace(Shorts x, Shorts other, uint16_t mask) {
    return (Shorts)_mm512_ternarylogic_epi32((__m512i)x, (__m512i)other, _mm512_set1_epi16(short(mask)), 0xd8);
}
#endif

// Bit i of `other` where `x` has a zero.
QWIRE_INLINE Shorts with_bit(Shorts x, Shorts other, int i) {
#if defined(__AVX512F__)
    return replace(x, other, uint16_t(1 << i));
#else
    return x | (other & uint16_t(1 << i));
#endif
}

// The low 5 bits of a block's vector, below others that mean nothing. `vector` and `step` are constants; `pass` says which part
// of the vectors, as wide as a register.
QWIRE_INLINE Shorts fixed_lows(const char* block, int vector, int pass) {
    const auto word = [&](int i) __attribute__((always_inline)) {
        return load<Shorts>(block + fixed_low(i) + pass * 4 * kWidth);
    };
    if (vector < 3 * kFixedLows) return word(vector / 3) >> vector % 3 * 5;
    Shorts low = word(0) >> 15;
#pragma GCC unroll 4
    for (int i = 1; i < kFixedLows; ++i) low = with_bit(low, word(i) >> (15 - i), i);
    return low;
}

// A step's low and high columns.
QWIRE_INLINE void unpack_fixed(const char* block, int step, int pass, Ints& low, Ints& high) {
    const Shorts both = load<Shorts>(block + fixed_high(step) + pass * 4 * kWidth);
    const Shorts lows = fixed_lows(block, 2 * step, pass), lows_of_high = fixed_lows(block, 2 * step + 1, pass);
#if defined(__AVX512F__)
    low = (Ints)replace((Shorts)((SignedShorts)(both << 8) >> 3), lows, 31);
    high = (Ints)replace((Shorts)((SignedShorts)both >> 3), lows_of_high, 31);
#else  // 32 times a byte takes one instruction, shifts and masks two
    low = (Ints)_mm256_maddubs_epi16(_mm256_set1_epi16(32), (__m256i)both) | ((Ints)(lows & 31));
    high = (Ints)_mm256_maddubs_epi16(_mm256_set1_epi16(32 << 8), (__m256i)both) | ((Ints)(lows_of_high & 31));
#endif
}
#endif

}  // namespace qwire
