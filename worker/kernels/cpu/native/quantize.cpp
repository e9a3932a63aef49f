#include "quantize.h"

#include <algorithm>
#include <cstring>

#include "pool.h"
#include "rows.h"

namespace qwire {
namespace {

constexpr int64_t chunks_of(int64_t size) { return (size + kChunk - 1) / kChunk; }
constexpr int64_t groups_of(int64_t size) { return (size + kRowGroup - 1) / kRowGroup; }
static_assert(kRowGroup == kInt8Group);  // so one loop makes scales and starts
constexpr int64_t line(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// The greatest magnitude, as bits: so compared, NaN is above infinity and infinity above all numbers.
uint32_t greatest(const float* from, int64_t size) {
    u32v best = {};
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) {
        const u32v bits = load<u32v>(from + i) & 0x7fffffffu;
        best = bits > best ? bits : best;
    }
    if (i < size) {
        float rest[kLanes] = {};
        std::memcpy(rest, from + i, size_t(size - i) * sizeof(float));
        const u32v bits = load<u32v>(rest) & 0x7fffffffu;
        best = bits > best ? bits : best;
    }
    best = fold(best, [](u32v a, u32v b) __attribute__((always_inline)) { return a > b ? a : b; });
    return best[0];
}

// Stores a vector of values as the activations of `dot`. Only the low bits of each lane count.
QWIRE_INLINE void store_values(int32_t* to, i32v x) {
#if defined(__AVX512VNNI__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8((__m512i)x));
#else
    const s16v narrow = __builtin_convertvector(x, s16v);
#if defined(__AVX512F__)
    store(to, __builtin_shuffle(narrow, s16v{0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15}));
#elif defined(__AVX2__)
    store(to, __builtin_shuffle(narrow, s16v{0, 2, 1, 3, 4, 6, 5, 7}));
#else
    store(to, __builtin_shuffle(narrow, s16v{0, 2, 1, 3}));
#endif
#endif
}

constexpr int64_t kPerGroup = kRowGroup / kChunk;

// Quantizes a row. `scales`: of group i at i * stride; `place(chunk)`: where a chunk's values go; `put_sums(first, count,
// vectors)` is given, for up to as many chunks as a vector has lanes, vectors whose lanes add up to their sums.
template <class Place, class PutSums>
QWIRE_INLINE void quantize_row(const float* from, int64_t size, float* scales, int64_t stride, const Place& place,
                               const PutSums& put_sums) {
    const int64_t chunks = chunks_of(size);
    const f32v magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, ties to even
    // Stores a group's scale and returns its inverse.
    const auto scale = [&](int64_t group) __attribute__((always_inline)) {
        const int64_t first = group * kRowGroup;
        const float absmax = __builtin_bit_cast(float, greatest(from + first, std::min(kRowGroup, size - first)));
        const float scale = absmax / 127.0f;
        scales[group * stride] = scale;
        // Below the least normal number the inverse would be infinite: such a group counts as zero.
        return splat(scale < 1.17549435e-38f ? 0.0f : 127.0f / absmax);
    };
    // Rounds a chunk, stores it, and returns the sum of its vectors.
    const auto round = [&](int64_t chunk, const float* at, f32v inverse) __attribute__((always_inline)) {
        int32_t* to = place(chunk);
        i32v total{};
        for (int i = 0; i < kChunk; i += kLanes, to += kChunkWords * kLanes / kChunk) {
            const i32v rounded = (i32v)fma(load<f32v>(at + i), inverse, magic);
            store_values(to, rounded);
            total += rounded - (i32v)magic;
        }
        return total;
    };
    // As many chunks at a time as a vector has lanes, for their sums.
    for (int64_t first = 0; first < chunks; first += kLanes) {
        const int64_t count = std::min<int64_t>(chunks - first, kLanes), whole = std::min(count, size / kChunk - first);
        i32v halves[kLanes];
        f32v inverse = {};
        for (int64_t i = 0; i < whole; ++i) {
            if (i % kPerGroup == 0) inverse = scale((first + i) / kPerGroup);
            halves[i] = round(first + i, from + (first + i) * kChunk, inverse);
        }
        if (whole < count) {
            float rest[kChunk] = {};
            std::memcpy(rest, from + (first + whole) * kChunk, size_t(size % kChunk) * sizeof(float));
            if (whole % kPerGroup == 0) inverse = scale((first + whole) / kPerGroup);
            halves[whole] = round(first + whole, rest, inverse);
        }
        for (int64_t i = count; i < kLanes; ++i) halves[i] = i32v{};
        put_sums(first, count, halves);
    }
}

// Fixes a row's values. `scales` as above; `put(chunk, i, values)` is given vectors of values from i on of a chunk.
template <class Put>
QWIRE_INLINE void fix_row(const float* from, int64_t size, float* scales, int64_t stride, const Put& put) {
    const f32v magic = splat(12582912.0f);
    f32v inverse{};
    for (int64_t k = 0; k < size; k += kChunk) {
        if (k % kFixedGroup == 0) {
            const float absmax = __builtin_bit_cast(float, greatest(from + k, std::min(kFixedGroup, size - k)));
            scales[k / kFixedGroup * stride] = absmax / kFixedMost;
            // Below the least normal number the inverse would be infinite: such a group counts as zero.
            inverse = splat(absmax < 1e-30f ? 0.0f : kFixedMost / absmax);
        }
        float rest[kChunk] = {};
        const float* chunk = from + k;
        if (size - k < kChunk) std::memcpy(rest, chunk, size_t(size - k) * sizeof(float)), chunk = rest;
        for (int i = 0; i < kChunk; i += kLanes)
            put(k / kChunk, i, (i32v)fma(load<f32v>(chunk + i), inverse, magic) - (i32v)magic);
    }
}

}  // namespace

const float* FloatRows::part(int64_t row, int64_t size, int64_t first, int64_t count, float* room) const {
    const float* from = x + row * stride + first;
    if (!gated) return from;
    silu_mul(from, from + size, stride, room, count);
    return room;
}

int64_t QuantizedRows::bytes(int64_t rows, int64_t size) {
    const int64_t chunks = chunks_of(size);
    return line(rows * chunks * kChunkWords * 4) + line(rows * chunks * 4) +
           2 * line(rows * groups_of(size) * 4);
}

QuantizedRows::QuantizedRows(void* memory, const Tiles& tiles, int64_t size)
    : tiles(tiles), size(size), chunks(chunks_of(size)), groups(groups_of(size)) {
    auto* at = static_cast<char*>(memory);
    values_ = reinterpret_cast<int32_t*>(at);
    at += line(tiles.rows * chunks * kChunkWords * 4);
    int8_starts_ = reinterpret_cast<int32_t*>(at);
    at += line(tiles.rows * groups * 4);
    int4_starts_ = reinterpret_cast<int32_t*>(at);
    at += line(tiles.rows * chunks * 4);
    scales_ = reinterpret_cast<float*>(at);
}

void QuantizedRows::quantize(int64_t tile, int64_t row, const float* from, int64_t first, int64_t count) const {
    const int64_t height = tiles.size(tile), index = row - tiles.first(tile);
    const int64_t first_chunk = tiles.first(tile) * chunks + first / kChunk * height;
    const int64_t first_group = tiles.first(tile) * groups + first / kRowGroup * height;
    int32_t* values = values_ + (first_chunk + index) * kChunkWords;
    int32_t *int8_starts = int8_starts_ + first_group + index, *int4_starts = int4_starts_ + first_chunk + index;
    const auto place = [&](int64_t chunk) __attribute__((always_inline)) { return values + chunk * height * kChunkWords; };
    const auto put_sums = [&](int64_t chunk, int64_t some, i32v (&halves)[kLanes]) __attribute__((always_inline)) {
        int32_t lanes[kLanes];
        store(lanes, totals(halves));
        for (int64_t i = 0; i < some; ++i) int4_starts[(chunk + i) * height] = kInt4Start * lanes[i];
        for (int64_t i = 0; i < some; i += kPerGroup) {
            int32_t group = 0;
            for (int64_t j = 0; j < kPerGroup; ++j) group += lanes[i + j];
            int8_starts[(chunk + i) / kPerGroup * height] = -128 * group;
        }
    };
    quantize_row(from, count, scales_ + first_group + index, height, place, put_sums);
}

namespace {

// Values that are worth a task of their own: some 3 µs of work.
constexpr int64_t kShare = 4096;

// Calls f(tile, row, its floats, first, count) for each row of each tile, on all threads: for values [first, first + count) of
// it, whole groups but at its end. Few tiles, where some threads would have one more than others, are shared out by groups:
// threads that took rows of one tile would write to the same cache lines.
template <class F>
void over_rows(const Tiles& tiles, int64_t size, const FloatRows& x, F&& f) {
    static_assert(kFixedGroup == kRowGroup);
    const int64_t groups = groups_of(size), threads = num_threads();
    const bool even = tiles.count % threads == 0 || tiles.count > 2 * threads;
    const int64_t most = even ? 1 : std::min(4 * threads / tiles.count, tiles.size(0) * size / kShare);
    const int64_t parts = std::clamp<int64_t>(most, 1, groups);
    parallel_for(tiles.count * parts, [&](int64_t task) {
        const int64_t tile = task / parts, part = task % parts;
        const int64_t first = groups * part / parts * kRowGroup;
        const int64_t count = std::min(groups * (part + 1) / parts * kRowGroup, size) - first;
        auto* room = static_cast<float*>(scratch(1, x.gated ? count * int64_t(sizeof(float)) : 0));
        for (int64_t row = tiles.first(tile); row < tiles.first(tile + 1); ++row)
            f(tile, row, x.part(row, size, first, count, room), first, count);
    });
}

}  // namespace

void fix_rows(const Tiles& tiles, int64_t size, const FloatRows& x, int16_t* values, float* scales) {
    const int64_t chunks = chunks_of(size), groups = groups_of(size);
    over_rows(tiles, size, x, [&](int64_t tile, int64_t row, const float* from, int64_t first, int64_t count) {
        const int64_t height = tiles.size(tile), index = row - tiles.first(tile);
        int16_t* to = values + (tiles.first(tile) * chunks + first / kChunk * height + index) * kChunk;
        const auto put = [&](int64_t chunk, int i, i32v rounded) __attribute__((always_inline)) {
            store(to + chunk * height * kChunk + i, __builtin_convertvector(rounded, s16v));
        };
        fix_row(from, count, scales + tiles.first(tile) * groups + first / kFixedGroup * height + index, height, put);
    });
}

void quantize_rows(const QuantizedRows& to, const FloatRows& x) {
    over_rows(to.tiles, to.size, x, [&](int64_t tile, int64_t row, const float* from, int64_t first, int64_t count) {
        to.quantize(tile, row, from, first, count);
    });
}

#if defined(__AMX_INT8__)
BlockedRows::BlockedRows(void* memory, int64_t rows, int64_t size, int digits)
    : rows(rows),
      tile_bytes(groups_of(size) * digits * kGroupTileBytes),
      group_bytes(digits * kGroupTileBytes),
      values(static_cast<char*>(memory)),
      scales(reinterpret_cast<float*>(values + (rows + kTileRows - 1) / kTileRows * tile_bytes)) {}

int64_t BlockedRows::bytes(int64_t rows, int64_t size, int digits) {
    return ((rows + kTileRows - 1) / kTileRows * digits * kGroupTileBytes + rows * int64_t(sizeof(float))) * groups_of(size);
}

namespace {

// Calls f(row, its floats, its place in `to`) for each row, on all threads: half a tile's rows at a time.
template <class F>
void over_rows(const BlockedRows& to, int64_t size, const FloatRows& x, F&& f) {
    constexpr int64_t kRows = kTileRows / 2;
    parallel_for((to.rows + kRows - 1) / kRows, [&](int64_t task) {
        auto* room = static_cast<float*>(scratch(1, x.gated ? size * int64_t(sizeof(float)) : 0));
        for (int64_t row = task * kRows; row < std::min(to.rows, (task + 1) * kRows); ++row)
            f(row, x.row(row, size, room), to.values + row / kTileRows * to.tile_bytes + row % kTileRows * 64);
    });
}

// Where a chunk of a row's digit begins, in bytes.
QWIRE_INLINE int64_t chunk_place(const BlockedRows& to, int64_t chunk, int digit) {
    return chunk / kPerGroup * to.group_bytes + digit * kGroupTileBytes + chunk % kPerGroup / 2 * kTileBytes + chunk % 2 * 32;
}

}  // namespace

void quantize_rows(const BlockedRows& to, int64_t size, const FloatRows& x) {
    over_rows(to, size, x, [&](int64_t row, const float* from, char* values) {
        const auto place = [&](int64_t chunk) __attribute__((always_inline)) {
            return reinterpret_cast<int32_t*>(values + chunk_place(to, chunk, 0));
        };
        quantize_row(from, size, to.scales + row, to.rows, place, [](int64_t, int64_t, i32v (&)[kLanes]) {});
    });
}

void fix_rows(const BlockedRows& to, int64_t size, const FloatRows& x) {
    const __m128i order = _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
    over_rows(to, size, x, [&](int64_t row, const float* from, char* values) {
        const auto put = [&](int64_t chunk, int i, i32v fixed) __attribute__((always_inline)) {
            const i32v high = fixed >> 6, low = fixed & 63;
            const i32v digits[kFixedDigits] = {high, low, high + low};
#pragma GCC unroll 3
            for (int digit = 0; digit < kFixedDigits; ++digit) {
                const __m128i bytes = _mm_shuffle_epi8(_mm512_cvtepi32_epi8((__m512i)digits[digit]), order);
                _mm_storeu_si128(reinterpret_cast<__m128i*>(values + chunk_place(to, chunk, digit) + i), bytes);
            }
        };
        fix_row(from, size, to.scales + row, to.rows, put);
    });
}
#endif

}  // namespace qwire
