// Causal attention over a paged cache, for prefills, chunks and decodes in one call.
#pragma once

#include <cstdint>

#include "attention_types.h"

namespace qwire {

// One layer's cache: keys and values each [kv_heads, blocks, block_size, head_dim], contiguous; where they are codes,
// their scales are [kv_heads, blocks, block_size].
struct PagedCache {
    const void* keys;
    const void* values;
    const float* key_scales;
    const float* value_scales;
    KvType type;
    int64_t kv_heads, blocks, block_size, head_dim;  // block_size: a power of two; head_dim: a multiple of 16
};

// Rows of the step, chunk after chunk. Chunk c holds positions starts[c] to starts[c] + lengths[c] - 1 of a sequence
// whose block ids begin at tables[table_starts[c]].
struct RaggedChunks {
    const int64_t* starts;
    const int64_t* lengths;
    const int64_t* tables;
    const int64_t* table_starts;
    int64_t count;
};

// queries: rows of [q_heads, head_dim], `query_stride` floats apart; out: [rows, q_heads, head_dim]. A query at
// position p reads positions max(0, p - window + 1) to p; window 0 is none.
void paged_attention(const float* queries, int64_t query_stride, int64_t q_heads, const PagedCache& cache,
                     const RaggedChunks& chunks, int64_t window, float* out);

}  // namespace qwire
