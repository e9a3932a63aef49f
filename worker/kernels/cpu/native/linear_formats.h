// How weights lie in panels, two vectors of columns at a time, and what a product of a panel is given.
#pragma once

#include "linear.h"
#include "registers.h"

namespace qwire {

// How many bytes ahead weights are prefetched, by measurement.
constexpr int64_t kFar = 8192;

// The two vectors of a step that pass `pass` works on, where a register holds fewer than 16 columns.
struct Pair {
    Floats low, high;
};
constexpr int kPasses = 16 / kWidth;

QWIRE_INLINE Pair widen_words(const char* words, int pass) {
    const Words both = load<Words>(words + pass * 4 * kWidth);
    return {(Floats)(both << 16), (Floats)(both & 0xffff0000u)};
}

struct Float32 {
    static constexpr int64_t kStep = 128;  // bytes a value of K
    static QWIRE_INLINE Pair widen(const char* at, int pass) {
        at += pass * 4 * kWidth;
        return {load<Floats>(at), load<Floats>(at + 64)};
    }
};

struct Bfloat16 {
    static constexpr int64_t kStep = 64;
    static QWIRE_INLINE Pair widen(const char* at, int pass) { return widen_words(at, pass); }
};

struct Float16 {
    static constexpr int64_t kStep = 64;
    static QWIRE_INLINE Pair widen(const char* at, int pass) {
        at += pass * 2 * kWidth;
        return {widen(at), widen(at + 32)};
    }
    static QWIRE_INLINE Floats widen(const char* at) {
#if defined(__AVX512F__)
        return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
#elif defined(__F16C__)
        return (Floats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
#else
        typedef uint16_t Halves __attribute__((vector_size(2 * kWidth)));
        const Words bits = __builtin_convertvector(load<Halves>(at), Words);
        // Exponent and mantissa moved into place stand for 2^-112 of the value; infinity and NaN take the top exponent.
        const Floats scaled = (Floats)((bits & 0x7fffu) << 13) * 0x1p112f;
        const Words special = ((bits & 0x7fffu) >= 0x7c00u) & 0x7f800000u;
        return (Floats)((Words)scaled | special | (bits & 0x8000u) << 16);
#endif
    }
};

// Integer formats: a group of K that shares scales, the bytes and values of K of a step, the words that hold a step of
// a row, and what a value of 1 stands for, in scales.
struct Int8 {
    static constexpr int64_t kGroup = kInt8Group, kStep = 128, kValues = 4, kWords = kActivationWords;
    static constexpr float kUnit = 1.0f;
    using Weights = Quads;
    static QWIRE_INLINE void load(const char* at, int pass, Quads& low, Quads& high) {
        at += pass * 4 * kWidth;
        low = quads(qwire::load<Ints>(at));
        high = quads(qwire::load<Ints>(at + 64));
    }
    static QWIRE_INLINE Pair scales(const char* group, int pass) { return widen_words(group, pass); }
    struct Zeros {
        QWIRE_INLINE Zeros(const char*, int) {}
        QWIRE_INLINE void start(const int32_t* from, Ints& low, Ints& high) const { low = high = broadcast(*from); }
    };
};

#if defined(__AVX512VNNI__)
struct FixedPoint {
    static constexpr int64_t kGroup = kFixedGroup, kStep = 128, kValues = 2, kWords = 1;
    static constexpr float kUnit = 1.0f;
    using Weights = Halves;
    static QWIRE_INLINE void load(const char* at, int, Halves& low, Halves& high) {
        low = {qwire::load<Ints>(at)};
        high = {qwire::load<Ints>(at + 64)};
    }
    static QWIRE_INLINE Pair scales(const char* group, int pass) { return widen_words(group, pass); }
    struct Zeros {
        QWIRE_INLINE Zeros(const char*, int) {}
        QWIRE_INLINE void start(const int32_t*, Ints& low, Ints& high) const { low = high = Ints{}; }
    };
};
#endif

// Values count in sixteenths, so that they can stay in the high half of a byte and zero points be fractions: a weight
// is scale / 16 * (16 q - 72 - 6 zero).
struct Int4 {
    static constexpr int64_t kGroup = kInt4Group, kStep = 64, kValues = 4, kWords = kActivationWords;
    static constexpr float kUnit = 1.0f / 16;
    using Weights = Quads;
    static QWIRE_INLINE void load(const char* at, int pass, Quads& low, Quads& high) {
        const Ints both = qwire::load<Ints>(at + pass * 4 * kWidth);
        low = quads((both << 4) & (int32_t)0xf0f0f0f0);
        high = quads(both & (int32_t)0xf0f0f0f0);
    }
    static QWIRE_INLINE Pair scales(const char* group, int pass) {
        const Words both = qwire::load<Words>(group + pass * 4 * kWidth);
        return {(Floats)((both & 0xfff0u) << 16), (Floats)(both & 0xfff00000u)};
    }
    struct Zeros {
        QWIRE_INLINE Zeros(const char* group, int pass) {
            const Words both = qwire::load<Words>(group + pass * 4 * kWidth);
            low = (Ints)(both & 15u);
            high = (Ints)(both >> 16 & 15u);
        }
        QWIRE_INLINE void start(const int32_t* from, Ints& low_start, Ints& high_start) const {
            const int32_t sum = *from;
            const Ints base = broadcast(-72 * sum);
            low_start = times(base, low, -6 * sum);
            high_start = times(base, high, -6 * sum);
        }
        // base + zero * factor; the sum of a chunk is at most 32 * 127, so factor fits in 16 bits.
        static QWIRE_INLINE Ints times(Ints base, Ints zero, int32_t factor) {
#if defined(__AVX512VNNI__)
            return dot_halves(base, zero, broadcast(factor));
#elif defined(__AVX2__)
            return dot_pairs(base, zero, factor);
#else
            return base + zero * broadcast(factor);
#endif
        }
        Ints low, high;
    };
};

// The rows of a product, tile by tile.
struct TiledRows {
    const Tiles& tiles;
    const char* values;     // [tile][chunk][tile rows][kChunk]: floats, activations or fixed-point values
    int64_t row_bytes;      // of `values`
    // int8 and int4 only: QuantizedRows::int8_starts or sums, [tile][int8: group, int4: chunk][tile rows]
    const int32_t* starts;
    int64_t row_starts;     // of `starts`
    const float* scales;    // of integers only: [tile][group][tile rows]
    int64_t row_scales;     // of `scales`
};

// One panel of weights, and where its products go.
struct Panel {
    Format format;
    const char* weights;
    const char* next;  // the panel that is read after it
    int64_t in;
    const float* bias;  // [columns], or null
    float* y;           // of row 0
    int64_t y_stride;
    int columns;  // 32, fewer in the last panel
};

}  // namespace qwire
