#include "linear.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <utility>
#include <vector>

#include "pool.h"
#include "registers.h"

namespace qwire {
namespace {

// Tiles of rows whose sums stay in registers beside two vectors of weights.
constexpr int kFloatTile = kRegisters == 32 ? 14 : 6;
// Up to this many rows, the float sums of integer products do too.
constexpr int kRegisterTile = kRegisters == 32 ? 6 : 2;
// Weights are prefetched twice: into the level-2 cache, then into the level-1 cache. Bytes ahead, by measurement.
constexpr int64_t kFar = 8192, kNear = 768;

// One panel times one tile of rows.
struct Product {
    const char* panel;
    int64_t chunks;         // of K
    const void* rows;       // float: [chunk][tile rows][kChunk]; integer: QuantizedRows::values
    const int32_t* starts;  // integer only: QuantizedRows::int8_starts or sums
    const float* scales;    // integer only: QuantizedRows::scales
    float* sums;            // integer only: room for [tile rows][32]
    const float* bias;      // [columns], or null
    float* y;
    int64_t y_stride;
    int columns;  // 32, fewer in the last panel
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

struct Int8 {
    static constexpr int64_t kGroup = kInt8Group, kStep = 128;  // bytes for four values of K
    static constexpr float kUnit = 1.0f;                        // what a value of 1 stands for, in scales
    static QWIRE_INLINE void load(const char* at, int pass, Quads& low, Quads& high) {
        at += pass * 4 * kWidth;
        low = quads(qwire::load<Ints>(at));
        high = quads(qwire::load<Ints>(at + 64));
    }
    static QWIRE_INLINE Pair scales(const char* group, int pass) { return widen_words(group, pass); }
    struct Zeros {
        QWIRE_INLINE Zeros(const char*, int) {}
        QWIRE_INLINE void start(int32_t from, Ints& low, Ints& high) const { low = high = broadcast(from); }
    };
};

// Values count in sixteenths, so that they can stay in the high half of a byte and zero points be fractions: a weight
// is scale / 16 * (16 q - 72 - 6 zero).
struct Int4 {
    static constexpr int64_t kGroup = kInt4Group, kStep = 64;
    static constexpr float kUnit = 1.0f / 16;
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
        QWIRE_INLINE void start(int32_t sum, Ints& low_start, Ints& high_start) const {
            const Ints base = broadcast(-72 * sum);
            low_start = times(base, low, -6 * sum);
            high_start = times(base, high, -6 * sum);
        }
        // base + zero * factor; the sum of a chunk is at most 32 * 127, so factor fits in 16 bits.
        static QWIRE_INLINE Ints times(Ints base, Ints zero, int32_t factor) {
#if defined(__AVX512VNNI__)
            return (Ints)_mm512_dpwssd_epi32((__m512i)base, (__m512i)zero, _mm512_set1_epi32(factor));
#elif defined(__AVX2__)
            return dot_pairs(base, zero, factor);
#else
            return base + zero * broadcast(factor);
#endif
        }
        Ints low, high;
    };
};

// The last panel's columns may be fewer than 32.
[[gnu::noinline]] void put_some(const Product& p, int row, int column, Floats sum) {
    for (int i = 0; i < kWidth && column + i < p.columns; ++i)
        p.y[row * p.y_stride + column + i] = p.bias ? sum[i] + p.bias[column + i] : sum[i];
}

// Writes a vector's columns of one row.
QWIRE_INLINE void put(const Product& p, int row, int column, Floats sum) {
    if (p.columns < kPanel) return put_some(p, row, column, sum);
    if (p.bias) sum += load<Floats>(p.bias + column);
    store(p.y + row * p.y_stride + column, sum);
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
    constexpr int64_t kChunks = W::kGroup / kChunk;
    for (int pass = 0; pass < kPasses; ++pass) {
        const char *at = p.panel, *ahead = p.ahead;
        const int32_t *rows = static_cast<const int32_t*>(p.rows), *starts = p.starts;
        Floats own[kInRegisters ? R : 1][2] = {};
        if (!kInRegisters)
            for (int r = 0; r < 2 * R; ++r) store(p.sums + r * kWidth, Floats{});
        for (int64_t left = p.chunks; left > 0; left -= kChunks, starts += R) {
            const char* group = at;
            const float* row_scales = p.scales + (p.chunks - left) / (kRowGroup / kChunk) * R;
            at += 64;
            Ints sums[R][2];
            const typename W::Zeros zeros(group, pass);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) zeros.start(starts[r], sums[r][0], sums[r][1]);
            __builtin_prefetch(group + kNear, 0, 3);
            if (kStreams<R, kIntTile>) __builtin_prefetch(group + kFar, 0, 2);
            for (int64_t chunk = 0; chunk < kChunks && chunk < left; ++chunk, rows += R * kChunkWords) {
                if (!kStreams<R, kIntTile>) ahead = prefetch_chunk(p, ahead);
#pragma GCC unroll 2
                for (int k = 0; k < kChunk / 4; ++k) {
                    Quads low, high;
                    W::load(at, pass, low, high);
                    for (int i = 0; i < W::kStep; i += 64) {
                        __builtin_prefetch(at + kNear + i, 0, 3);
                        if (kStreams<R, kIntTile>) __builtin_prefetch(at + kFar + i, 0, 2);
                    }
#pragma GCC unroll 16
                    for (int r = 0; r < R; ++r) {
                        const int32_t* x = rows + r * kChunkWords + k * kActivationWords;
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
                    float* to = p.sums + r * 2 * kWidth;
                    store(to, multiply_add(low, scales.low, load<Floats>(to)));
                    store(to + kWidth, multiply_add(high, scales.high, load<Floats>(to + kWidth)));
                }
            }
        }
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const float* from = p.sums + r * 2 * kWidth;
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
    static constexpr auto bfloat16 = float_kernels<Bfloat16>(FloatTiles());
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

// Calls f(panel, next) for each panel, on all threads; `next` is the panel that this thread likely takes after it.
// Each thread has a run of neighbours, so that prefetching goes on from panel to panel, and takes from the others' runs
// when its own is done.
template <class F>
void share_panels(int64_t panels, F&& f) {
    struct alignas(64) Run {
        std::atomic<int64_t> next;
        int64_t end;
    };
    const int64_t threads = num_threads() < panels ? num_threads() : panels;
    std::vector<Run> runs(static_cast<size_t>(threads));
    for (int64_t i = 0; i < threads; ++i) {
        runs[size_t(i)].next.store(panels * i / threads, std::memory_order_relaxed);
        runs[size_t(i)].end = panels * (i + 1) / threads;
    }
    parallel_for(threads, [&](int64_t own) {
        for (int64_t i = 0; i < threads; ++i) {
            Run& run = runs[size_t((own + i) % threads)];
            for (;;) {
                const int64_t panel = run.next.fetch_add(1, std::memory_order_relaxed);
                if (panel >= run.end) break;
                f(panel, panel + 1 < run.end ? panel + 1 : panel);
            }
        }
    });
}

// All panels times all tiles. `fill(product, tile)` sets what depends on the tile's rows.
template <class Fill>
void multiply(Format format, const void* packed, int64_t out, int64_t in, const float* bias, const Tiles& tiles, float* y,
              int64_t y_stride, Fill&& fill) {
    const Kernel* by_rows = kernels(format);
    const int64_t bytes = panel_bytes(format, in);
    share_panels(ceil_div(out, kPanel), [&](int64_t panel, int64_t next) {
        Product p{};
        p.panel = static_cast<const char*>(packed) + panel * bytes;
        p.chunks = ceil_div(in, kChunk);
        p.bias = bias ? bias + panel * kPanel : nullptr;
        p.y_stride = y_stride;
        p.columns = int(out - panel * kPanel < kPanel ? out - panel * kPanel : kPanel);
        p.sums = static_cast<float*>(scratch(1, kIntTile * kPanel * sizeof(float)));
        for (int64_t tile = 0; tile < tiles.count; ++tile) {
            // With one tile weights stream past; with several the panel stays in the level-2 cache, and each brings in its
            // share of the next one.
            p.ahead = tiles.count == 1 ? p.panel + kFar
                                       : static_cast<const char*>(packed) + next * bytes + bytes * tile / tiles.count;
            p.advance = ceil_div(bytes, tiles.count * p.chunks);
            p.y = y + tiles.first(tile) * y_stride + panel * kPanel;
            fill(p, tile);
            by_rows[tiles.size(tile) - 1](p);
        }
    });
}

void linear_floats(Format format, const void* packed, int64_t out, int64_t in, const float* bias, int64_t rows,
                   const float* x, int64_t x_stride, float* y, int64_t y_stride) {
    const Tiles tiles(rows, kFloatTile);
    const int64_t row_size = ceil_div(in, kChunk) * kChunk;
    const float* tiled = x;
    if (rows > 1 || row_size > in) {  // else the row is a tile as it stands
        auto* to = static_cast<float*>(scratch(0, rows * row_size * int64_t(sizeof(float))));
        tiled = to;
        parallel_for(tiles.count, [&](int64_t tile) {
            const int64_t height = tiles.size(tile);
            for (int64_t r = 0; r < height; ++r) {
                const float* from = x + (tiles.first(tile) + r) * x_stride;
                float* row = to + tiles.first(tile) * row_size + r * kChunk;
                for (int64_t k = 0; k < in; k += kChunk) {
                    const int64_t size = in - k < kChunk ? in - k : kChunk;
                    std::memcpy(row + k * height, from + k, size_t(size) * sizeof(float));
                    std::fill(row + k * height + size, row + k * height + kChunk, 0.0f);
                }
            }
        });
    }
    multiply(format, packed, out, in, bias, tiles, y, y_stride,
             [&](Product& p, int64_t tile) { p.rows = tiled + tiles.first(tile) * row_size; });
}

// Where a panel's 16-bit value of one column stands, among the 32 of a step.
int64_t word_half(int64_t column) { return column % 16 * 2 + column / 16; }

}  // namespace

float widen(Format format, uint32_t bits) {
    if (format == Format::kBfloat16) return __builtin_bit_cast(float, bits << 16);
    char half[2 * kWidth] = {};
    std::memcpy(half, &bits, 2);
    return Float16::widen(half)[0];
}

int64_t panel_bytes(Format format, int64_t in) {
    const int64_t padded = ceil_div(in, kChunk) * kChunk;
    switch (format) {
        case Format::kFloat32: return padded * kPanel * 4;
        case Format::kBfloat16:
        case Format::kFloat16: return padded * kPanel * 2;
        case Format::kInt8: return ceil_div(in, kInt8Group) * 64 + padded * kPanel;
        case Format::kInt4: return ceil_div(in, kInt4Group) * 64 + padded * kPanel / 2;
    }
    __builtin_unreachable();
}

int64_t packed_bytes(Format format, int64_t out, int64_t in) { return ceil_div(out, kPanel) * panel_bytes(format, in); }

void linear(Format format, const void* packed, int64_t out, int64_t in, const float* bias, int64_t rows, const float* x,
            int64_t x_stride, float* y, int64_t y_stride) {
    if (format != Format::kInt8 && format != Format::kInt4) {
        linear_floats(format, packed, out, in, bias, rows, x, x_stride, y, y_stride);
        return;
    }
    const QuantizedRows quantized(scratch(0, QuantizedRows::bytes(rows, in)), rows, in);
    quantize_rows(quantized, x, x_stride);
    linear(format, packed, out, bias, quantized, y, y_stride);
}

void linear(Format format, const void* packed, int64_t out, const float* bias, const QuantizedRows& x, float* y,
            int64_t y_stride) {
    multiply(format, packed, out, x.size, bias, x.tiles, y, y_stride, [&](Product& p, int64_t tile) {
        p.rows = x.values(tile);
        p.starts = format == Format::kInt8 ? x.int8_starts(tile) : x.sums(tile);
        p.scales = x.scales(tile);
    });
}

void embed(Format format, const void* packed, int64_t out, int64_t in, int64_t count, const int64_t* ids, float* y) {
    for (int64_t i = 0; i < count; ++i)
        if (ids[i] < 0 || ids[i] >= out) throw std::out_of_range("embed: an id beyond the vocabulary");
    parallel_for(count, [&](int64_t i) {
        const int64_t column = ids[i] % kPanel;
        const char* panel = static_cast<const char*>(packed) + ids[i] / kPanel * panel_bytes(format, in);
        float* row = y + i * in;
        for (int64_t k = 0; k < in; ++k) {
            if (format == Format::kFloat32) {
                row[k] = reinterpret_cast<const float*>(panel)[k * kPanel + column];
            } else if (format == Format::kBfloat16 || format == Format::kFloat16) {
                const int64_t at = k * kPanel + (format == Format::kBfloat16 ? word_half(column) : column);
                row[k] = widen(format, reinterpret_cast<const uint16_t*>(panel)[at]);
            } else {
                const bool wide = format == Format::kInt8;
                const int64_t size = wide ? kInt8Group : kInt4Group;
                const int64_t step = wide ? Int8::kStep : Int4::kStep;
                const char* group = panel + k / size * (64 + size / 4 * step);
                const uint32_t word = reinterpret_cast<const uint16_t*>(group)[word_half(column)];
                const char* values = group + 64 + k % size / 4 * step;
                if (wide) {
                    const int value = uint8_t(values[column * 4 + k % 4]) - 128;
                    row[k] = float(value) * widen(Format::kBfloat16, word);
                } else {
                    const int value = uint8_t(values[column % 16 * 4 + k % 4]) >> (column / 16 * 4) & 15;
                    const int sixteenths = 16 * value - 72 - 6 * int(word & 15u);
                    row[k] = float(sixteenths) * (widen(Format::kBfloat16, word & 0xfff0u) / 16);
                }
            }
        }
    });
}

}  // namespace qwire
