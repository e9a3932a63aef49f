// Products of many rows with AMX: tiles of 16 rows times 16 columns, 64 values of K at a time, whose sums are those that VNNI
// makes, so that an output's bits are the same however many rows there are.
//
// Two tiles of rows meet a panel's two halves: four tiles of sums, read with two of rows and two of weights. A group of
// 128 along K, over which weights and rows have one scale each, takes one product for int8 and three for fixed point, of
// digits: a = 64 a1 + a0 and w = 64 w1 + w0, all of them of 7 bits, make
//
//   a w = 4096 a1 w1 + 64 ((a1 + a0) (w1 + w0) - a1 w1 - a0 w0) + a0 w0
//
// Sums leave tiles through memory. That takes half as long as their products did (on Emerald Rapids, where a tile's store
// keeps the next product from its unit), and a third of int4's gain was left of it, whose groups are of 32: it has no such
// kernel. The same for sums that are made floats while the next group is being multiplied.
#pragma once

#include <algorithm>
#include <cstring>

#include "linear_formats.h"
#include "pool.h"
#include "tiles.h"

namespace qwire {

constexpr int64_t kPairRows = 2 * kTileRows, kPairSums = kPairRows * kPanel;
// Bytes of rows that meet all panels before the next ones do: they stay in the level-2 cache.
constexpr int64_t kRowBytes = 1200 << 10;
// Groups of weights are kept as tiles read them: [32] floats of scales, then for each digit and 64 values of K the low columns
// and the high ones, [16][16 columns][4 values of K].
constexpr int64_t kStepBytes = 2 * kTileBytes, kDigitBytes = kRowGroup / 64 * kStepBytes, kScaleBytes = kPanel * 4;

// Formats: how many digits, and how many groups at a time stay in the level-1 cache beside rows and sums.
struct Int8Tiles {
    using Packed = Int8;
    static constexpr int kDigits = 1;
    static constexpr int64_t kBlock = 4;
};
struct FixedTiles {
    using Packed = FixedPoint;
    static constexpr int kDigits = kFixedDigits;
    static constexpr int64_t kBlock = 1;
};
template <class T>
constexpr int64_t kGroupBytes = kScaleBytes + T::kDigits * kDigitBytes;

typedef uint8_t Bytes __attribute__((vector_size(64)));
typedef int16_t SignedShorts __attribute__((vector_size(64)));

// Bytes 0 and 2 of each of a's words, 1 and 3 of b's.
QWIRE_INLINE Ints interleave_bytes(Ints a, Ints b) { return (Ints)replace((Shorts)b, (Shorts)a, 0x00ff); }

// Integer sums of one group, [digit][32 rows][32]: `rows` are one or two tiles' (kTiles), [digit][128 / 64][16][64] each,
// `tile_bytes` apart.
template <int kDigits, int kTiles>
void multiply_group(const char* rows, int64_t tile_bytes, const char* weights, int32_t* sums) {
    for (int digit = 0; digit < kDigits; ++digit, sums += kPairSums) {
        _tile_zero(0);
        _tile_zero(1);
        if (kTiles == 2) _tile_zero(2);
        if (kTiles == 2) _tile_zero(3);
        for (int64_t k = 0; k < kRowGroup; k += 64, weights += kStepBytes, rows += kTileBytes) {
            _tile_loadd(6, weights, 64);
            _tile_loadd(4, rows, 64);
            _tile_dpbssd(0, 4, 6);
            _tile_loadd(7, weights + kTileBytes, 64);
            _tile_dpbssd(1, 4, 7);
            if constexpr (kTiles == 2) {
                _tile_loadd(5, rows + tile_bytes, 64);
                _tile_dpbssd(2, 5, 6);
                _tile_dpbssd(3, 5, 7);
            }
        }
        _tile_stored(0, sums, kPanel * 4);
        _tile_stored(1, sums + kWidth, kPanel * 4);
        if constexpr (kTiles == 2) {
            _tile_stored(2, sums + kTileRows * kPanel, kPanel * 4);
            _tile_stored(3, sums + kTileRows * kPanel + kWidth, kPanel * 4);
        }
    }
}

// Adds a group's sums, times their scales, to outputs [32 rows][32].
template <int kDigits>
void add_group(const int32_t* sums, const char* weights, const float* row_scales, int64_t rows, float* outputs) {
    const Floats scales[] = {load<Floats>(weights), load<Floats>(weights + kWidth * 4)};
    for (int64_t row = 0; row < rows; ++row) {
        const Floats row_scale = broadcast(row_scales[row]);
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half, sums += kWidth, outputs += kWidth) {
            Ints sum = load<Ints>(sums);
            if constexpr (kDigits == kFixedDigits) {
                const Ints low = load<Ints>(sums + kPairSums), both = load<Ints>(sums + 2 * kPairSums);
                sum = (((sum << 6) - sum + both - low) << 6) + low;
            }
            const Floats value = __builtin_convertvector(sum, Floats) * row_scale;
            store(outputs, multiply_add(value, scales[half], load<Floats>(outputs)));
        }
    }
}

QWIRE_INLINE void unpack_steps(const Int8& weights, const char* from, char* to) {
#pragma GCC unroll 2
    for (int step = 0; step < Int8::kSteps; ++step, to += 64) {
        Quads low, high;
        weights.load(from, step, 0, low, high);
        constexpr int32_t kSigned = int32_t(0x80808080);  // from w + 128 to w
        store(to, low.bytes ^ kSigned);
        store(to + kTileBytes, high.bytes ^ kSigned);
    }
}

