// The products of attention: scores of queries and keys, and values mixed by weights. Each element is one sum in order,
// whatever the number of rows and of columns.
//
// Few rows meet keys that are turned into columns but left as they were read, and values in place; many meet panels of
// both, widened to floats once.
#pragma once

#include <algorithm>
#include <array>
#include <utility>

#include "attention_types.h"

namespace qwire {

constexpr int kTile = 256;  // keys of a tile: rows of scores and weights are as long

// Accumulators of the products below: rows and vectors that fit the registers.
#if defined(__AVX512F__)
constexpr int kRows = 6, kVectors = 4;
#elif defined(__AVX2__)
constexpr int kRows = 6, kVectors = 2;
#else
constexpr int kRows = 3, kVectors = 3;
#endif
constexpr int kPanel = kVectors * kLanes;  // columns of a panel
constexpr int kDepth = 64;                 // rows of a panel, in units, that a product takes at once
// Keys or values, in the order of reading, that are asked for before they are read. Few rows ask for one after the other, as
// they lie, however they read them: on Zen 3 a third of decode attention went where a line of each was asked for in turn.
constexpr int kAhead = 64;

// c [M, N vectors] += a [M, count] * b [count, N vectors], in order of count; `fresh`: c is taken as 0. a and b are
// units of T, c sums of them.
template <class T, int M, int N>
void multiply(int64_t count, const Unit<T>* a, int64_t a_stride, const Unit<T>* b, float* c, int64_t c_stride,
              bool fresh) {
    Units<T> sums[M][N];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n)
            sums[m][n] = fresh ? Units<T>{} : load<Units<T>>(c + m * c_stride + n * kLanes);
    for (int64_t k = 0; k < count; ++k) {
        Units<T> row[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) row[n] = load<Units<T>>(b + k * kPanel + n * kLanes);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            const Units<T> factor = repeat(a[m * a_stride + k]);
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) sums[m][n] = add_products(sums[m][n], factor, row[n]);
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) store(c + m * c_stride + n * kLanes, sums[m][n]);
}

template <class T>
using Multiply = void (*)(int64_t, const Unit<T>*, int64_t, const Unit<T>*, float*, int64_t, bool);

template <class T, size_t... I>
constexpr std::array<Multiply<T>, sizeof...(I)> multiplies(std::index_sequence<I...>) {
    return {multiply<T, I / kVectors + 1, I % kVectors + 1>...};
}

// For M rows and N vectors: kMultiply<T>[(M - 1) * kVectors + N - 1]. What is paired, or isn't, is multiplied alike.
template <class T>
constexpr auto kMultiply = multiplies<std::conditional_t<kPaired<T>, int8_t, float>>(
    std::make_index_sequence<kRows * kVectors>());

// Vectors that `mix` keeps for each of M rows.
constexpr int mix_vectors([[maybe_unused]] int m) {
#if defined(__AVX512F__)
    return m <= 3 ? 8 : 4;
#elif defined(__AVX2__)
    return m <= 1 ? 8 : m <= 3 ? 4 : m <= 4 ? 2 : 1;
#else
    return m <= 2 ? 4 : 2;
#endif
}

// A vector of units of values, the k-th along `values`, from d on.
template <class T>
QWIRE_INLINE Units<T> value_units(const T* const* values, int64_t k, int64_t d) {
    if constexpr (kPaired<T>) return pair_up(values[2 * k] + d, values[2 * k + 1] + d);
    else return widen(values[k] + d);
}

// out [M, N vectors] += weights [M, count] * values [count, N vectors], in order; value k begins at values[k] + d.
// `fresh`: out is taken as 0. Of units, and sums of them. A value and a row of `out` have dim elements.
template <class T, int M, int N>
void mix(int64_t count, const Unit<T>* weights, const T* const* values, int64_t dim, int64_t d, float* out, bool fresh) {
    Units<T> sums[M][N];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) sums[m][n] = fresh ? Units<T>{} : load<Units<T>>(out + m * dim + n * kLanes);
    const int64_t before = d * count * kUnitSize<T>;  // elements of these values that others of `mix_all` read
    const T* const* ahead = values + kAhead + before / dim;
    int64_t at = before % dim;
    for (int64_t k = 0; k < count; ++k) {
        for (int i = 0; i < kUnitSize<T>; ++i) {
            prefetch(*ahead + at, N * kLanes * int64_t(sizeof(T)));
            at += N * kLanes;
            if (at >= dim) at -= dim, ++ahead;
        }
        Units<T> factors[M];
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) factors[m] = repeat(weights[m * kTile + k]);
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
            const Units<T> value = value_units(values, k, d + n * kLanes);
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) sums[m][n] = add_products(sums[m][n], factors[m], value);
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) store(out + m * dim + n * kLanes, sums[m][n]);
}

