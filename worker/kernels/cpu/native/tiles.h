// AMX's tiles, as all products use them: 0 to 3 hold sums, 4 and 5 rows, 6 and 7 weights.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace qwire {

// For products of 16 rows, 16 columns and `k` values of K, up to 64.
struct alignas(64) TileConfig {
    explicit constexpr TileConfig(int k)
        : row_bytes{64, 64, 64, 64, uint16_t(k), uint16_t(k), 64, 64},
          rows{16, 16, 16, 16, 16, 16, uint8_t(k / 4), uint8_t(k / 4)} {}

    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

}  // namespace qwire
