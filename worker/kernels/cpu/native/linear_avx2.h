// Products for AVX2: 16 registers of 8 floats, and no instruction that sums products of bytes into 32 bits.
//
// A panel is cut along K into blocks of 128. A block meets all tiles of rows before the next one does; sums lie in memory
// between blocks, which changes no bit. Few rows take all 32 columns at once, others half of them, then the other half.
// int8, since vpmaddubsw would saturate, and bfloat16's fixed point are multiplied as pairs of 16 bits, twice as many as floats
// at once; int4 as bytes, whose products with signed bytes stay within 16 bits for a group of 32, two lanes of 16 values
// each: 16 * 15 * 127 = 30480.
#pragma once

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "linear_formats.h"
#include "pool.h"

namespace qwire {

constexpr int kTile = 6, kFloatTile = kTile;  // rows whose sums of two vectors stay in registers
constexpr int kBlock = 128;                    // values of K
constexpr int kBlockChunks = kBlock / kChunk;
constexpr int64_t kMostRows = 512;  // at a time, so that their sums stay in the level-2 cache
constexpr int64_t kStreamed = 3;    // tiles up to which weights are prefetched at the pace at which they are read
static_assert(kBlock == kInt8Group && kBlock == kFixedGroup && kBlock == kRowGroup && kChunk == kInt4Group);
static_assert(kIntTile == kTile && kChunkWords == kChunk / 2);

// One block of a panel times one tile of rows.
struct Block {
    const char* scales;     // integer only: the block's, or the first group's
    const char* weights;    // past these scales, or unpacked
    int64_t chunks;         // of K
    const void* rows;       // [chunk][tile rows][kChunk], as floats, pairs or bytes
    const int32_t* starts;  // integer only: [tile rows] of int8 (bfloat16: zeros), [chunk][tile rows] sums of int4
    const float* row_scales;  // integer only: [tile rows]
    float* sums;            // [tile rows][32]
    // With many tiles: each chunk prefetches `advance` bytes of weights from `ahead` on and its part of `next_rows`.
    const char* ahead;
    int64_t advance;
    const char* next_rows;
};

// Pairs of vectors, low and high, that R rows keep in registers at once.
constexpr int pairs(int rows) { return rows * 4 <= 2 * kTile ? 2 : 1; }

// Where two passes go over a block, the first one prefetches. Once, and not to be kept: a step's weights would drive all
// that its small operations, and Python, work on out of the caches. On Zen 4 that is 2 to 5% of a decode step.
template <bool kStreams, int64_t kBytes>
QWIRE_INLINE void prefetch_step(const char* at, int pass) {
    if (!kStreams || pass) return;
    for (int64_t i = 0; i < kBytes; i += 64) __builtin_prefetch(at + kFar + i, 0, 0);
}

template <bool kStreams, int64_t kRowBytes>
QWIRE_INLINE const char* prefetch_chunk(const Block& b, const char* ahead, int64_t chunk, int pass) {
    if (kStreams || pass) return ahead;
    for (int64_t i = 0; i < kRowBytes; i += 64) __builtin_prefetch(b.next_rows + chunk * kRowBytes + i, 0, 3);
    const char* end = ahead + b.advance;
    for (; ahead < end; ahead += 64) __builtin_prefetch(ahead, 0, 2);
    return end;
}

// What a row does with two vectors of weights. In assembly, because g++ 12 would load several rows ahead and put sums, which
// just fit the 16 registers, on the stack.
QWIRE_INLINE void multiply_row(const float& x, Floats low, Floats high, Floats (&sums)[2]) {
    Floats all;
    asm("vbroadcastss %3, %2\n\tvfmadd231ps %4, %2, %0\n\tvfmadd231ps %5, %2, %1"
        : "+x"(sums[0]), "+x"(sums[1]), "=&x"(all)
        : "m"(x), "x"(low), "x"(high));
}

QWIRE_INLINE void multiply_row(const int32_t& x, Ints low, Ints high, Ints (&sums)[2]) {  // pairs of 16 bits
    Ints all, product;
    asm("vpbroadcastd %4, %2\n\tvpmaddwd %5, %2, %3\n\tvpmaddwd %6, %2, %2\n\tvpaddd %3, %0, %0\n\tvpaddd %2, %1, %1"
        : "+x"(sums[0]), "+x"(sums[1]), "=&x"(all), "=&x"(product)
        : "m"(x), "x"(low), "x"(high));
}

QWIRE_INLINE void multiply_row(Ints all, Ints low, Ints high, Ints (&sums)[2]) {
    Ints product, other;
    asm("vpmaddwd %5, %4, %2\n\tvpmaddwd %6, %4, %3\n\tvpaddd %2, %0, %0\n\tvpaddd %3, %1, %1"
        : "+x"(sums[0]), "+x"(sums[1]), "=&x"(product), "=&x"(other)
        : "x"(all), "x"(low), "x"(high));
}

QWIRE_INLINE void multiply_bytes(const int32_t& x, Ints low, Ints high, Ints (&sums)[2]) {  // to sums of 16 bits
    Ints all, product;
    asm("vpbroadcastd %4, %2\n\tvpmaddubsw %2, %5, %3\n\tvpmaddubsw %2, %6, %2\n\tvpaddw %3, %0, %0\n\tvpaddw %2, %1, %1"
        : "+x"(sums[0]), "+x"(sums[1]), "=&x"(all), "=&x"(product)
        : "m"(x), "x"(low), "x"(high));
}

// f(0) to f(N - 1) with constants, so that arrays are registers from the start.
template <int N, class F>
QWIRE_INLINE void unroll(F&& f) {
    [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
        (f(std::integral_constant<int, I>()), ...);
    }
    (std::make_integer_sequence<int, N>());
}
#define QWIRE_EACH(i) [&](auto i) __attribute__((always_inline))

template <bool kStreams, class W, int R>
void float_block(const Block& b) {
    constexpr int P = pairs(R);
    unroll<kPasses / P>(QWIRE_EACH(turn) {
        constexpr int pass = turn * P;
        const char *at = b.weights, *ahead = b.ahead;
        const float* rows = static_cast<const float*>(b.rows);
        Floats sums[R * P][2];
        unroll<R * P>(QWIRE_EACH(i) {
            const float* from = b.sums + i / P * kPanel + (pass + i % P) * kWidth;
            sums[i][0] = load<Floats>(from), sums[i][1] = load<Floats>(from + 16);
        });
        for (int64_t chunk = 0; chunk < b.chunks; ++chunk, rows += R * kChunk) {
            ahead = prefetch_chunk<kStreams, R * kChunk * 4>(b, ahead, chunk, pass);
            for (int k = 0; k < kChunk; k += 2, at += 2 * W::kStep) {
                prefetch_step<kStreams, 2 * W::kStep>(at, pass);
                unroll<2 * P>(QWIRE_EACH(i) {
                    const Pair weights = W::widen(at + i / P * W::kStep, pass + i % P);
                    unroll<R>(QWIRE_EACH(r) {
                        multiply_row(rows[r * kChunk + k + i / P], weights.low, weights.high, sums[r * P + i % P]);
                    });
                });
            }
        }
        unroll<R * P>(QWIRE_EACH(i) {
            float* to = b.sums + i / P * kPanel + (pass + i % P) * kWidth;
            store(to, sums[i][0]), store(to + 16, sums[i][1]);
        });
    });
}

// Adds integer sums, times their row's and their columns' scales, to those in memory.
QWIRE_INLINE void add_scaled(float* to, Ints low, Ints high, float row_scale, const Pair& scales) {
    const Floats scale = broadcast(row_scale);
    store(to, multiply_add(__builtin_convertvector(low, Floats) * scale, scales.low, load<Floats>(to)));
    store(to + 16, multiply_add(__builtin_convertvector(high, Floats) * scale, scales.high, load<Floats>(to + 16)));
}

// Weights as pairs of 16-bit values: steps that are unpacked together, of two values of K each, their bytes, and whether both
// passes of one row share what is loaded of it: 0.97 of bfloat16's time on Zen 3, but 1.1 of int8's.
struct PackedInt8 {  // a step: of four values those that `dot` calls even, or the odd ones
    static constexpr int kSteps = 2;
    static constexpr int64_t kBytes = 128;
    static constexpr bool kShares = false;
    static QWIRE_INLINE void load(const char* at, int step, int pass, Ints& low, Ints& high) {
        low = half(at + pass * 32, step);
        high = half(at + pass * 32 + 64, step);
    }

