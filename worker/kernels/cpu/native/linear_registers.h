// Products for many registers, or for none to speak of: a tile's sums run over all of K in registers.
#pragma once

#include <algorithm>
#include <array>
#include <utility>

#include "linear_formats.h"
#include "pool.h"

namespace qwire {

// Tiles of rows whose sums stay in registers beside two vectors of weights.
constexpr int kFloatTile = kRegisters == 32 ? 14 : 6;
// Up to this many rows, the float sums of integer products do too.
constexpr int kRegisterTile = kRegisters == 32 ? 6 : 2;
constexpr int64_t kMostRows = INT64_MAX;  // at a time
// Weights are prefetched twice: kFar ahead into the level-2 cache, then so many bytes ahead into the level-1 cache.
constexpr int64_t kNear = 768;
// Outputs of more bytes go past the caches, which hold no more, when they are read next: on Zen 4 the lines that stores
// brought in first took 5 to 8% of a prefill.
constexpr int64_t kPastCaches = 1 << 20;

// Products of a few tiles with int8 and fixed-point weights go over a block of K, which stays in the level-1 cache, with
// all of them before they go on: 4% of 16 to 28 rows, on Zen 4. int4, less of which is read, loses by it.
constexpr int64_t kBlock = 128, kBlockTiles = 4;
static_assert(kBlock == kInt8Group && kBlock == kRowGroup && kBlock == kFixedGroup);

// One panel, or a block of one, times one tile of rows.
struct Product {
    const char* panel;
    int64_t chunks;         // of K
    bool begins, ends;      // integer only: whether sums begin here, and are done
    const void* rows;       // [chunk][tile rows][kChunk]: floats, QuantizedRows::values or fixed-point values
    const int32_t* starts;  // int8 and int4 only: QuantizedRows::int8_starts or sums
    const float* scales;    // integer only
    float* sums;            // integer only: room for [tile rows][32]
    const float* bias;      // [columns], or null
    float* y;
    int64_t y_stride;
    int columns;  // 32, fewer in the last panel
    bool past_caches;
    // Prefetching goes on at `ahead`, `advance` bytes for each chunk of K.
    const char* ahead;
    int64_t advance;
};

// Tiles of fewer rows are all of their call's rows, so weights stream past and are prefetched at the pace at which they
// are read, spread among the steps. In others that would take load slots that the rows need: there, a chunk at a time.
template <int R, int kLimit>
constexpr bool kStreams = R < kLimit / 2;

QWIRE_INLINE const char* prefetch_chunk(const Product& p, const char* ahead) {
    const char* end = ahead + p.advance;
    for (; ahead < end; ahead += 64) __builtin_prefetch(ahead, 0, 2);
    return end;
}

// The last panel's columns may be fewer than 32.
[[gnu::noinline]] void put_some(const Product& p, int row, int column, Floats sum) {
    for (int i = 0; i < kWidth && column + i < p.columns; ++i)
        p.y[row * p.y_stride + column + i] = p.bias ? sum[i] + p.bias[column + i] : sum[i];
}

// Writes a vector's columns of one row.
QWIRE_INLINE void put(const Product& p, int row, int column, Floats sum) {
    if (p.columns < kPanel) return put_some(p, row, column, sum);
    if (p.bias) sum += load<Floats>(p.bias + column);
    float* to = p.y + row * p.y_stride + column;
    p.past_caches ? store_past_caches(to, sum) : store(to, sum);
}

template <class W, int R>
void float_product(const Product& p) {
    for (int pass = 0; pass < kPasses; ++pass) {
        const char *at = p.panel, *ahead = p.ahead;
        const float* rows = static_cast<const float*>(p.rows);
        Floats sums[R][2] = {};
        for (int64_t chunk = 0; chunk < p.chunks; ++chunk, rows += R * kChunk) {
            if (!kStreams<R, kFloatTile>) ahead = prefetch_chunk(p, ahead);
#pragma GCC unroll 2
            for (int k = 0; k < kChunk; ++k) {
                const Pair weights = W::widen(at, pass);
                for (int i = 0; i < W::kStep; i += 64) {
                    __builtin_prefetch(at + kNear + i, 0, 3);
                    if (kStreams<R, kFloatTile>) __builtin_prefetch(at + kFar + i, 0, 2);
                }
#pragma GCC unroll 16
                for (int r = 0; r < R; ++r) {
                    const Floats x = broadcast(rows[r * kChunk + k]);
                    sums[r][0] = multiply_add(x, weights.low, sums[r][0]);
                    sums[r][1] = multiply_add(x, weights.high, sums[r][1]);
                }
                at += W::kStep;
            }
        }
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            put(p, r, pass * kWidth, sums[r][0]);
            put(p, r, 16 + pass * kWidth, sums[r][1]);
        }
    }
}

