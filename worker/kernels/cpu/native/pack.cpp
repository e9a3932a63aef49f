// Weights into panels. Every format's panel is rows of 32-bit words, one or two rows of 16 words a step along K; a word
// holds what some rows of W have at that step. So packing is the same for all: 16 words of each column are gathered
// along K, then 16 columns of them transposed.
#include <algorithm>
#include <cstring>

#include "linear.h"
#include "linear_fixed.h"
#include "pages.h"
#include "pool.h"

namespace qwire {
namespace {

// Sixteen of each, however wide registers are: packing is done once.
typedef float f32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
constexpr int kBlock = 16;  // steps that are packed at a time

QWIRE_INLINE void transpose(u32x16 (&x)[16]) {
    // Each round interleaves rows i and i + 8: after four, word j of row i is word i of row j.
    for (int round = 0; round < 4; ++round) {
        u32x16 y[16];
        for (int i = 0; i < 8; ++i) {
            y[2 * i] = __builtin_shuffle(x[i], x[i + 8], u32x16{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23});
            y[2 * i + 1] =
                __builtin_shuffle(x[i], x[i + 8], u32x16{8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31});
        }
        for (int i = 0; i < 16; ++i) x[i] = y[i];
    }
}

// To the nearest float16, ties to even; NaN stays NaN.
uint16_t narrow_f16(float x) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, x), magnitude = bits & 0x7fffffffu;
    const uint32_t sign = bits >> 16 & 0x8000u;
    if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00u);
    if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00u);
    if (magnitude < 0x38800000u)  // subnormal: adding 2^-1 leaves the rounded multiple of 2^-24 in the low bits
        return uint16_t(sign | (__builtin_bit_cast(uint32_t, __builtin_bit_cast(float, magnitude) + 0.5f) - 0x3f000000u));
    return uint16_t(sign | ((magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13));
}

// Sixteen values of a row of W.
QWIRE_INLINE f32x16 read(Format source, const char* from) {
    if (source == Format::kFloat32) return load<f32x16>(from);
    alignas(64) float wide[16];
    if (source == Format::kBfloat16) {
        for (int i = 0; i < 16; i += kLanes) store(wide + i, widen_bf16(load<u16v>(from + 2 * i)));
    } else {
        const auto halves = load<u16x16>(from);
        for (int i = 0; i < 16; ++i) wide[i] = widen(source, halves[i]);
    }
    return load<f32x16>(wide);
}

QWIRE_INLINE u32x16 read_narrow(Format format, Format source, const char* from) {
    if (format == source) return __builtin_convertvector(load<u16x16>(from), u32x16);
    const f32x16 wide = read(source, from);
    alignas(64) uint16_t narrow[16];
    if (format == Format::kBfloat16) {
        for (int i = 0; i < 16; i += kLanes)
            store(narrow + i, narrow_bf16(load<f32v>(reinterpret_cast<const float*>(&wide) + i)));
    } else {
        for (int i = 0; i < 16; ++i) narrow[i] = narrow_f16(wide[i]);
    }
    return __builtin_convertvector(load<u16x16>(narrow), u32x16);
}

// The rows of W that are being packed, seen from one panel: columns [begin, end) of it, `row_bytes` a row.
struct Rows {
    const char* data;
    int64_t row_bytes;
    int begin, end;

    // `bytes` of a column's row from `offset` on, as a vector; zeros past the row's end and for other columns.
    template <class Convert>
    QWIRE_INLINE u32x16 get(int column, int64_t offset, int64_t bytes, Convert&& convert) const {
        if (column < begin || column >= end) return u32x16{};
        const char* from = data + (column - begin) * row_bytes + offset;
        if (offset + bytes <= row_bytes) return convert(from);
        alignas(64) char rest[64] = {};
        if (offset < row_bytes) std::memcpy(rest, from, size_t(row_bytes - offset));
        return convert(rest);
    }
};

