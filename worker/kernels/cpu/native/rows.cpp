#include "rows.h"

#include <algorithm>
#include <cmath>

#include "pool.h"

namespace qwire {
namespace {

// Elements that are worth another thread: some 2 µs of work against the 1 µs that sharing it out costs.
constexpr int64_t kShare = 8192;

// Calls f(row) for each row, on all threads where that pays.
template <class F>
void for_rows(int64_t rows, int64_t elements_a_row, F&& f) {
    const int64_t total = rows * elements_a_row;
    const int64_t tasks = std::clamp<int64_t>(total / kShare, 1, std::min<int64_t>(rows, 8 * num_threads()));
    parallel_for(tasks, [&](int64_t task) {
        for (int64_t row = rows * task / tasks; row < rows * (task + 1) / tasks; ++row) f(row);
    });
}

// Asks for floats of the next row, some at a time while this one is worked on: those of a long prompt have left the caches,
// and a processor by itself looks ahead too little. Beyond the last row it asks in vain.
QWIRE_INLINE void prefetch_floats(const float* from, int64_t count) { prefetch(from, count * int64_t(sizeof(float))); }

// Asks for a vector's slot, which stores would wait for one after the other.
template <class T>
QWIRE_INLINE void prefetch_slot(const void* pool, const float* scales, int64_t dim, int64_t slot) {
    prefetch(static_cast<const T*>(pool) + slot * dim, dim * int64_t(sizeof(T)));
    if constexpr (kScaled<T>) prefetch_floats(scales + slot, 1);
}

// The first `count` floats of a vector, zeros after them.
QWIRE_INLINE f32v load_part(const float* from, int64_t count) {
    f32v x{};
    std::memcpy(&x, from, size_t(count) * sizeof(float));
    return x;
}

QWIRE_INLINE void store_part(float* to, f32v x, int64_t count) { std::memcpy(to, &x, size_t(count) * sizeof(float)); }

// Calls f(i, load, store) for each vector of a row, the last of them perhaps not whole.
template <class F>
QWIRE_INLINE void for_vectors(int64_t size, F&& f) {
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes)
        f(i, [](const float* from) { return load<f32v>(from); }, [](float* to, f32v x) { store(to, x); });
    if (i < size) {
        f(i, [&](const float* from) { return load_part(from, size - i); },
          [&](float* to, f32v x) { store_part(to, x, size - i); });
    }
}

QWIRE_INLINE float inverse_rms(f32v squares, int64_t size, float eps) {
    return 1.0f / std::sqrt(sum(squares) / float(size) + eps);
}

void norm_row(const float* x, const float* residual, const float* weight, float eps, float* out, float* sums,
              int64_t size) {
    f32v squares[4] = {};
    int64_t i = 0;
    if (residual) {
        for (; i + 4 * kLanes <= size; i += 4 * kLanes) {
            for (int j = 0; j < 4; ++j) {
                const f32v y = load<f32v>(x + i + j * kLanes) + load<f32v>(residual + i + j * kLanes);
                store(sums + i + j * kLanes, y);
                squares[j] = fma(y, y, squares[j]);
            }
        }
        for_vectors(size - i, [&](int64_t k, auto load_some, auto store_some) {
            const f32v y = load_some(x + i + k) + load_some(residual + i + k);
            store_some(sums + i + k, y);
            squares[0] = fma(y, y, squares[0]);
        });
        x = sums;
    } else {
        for (; i + 4 * kLanes <= size; i += 4 * kLanes) {
            for (int j = 0; j < 4; ++j) {
                const f32v y = load<f32v>(x + i + j * kLanes);
                squares[j] = fma(y, y, squares[j]);
            }
        }
        for_vectors(size - i, [&](int64_t k, auto load_some, auto) {
            const f32v y = load_some(x + i + k);
            squares[0] = fma(y, y, squares[0]);
        });
    }
    const f32v scale = splat(inverse_rms((squares[0] + squares[1]) + (squares[2] + squares[3]), size, eps));
    for_vectors(size, [&](int64_t k, auto load_some, auto store_some) {
        store_some(out + k, load_some(x + k) * scale * load_some(weight + k));
    });
}

// head [dim] to out, normed where a weight is given and rotated: element i pairs with i + dim / 2.
QWIRE_INLINE void turn(const float* head, const float* weight, float eps, const float* cos, const float* sin,
                       float* out, int64_t dim) {
    alignas(64) float normed[kMaxHeadDim];
    if (weight) {
        norm_row(head, nullptr, weight, eps, normed, nullptr, dim);
        head = normed;
    }
    const int64_t half = dim / 2;
    for_vectors(half, [&](int64_t i, auto load_some, auto store_some) {
        const f32v first = load_some(head + i), second = load_some(head + half + i);
        const f32v c = load_some(cos + i), s = load_some(sin + i);
        store_some(out + i, fma(first, c, -(second * s)));
        store_some(out + half + i, fma(second, c, first * s));
    });
}

// Writes a vector to its slot, and its scale where elements are codes: the largest element takes the greatest code. A vector
// with a not-a-number or an infinity gets a scale of not-a-number, so that it does not go unseen.
template <class T>
QWIRE_INLINE void keep(const float* from, int64_t dim, void* pool, float* scales, int64_t slot) {
    T* to = static_cast<T*>(pool) + slot * dim;
    if constexpr (kScaled<T>) {
        f32v most{}, poison{};
        for (int64_t d = 0; d < dim; d += kLanes) {
            const f32v x = load<f32v>(from + d);
            most = max(most, max(x, -x));
            poison = fma(x, f32v{}, poison);
        }
        constexpr float kMost = kMostCode<T>;
        const float scale = max(most) / kMost + sum(poison);
        const f32v factor = splat(scale >= 0x1p-126f ? 1.0f / scale : 0.0f);  // a smaller one has no finite inverse
        scales[slot] = scale;
        for (int64_t d = 0; d < dim; d += kLanes) {
            const f32v code = load<f32v>(from + d) * factor;
            narrow(to + d, max(splat(-kMost), code < splat(kMost) ? code : splat(kMost)));
        }
    } else {
        for (int64_t d = 0; d < dim; d += kLanes) narrow(to + d, load<f32v>(from + d));
    }
}

template <class T>
void rope_row(const Rotation& r, int64_t row) {
    const int64_t dim = r.head_dim, width = (r.q_heads + 2 * r.kv_heads) * dim;
    const float* heads = r.qkv + row * width;
    const float *cos = r.cos + row * (dim / 2), *sin = r.sin + row * (dim / 2);
    const auto slot = [&](int64_t head) { return head * r.slots_a_head + r.slots[row]; };
    for (int64_t head = 0; head < r.kv_heads && row < r.tokens; ++head) {
        prefetch_slot<T>(r.keys, r.key_scales, dim, slot(head));
        prefetch_slot<T>(r.values, r.value_scales, dim, slot(head));
    }
    for (int64_t head = 0; head < r.q_heads; ++head) {
        prefetch_floats(heads + width + head * dim, dim);
        turn(heads + head * dim, r.q_norm, r.eps, cos, sin, r.out + (row * r.q_heads + head) * dim, dim);
    }
    if (row >= r.tokens) return;
    alignas(64) float key[kMaxHeadDim];
    for (int64_t head = 0; head < r.kv_heads; ++head) {
        turn(heads + (r.q_heads + head) * dim, r.k_norm, r.eps, cos, sin, key, dim);
        const float* value = heads + (r.q_heads + r.kv_heads + head) * dim;
        prefetch_floats(heads + width + (r.q_heads + head) * dim, dim);
        prefetch_floats(value + width, dim);
        keep<T>(key, dim, r.keys, r.key_scales, slot(head));
        keep<T>(value, dim, r.values, r.value_scales, slot(head));
    }
}

}  // namespace

void rms_norm(const float* x, const float* residual, const float* weight, float eps, float* out, float* sums,
              int64_t rows, int64_t size) {
    for_rows(rows, size, [&](int64_t row) {
        const int64_t at = row * size;
        norm_row(x + at, residual ? residual + at : nullptr, weight, eps, out + at, sums + at, size);
    });
}

void rope_and_cache(const Rotation& rotation) {
    with_type(rotation.type, [&](auto type) {
        for_rows(rotation.rows, (rotation.q_heads + 2 * rotation.kv_heads) * rotation.head_dim,
                 [&](int64_t row) { rope_row<decltype(type)>(rotation, row); });
    });
}

void silu_mul(const float* gates, const float* ups, int64_t next, float* out, int64_t count) {
    for_vectors(count, [&](int64_t i, auto load_some, auto store_some) {
        prefetch_floats(gates + next + i, kLanes);
        prefetch_floats(ups + next + i, kLanes);
        const f32v gate = load_some(gates + i);
        store_some(out + i, gate / (splat(1.0f) + exp(-gate)) * load_some(ups + i));
    });
}

}  // namespace qwire
