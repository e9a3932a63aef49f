// y = x W^T + bias: x float32 [rows, in], W [out, in] packed, y float32 [rows, out].
//
// One family of kernels from 1 row, where reading the weights takes all the time, to hundreds, where arithmetic does.
// W is packed into panels of 32 output columns, contiguous along K, so that a panel is one stream of memory and serves
// any number of rows. An output's bits depend on its own row and column: float sums run over K in order, one
// accumulator an output, with FMA where there is one; integer sums are exact within a weight's group and the groups are
// added in order. Rows meet int8 and int4 weights as 8 bits, fixed-point ones as 13, and floats as they are.
//
// Panels, each of 32 columns and contiguous along K; "low" columns are a panel's first 16, "high" ones the other 16:
//
//   float32    [k][32 columns]
//   bfloat16   [k][16 words]: a word holds a high column's value above a low column's, so that shift and mask widen
//              both. Where kFixedPoint says so fixed point of 13 bits, see linear_fixed.h.
//   float16    [k][32 columns]
//   int8       per group of 128: [16 words] of scales, laid out as bfloat16; then [k / 4][32 columns][4], stored as w + 128
//   int4       per group of 32: [16 words] of scales and zero points, laid out as bfloat16, a zero point in the low 4 bits of
//              its scale; then [k / 4][16 columns][4 bytes]: a byte holds a high column's value above a low column's
//
// K is padded with zeros to a multiple of 32, so that inner loops are of fixed length, and columns to a multiple of 32. The
// last group may be shorter than the others.
#pragma once

#include <cstdint>

#include "pool.h"
#include "quantize.h"

namespace qwire {

enum class Format : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2, kInt8 = 3, kInt4 = 4 };
constexpr int kPanel = 32;  // output columns

// The value of a bfloat16 or float16, given its bits.
float widen(Format format, uint32_t bits);

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t panel_bytes(Format format, int64_t in);
int64_t packed_bytes(Format format, int64_t out, int64_t in);
// The weights, as `linear` shares them out.
Pieces panels(Format format, const void* packed, int64_t out, int64_t in);

// Rows [first, first + count) of W into `packed`, which began as zeros. `rows` is [count, in] of `source`'s type, one of
// the three float formats; `format` too, which may differ from it.
void pack_floats(Format format, void* packed, int64_t in, int64_t first, int64_t count, Format source,
                 const void* rows);
// `q` int8 [count, in], `scale` bfloat16 [count, groups of kInt8Group].
void pack_int8(void* packed, int64_t in, int64_t first, int64_t count, const int8_t* q, const uint16_t* scale);
// `q` uint8 [count, (in + 1) / 2], value 2i in the low half of byte i; `scale` bfloat16 and `zero` uint8, both [count,
// groups of kInt4Group]. A weight is scale * (q - (36 + 3 zero) / 8); the low 4 bits of a scale are zero, `zero` is below 16.
void pack_int4(void* packed, int64_t in, int64_t first, int64_t count, const uint8_t* q, const uint16_t* scale,
               const uint8_t* zero);

// `y` has `y_stride` floats from row to row. `bias` may be null.
void linear(Format format, const void* packed, int64_t out, int64_t in, const float* bias, int64_t rows, const FloatRows& x,
            float* y, int64_t y_stride);

// Row ids[i] of W as floats, into y [count, in]. Throws std::out_of_range for an id outside [0, out).
void embed(Format format, const void* packed, int64_t out, int64_t in, int64_t count, const int64_t* ids, float* y);

}  // namespace qwire
