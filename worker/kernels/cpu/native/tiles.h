// AMX's tiles, as all products use them: 0 to 3 hold sums, 4 and 5 rows, 6 and 7 weights.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace qwire {

// All of 16 rows of 64 bytes.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

}  // namespace qwire
