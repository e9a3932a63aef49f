// How weights lie in panels, two vectors of columns at a time, and what a product of a panel is given.
#pragma once

#include "linear.h"
#include "linear_fixed.h"
#include "registers.h"

namespace qwire {

// How many bytes ahead weights are prefetched, by measurement: with AVX2 on Zen 3.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int64_t kFar = 4096;
#else
constexpr int64_t kFar = 8192;
#endif

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
        return (Floats)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
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

// Integer formats: a group of K that shares scales, steps that are loaded one after the other and their bytes, values of
// K and words of a row that a step takes, what a value of 1 stands for, in scales, whether sums start from the rows'
// `starts`, and what loading a group's weights takes.
struct Int8 {
    static constexpr int64_t kGroup = kInt8Group, kSteps = 2, kBytes = 256, kValues = 4, kWords = kActivationWords;
    static constexpr float kUnit = 1.0f;
    static constexpr bool kStarts = true;
    using Weights = Quads;
    QWIRE_INLINE Int8(const char*, int) {}
    QWIRE_INLINE void load(const char* at, int step, int pass, Quads& low, Quads& high) const {
        at += step * 128 + pass * 4 * kWidth;
        low = quads(qwire::load<Ints>(at));
        high = quads(qwire::load<Ints>(at + 64));
    }
    static QWIRE_INLINE Pair scales(const char* group, int pass) { return widen_words(group, pass); }
};

#if defined(__AVX512VNNI__)
struct FixedPoint {
    static constexpr int64_t kGroup = kFixedGroup, kSteps = kFixedSteps, kBytes = kFixedBlockBytes, kValues = 2, kWords = 1;
    static constexpr float kUnit = 1.0f;
    static constexpr bool kStarts = false;
    using Weights = Halves;
    QWIRE_INLINE FixedPoint(const char*, int) {}
    QWIRE_INLINE void load(const char* at, int step, int, Halves& low, Halves& high) const {
        unpack_fixed(at, step, 0, low.words, high.words);
    }
    static QWIRE_INLINE Pair scales(const char* group, int pass) { return widen_words(group, pass); }
};
#endif

// Values count in eighths, so that zero points can be fractions: a weight is scale / 8 * (8 q - 36 - 3 zero), and with
// 128 added it is a byte, 47 to 212.
struct Int4 {
    static constexpr int64_t kGroup = kInt4Group, kSteps = 2, kBytes = 128, kValues = 4, kWords = kActivationWords;
    static constexpr float kUnit = 1.0f / 8;
    static constexpr bool kStarts = true;
    using Weights = Quads;
    QWIRE_INLINE Int4(const char* group, int pass) {
        const Words zeros = qwire::load<Words>(group + pass * 4 * kWidth) & 0x000f000fu;
        low_ = added(zeros, 0);
        high_ = added(zeros, 2);
    }
    QWIRE_INLINE void load(const char* at, int step, int pass, Quads& low, Quads& high) const {
        const Words both = qwire::load<Words>(at + step * 64 + pass * 4 * kWidth);
        low = quads((Ints)((both << 3 & 0x78787878u) + low_));
        high = quads((Ints)((both >> 1 & 0x78787878u) + high_));
    }
    static QWIRE_INLINE Pair scales(const char* group, int pass) {
        const Words both = qwire::load<Words>(group + pass * 4 * kWidth);
        return {(Floats)((both & 0xfff0u) << 16), (Floats)(both & 0xfff00000u)};
    }

   private:
    // 92 - 3 zero of the zero points in that byte of each word, four times.
    static QWIRE_INLINE Words added(Words zeros, int byte) {
#if defined(__AVX512BW__)  // two instructions, where a step's weights take six
        const __m128i of_zero = _mm_setr_epi8(92, 89, 86, 83, 80, 77, 74, 71, 68, 65, 62, 59, 56, 53, 50, 47);
        const Words places = __builtin_bit_cast(
            Words, _mm512_set4_epi32(12 * 0x01010101, 8 * 0x01010101, 4 * 0x01010101, 0)) + uint32_t(byte) * 0x01010101u;
        const __m512i four = _mm512_shuffle_epi8((__m512i)zeros, (__m512i)places);
        return (Words)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(of_zero), four);
#else
        Words each = 92 - 3 * (zeros >> 8 * byte & 15u);
        each |= each << 8;
        return each | each << 16;
#endif
    }
    Words low_, high_;  // what a step's four bytes get added
};

// As the first of several tiles meets W: it leaves them unpacked for the others.
template <class W>
struct Unpacking : W {
    using W::W;
};
template <class W>
constexpr bool kUnpacking = false;
template <class W>
constexpr bool kUnpacking<Unpacking<W>> = true;

#if defined(__AVX512VNNI__)
// Weights of W as they are multiplied, a group's scales before them as W has them: [k / kValues][32 columns][kValues].
template <class W>
struct Unpacked : W {
    static constexpr int64_t kSteps = 2, kBytes = 256;
    using W::W;
    QWIRE_INLINE void load(const char* at, int step, int, typename W::Weights& low, typename W::Weights& high) const {
        low = {qwire::load<Ints>(at + step * 128)};
        high = {qwire::load<Ints>(at + step * 128 + 64)};
    }
};
#endif

// The rows of a product, tile by tile.
struct TiledRows {
    const Tiles& tiles;
    const char* values;     // [tile][chunk][tile rows][kChunk]: floats, activations or fixed-point values
    int64_t row_bytes;      // of `values`
    // int8 and int4 only: QuantizedRows::int8_starts or int4_starts, [tile][int8: group, int4: chunk][tile rows]
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

// Outputs of more bytes go past the caches, which hold no more, when they are read next: on Zen 4 the lines that stores
// brought in first took 5 to 8% of a prefill.
constexpr int64_t kPastCaches = 1 << 20;

// Where a panel's outputs go.
struct Output {
    const float* bias;  // [columns], or null
    float* y;
    int64_t y_stride;
    int columns;  // 32, fewer in the last panel
    bool past_caches;
};

inline Output output_of(const Panel& panel, int64_t rows) {
    const int64_t row_bytes = panel.y_stride * int64_t(sizeof(float));
    const bool past_caches = rows * row_bytes > kPastCaches && (uintptr_t(panel.y) | uintptr_t(row_bytes)) % 64 == 0;
    return {panel.bias, panel.y, panel.y_stride, panel.columns, past_caches};
}

// The last panel's columns may be fewer than 32.
[[gnu::noinline]] inline void put_some(const Output& p, int row, int column, Floats sum) {
    for (int i = 0; i < kWidth && column + i < p.columns; ++i)
        p.y[row * p.y_stride + column + i] = p.bias ? sum[i] + p.bias[column + i] : sum[i];
}

// Writes a vector's columns of one row.
QWIRE_INLINE void put(const Output& p, int row, int column, Floats sum) {
    if (p.columns < kPanel) return put_some(p, row, column, sum);
    if (p.bias) sum += load<Floats>(p.bias + column);
    float* to = p.y + row * p.y_stride + column;
    p.past_caches ? store_past_caches(to, sum) : store(to, sum);
}

}  // namespace qwire
