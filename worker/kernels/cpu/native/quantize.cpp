#include "quantize.h"

#include <algorithm>
#include <cstring>

#include "pool.h"

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
    const auto fold = [&](u32v other) __attribute__((always_inline)) { best = best > other ? best : other; };
    fold(__builtin_shuffle(best, u32v{8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7}));
    fold(__builtin_shuffle(best, u32v{4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11}));
    fold(__builtin_shuffle(best, u32v{2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13}));
    fold(__builtin_shuffle(best, u32v{1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14}));
    return best[0];
}

// Adds neighbours: lane i is the sum of lanes 2i and 2i + 1 of a and b, one behind the other.
QWIRE_INLINE i32v pair_sums(i32v a, i32v b) {
    return __builtin_shuffle(a, b, i32v{0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30}) +
           __builtin_shuffle(a, b, i32v{1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31});
}

// Lane i is the sum of all lanes of x[i]: far fewer shuffles than 16 sums one by one.
QWIRE_INLINE i32v totals(i32v (&x)[kLanes]) {
    for (int width = kLanes; width > 1; width /= 2)
        for (int i = 0; i < width / 2; ++i) x[i] = pair_sums(x[2 * i], x[2 * i + 1]);
    return x[0];
}

// Stores 16 values as the activations of `dot`. Only the low bits of each lane count.
QWIRE_INLINE void store_values(int32_t* to, i32v x) {
#if defined(__AVX512VNNI__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8((__m512i)x));
#else
    typedef int16_t s16v __attribute__((vector_size(32)));
    const s16v narrow = __builtin_convertvector(x, s16v);
    store(to, __builtin_shuffle(narrow, s16v{0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15}));
#endif
}

}  // namespace

int64_t QuantizedRows::bytes(int64_t rows, int64_t size) {
    const int64_t chunks = chunks_of(size);
    return line(rows * chunks * kChunkWords * 4) + line(rows * chunks * 4) +
           2 * line(rows * groups_of(size) * 4);
}

QuantizedRows::QuantizedRows(void* memory, int64_t rows, int64_t size)
    : tiles(rows, kIntTile), size(size), chunks(chunks_of(size)), groups(groups_of(size)) {
    auto* at = static_cast<char*>(memory);
    values_ = reinterpret_cast<int32_t*>(at);
    at += line(rows * chunks * kChunkWords * 4);
    int8_starts_ = reinterpret_cast<int32_t*>(at);
    at += line(rows * groups * 4);
    sums_ = reinterpret_cast<int32_t*>(at);
    at += line(rows * chunks * 4);
    scales_ = reinterpret_cast<float*>(at);
}

void QuantizedRows::quantize(int64_t row, const float* from) const {
    // Tile sizes differ by one at most: the quotient is the tile or the one before it.
    int64_t tile = row * tiles.count / tiles.rows;
    while (tiles.first(tile + 1) <= row) ++tile;
    const int64_t height = tiles.size(tile), index = row - tiles.first(tile);
    int32_t* values = values_ + (tiles.first(tile) * chunks + index) * kChunkWords;
    int32_t* starts = int8_starts_ + tiles.first(tile) * groups + index;
    int32_t* sums = sums_ + tiles.first(tile) * chunks + index;
    float* scales = scales_ + tiles.first(tile) * groups + index;

    const f32v magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, ties to even
    // Stores a group's scale and returns its inverse.
    const auto scale = [&](int64_t group) __attribute__((always_inline)) {
        const int64_t first = group * kRowGroup;
        const float absmax = __builtin_bit_cast(float, greatest(from + first, std::min(kRowGroup, size - first)));
        const float scale = absmax / 127.0f;
        scales[group * height] = scale;
        // Below the least normal number the inverse would be infinite: such a group counts as zero.
        return splat(scale < 1.17549435e-38f ? 0.0f : 127.0f / absmax);
    };
    // Rounds a chunk, stores it, and returns the sum of its halves.
    const auto round = [&](int64_t chunk, const float* at, f32v inverse) __attribute__((always_inline)) {
        const i32v low = (i32v)fma(load<f32v>(at), inverse, magic);
        const i32v high = (i32v)fma(load<f32v>(at + kLanes), inverse, magic);
        int32_t* to = values + chunk * height * kChunkWords;
        store_values(to, low);
        store_values(to + kChunkWords / 2, high);
        return (low - (i32v)magic) + (high - (i32v)magic);
    };
    // 16 chunks at a time, for their sums.
    for (int64_t first = 0; first < chunks; first += kLanes) {
        const int64_t count = std::min<int64_t>(chunks - first, kLanes), whole = std::min(count, size / kChunk - first);
        constexpr int64_t kPerGroup = kRowGroup / kChunk;
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
        int32_t lanes[kLanes];
        store(lanes, totals(halves));
        for (int64_t i = 0; i < count; ++i) sums[(first + i) * height] = lanes[i];
        for (int64_t i = 0; i < count; i += kPerGroup) {
            int32_t group = 0;
            for (int64_t j = 0; j < kPerGroup; ++j) group += lanes[i + j];
            starts[(first + i) / kPerGroup * height] = -128 * group;
        }
    }
}

void quantize_rows(const QuantizedRows& to, const float* x, int64_t stride) {
    constexpr int64_t kRowsPerTask = 4;  // fewer would cost more to share out than to do
    const int64_t rows = to.tiles.rows;
    parallel_for((rows + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task) {
        const int64_t first = task * kRowsPerTask;
        for (int64_t row = first; row < std::min(rows, first + kRowsPerTask); ++row) to.quantize(row, x + row * stride);
    });
}

}  // namespace qwire