// Stores `words(column, block)` of all 16 columns at the block's steps. Rows of a panel may come in several calls, so
// words are merged into what is there, which began as zeros.
template <class Words>
QWIRE_INLINE void store_block(char* const (&steps)[kBlock], Words&& words) {
    u32x16 block[16];
    for (int column = 0; column < 16; ++column) block[column] = words(column);
    transpose(block);
    for (int i = 0; i < kBlock; ++i) store(steps[i], load<u32x16>(steps[i]) | block[i]);
}

// Calls f(panel's address, Rows) for each panel that rows [first, first + count) fall in, on all threads.
template <class F>
void over_panels(Format format, void* packed, int64_t in, int64_t first, int64_t count, const void* data,
                 int64_t row_bytes, F&& f) {
    const int64_t from = first / kPanel, to = ceil_div(first + count, kPanel), bytes = panel_bytes(format, in);
    parallel_for(to - from, [&](int64_t task) {
        const int64_t start = (from + task) * kPanel, begin = std::max(first, start);
        const int64_t end = std::min(first + count, start + kPanel);
        const Rows rows{static_cast<const char*>(data) + (begin - first) * row_bytes, row_bytes, int(begin - start),
                        int(end - start)};
        char* panel = static_cast<char*>(packed) + (from + task) * bytes;
        touch(panel, bytes);
        f(panel, rows, begin - first);
    });
}

// Addresses of the block's steps; those past the panel's end lead to `waste`.
void find_steps(char* (&steps)[kBlock], char* panel, int64_t first, int64_t count, int64_t step_bytes,
                int64_t steps_per_group, char* waste) {
    for (int64_t i = 0; i < kBlock; ++i) {
        const int64_t step = first + i;
        const int64_t scales = steps_per_group ? (step / steps_per_group + 1) * 64 : 0;
        steps[i] = step < count ? panel + scales + step * step_bytes : waste;
    }
}

// A group's scales, `bits(column, group)` for the columns at hand, into its first 16 words.
template <class Bits>
void store_scales(char* to, const Rows& rows, int64_t group, Bits&& bits) {
    for (int column = rows.begin; column < rows.end; ++column) {
        const uint16_t value = bits(column - rows.begin, group);
        std::memcpy(to + column % 16 * 4 + column / 16 * 2, &value, 2);
    }
}

// As many values of a row of W as a register holds, as bfloat16 has them.
QWIRE_INLINE f32v read_bf16(Format source, const char* from) {
    if (source == Format::kBfloat16) return widen_bf16(load<u16v>(from));
    alignas(64) float wide[kLanes];
    if (source == Format::kFloat32) std::memcpy(wide, from, sizeof wide);
    else for (int i = 0; i < kLanes; ++i) wide[i] = widen(source, load<uint16_t>(from + 2 * i));
    return widen_bf16(narrow_bf16(load<f32v>(wide)));
}

// `count` weights, a multiple of 32, to fixed-point values; returns their scale, bfloat16. Zeros where all are below 1e-30, a
// scale of NaN where one isn't finite.
uint16_t fix(Format source, const char* from, int64_t size, int64_t count, int16_t* values) {
    f32v wide[kFixedGroup / kLanes];
    i32v most{};
    for (int64_t i = 0; i < count / kLanes; ++i) {
        wide[i] = read_bf16(source, from + i * kLanes * size);
        const i32v bits = (i32v)wide[i] & 0x7fffffff;
        most = bits > most ? bits : most;
    }
    most = fold(most, [](i32v a, i32v b) __attribute__((always_inline)) { return a > b ? a : b; });
    const auto top = uint32_t(most[0]);
    const bool zero = top < __builtin_bit_cast(uint32_t, 1e-30f), finite = top < 0x7f800000u;
    // A power of two that takes the largest below 2^kFixedBits, by its exponent alone.
    const uint32_t exponent = finite && !zero ? (top >> 23) - (kFixedBits - 1) : 0;
    const f32v inverse = splat(exponent ? __builtin_bit_cast(float, (254 - exponent) << 23) : 0.0f);
    for (int64_t i = 0; i < count / kLanes; ++i) {
        const f32v rounded = fma(wide[i], inverse, splat(12582912.0f));  // 1.5 * 2^23
        store(values + i * kLanes, __builtin_convertvector((i32v)rounded - 0x4b400000, s16v));
    }
    return finite ? uint16_t(exponent << 7) : uint16_t(0x7fc0);
}