QWIRE_INLINE void unpack_steps(const FixedPoint& weights, const char* from, char* to) {
    // Four values of K, of which the middle ones change places: so do the rows'.
    const auto digits = [](char* to, Ints a, Ints b) __attribute__((always_inline)) {
        const Ints high = interleave_bytes((Ints)((SignedShorts)a >> 6), (Ints)((Shorts)b << 2));
        const Ints low = interleave_bytes(a, b << 8) & 0x3f3f3f3f;
        store(to, high);
        store(to + kDigitBytes, low);
        store(to + 2 * kDigitBytes, (Ints)((Bytes)high + (Bytes)low));
    };
#pragma GCC unroll 4
    for (int step = 0; step < FixedPoint::kSteps; step += 2, to += 64) {
        Halves low[2], high[2];
        weights.load(from, step, 0, low[0], high[0]);
        weights.load(from, step + 1, 0, low[1], high[1]);
        digits(to, low[0].words, low[1].words);
        digits(to + kTileBytes, high[0].words, high[1].words);
    }
}

// Groups as tiles read them, of `size` values of K; what lacks of the last one is zeros.
template <class T>
const char* unpack_tiles(const char* from, int64_t size) {
    using W = typename T::Packed;
    static_assert(W::kGroup == kRowGroup);
    constexpr int64_t kValues = W::kSteps * W::kValues;
    auto* unpacked = static_cast<char*>(scratch(2, ceil_div(size, kRowGroup) * kGroupBytes<T>));
    char* to = unpacked;
    for (int64_t left = size; left > 0; left -= kRowGroup, to += kGroupBytes<T>) {
        if (left < kRowGroup) std::memset(to, 0, size_t(kGroupBytes<T>));
        const W weights(from, 0);
        const Pair scales = W::scales(from, 0);
        store(to, scales.low);
        store(to + kWidth * 4, scales.high);
        from += 64;
        for (int64_t k = 0; k < std::min(left, kRowGroup); k += kValues, from += W::kBytes) {
            for (int64_t i = 0; i < W::kBytes; i += 64) __builtin_prefetch(from + kNear + i, 0, 3);
            unpack_steps(weights, from, to + kScaleBytes + k / 64 * kStepBytes + k % 64 * 16);
        }
    }
    asm volatile("" ::: "memory");  // tiles are loaded behind the compiler's back
    return unpacked;
}

// The panel times the pairs of tiles [first, last).
template <class T>
void multiply_pairs(const Panel& panel, const BlockedRows& rows, int64_t first, int64_t last) {
    const int64_t groups = ceil_div(panel.in, kRowGroup), pairs = last - first;
    const int64_t first_row = first * kPairRows, end_row = std::min(rows.rows, last * kPairRows);
    auto* sums = static_cast<int32_t*>(scratch(1, (T::kDigits + pairs) * kPairSums * 4));
    auto* outputs = reinterpret_cast<float*>(sums + T::kDigits * kPairSums);  // [pair][32 rows][32]
    std::memset(outputs, 0, size_t(pairs * kPairSums * 4));
    static constexpr TileConfig config;
    _tile_loadconfig(&config);
    for (int64_t block = 0; block < groups; block += T::kBlock) {
        const int64_t count = std::min(T::kBlock, groups - block);
        const char* packed = panel.weights + panel_bytes(panel.format, block * kRowGroup);
        // Each pair brings in its share of the block after the next.
        const int64_t bytes = panel_bytes(panel.format, count * kRowGroup), advance = ceil_div(bytes, pairs);
        const char* ahead = packed + 2 * bytes;
        const char* weights = unpack_tiles<T>(packed, std::min(count * kRowGroup, panel.in - block * kRowGroup));
        for (int64_t pair = 0; pair < pairs; ++pair) {
            for (const char* end = ahead + advance; ahead < end; ahead += 64) __builtin_prefetch(ahead, 0, 2);
            const int64_t row = first_row + pair * kPairRows, pair_rows = std::min(kPairRows, end_row - row);
            const char* tiles = rows.values + row / kTileRows * rows.tile_bytes + block * rows.group_bytes;
            const float* row_scales = rows.scales + block * rows.rows + row;
            const auto multiply = pair_rows > kTileRows ? multiply_group<T::kDigits, 2> : multiply_group<T::kDigits, 1>;
            for (int64_t group = 0; group < count; ++group, tiles += rows.group_bytes, row_scales += rows.rows) {
                const char* own = weights + group * kGroupBytes<T>;
                multiply(tiles, rows.tile_bytes, own + kScaleBytes, sums);
                add_group<T::kDigits>(sums, own, row_scales, pair_rows, outputs + pair * kPairSums);
            }
        }
    }
    _tile_release();
    const Output output = output_of(panel, rows.rows);
    for (int64_t row = first_row; row < end_row; ++row, outputs += kPanel)
        for (int half = 0; half < 2; ++half) put(output, int(row), half * kWidth, load<Floats>(outputs + half * kWidth));
    if (output.past_caches) finish_past_caches();
}

inline void panel_product(const Panel& panel, const BlockedRows& rows, int64_t first, int64_t last) {
    const bool fixed = panel.format == Format::kBfloat16;
    fixed ? multiply_pairs<FixedTiles>(panel, rows, first, last) : multiply_pairs<Int8Tiles>(panel, rows, first, last);
}

}  // namespace qwire
