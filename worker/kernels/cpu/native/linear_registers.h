// Products for many registers, or for none to speak of: a tile's sums run over all of K in registers.
#pragma once

#include <algorithm>
#include <array>
#include <type_traits>
#include <utility>

#include "linear_formats.h"
#include "pool.h"

namespace qwire {

// Tiles of rows whose sums stay in registers beside two vectors of weights.
constexpr int kFloatTile = kRegisters == 32 ? 14 : 6;
// Up to this many rows, the float sums of integer products do too.
constexpr int kRegisterTile = kRegisters == 32 ? 7 : 2;
constexpr int64_t kMostRows = INT64_MAX;  // at a time
// Weights that stream past are asked for kFar ahead, into the level-2 cache; what lies there, and floats, so many bytes
// ahead into the level-1 cache. Doing both for integers cost 3 to 10% of one row on Zen 5.
constexpr int64_t kNear = 768;

// One panel times one tile of rows.
struct Product : Output {
    const char* panel;
    int64_t chunks;         // of K
    const void* rows;       // [chunk][tile rows][kChunk]: floats, QuantizedRows::values or fixed-point values
    const int32_t* starts;  // int8 and int4 only: QuantizedRows::int8_starts or int4_starts
    const float* scales;    // integer only
    // Integer only: [tile rows][32] that a block of K leaves to the next one, and room for as many.
    float *sums, *room;
    bool first, last;  // of the blocks
    char* unpacked;  // where kUnpacking leaves weights, as Unpacked has them
    // Where it doesn't stream, prefetching goes on at `ahead`, `advance` bytes for each chunk of K.
    const char* ahead;
    int64_t advance;
};

// One tile of all rows streams: its weights are prefetched at the pace at which they are read, spread among the steps. With
// several that would take load slots that the rows need: each prefetches a part of the next panel, a chunk at a time.
QWIRE_INLINE const char* prefetch_chunk(const Product& p, const char* ahead) {
    const char* end = ahead + p.advance;
    for (; ahead < end; ahead += 64) __builtin_prefetch(ahead, 0, 2);
    return end;
}

template <class W, bool kStreams, int R>
void float_product(const Product& p) {
    for (int pass = 0; pass < kPasses; ++pass) {
        const char *at = p.panel, *ahead = p.ahead;
        const float* rows = static_cast<const float*>(p.rows);
        Floats sums[R][2] = {};
        for (int64_t chunk = 0; chunk < p.chunks; ++chunk, rows += R * kChunk) {
            if (!kStreams) ahead = prefetch_chunk(p, ahead);
#pragma GCC unroll 2
            for (int k = 0; k < kChunk; ++k) {
                const Pair weights = W::widen(at, pass);
                for (int i = 0; i < W::kStep; i += 64) {
                    __builtin_prefetch(at + kNear + i, 0, 3);
                    if (kStreams) __builtin_prefetch(at + kFar + i, 0, 2);
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

// Float sums of a tile, two vectors a row, with room in memory for them: where they begin if they are `kept` from the block
// before, and where they go for the next one.
template <int R>
struct SumsInRegisters {
    Floats sums[R][2] = {};
    float* memory;
    QWIRE_INLINE SumsInRegisters(float* memory, bool kept) : memory(memory) {
        if (!kept) return;
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
            for (int half = 0; half < 2; ++half) sums[r][half] = load<Floats>(memory + (2 * r + half) * kWidth);
    }
    QWIRE_INLINE Floats get(int row, int half) const { return sums[row][half]; }
    QWIRE_INLINE void set(int row, int half, Floats sum) { sums[row][half] = sum; }
    QWIRE_INLINE void keep() const {
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
            for (int half = 0; half < 2; ++half) store(memory + (2 * r + half) * kWidth, sums[r][half]);
    }
};

template <int R>
struct SumsInMemory {
    float* memory;
    QWIRE_INLINE SumsInMemory(float* memory, bool kept) : memory(memory) {
        for (int i = 0; i < 2 * R && !kept; ++i) store(memory + i * kWidth, Floats{});
    }
    QWIRE_INLINE Floats get(int row, int half) const { return load<Floats>(memory + (2 * row + half) * kWidth); }
    QWIRE_INLINE void set(int row, int half, Floats sum) { store(memory + (2 * row + half) * kWidth, sum); }
    QWIRE_INLINE void keep() const {}
};

// Cache lines of what is loaded at once that come before a step's share of them.
template <class W>
constexpr int64_t lines(int64_t step) {
    return W::kBytes / 64 * step / W::kSteps;
}

// Sums are of integers within a group, and of floats over the groups: times their weights' and their rows' scales. Groups
// that share their rows' scales are first added up times their weights' alone.
template <class W, bool kStreams, int R>
void integer_product(const Product& p) {
    constexpr bool kInRegisters = R <= kRegisterTile, kShare = W::kGroup < kRowGroup;
    constexpr int64_t kChunks = W::kGroup / kChunk, kWords = kChunk / W::kValues * W::kWords;
    for (int pass = 0; pass < kPasses; ++pass) {
        const char *at = p.panel, *ahead = p.ahead;
        const int32_t *rows = static_cast<const int32_t*>(p.rows), *starts = p.starts;
        using Shared = std::conditional_t<kInRegisters, SumsInRegisters<R>, SumsInMemory<R>>;  // unless kShare, unused
        using Own = std::conditional_t<kInRegisters && !kShare, SumsInRegisters<R>, SumsInMemory<R>>;
        [[maybe_unused]] char* unpacked = p.unpacked;
        Shared shared(p.room, false);
        Own own(p.sums + pass * R * 2 * kWidth, !p.first);
        for (int64_t left = p.chunks; left > 0; left -= kChunks, starts += R) {
            const char* group = at;
            const int64_t chunks_before = p.chunks - left;
            const float* row_scales = p.scales + chunks_before / (kRowGroup / kChunk) * R;
            at += 64;
            Ints sums[R][2];
            const W weights(group, pass);
            if constexpr (kUnpacking<W>) {
                store(unpacked, load<Ints>(group));
                unpacked += 64;
            }
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) sums[r][0] = sums[r][1] = W::kStarts ? broadcast(starts[r]) : Ints{};
            __builtin_prefetch(group + (kStreams ? kFar : kNear), 0, kStreams ? 2 : 3);
            for (int64_t chunk = 0; chunk < kChunks && chunk < left; ++chunk, rows += R * kWords) {
                if (!kStreams) ahead = prefetch_chunk(p, ahead);
                for (int k = 0; k < kChunk / W::kValues; k += W::kSteps, at += W::kBytes) {
#pragma GCC unroll 8
                    for (int step = 0; step < W::kSteps; ++step) {
                        typename W::Weights low, high;
                        weights.load(at, step, pass, low, high);
                        if constexpr (kUnpacking<W>) {
                            store(unpacked, low);
                            store(unpacked + 64, high);
                            unpacked += 128;
                        }
                        for (int64_t i = lines<W>(step); i < lines<W>(step + 1); ++i)
                            __builtin_prefetch(at + (kStreams ? kFar : kNear) + i * 64, 0, kStreams ? 2 : 3);
                        // Else g++ puts all prefetches in one place, and stores sums a second time for the next group.
                        asm volatile("" ::: "memory");
#pragma GCC unroll 16
                        for (int r = 0; r < R; ++r) {
                            const int32_t* x = rows + r * kWords + (k + step) * W::kWords;
                            sums[r][0] = dot(sums[r][0], low, x);
                            sums[r][1] = dot(sums[r][1], high, x);
                        }
                    }
                }
            }
            const Pair scales = W::scales(group, pass);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                const Floats low = __builtin_convertvector(sums[r][0], Floats);
                const Floats high = __builtin_convertvector(sums[r][1], Floats);
                if constexpr (kShare) {
                    shared.set(r, 0, multiply_add(low, scales.low, shared.get(r, 0)));
                    shared.set(r, 1, multiply_add(high, scales.high, shared.get(r, 1)));
                } else {
                    const Floats scale = broadcast(row_scales[r]);
                    own.set(r, 0, multiply_add(low * scale, scales.low, own.get(r, 0)));
                    own.set(r, 1, multiply_add(high * scale, scales.high, own.get(r, 1)));
                }
            }
            if (!kShare || ((chunks_before + kChunks) % (kRowGroup / kChunk) && left > kChunks)) continue;
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                const Floats scale = broadcast(row_scales[r]);
                for (int half = 0; half < 2; ++half) {
                    own.set(r, half, multiply_add(shared.get(r, half), scale, own.get(r, half)));
                    shared.set(r, half, Floats{});
                }
            }
        }
        if (!p.last) {
            own.keep();
            continue;
        }
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            put(p, r, pass * kWidth, own.get(r, 0) * W::kUnit);
            put(p, r, 16 + pass * kWidth, own.get(r, 1) * W::kUnit);
        }
    }
}

using Kernel = void (*)(const Product&);

template <class W, bool kStreams, int... R>
constexpr std::array<Kernel, sizeof...(R)> float_kernels(std::integer_sequence<int, R...>) {
    return {float_product<W, kStreams, R + 1>...};
}

template <class W, bool kStreams, int... R>
constexpr std::array<Kernel, sizeof...(R)> integer_kernels(std::integer_sequence<int, R...>) {
    return {integer_product<W, kStreams, R + 1>...};
}

// Which tile meets a panel: the only one, which weights stream past, or the first of several, or another of them. Intel's
// processors unpack with what they multiply with, so that each tile for itself took up to a quarter of the time; unpacking by
// itself, before the first, took a tenth of 16 rows on Zen 4.
enum class Met { kAlone, kFirst, kLater };

template <class W, Met kMet>
struct AsMet {
    using Weights = W;
};
#if defined(__AVX512VNNI__)
template <class W>
struct AsMet<W, Met::kFirst> {
    using Weights = Unpacking<W>;
};
template <class W>
struct AsMet<W, Met::kLater> {
    using Weights = Unpacked<W>;
};

// Up to so many tiles take a block of K that fits in the level-1 cache before the next one: on Emerald Rapids 5 to 12% of 15 to
// 35 rows. More would wait for their sums.
constexpr int64_t kBlockedTiles = 5, kBlockBytes = 8192;
#endif

// By rows of the tile, less one.
template <Met kMet>
const Kernel* kernels(Format format) {
    constexpr bool kStreams = kMet == Met::kAlone;
    using FloatTiles = std::make_integer_sequence<int, kFloatTile>;
    using IntTiles = std::make_integer_sequence<int, kStreams ? kIntTile : kTileOfMany>;
    using Int4Tiles = std::make_integer_sequence<int, kTileOfMany>;
    static constexpr auto float32 = float_kernels<Float32, kStreams>(FloatTiles());
    static constexpr auto float16 = float_kernels<Float16, kStreams>(FloatTiles());
    static constexpr auto int8 = integer_kernels<Int8, kStreams>(IntTiles());
    static constexpr auto int4 = integer_kernels<typename AsMet<Int4, kMet>::Weights, kStreams>(Int4Tiles());
#if defined(__AVX512VNNI__)
    static constexpr auto bfloat16 = integer_kernels<typename AsMet<FixedPoint, kMet>::Weights, kStreams>(IntTiles());
#else
    static constexpr auto bfloat16 = float_kernels<Bfloat16, kStreams>(FloatTiles());
#endif
    switch (format) {
        case Format::kFloat32: return float32.data();
        case Format::kBfloat16: return bfloat16.data();
        case Format::kFloat16: return float16.data();
        case Format::kInt8: return int8.data();
        case Format::kInt4: return int4.data();
    }
    __builtin_unreachable();
}

// The panel times the tiles [first, last).
inline void panel_product(const Panel& panel, const TiledRows& rows, int64_t first, int64_t last) {
    const int64_t count = last - first, chunks = ceil_div(panel.in, kChunk), first_row = rows.tiles.first(first);
    const Kernel* by_rows = count == 1 ? kernels<Met::kAlone>(panel.format) : kernels<Met::kFirst>(panel.format);
    const Kernel* later_by_rows = kernels<Met::kLater>(panel.format);
    int64_t block = chunks;
#if defined(__AVX512VNNI__)
    const bool fixed = panel.format == Format::kBfloat16, unpacks = count > 1 && (fixed || panel.format == Format::kInt4);
    if (unpacks && count <= kBlockedTiles) block = kBlockBytes / (kChunk * kPanel * (fixed ? 2 : 1));
#endif
    const bool blocked = block < chunks;
    const int64_t sums = blocked ? rows.tiles.first(last) - first_row : kIntTile;  // rows of them
    Product p{output_of(panel, rows.tiles.rows)};
#if defined(__AVX512VNNI__)
    if (unpacks) {
        const int64_t size = std::min(block, chunks) * kChunk, group = fixed ? FixedPoint::kGroup : Int4::kGroup;
        p.unpacked = static_cast<char*>(scratch(2, ceil_div(size, group) * 64 + size * kPanel * (fixed ? 2 : 1)));
    }
#endif
    p.room = static_cast<float*>(scratch(1, (kIntTile + sums) * kPanel * int64_t(sizeof(float))));
    for (int64_t chunk = 0; chunk < chunks; chunk += block) {
        p.chunks = std::min(block, chunks - chunk);
        p.first = chunk == 0, p.last = chunk + block >= chunks;
        p.panel = panel.weights + panel_bytes(panel.format, chunk * kChunk);
        const int64_t bytes = panel_bytes(panel.format, p.chunks * kChunk);
        p.advance = ceil_div(bytes, count * p.chunks);
        // With one tile weights stream past; with several the block stays in a cache, and each brings in its share of another.
        const char* ahead = blocked ? p.panel + 2 * bytes : panel.next;
        for (int64_t tile = first; tile < last; ++tile) {
            const int64_t row = rows.tiles.first(tile), size = rows.tiles.size(tile);
            p.ahead = ahead + bytes * (tile - first) / count;
            p.rows = rows.values + row * rows.row_bytes + chunk * size * (rows.row_bytes / chunks);
            if (rows.starts) p.starts = rows.starts + row * rows.row_starts + chunk * size;  // int4's, else chunk is 0
            if (rows.scales) p.scales = rows.scales + row * rows.row_scales + chunk * kChunk / kRowGroup * size;
            p.sums = p.room + (kIntTile + (blocked ? row - first_row : 0)) * kPanel;
            p.y = panel.y + row * panel.y_stride;
            (tile == first ? by_rows : later_by_rows)[size - 1](p);
#if defined(__AVX512VNNI__)
            if (unpacks) p.panel = p.unpacked;
#endif
        }
    }
    if (p.past_caches) finish_past_caches();
}

}  // namespace qwire