// Two blocks of linear_fixed.h, merged into what is there; `words(column)`: two values of K of each of 16 steps.
template <class Words>
QWIRE_INLINE void store_fixed(char* to, Words&& words) {
    static_assert(kBlock == 2 * kFixedSteps);
    const auto merge = [](char* at, u32x16 x) { store(at, load<u32x16>(at) | x); };
    u32x16 high[16], low[16];  // low: of each value, those of a low column's and a high one's together
    for (int column = 0; column < 16; ++column) {
        const u32x16 a = words(column), b = words(column + 16);
        high[column] = (a >> 5 & 0x00ff00ffu) | (b << 3 & 0xff00ff00u);
        low[column] = (a & 0x001f001fu) | (b & 0x001f001fu) << 5;
    }
    transpose(high);
    transpose(low);
    for (int i = 0; i < 2; ++i, to += kFixedBlockBytes) {
        u32x16 lows[kFixedLows] = {};
        for (int step = 0; step < kFixedSteps; ++step) {
            merge(to + fixed_high(step), high[i * kFixedSteps + step]);
            for (int half = 0; half < 2; ++half) {
                const u32x16 own = low[i * kFixedSteps + step] >> uint32_t(half * 5) & 0x001f001fu;
                const int vector = 2 * step + half;
                if (vector < 3 * kFixedLows) lows[vector / 3] |= own << uint32_t(vector % 3 * 5);
                else for (uint32_t j = 0; j < kFixedLows; ++j) lows[j] |= (own >> j & 0x00010001u) << 15;
            }
        }
        for (int j = 0; j < kFixedLows; ++j) merge(to + fixed_low(j), lows[j]);
    }
}

void pack_fixed(void* packed, int64_t in, int64_t first, int64_t count, Format source, const void* data) {
    const int64_t size = source == Format::kFloat32 ? 4 : 2;
    const auto fix_panel = [&](char* panel, const Rows& rows, int64_t) {
        alignas(64) int16_t values[kPanel][kFixedGroup] = {};
        char rest[kFixedGroup * sizeof(float)] = {};  // a row's last values, and zeros
        for (int64_t group = 0; group * kFixedGroup < in; ++group) {
            const int64_t k = group * kFixedGroup;
            const int64_t padded = ceil_div(std::min(kFixedGroup, in - k), kChunk) * kChunk;
            uint16_t scales[kPanel] = {};
            for (int column = rows.begin; column < rows.end; ++column) {
                const char* from = rows.data + (column - rows.begin) * rows.row_bytes + k * size;
                if (k + padded > in) std::memcpy(rest, from, size_t((in - k) * size)), from = rest;
                scales[column] = fix(source, from, size, padded, values[column]);
            }
            store_scales(panel + group * kFixedGroupBytes, rows, group,
                         [&](int64_t i, int64_t) { return scales[rows.begin + i]; });
            char* block = panel + group * kFixedGroupBytes + 64;
            for (int64_t step = 0; step < padded / 2; step += kBlock, block += kBlock / kFixedSteps * kFixedBlockBytes) {
                const auto words = [&](int column) __attribute__((always_inline)) {
                    return load<u32x16>(values[column] + step * 2);
                };
                store_fixed(block, words);
            }
        }
    };
    over_panels(Format::kBfloat16, packed, in, first, count, data, in * size, fix_panel);
}

}  // namespace