// As `mix`, for the vectors from d on; `out` is a whole row's.
template <class T, int M, int N = mix_vectors(M)>
void mix_all(int64_t count, const Unit<T>* weights, const T* const* values, int64_t dim, int64_t d, float* out, bool fresh) {
    for (; dim - d >= N * kLanes; d += N * kLanes) mix<T, M, N>(count, weights, values, dim, d, out + d, fresh);
    if constexpr (N > 1) {
        if (d < dim) mix_all<T, M, N / 2>(count, weights, values, dim, d, out, fresh);
    }
}

template <class T>
using Mix = void (*)(int64_t, const Unit<T>*, const T* const*, int64_t, int64_t, float*, bool);

template <class T, size_t... I>
constexpr std::array<Mix<T>, sizeof...(I)> mixes(std::index_sequence<I...>) {
    return {mix_all<T, I + 1>...};
}

template <class T>
constexpr auto kMix = mixes<T>(std::make_index_sequence<kRows>());

// Elements d to d + 4 / sizeof(T) * kLanes - 1 of as many rows as a vector has lanes; 0 for those beyond d + depth - 1.
template <class T>
QWIRE_INLINE void load_rows(const T* const* rows, int64_t d, int64_t depth, u32v (&x)[kLanes]) {
    if (depth * int64_t(sizeof(T)) >= int64_t(sizeof(u32v))) {
#pragma GCC unroll 16
        for (int row = 0; row < kLanes; ++row) x[row] = load<u32v>(rows[row] + d);
        return;
    }
    for (int row = 0; row < kLanes; ++row) {
        x[row] = u32v{};
        std::memcpy(&x[row], rows[row] + d, size_t(depth) * sizeof(T));
    }
}

// Elements d to d + depth - 1 of as many keys as a vector has lanes, as columns of units: to[i * kPanel + key].
template <class T>
void pack_keys(const T* const* keys, int64_t d, int64_t depth, int64_t dim, Unit<T>* to) {
    constexpr int64_t kElements = 4 / sizeof(T), kParts = kElements / kUnitSize<T>, kWide = kElements * kLanes;
    u32v x[kLanes];
    const auto columns = [&](int64_t count) {
        transpose(x);
        for (int64_t j = 0; j < count / kElements; ++j, to += kParts * kPanel) {
            Units<T> parts[kParts];
            unpack(x[j], T{}, parts);
#pragma GCC unroll 4
            for (int64_t i = 0; i < kParts; ++i) store(to + i * kPanel, parts[i]);
        }
    };
    // As many of the rows ahead as these elements are of the rows at hand.
    const auto ask = [&](int64_t begin, int64_t end) {
        for (int64_t key = kLanes * begin / dim; key < kLanes * end / dim; ++key)
            prefetch(keys[key + kAhead], dim * int64_t(sizeof(T)));
    };
    for (const int64_t end = d + depth / kWide * kWide; d < end; d += kWide) {
        ask(d, d + kWide);
        load_rows(keys, d, kWide, x);
        columns(kWide);
    }
    const int64_t left = depth % kWide;
    if (!left) return;
    ask(d, d + left);
    load_rows(keys, d, left, x);
    columns(left);
}

// c [M, N vectors] += a [M, count * parts] * b, in order, as `multiply` does; b [count, N vectors] holds neighbouring rows
// together, as `unpack` takes them apart.
template <class T, int M, int N>
__attribute__((noinline)) void multiply_unpacked(int64_t count, const Unit<T>* a, int64_t a_stride, const u32v* b,
                                                 float* c, bool fresh) {
    constexpr int kParts = 4 / sizeof(T) / kUnitSize<T>;
    Units<T> sums[M][N];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) sums[m][n] = fresh ? Units<T>{} : load<Units<T>>(c + m * kTile + n * kLanes);
    for (; count; --count, a += kParts, b += N) {
#pragma GCC unroll 4
        for (int i = 0; i < kParts; ++i) {
            Units<T> row[N];
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) {
                Units<T> parts[kParts];
                unpack(b[n], T{}, parts);
                row[n] = parts[i];
            }
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) {
                const Units<T> factor = repeat(a[m * a_stride + i]);
#pragma GCC unroll 8
                for (int n = 0; n < N; ++n) sums[m][n] = add_products(sums[m][n], factor, row[n]);
            }
            asm volatile("" ::: "memory");  // b is read anew: kept for the next part, it would drive sums into memory
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) store(c + m * kTile + n * kLanes, sums[m][n]);
}