template <class W, int R>
void integer_product(const Product& p) {
    constexpr bool kInRegisters = R <= kRegisterTile;
    constexpr int64_t kChunks = W::kGroup / kChunk, kWords = kChunk / W::kValues * W::kWords;
    for (int pass = 0; pass < kPasses; ++pass) {
        const char *at = p.panel, *ahead = p.ahead;
        const int32_t *rows = static_cast<const int32_t*>(p.rows), *starts = p.starts;
        Floats own[kInRegisters ? R : 1][2] = {};
        float* in_memory = p.sums + pass * R * 2 * kWidth;
        if (!kInRegisters && p.begins)
            for (int r = 0; r < 2 * R; ++r) store(in_memory + r * kWidth, Floats{});
        for (int64_t left = p.chunks; left > 0; left -= kChunks, starts += R) {
            const char* group = at;
            const float* row_scales = p.scales + (p.chunks - left) / (kRowGroup / kChunk) * R;
            at += 64;
            Ints sums[R][2];
            const typename W::Zeros zeros(group, pass);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) zeros.start(starts + r, sums[r][0], sums[r][1]);
            __builtin_prefetch(group + kNear, 0, 3);
            if (kStreams<R, kIntTile>) __builtin_prefetch(group + kFar, 0, 2);
            for (int64_t chunk = 0; chunk < kChunks && chunk < left; ++chunk, rows += R * kWords) {
                if (!kStreams<R, kIntTile>) ahead = prefetch_chunk(p, ahead);
#pragma GCC unroll 2
                for (int k = 0; k < kChunk / W::kValues; ++k) {
                    typename W::Weights low, high;
                    W::load(at, pass, low, high);
                    for (int i = 0; i < W::kStep; i += 64) {
                        __builtin_prefetch(at + kNear + i, 0, 3);
                        if (kStreams<R, kIntTile>) __builtin_prefetch(at + kFar + i, 0, 2);
                    }
#pragma GCC unroll 16
                    for (int r = 0; r < R; ++r) {
                        const int32_t* x = rows + r * kWords + k * W::kWords;
                        sums[r][0] = dot(sums[r][0], low, x);
                        sums[r][1] = dot(sums[r][1], high, x);
                    }
                    at += W::kStep;
                }
            }
            const Pair scales = W::scales(group, pass);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                const Floats scale = broadcast(row_scales[r]);
                const Floats low = __builtin_convertvector(sums[r][0], Floats) * scale;
                const Floats high = __builtin_convertvector(sums[r][1], Floats) * scale;
                if (kInRegisters) {
                    own[r][0] = multiply_add(low, scales.low, own[r][0]);
                    own[r][1] = multiply_add(high, scales.high, own[r][1]);
                } else {
                    float* to = in_memory + r * 2 * kWidth;
                    store(to, multiply_add(low, scales.low, load<Floats>(to)));
                    store(to + kWidth, multiply_add(high, scales.high, load<Floats>(to + kWidth)));
                }
            }
        }
        if (!p.ends) continue;
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const float* from = in_memory + r * 2 * kWidth;
            put(p, r, pass * kWidth, (kInRegisters ? own[r][0] : load<Floats>(from)) * W::kUnit);
            put(p, r, 16 + pass * kWidth, (kInRegisters ? own[r][1] : load<Floats>(from + kWidth)) * W::kUnit);
        }
    }
}

using Kernel = void (*)(const Product&);

template <class W, int... R>
constexpr std::array<Kernel, sizeof...(R)> float_kernels(std::integer_sequence<int, R...>) {
    return {float_product<W, R + 1>...};
}

template <class W, int... R>
constexpr std::array<Kernel, sizeof...(R)> integer_kernels(std::integer_sequence<int, R...>) {
    return {integer_product<W, R + 1>...};
}