void pack_floats(Format format, void* packed, int64_t in, int64_t first, int64_t count, Format source,
                 const void* data) {
    if (kFixedPoint && format == Format::kBfloat16) return pack_fixed(packed, in, first, count, source, data);
    const int64_t size = source == Format::kFloat32 ? 4 : 2, steps_count = ceil_div(in, kChunk) * kChunk;
    over_panels(format, packed, in, first, count, data, in * size, [&](char* panel, const Rows& rows, int64_t) {
        alignas(64) char waste[128];
        char* steps[kBlock];
        for (int64_t k = 0; k < in; k += kBlock) {
            find_steps(steps, panel, k, steps_count, format == Format::kFloat32 ? 128 : 64, 0, waste);
            const auto narrow = [&](int column) __attribute__((always_inline)) {
                return rows.get(column, k * size, kBlock * size,
                                [&](const char* from) { return read_narrow(format, source, from); });
            };
            const auto wide = [&](int column) __attribute__((always_inline)) {
                return rows.get(column, k * size, kBlock * size,
                                [&](const char* from) { return (u32x16)read(source, from); });
            };
            if (format == Format::kFloat32) {
                store_block(steps, wide);
                for (char*& step : steps) step += 64;
                store_block(steps, [&](int column) { return wide(column + 16); });
            } else if (format == Format::kBfloat16) {
                store_block(steps, [&](int column) { return narrow(column) | narrow(column + 16) << 16; });
            } else {
                store_block(steps, [&](int column) { return narrow(2 * column) | narrow(2 * column + 1) << 16; });
            }
        }
    });
}

void pack_int8(void* packed, int64_t in, int64_t first, int64_t count, const int8_t* q, const uint16_t* scale) {
    const int64_t groups = ceil_div(in, kInt8Group), steps_count = ceil_div(in, kChunk) * (kChunk / 4);
    over_panels(Format::kInt8, packed, in, first, count, q, in, [&](char* panel, const Rows& rows, int64_t row) {
        alignas(64) char waste[128];
        char* steps[kBlock];
        for (int64_t step = 0; step < steps_count; step += kBlock) {
            find_steps(steps, panel, step, steps_count, 128, kInt8Group / 4, waste);
            const auto words = [&](int column) __attribute__((always_inline)) {
                return rows.get(column, step * 4, kBlock * 4,
                                [](const char* from) { return load<u32x16>(from) ^ 0x80808080u; });
            };
            store_block(steps, words);
            for (char*& at : steps) at += 64;
            store_block(steps, [&](int column) { return words(column + 16); });
        }
        for (int64_t group = 0; group < groups; ++group)
            store_scales(panel + group * (64 + kInt8Group * kPanel), rows, group,
                         [&](int64_t i, int64_t g) { return scale[(row + i) * groups + g]; });
    });
}

void pack_int4(void* packed, int64_t in, int64_t first, int64_t count, const uint8_t* q, const uint16_t* scale,
               const uint8_t* zero) {
    const int64_t groups = ceil_div(in, kInt4Group), steps_count = ceil_div(in, kChunk) * (kChunk / 4);
    over_panels(Format::kInt4, packed, in, first, count, q, ceil_div(in, 2), [&](char* panel, const Rows& rows,
                                                                                 int64_t row) {
        alignas(64) char waste[128];
        char* steps[kBlock];
        for (int64_t step = 0; step < steps_count; step += kBlock) {
            find_steps(steps, panel, step, steps_count, 64, kInt4Group / 4, waste);
            const auto words = [&](int column) __attribute__((always_inline)) {
                return rows.get(column, step * 2, kBlock * 2, [](const char* from) {
                    const u32x16 four = __builtin_convertvector(load<u16x16>(from), u32x16);
                    return (four & 0xfu) | (four & 0xf0u) << 4 | (four & 0xf00u) << 8 | (four & 0xf000u) << 12;
                });
            };
            store_block(steps, [&](int column) { return words(column) | words(column + 16) << 4; });
        }
        for (int64_t group = 0; group < groups; ++group)
            store_scales(panel + group * (64 + kInt4Group * kPanel / 2), rows, group, [&](int64_t i, int64_t g) {
                return uint16_t(scale[(row + i) * groups + g] | zero[(row + i) * groups + g]);
            });
    });
}

}  // namespace qwire
