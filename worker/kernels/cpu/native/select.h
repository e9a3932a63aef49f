// Choosing among the logits of a vocabulary without sorting it.
//
// Order: greater first, equal ones by rising id; -0 equals 0; NaN is above everything (as in torch.argmax and topk).
#pragma once

#include <cstdint>

namespace qwire {

// The first id of each row of [rows, size] in that order.
void argmax(const float* logits, int64_t rows, int64_t size, int64_t* ids);

// The first k ids of each row in that order, and their values: [rows, k] each. 1 <= k <= size.
void top_values(const float* logits, int64_t rows, int64_t size, int64_t k, float* values, int64_t* ids);

// By row, the sum of exp(logit - peak), in tiles of fixed size; peak: the row's greatest.
void total_mass(const float* logits, const float* peaks, int64_t rows, int64_t size, double* masses);

// Divides the chosen rows of [rows, size] by a divisor each, in place.
void divide_rows(float* logits, int64_t size, const int64_t* chosen, const float* divisors, int64_t count);

// The first word of Philox4x32-10 for each candidate: counter (id, position, choice, 0) and key `seed`, the last three
// those of the candidate's row. See worker.kernels.philox.
void philox_words(const int64_t* ids, const int64_t* rows, int64_t count, const int64_t* positions,
                  const int64_t* choices, const uint64_t* seeds, int64_t* words);

}  // namespace qwire
