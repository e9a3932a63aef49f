// Products of many rows with AMX: tiles of 16 rows times 16 columns, 64 values of K at a time, whose sums are those that VNNI
// makes, so that an output's bits are the same however many rows there are.
//
// Two tiles of rows meet a panel's two halves: four tiles of sums, read with two of rows and two of weights. 128 values of K
// share a scale of their row. They take one product with int8 weights, four with int4 ones, whose scales are for 32 each, and
// three in fixed point, of digits: a = 64 a1 + a0 and w = 64 w1 + w0 make
//
//   a w = 4096 a1 w1 + 64 ((a1 + a0) (w1 + w0) - a1 w1 - a0 w0) + a0 w0
//
// of numbers from -64 to 126, which bytes hold.
//
// Sums leave tiles through memory, and a store of one keeps their unit for as long as a product does (on Emerald Rapids). To
// make floats of one group's while the next one is multiplied gained nothing, and cost int4 a third. Fixed-point weights
// that are kept as digits, in 16 bits, gained 0 to 6% with many rows, and one row took half as long again.
#pragma once

#include <algorithm>
#include <cstring>

#include "linear_formats.h"
#include "pool.h"
#include "tiles.h"

namespace qwire {

constexpr int64_t kPairRows = 2 * kTileRows, kPairSums = kPairRows * kPanel;
// Bytes of rows that meet all panels before the next ones do: they stay in the level-2 cache. Fewer pairs would not be worth
// unpacking the weights for: at K = 9728 bfloat16 took twice as long with one at a time as with four.
constexpr int64_t kRowBytes = 1200 << 10, kLeastPairs = 4;
// Formats: digits of a weight, groups of weights in 128 values of K, values of K of a tile, and how many times 128 stay in the
// level-1 cache beside rows and sums. 128 are kept as tiles read them: [32] floats of scales for each group, then for each
// digit and step along K the low columns and the high ones, [kTileK / 4][16 columns][4 values of K].
struct Int8Tiles {
    using Packed = Int8;
    static constexpr int kDigits = 1, kGroups = 1, kTileK = 64;
    static constexpr int64_t kBlock = 4;
};
struct Int4Tiles {
    using Packed = Int4;
    static constexpr int kDigits = 1, kGroups = 4, kTileK = 32;
    static constexpr int64_t kBlock = 4;
};
struct FixedTiles {
    using Packed = FixedPoint;
    static constexpr int kDigits = kFixedDigits, kGroups = 1, kTileK = 64;
    static constexpr int64_t kBlock = 1;
};
template <class T>
constexpr int64_t kHalfBytes = T::kTileK * 16;  // of a step
constexpr int64_t kDigitBytes = kRowGroup * kPanel;
template <class T>
constexpr int64_t kScaleBytes = T::kGroups * kPanel * 4;
template <class T>
constexpr int64_t kGroupBytes = kScaleBytes<T> + T::kDigits * kDigitBytes;

typedef uint8_t Bytes __attribute__((vector_size(64)));

// Bytes 0 and 2 of each of a's words, 1 and 3 of b's.
QWIRE_INLINE Ints interleave_bytes(Ints a, Ints b) { return (Ints)replace((Shorts)b, (Shorts)a, 0x00ff); }

// Integer sums of 128 values of K, [digit or group][32 rows][32]: `rows` are one or two tiles' (kTiles), [digit][128 /
// 64][16][64] each, `tile_bytes` apart.
template <class T, int kTiles>
void multiply_group(const char* rows, int64_t tile_bytes, const char* weights, int32_t* sums) {
    constexpr int kSteps = int(kRowGroup) / T::kGroups / T::kTileK;
    for (int product = 0; product < T::kDigits * T::kGroups; ++product, sums += kPairSums) {
        _tile_zero(0);
        _tile_zero(1);
        if (kTiles == 2) _tile_zero(2);
        if (kTiles == 2) _tile_zero(3);
        for (int step = 0; step < kSteps; ++step, weights += 2 * kHalfBytes<T>) {
            const int64_t k = (product * kSteps + step) * T::kTileK;
            const char* tile = rows + k / 64 * kTileBytes + k % 64;
            _tile_loadd(6, weights, 64);
            _tile_loadd(4, tile, 64);
            _tile_dpbssd(0, 4, 6);
            _tile_loadd(7, weights + kHalfBytes<T>, 64);
            _tile_dpbssd(1, 4, 7);
            if constexpr (kTiles == 2) {
                _tile_loadd(5, tile + tile_bytes, 64);
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

// Adds these sums, times their scales, to outputs [32 rows][32].
template <class T>
void add_group(const int32_t* sums, const char* weights, const float* row_scales, int64_t rows, float* outputs) {
    const auto floats = [](Ints x) __attribute__((always_inline)) { return __builtin_convertvector(x, Floats); };
    Floats scales[T::kGroups][2];
#pragma GCC unroll 4
    for (int group = 0; group < T::kGroups; ++group)
        for (int half = 0; half < 2; ++half) scales[group][half] = load<Floats>(weights + group * 128 + half * 64);
    for (int64_t row = 0; row < rows; ++row) {
        const Floats row_scale = broadcast(row_scales[row]);
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half, sums += kWidth, outputs += kWidth) {
            const Floats before = load<Floats>(outputs);
            if constexpr (T::kGroups > 1) {
                Floats shared{};
#pragma GCC unroll 4
                for (int group = 0; group < T::kGroups; ++group)
                    shared = multiply_add(floats(load<Ints>(sums + group * kPairSums)), scales[group][half], shared);
                store(outputs, multiply_add(shared, row_scale, before));
            } else {
                Ints sum = load<Ints>(sums);
                if constexpr (T::kDigits == kFixedDigits) {
                    const Ints low = load<Ints>(sums + kPairSums), both = load<Ints>(sums + 2 * kPairSums);
                    sum = (((sum << 6) - sum + both - low) << 6) + low;
                }
                store(outputs, multiply_add(floats(sum) * row_scale, scales[0][half], before));
            }
        }
    }
}

template <class T>
QWIRE_INLINE void unpack_steps(const typename T::Packed& weights, const char* from, char* to) {
#pragma GCC unroll 2
    for (int step = 0; step < T::Packed::kSteps; ++step, to += 64) {
        Quads low, high;
        weights.load(from, step, 0, low, high);
        constexpr int32_t kSigned = int32_t(0x80808080);  // from w + 128 to w
        store(to, low.bytes ^ kSigned);
        store(to + kHalfBytes<T>, high.bytes ^ kSigned);
    }
}

template <>
QWIRE_INLINE void unpack_steps<FixedTiles>(const FixedPoint& weights, const char* from, char* to) {
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
        digits(to + kHalfBytes<FixedTiles>, high[0].words, high[1].words);
    }
}

// `size` values of K as tiles read them; what lacks of the last 128 is zeros.
template <class T>
const char* unpack_tiles(const char* from, int64_t size) {
    using W = typename T::Packed;
    static_assert(W::kGroup * T::kGroups == kRowGroup);
    auto* unpacked = static_cast<char*>(scratch(2, ceil_div(size, kRowGroup) * kGroupBytes<T>));
    char* to = unpacked;
    for (int64_t left = size; left > 0; left -= kRowGroup, to += kGroupBytes<T>) {
        if (left < kRowGroup) std::memset(to, 0, size_t(kGroupBytes<T>));
        const int64_t end = std::min(left, kRowGroup);
        for (int64_t group = 0; group < end; group += W::kGroup) {
            const W weights(from, 0);
            const Pair scales = W::scales(from, 0);
            store(to + group / W::kGroup * kPanel * 4, scales.low);
            store(to + group / W::kGroup * kPanel * 4 + 64, scales.high);
            from += 64;
            const int64_t group_end = std::min(group + W::kGroup, end);
            for (int64_t k = group; k < group_end; k += W::kSteps * W::kValues, from += W::kBytes) {
                for (int64_t i = 0; i < W::kBytes; i += 64) __builtin_prefetch(from + kNear + i, 0, 3);
                unpack_steps<T>(weights, from, to + kScaleBytes<T> + k / T::kTileK * 2 * kHalfBytes<T> + k % T::kTileK * 16);
            }
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
    constexpr int64_t kSums = T::kDigits * T::kGroups * kPairSums;
    auto* sums = static_cast<int32_t*>(scratch(1, (kSums + pairs * kPairSums) * 4));
    auto* outputs = reinterpret_cast<float*>(sums + kSums);  // [pair][32 rows][32]
    std::memset(outputs, 0, size_t(pairs * kPairSums * 4));
    static constexpr TileConfig config(T::kTileK);
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
            const auto multiply = pair_rows > kTileRows ? multiply_group<T, 2> : multiply_group<T, 1>;
            for (int64_t group = 0; group < count; ++group, tiles += rows.group_bytes, row_scales += rows.rows) {
                const char* own = weights + group * kGroupBytes<T>;
                multiply(tiles, rows.tile_bytes, own + kScaleBytes<T>, sums);
                add_group<T>(sums, own, row_scales, pair_rows, outputs + pair * kPairSums);
            }
        }
    }
    _tile_release();
    const Output output = output_of(panel, rows.rows);
    for (int64_t row = first_row; row < end_row; ++row, outputs += kPanel)
        for (int half = 0; half < 2; ++half)
            put(output, int(row), half * kWidth, load<Floats>(outputs + half * kWidth) * T::Packed::kUnit);
    if (output.past_caches) finish_past_caches();
}

inline void panel_product(const Panel& panel, const BlockedRows& rows, int64_t first, int64_t last) {
    switch (panel.format) {
        case Format::kBfloat16: return multiply_pairs<FixedTiles>(panel, rows, first, last);
        case Format::kInt8: return multiply_pairs<Int8Tiles>(panel, rows, first, last);
        case Format::kInt4: return multiply_pairs<Int4Tiles>(panel, rows, first, last);
        default: __builtin_unreachable();
    }
}

}  // namespace qwire