// By rows of the tile, less one.
const Kernel* kernels(Format format) {
    using FloatTiles = std::make_integer_sequence<int, kFloatTile>;
    using IntTiles = std::make_integer_sequence<int, kIntTile>;
    static constexpr auto float32 = float_kernels<Float32>(FloatTiles());
#if defined(__AVX512VNNI__)
    static constexpr auto bfloat16 = integer_kernels<FixedPoint>(IntTiles());
#else
    static constexpr auto bfloat16 = float_kernels<Bfloat16>(FloatTiles());
#endif
    static constexpr auto float16 = float_kernels<Float16>(FloatTiles());
    static constexpr auto int8 = integer_kernels<Int8>(IntTiles());
    static constexpr auto int4 = integer_kernels<Int4>(IntTiles());
    switch (format) {
        case Format::kFloat32: return float32.data();
        case Format::kBfloat16: return bfloat16.data();
        case Format::kFloat16: return float16.data();
        case Format::kInt8: return int8.data();
        case Format::kInt4: return int4.data();
    }
    __builtin_unreachable();
}

// Sets what is the same for a whole panel.
inline Product product_of(const Panel& panel, int64_t rows) {
    const int64_t row_bytes = panel.y_stride * int64_t(sizeof(float));
    Product p{};
    p.panel = panel.weights;
    p.chunks = ceil_div(panel.in, kChunk);
    p.begins = p.ends = true;
    p.bias = panel.bias;
    p.y_stride = panel.y_stride;
    p.columns = panel.columns;
    p.past_caches = rows * row_bytes > kPastCaches && (uintptr_t(panel.y) | uintptr_t(row_bytes)) % 64 == 0;
    return p;
}

// The panel times the tiles [first, last), block by block.
inline void product_by_blocks(const Panel& panel, const TiledRows& rows, int64_t first, int64_t last, Product p) {
    const Kernel* by_rows = kernels(panel.format);
    const int64_t chunks = p.chunks, bytes = panel_bytes(panel.format, kBlock), count = last - first;
    const int64_t row_bytes = rows.row_bytes / chunks * (kBlock / kChunk);  // of a block
    auto* sums = static_cast<float*>(scratch(1, count * kIntTile * kPanel * int64_t(sizeof(float))));
    for (int64_t block = 0; block * kBlock < panel.in; ++block) {
        p.panel = panel.weights + block * bytes;
        p.chunks = std::min(chunks - block * (kBlock / kChunk), kBlock / kChunk);
        p.begins = block == 0, p.ends = (block + 1) * kBlock >= panel.in;
        p.advance = ceil_div(bytes, count * p.chunks);
        for (int64_t tile = first; tile < last; ++tile) {
            const int64_t row = rows.tiles.first(tile), size = rows.tiles.size(tile);
            p.ahead = p.panel + kFar + bytes * (tile - first) / count;
            p.rows = rows.values + row * rows.row_bytes + block * size * row_bytes;
            if (rows.starts) p.starts = rows.starts + row * rows.row_starts + block * size;
            p.scales = rows.scales + row * rows.row_scales + block * size;
            p.sums = sums + (tile - first) * kIntTile * kPanel;
            p.y = panel.y + row * panel.y_stride;
            by_rows[size - 1](p);
        }
    }
}

// The panel times the tiles [first, last).
inline void panel_product(const Panel& panel, const TiledRows& rows, int64_t first, int64_t last) {
    Product p = product_of(panel, rows.tiles.rows);
    const int64_t count = last - first;
    const bool in_memory = rows.tiles.rows / rows.tiles.count > kRegisterTile;  // sums, of the smallest tile
    if (rows.scales && panel.format != Format::kInt4 && in_memory && count > 1 && count <= kBlockTiles) {
        product_by_blocks(panel, rows, first, last, p);
    } else {
        const Kernel* by_rows = kernels(panel.format);
        const int64_t bytes = panel_bytes(panel.format, panel.in);
        p.sums = static_cast<float*>(scratch(1, kIntTile * kPanel * sizeof(float)));
        for (int64_t tile = first; tile < last; ++tile) {
            const int64_t row = rows.tiles.first(tile);
            // With one tile weights stream past; with several the panel stays in the level-2 cache, and each brings in
            // its share of the next one.
            p.ahead = count == 1 ? p.panel + kFar : panel.next + bytes * (tile - first) / count;
            p.advance = ceil_div(bytes, count * p.chunks);
            p.rows = rows.values + row * rows.row_bytes;
            if (rows.starts) p.starts = rows.starts + row * rows.row_starts;
            if (rows.scales) p.scales = rows.scales + row * rows.row_scales;
            p.y = panel.y + row * panel.y_stride;
            by_rows[rows.tiles.size(tile) - 1](p);
        }
    }
    if (p.past_caches) finish_past_caches();
}

}  // namespace qwire
