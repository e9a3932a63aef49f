// Rows of activations as signed bytes, in the layout that products with int8 and int4 weights read.
//
// Every 128 values of a row share a scale, absmax / 127, so that outliers cost only their neighbours precision; values are
// rounded to the nearest, ties to even. A row's bytes depend on that row alone. Rows lie in tiles, which a kernel
// holds in registers at once (int_tiles, int4_tiles); a tile is cut along K into chunks of 32 values, [chunk][row][32], so that
// a row's values are written as they come and read side by side.
#pragma once

#include <cstdint>

#include "registers.h"

namespace qwire {

constexpr int kChunk = 32;                                       // values of K
constexpr int kChunkWords = kChunk / 4 * kActivationWords;       // 32-bit words that hold a chunk of one row
constexpr int64_t kInt8Group = 128, kInt4Group = kChunk;         // values of K that share a weight's scale
constexpr int64_t kRowGroup = 128;                               // values of a row that share one

// Rows cut into the fewest tiles of at most `limit`, as even as can be.
struct Tiles {
    Tiles(int64_t rows, int64_t limit) : rows(rows), count((rows + limit - 1) / limit) {}
    int64_t first(int64_t tile) const { return rows * tile / count; }
    int size(int64_t tile) const { return int(first(tile + 1) - first(tile)); }

    int64_t rows, count;
};

// Rows of integer products are one tile if there are up to kIntTile of them, which then read each weight once, else
// tiles of up to kTileOfMany, which is how many keep their float sums in registers too: on Zen 5 a store of 512 bits takes
// a cycle from the products. Rows that meet int4 weights, whose sums become floats four times as often, are such tiles always:
// on Zen 4 8 to 14 rows take 0.9 of the time so.
#if defined(__AVX512VNNI__)
constexpr int kIntTile = 14, kTileOfMany = 7;
#elif defined(__AVX512F__)
constexpr int kIntTile = 12, kTileOfMany = 12;
#elif defined(__AVX2__)
constexpr int kIntTile = 6, kTileOfMany = 6;
#else
constexpr int kIntTile = 4, kTileOfMany = 4;
#endif

inline Tiles int_tiles(int64_t rows) { return {rows, rows <= kIntTile ? kIntTile : kTileOfMany}; }
inline Tiles int4_tiles(int64_t rows) { return {rows, kTileOfMany}; }

// int4 weights are unpacked to w + 128, but for AVX2, whose products take out zero points by the sum.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int32_t kInt4Start = 1;
#else
constexpr int32_t kInt4Start = -128;
#endif

// Rows of floats, `stride` from one to the next: as they lie or, where they are gated, silu(gate) * up of the gates and the
// ups that lie side by side in each.
struct FloatRows {
    const float* x;
    int64_t stride;
    bool gated = false;

    // Values [first, first + count) of a row of `size`, in `room` where they have to be made.
    const float* part(int64_t row, int64_t size, int64_t first, int64_t count, float* room) const;
    const float* row(int64_t row, int64_t size, float* room) const { return part(row, size, 0, size, room); }
};

// A buffer of quantized rows, as the caller's memory holds it.
class QuantizedRows {
   public:
    static int64_t bytes(int64_t rows, int64_t size);

    // `memory`: bytes(tiles.rows, size) of them, 64-byte aligned.
    QuantizedRows(void* memory, const Tiles& tiles, int64_t size);

    // Fills `count` values of a tile's row from the floats that they are of, from the first one of a group on, and to the end
    // of one or of the row. A row that holds NaN or infinity yields no finite product.
    void quantize(int64_t tile, int64_t row, const float* from, int64_t first, int64_t count) const;

    // [chunks][tile rows][kChunkWords]
    const int32_t* values(int64_t tile) const { return values_ + tiles.first(tile) * chunks * kChunkWords; }
    // What a sum starts from so that weights stored as w + 128 count as w: [groups][tile rows].
    const int32_t* int8_starts(int64_t tile) const { return int8_starts_ + tiles.first(tile) * groups; }
    // The same for a chunk and int4 weights, kInt4Start times the sum of its values: [chunks][tile rows].
    const int32_t* int4_starts(int64_t tile) const { return int4_starts_ + tiles.first(tile) * chunks; }
    // [groups][tile rows]
    const float* scales(int64_t tile) const { return scales_ + tiles.first(tile) * groups; }

    const Tiles tiles;
    const int64_t size, chunks, groups;

   private:
    int32_t *values_, *int8_starts_, *int4_starts_;
    float* scales_;
};

// The largest fixed-point value of an activation and the bits of a weight's: 128 products of the largest of both, whose
// magnitude is below 2^kFixedBits, stay below 2^31.
constexpr int kFixedMost = 4095, kFixedBits = 12;
constexpr int64_t kFixedGroup = 128;  // values of K that share a scale, of a weight and of a row
// Products of bytes that one of fixed-point values takes the time of, where there are many rows.
#if defined(__AMX_INT8__)
constexpr int kFixedDigits = 3, kFixedProducts = kFixedDigits;
#elif defined(__AVX512VNNI__)
constexpr int kFixedProducts = 2;
#else
constexpr int kFixedProducts = 1;
#endif

// Rows as fixed-point values, to the nearest, ties to even, in tiles: `values` [chunks][tile
// rows][kChunk], zeros beyond a row's end, and `scales` [groups][tile rows] of each tile, on all threads. A row's values
// depend on that row alone; one that holds NaN or infinity yields no finite product.
void fix_rows(const Tiles& tiles, int64_t size, const FloatRows& x, int16_t* values, float* scales);

// All rows, on all threads.
void quantize_rows(const QuantizedRows& to, const FloatRows& x);

#if defined(__AMX_INT8__)
// Rows as AMX's tiles read them: [tile of 16 rows][group of 128][digit][128 / 64][16][64] bytes. Quantized rows have one digit;
// fixed-point ones have three: of 64 a1 + a0 a1 (-64 to 63), a0 (0 to 63) and their sum (-64 to 126), all of which bytes
// hold; and of every four values the second and the third are in each other's place.
static_assert(kFixedBits == 12 && kFixedMost < 4096);
constexpr int64_t kTileRows = 16, kTileBytes = 1024, kGroupTileBytes = kRowGroup / 64 * kTileBytes;

struct BlockedRows {
    static int64_t bytes(int64_t rows, int64_t size, int digits);

    // `memory`: bytes(rows, size, digits) of them, 64-byte aligned.
    BlockedRows(void* memory, int64_t rows, int64_t size, int digits);

    int64_t rows, tile_bytes, group_bytes;
    char* values;
    float* scales;  // [group][row]
};

// As their namesakes. What no row has is left as it was: it meets zeros, or yields products of no row.
void quantize_rows(const BlockedRows& to, int64_t size, const FloatRows& x);
void fix_rows(const BlockedRows& to, int64_t size, const FloatRows& x);
#endif

}  // namespace qwire