// scores [M, N vectors] of as many keys as N vectors have lanes: each one sum over d in order. For few rows columns are
// kept as they were read, and widened when they meet the rows.
template <class T, int M, int N>
void score_few(const T* const* keys, int64_t dim, const Unit<T>* queries, float* scores) {
    constexpr int64_t kParts = 4 / sizeof(T), kWide = kParts * kLanes;
    u32v columns[kDepth / kParts][N];
    const T* const* ahead = keys + kAhead;
    int64_t read = 0, asked = 0;  // elements
    for (int64_t d = 0; d < dim; d += kDepth) {
        const int64_t depth = std::min<int64_t>(kDepth, dim - d);
        for (int64_t e = 0; e < depth; e += kWide) {
#pragma GCC unroll 1
            for (int n = 0; n < N; ++n) {
                const T* const* rows = keys + n * kLanes;
                for (read += kLanes * std::min(kWide, depth - e); asked < read; asked += dim)
                    prefetch(*ahead++, dim * int64_t(sizeof(T)));
                u32v x[kLanes];
                load_rows(rows, d + e, depth - e, x);
                transpose(x);
#pragma GCC unroll 16
                for (int64_t j = 0; j < kLanes; ++j) columns[e / kParts + j][n] = x[j];
            }
        }
        multiply_unpacked<T, M, N>(depth / kParts, queries + d / kUnitSize<T>, dim / kUnitSize<T>, columns[0], scores,
                                   d == 0);
    }
}

// As `score_few`, for any number of vectors.
template <class T, int M, int N = (M <= 3 ? 4 : 2)>
void score_all(int64_t vectors, const T* const* keys, int64_t dim, const Unit<T>* queries, float* scores) {
    for (; vectors >= N; vectors -= N, keys += N * kLanes, scores += N * kLanes)
        score_few<T, M, N>(keys, dim, queries, scores);
    if constexpr (N > 1) {
        if (vectors) score_all<T, M, N / 2>(vectors, keys, dim, queries, scores);
    }
}

// As `score_all`, of codes of 16 bits, whose sums are the same in any order: each key meets the rows as it lies. What is asked
// for ahead is spread among the products, which bursts would hold up, and comes nearer before it is read: a decode step's
// attention takes 0.9 of the time that turning keys into columns takes.
template <class T, int M>
void score_across(int64_t vectors, const T* const* keys, int64_t dim, const Unit<T>* queries, float* scores) {
    constexpr int kStep = 2 * kLanes, kNearKeys = 6;
    const T* rows = reinterpret_cast<const T*>(queries);
    // `count` elements, zeros up to a vector.
    const auto part = [](const T* from, int64_t count) __attribute__((always_inline)) {
        i32v x{};
        std::memcpy(&x, from, size_t(count) * sizeof(T));
        return x;
    };
    for (int64_t v = 0; v < vectors; ++v, keys += kLanes, scores += kLanes) {
        i32v sums[M][kLanes];
        for (int key = 0; key < kLanes; ++key) {
            i32v own[M] = {};
            int64_t d = 0;
            for (; d + kStep <= dim; d += kStep) {
                __builtin_prefetch(keys[key + kAhead] + d, 0, 2);
                __builtin_prefetch(keys[key + kNearKeys] + d, 0, 3);
                const i32v x = load<i32v>(keys[key] + d);
#pragma GCC unroll 8
                for (int m = 0; m < M; ++m) own[m] = add_products(own[m], load<i32v>(rows + m * dim + d), x);
            }
            if (d < dim) {
                __builtin_prefetch(keys[key + kAhead] + d, 0, 2);
                const i32v x = part(keys[key] + d, dim - d);
#pragma GCC unroll 8
                for (int m = 0; m < M; ++m) own[m] = add_products(own[m], part(rows + m * dim + d, dim - d), x);
            }
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) sums[m][key] = own[m];
        }
        for (int m = 0; m < M; ++m) store(scores + m * kTile, totals(sums[m]));
    }
}

template <class T>
using ScoreFew = void (*)(int64_t, const T* const*, int64_t, const Unit<T>*, float*);

template <class T, size_t... I>
constexpr std::array<ScoreFew<T>, sizeof...(I)> scores_of_few(std::index_sequence<I...>) {
    if constexpr (kPaired<T> && sizeof(T) == 2) return {score_across<T, I + 1>...};
    else return {score_all<T, I + 1>...};
}

template <class T>
constexpr auto kScoreFew = scores_of_few<T>(std::make_index_sequence<kRows>());

}  // namespace qwire
