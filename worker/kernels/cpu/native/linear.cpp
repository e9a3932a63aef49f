#include "linear.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "linear_formats.h"
#include "pool.h"
#if defined(__AVX2__) && !defined(__AVX512F__)
#include "linear_avx2.h"
#else
#include "linear_registers.h"
#endif
#if defined(__AMX_INT8__)
#include "linear_amx.h"
#endif

namespace qwire {
namespace {

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

// A product with packed weights, but for its rows.
struct Weights {
    Format format;
    const void* packed;
    int64_t out, in;
    const float* bias;
    float* y;
    int64_t y_stride;
};

// All panels times `count` tiles, or pairs of them, `at_once` at a time.
template <class Rows>
void multiply(const Weights& w, const Rows& rows, int64_t count, int64_t at_once) {
    const auto* weights = static_cast<const char*>(w.packed);
    const int64_t bytes = panel_bytes(w.format, w.in);
    for (int64_t first = 0; first < count; first += at_once) {
        const int64_t last = std::min(count, first + at_once);
        share_panels(ceil_div(w.out, kPanel), [&](int64_t panel, int64_t next) {
            const int64_t column = panel * kPanel;
            panel_product({w.format, weights + panel * bytes, weights + next * bytes, w.in, w.bias ? w.bias + column : nullptr,
                           w.y + column, w.y_stride, int(std::min<int64_t>(kPanel, w.out - column))},
                          rows, first, last);
        });
    }
}

void multiply(const Weights& w, const TiledRows& rows) {
    multiply(w, rows, rows.tiles.count, std::max<int64_t>(1, kMostRows / rows.tiles.size(0)));
}

#if defined(__AMX_INT8__)
// Fewer rows are multiplied faster as they are.
constexpr int64_t kAmxRows = 48;

void linear_amx(const Weights& w, int64_t rows, const FloatRows& x) {
    const bool fixed = w.format == Format::kBfloat16;
    const int digits = fixed ? kFixedDigits : 1;
    const BlockedRows to(scratch(0, BlockedRows::bytes(rows, w.in, digits)), rows, w.in, digits);
    fixed ? fix_rows(to, w.in, x) : quantize_rows(to, w.in, x);
    multiply(w, to, ceil_div(rows, kPairRows), std::max(kLeastPairs, kRowBytes / (2 * to.tile_bytes)));
}
#endif

void linear_floats(const Weights& w, int64_t rows, const FloatRows& x) {
    const int64_t in = w.in;
    const Tiles tiles(rows, kFloatTile);
    const int64_t row_size = ceil_div(in, kChunk) * kChunk;
    const float* tiled = x.x;
    if (rows > 1 || row_size > in || x.gated) {  // else the row is a tile as it stands
        auto* to = static_cast<float*>(scratch(0, rows * row_size * int64_t(sizeof(float))));
        tiled = to;
        parallel_for(tiles.count, [&](int64_t tile) {
            const int64_t height = tiles.size(tile);
            auto* room = static_cast<float*>(scratch(1, x.gated ? in * int64_t(sizeof(float)) : 0));
            for (int64_t r = 0; r < height; ++r) {
                const float* from = x.row(tiles.first(tile) + r, in, room);
                float* row = to + tiles.first(tile) * row_size + r * kChunk;
                for (int64_t k = 0; k < in; k += kChunk) {
                    const int64_t size = in - k < kChunk ? in - k : kChunk;
                    std::memcpy(row + k * height, from + k, size_t(size) * sizeof(float));
                    std::fill(row + k * height + size, row + k * height + kChunk, 0.0f);
                }
            }
        });
    }
    multiply(w, {tiles, reinterpret_cast<const char*>(tiled), row_size * int64_t(sizeof(float)), nullptr, 0, nullptr, 0});
}

void linear_fixed(const Weights& w, int64_t rows, const FloatRows& x) {
    const Tiles tiles = int_tiles(rows);
    const int64_t row_bytes = ceil_div(w.in, kChunk) * kChunk * int64_t(sizeof(int16_t));
    const int64_t groups = ceil_div(w.in, kFixedGroup);
    auto* values = static_cast<char*>(scratch(0, rows * (row_bytes + groups * int64_t(sizeof(float)))));
    auto* scales = reinterpret_cast<float*>(values + rows * row_bytes);
    fix_rows(tiles, w.in, x, reinterpret_cast<int16_t*>(values), scales);
    multiply(w, {tiles, values, row_bytes, nullptr, 0, scales, groups});
}

void linear_quantized(const Weights& w, int64_t rows, const FloatRows& x) {
    const bool wide = w.format == Format::kInt8;
    const QuantizedRows to(scratch(0, QuantizedRows::bytes(rows, w.in)), wide ? int_tiles(rows) : int4_tiles(rows), w.in);
    quantize_rows(to, x);
    TiledRows tiled{to.tiles, reinterpret_cast<const char*>(to.values(0)), to.chunks * kChunkWords * 4,
                    wide ? to.int8_starts(0) : to.int4_starts(0), wide ? to.groups : to.chunks, to.scales(0), to.groups};
#if defined(__AVX2__) && !defined(__AVX512F__)
    if (!wide) {
        tiled.row_bytes = to.chunks * kChunk;
        auto* bytes = static_cast<char*>(scratch(3, rows * tiled.row_bytes));
        constexpr int64_t kAtOnce = 8;  // tiles: fewer are not worth another thread
        parallel_for(ceil_div(to.tiles.count, kAtOnce), [&](int64_t task) {
            const int64_t first = task * kAtOnce, last = std::min(first + kAtOnce, to.tiles.count);
            bytes_of(to.values(first), int64_t(to.values(last) - to.values(first)),
                     bytes + to.tiles.first(first) * tiled.row_bytes);
        });
        tiled.values = bytes;
    }
#endif
    multiply(w, tiled);
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
            return kFixedPoint ? ceil_div(in, kFixedGroup) * 64 + padded / kFixedBlock * kFixedBlockBytes
                               : padded * kPanel * 2;
        case Format::kFloat16: return padded * kPanel * 2;
        case Format::kInt8: return ceil_div(in, kInt8Group) * 64 + padded * kPanel;
        case Format::kInt4: return ceil_div(in, kInt4Group) * 64 + padded * kPanel / 2;
    }
    __builtin_unreachable();
}

int64_t packed_bytes(Format format, int64_t out, int64_t in) { return ceil_div(out, kPanel) * panel_bytes(format, in); }

Pieces panels(Format format, const void* packed, int64_t out, int64_t in) {
    return {static_cast<const char*>(packed), ceil_div(out, kPanel), panel_bytes(format, in)};
}

void linear(Format format, const void* packed, int64_t out, int64_t in, const float* bias, int64_t rows, const FloatRows& x,
            float* y, int64_t y_stride) {
    const Weights w{format, packed, out, in, bias, y, y_stride};
#if defined(__AMX_INT8__)
    const bool floats = format == Format::kFloat32 || format == Format::kFloat16;
    if (rows >= kAmxRows && !floats) return linear_amx(w, rows, x);
#endif
    if (kFixedPoint && format == Format::kBfloat16) return linear_fixed(w, rows, x);
    if (format == Format::kInt8 || format == Format::kInt4) return linear_quantized(w, rows, x);
    linear_floats(w, rows, x);
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
            } else if (kFixedPoint && format == Format::kBfloat16) {
                const char* group = panel + k / kFixedGroup * kFixedGroupBytes;
                const uint32_t word = reinterpret_cast<const uint16_t*>(group)[word_half(column)];
                row[k] = float(fixed_value(panel, column, k)) * widen(Format::kBfloat16, word);
            } else if (format == Format::kBfloat16 || format == Format::kFloat16) {
                const int64_t at = k * kPanel + (format == Format::kBfloat16 ? word_half(column) : column);
                row[k] = widen(format, reinterpret_cast<const uint16_t*>(panel)[at]);
            } else {
                const bool wide = format == Format::kInt8;
                const int64_t size = wide ? kInt8Group : kInt4Group;
                const int64_t step = wide ? kPanel * 4 : kPanel * 2;  // bytes of four values of K
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