   private:
    static QWIRE_INLINE Ints half(const char* at, int step) {
        const Ints bytes = qwire::load<Ints>(at);
        return step ? (Ints)_mm256_srli_epi16((__m256i)bytes, 8) : bytes & 0x00ff00ff;
    }
};

struct PackedFixed {
    static constexpr int kSteps = kFixedSteps;
    static constexpr int64_t kBytes = kFixedBlockBytes;
    static constexpr bool kShares = true;
    static QWIRE_INLINE void load(const char* at, int step, int pass, Ints& low, Ints& high) {
        unpack_fixed(at, step, pass, low, high);
    }
};

struct Unpacked {
    static constexpr int kSteps = 2;
    static constexpr int64_t kBytes = 256;
    static constexpr bool kShares = false;
    static QWIRE_INLINE void load(const char* at, int step, int pass, Ints& low, Ints& high) {
        at += step * 128 + pass * 32;
        low = qwire::load<Ints>(at), high = qwire::load<Ints>(at + 64);
    }
};

constexpr int kChunkSteps = kChunk / 2;

// A block of fixed-point values for several tiles, which would each take a third of their time to unpack it.
inline const char* unpack_block(const char* from, int64_t chunks) {
    auto* to = static_cast<char*>(scratch(2, kBlockChunks * kChunkSteps * 128));
    for (int64_t step = 0; step < chunks * kChunkSteps; step += kFixedSteps, from += kFixedBlockBytes) {
        for (int64_t i = 0; i < kFixedBlockBytes; i += 64) __builtin_prefetch(from + kFar + i, 0, 0);
        unroll<kFixedSteps * kPasses>(QWIRE_EACH(i) {
            Ints low, high;
            unpack_fixed(from, i / kPasses, i % kPasses, low, high);
            char* at = to + (step + i / kPasses) * 128 + i % kPasses * 32;
            store(at, low), store(at + 64, high);
        });
    }
    return to;
}

template <class W, bool kStreams, int R>
void pairs_block(const Block& b) {
    constexpr int P = pairs(R);
    unroll<kPasses / P>(QWIRE_EACH(turn) {
        constexpr int pass = turn * P;
        const char *at = b.weights, *ahead = b.ahead;
        const int32_t* rows = static_cast<const int32_t*>(b.rows);
        Ints sums[R * P][2];
        unroll<R * P>(QWIRE_EACH(i) { sums[i][0] = sums[i][1] = broadcast(b.starts[i / P]); });
        prefetch_step<kStreams, 64>(b.scales, pass);
        for (int64_t chunk = 0; chunk < b.chunks; ++chunk, rows += R * kChunkSteps) {
            ahead = prefetch_chunk<kStreams, R * kChunkSteps * 4>(b, ahead, chunk, pass);
            for (int step = 0; step < kChunkSteps; step += W::kSteps, at += W::kBytes) {
                prefetch_step<kStreams, W::kBytes>(at, pass);
                if constexpr (R == 1 && W::kShares) {
                    unroll<W::kSteps>(QWIRE_EACH(i) {
                        const Ints all = broadcast(rows[step + i]);
                        unroll<P>(QWIRE_EACH(p) {
                            Ints low, high;
                            W::load(at, i, pass + p, low, high);
                            multiply_row(all, low, high, sums[p]);
                        });
                    });
                    continue;
                }
                unroll<W::kSteps * P>(QWIRE_EACH(i) {
                    Ints low, high;
                    W::load(at, i / P, pass + i % P, low, high);
                    unroll<R>(QWIRE_EACH(r) {
                        multiply_row(rows[r * kChunkSteps + step + i / P], low, high, sums[r * P + i % P]);
                    });
                });
            }
        }
        unroll<P>(QWIRE_EACH(i) {
            const Pair scales = widen_words(b.scales, pass + i);
            unroll<R>(QWIRE_EACH(r) {
                add_scaled(b.sums + r * kPanel + (pass + i) * kWidth, sums[r * P + i][0], sums[r * P + i][1],
                           b.row_scales[r], scales);
            });
        });
    });
}

struct PackedInt4 {
    static constexpr int64_t kStep = 64, kGroup = 64 + kInt4Group / 4 * kStep;  // bytes from group to group
    static QWIRE_INLINE Ints low(const char* at, int pass) { return load<Ints>(at + pass * 32) & 0x0f0f0f0f; }
    static QWIRE_INLINE Ints high(const char* at, int pass) {
        return (Ints)_mm256_srli_epi16((__m256i)load<Ints>(at + pass * 32), 4) & 0x0f0f0f0f;
    }
};

// 16 times a group's sum, less its zero points' part: pairs of 16-bit sums, the factors that a sum of activations has.
QWIRE_INLINE Ints group_sum(Ints sums, Ints zeros, int32_t activations) {
    const __m256i all = _mm256_madd_epi16((__m256i)sums, _mm256_set1_epi16(16));
    return (Ints)_mm256_sub_epi32(all, _mm256_madd_epi16((__m256i)zeros, _mm256_set1_epi32(activations)));
}

template <bool kStreams, int R>
void int4_block(const Block& b) {
    constexpr int P = pairs(R), kWords = kChunk / 4;
    unroll<kPasses / P>(QWIRE_EACH(turn) {
        constexpr int pass = turn * P;
        const char *at = b.weights, *group = b.scales, *ahead = b.ahead;
        const int32_t *rows = static_cast<const int32_t*>(b.rows), *starts = b.starts;
        for (int64_t chunk = 0; chunk < b.chunks; ++chunk, rows += R * kWords, starts += R) {
            ahead = prefetch_chunk<kStreams, R * kWords * 4>(b, ahead, chunk, pass);
            prefetch_step<kStreams, 64>(group, pass);
            Ints sums[R * P][2] = {};
            for (int k = 0; k < kWords; k += 2) {
                const char* from = at + k * PackedInt4::kStep;
                prefetch_step<kStreams, 2 * PackedInt4::kStep>(from, pass);
                unroll<2 * P>(QWIRE_EACH(i) {
                    const Ints low = PackedInt4::low(from + i / P * PackedInt4::kStep, pass + i % P);
                    const Ints high = PackedInt4::high(from + i / P * PackedInt4::kStep, pass + i % P);
                    unroll<R>(QWIRE_EACH(r) {
                        multiply_bytes(rows[r * kWords + k + i / P], low, high, sums[r * P + i % P]);
                    });
                });
            }
            unroll<P>(QWIRE_EACH(i) {
                const Words both = load<Words>(group + (pass + i) * 32);
                const Pair scales = {(Floats)((both & 0xfff0u) << 16), (Floats)(both & 0xfff00000u)};
                const Ints low = (Ints)((both & 15u) * 6u + 72u), high = (Ints)((both >> 16 & 15u) * 6u + 72u);
                unroll<R>(QWIRE_EACH(r) {
                    add_scaled(b.sums + r * kPanel + (pass + i) * kWidth, group_sum(sums[r * P + i][0], low, starts[r]),
                               group_sum(sums[r * P + i][1], high, starts[r]), b.row_scales[r], scales);
                });
            });
            at += PackedInt4::kGroup, group += PackedInt4::kGroup;
        }
    });
}

using Kernel = void (*)(const Block&);
using Kernels = std::array<Kernel, kTile>;

template <bool kStreams, class W, int... R>
constexpr Kernels float_blocks(std::integer_sequence<int, R...>) {
    return {float_block<kStreams, W, R + 1>...};
}
template <class W, bool kStreams, int... R>
constexpr Kernels pairs_blocks(std::integer_sequence<int, R...>) {
    return {pairs_block<W, kStreams, R + 1>...};
}
template <bool kStreams, int... R>
constexpr Kernels int4_blocks(std::integer_sequence<int, R...>) {
    return {int4_block<kStreams, R + 1>...};
}

// What a panel meets: a tile that its weights stream past, few tiles that they do, or many.
enum class Meets { kTile, kFew, kMany };

// By rows of the tile, less one.
template <Meets meets>
const Kernels& kernels(Format format) {
    using Rows = std::make_integer_sequence<int, kTile>;
    constexpr bool kOne = meets == Meets::kTile, kStreams = meets != Meets::kMany;
    static constexpr auto float32 = float_blocks<kStreams, Float32>(Rows());
    static constexpr auto float16 = float_blocks<kStreams, Float16>(Rows());
    static constexpr auto bfloat16 = pairs_blocks<std::conditional_t<kOne, PackedFixed, Unpacked>, kOne>(Rows());
    static constexpr auto int8 = pairs_blocks<PackedInt8, kStreams>(Rows());
    static constexpr auto int4 = int4_blocks<kStreams>(Rows());
    switch (format) {
        case Format::kFloat32: return float32;
        case Format::kBfloat16: return bfloat16;
        case Format::kFloat16: return float16;
        case Format::kInt8: return int8;
        case Format::kInt4: return int4;
    }
    __builtin_unreachable();
}

// The panel times the tiles [first, last).
inline void panel_product(const Panel& panel, const TiledRows& rows, int64_t first, int64_t last) {
    const Tiles& tiles = rows.tiles;
    const Format format = panel.format;
    const bool fixed = format == Format::kBfloat16, integer = fixed || format == Format::kInt8 || format == Format::kInt4;
    const bool unpacks = last - first > 1 && fixed;
    const int64_t first_row = tiles.first(first), count = tiles.first(last) - first_row;
    const int64_t chunks = ceil_div(panel.in, kChunk), chunk_bytes = rows.row_bytes / chunks;
    const int64_t block_bytes = panel_bytes(format, kBlock);
    const Kernels& by_rows = last - first == 1          ? kernels<Meets::kTile>(format)
                             : last - first > kStreamed ? kernels<Meets::kMany>(format)
                                                        : kernels<Meets::kFew>(format);
    static constexpr int32_t kZeros[kTile] = {};
    auto* sums = static_cast<float*>(scratch(1, count * kPanel * int64_t(sizeof(float))));
    std::memset(sums, 0, size_t(count * kPanel) * sizeof(float));
    for (int64_t chunk = 0; chunk < chunks; chunk += kBlockChunks) {
        Block b{};
        b.scales = panel.weights + chunk / kBlockChunks * block_bytes;
        b.weights = b.scales + (integer ? 64 : 0);
        b.chunks = std::min<int64_t>(kBlockChunks, chunks - chunk);
        // What is read next, while this block meets its tiles.
        const char* ahead = chunk + kBlockChunks < chunks ? b.scales + block_bytes : panel.next;
        b.advance = ceil_div(block_bytes, (last - first) * b.chunks);
        if (unpacks) b.weights = unpack_block(b.weights, b.chunks);
        for (int64_t tile = first; tile < last; ++tile) {
            const int64_t row = tiles.first(tile), height = tiles.size(tile);
            const char* values = rows.values + row * rows.row_bytes + chunk * height * chunk_bytes;
            const int64_t next_chunk = chunk + kBlockChunks < chunks ? chunk + kBlockChunks : 0;
            b.rows = values;
            b.next_rows = tile + 1 < last ? values + height * rows.row_bytes
                                          : rows.values + first_row * rows.row_bytes +
                                                next_chunk * tiles.size(first) * chunk_bytes;
            if (integer) {
                const int64_t block = chunk / kBlockChunks;
                const int64_t of_rows = row * rows.row_starts + height * (format == Format::kInt8 ? block : chunk);
                b.starts = fixed ? kZeros : rows.starts + of_rows;
                b.row_scales = rows.scales + row * rows.row_scales + height * block;
            }
            b.sums = sums + (row - first_row) * kPanel;
            b.ahead = ahead;
            by_rows[size_t(height - 1)](b);
            ahead += b.advance * b.chunks;
        }
    }
    const float unit = format == Format::kInt4 ? 1.0f / 16 : 1.0f;  // what a sum of 1 stands for, in scales
    for (int64_t r = 0; r < count; ++r) {
        const float* from = sums + r * kPanel;
        float* to = panel.y + (first_row + r) * panel.y_stride;
        for (int c = 0; c < panel.columns; c += kWidth) {
            Floats sum = load<Floats>(from + c) * unit;
            if (panel.columns == kPanel) {
                if (panel.bias) sum += load<Floats>(panel.bias + c);
                store(to + c, sum);
            } else {
                for (int i = 0; i < kWidth && c + i < panel.columns; ++i)
                    to[c + i] = panel.bias ? sum[i] + panel.bias[c + i] : sum[i];
            }
        }
    }
}

// Pairs of activations to bytes, in the same order of chunks and rows.
inline void bytes_of(const int32_t* pairs, int64_t count, char* to) {
    for (int64_t i = 0; i < count; i += 16, to += 32) {
        // 16 words hold 8 times even, odd pairs of the same four values.
        const __m256i a = load<__m256i>(pairs + i), b = load<__m256i>(pairs + i + 8);
        const __m256i even = _mm256_castps_si256(_mm256_shuffle_ps((__m256)a, (__m256)b, 0x88));
        const __m256i odd = _mm256_castps_si256(_mm256_shuffle_ps((__m256)a, (__m256)b, 0xdd));
        const __m256i bytes = _mm256_or_si256(_mm256_and_si256(even, _mm256_set1_epi16(0xff)), _mm256_slli_epi16(odd, 8));
        store(to, _mm256_permute4x64_epi64(bytes, 0xd8));
    }
}

}  // namespace qwire
