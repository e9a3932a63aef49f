// What works on rows of activations one by one: norms, rotation with the cache write, the gated activation.
//
// A row's bits depend on the row alone: each sum runs over fixed lanes in a fixed order.
#pragma once

#include <cstdint>

#include "attention_types.h"

namespace qwire {

// sums = x + residual (x itself where residual is null, and then sums isn't written); out = sums / rms(sums) * weight.
// All [rows, size] but weight [size]; sums may be residual or x, out may be x.
void rms_norm(const float* x, const float* residual, const float* weight, float eps, float* out, float* sums,
              int64_t rows, int64_t size);

// qkv: rows of [q_heads + 2 * kv_heads, head_dim]; cos, sin: [rows, head_dim / 2]; q_norm, k_norm: [head_dim] or null.
// Queries go to out [rows, q_heads, head_dim]; keys and values of the first `tokens` rows to the slots (block * block
// size + offset) of a cache [kv_heads, slots_a_head, head_dim].
struct Rotation {
    const float* qkv;
    const float* cos;
    const float* sin;
    const float* q_norm;
    const float* k_norm;
    float eps;
    const int64_t* slots;
    int64_t rows, tokens, q_heads, kv_heads, head_dim, slots_a_head;
    void* keys;
    void* values;
    float* key_scales;  // [kv_heads, slots_a_head] where the cache holds codes
    float* value_scales;
    KvType type;
    float* out;
};
void rope_and_cache(const Rotation& rotation);

// silu(gate) * up of `count` of each to `out`. Those that are read after them lie `next` floats further, to be asked for.
void silu_mul(const float* gates, const float* ups, int64_t next, float* out, int64_t count);

}  // namespace qwire
