#include "select.h"

#include <algorithm>
#include <vector>

#include "pool.h"
#include "vec.h"

namespace qwire {
namespace {

constexpr int64_t kSlice = 8192;     // logits of a task, where rows are shared out in slices
constexpr int64_t kGroupsWanted = 4096;  // of which the greatest are looked for
constexpr int32_t kLowest = INT32_MIN;   // below every key

// A key whose order as an integer is that of the values.
QWIRE_INLINE i32v keys_of(f32v x) {
    const i32v bits = (i32v)(x + 0.0f);  // -0 to 0
    const i32v key = bits ^ ((bits >> 31) & 0x7fffffff);
    return (i32v)(x == x) ? key : i32v{} + INT32_MAX;
}

QWIRE_INLINE i32v max_keys(i32v a, i32v b) { return a > b ? a : b; }

QWIRE_INLINE int32_t max_lane(i32v x) {
    int32_t greatest = x[0];
    for (int i = 1; i < kLanes; ++i) greatest = std::max(greatest, int32_t(x[i]));
    return greatest;
}

// keys_of a vector of logits, kLowest from `size` on.
QWIRE_INLINE i32v load_keys(const float* logits, int64_t from, int64_t size) {
    if (from + kLanes <= size) return keys_of(load<f32v>(logits + from));
    i32v keys = i32v{} + kLowest;
    f32v x{};
    std::memcpy(&x, logits + from, size_t(size - from) * sizeof(float));
    const i32v found = keys_of(x);
    for (int64_t i = 0; i < size - from; ++i) keys[i] = found[i];
    return keys;
}

int32_t greatest_key(const float* logits, int64_t size) {
    i32v a = i32v{} + kLowest, b = a;
    int64_t i = 0;
    for (; i + 2 * kLanes <= size; i += 2 * kLanes) {
        a = max_keys(a, keys_of(load<f32v>(logits + i)));
        b = max_keys(b, keys_of(load<f32v>(logits + i + kLanes)));
    }
    for (; i < size; i += kLanes) a = max_keys(a, load_keys(logits, i, size));
    return max_lane(max_keys(a, b));
}

int64_t first_of(const float* logits, int64_t size, int32_t key) {
    for (int64_t i = 0; i < size; i += kLanes) {
        const i32v keys = load_keys(logits, i, size);
        for (int lane = 0; lane < kLanes; ++lane)
            if (keys[lane] == key) return i + lane;
    }
    return 0;
}

// Sorts by value falling, id rising, as one number.
QWIRE_INLINE uint64_t rank(int32_t key, int64_t id) {
    return uint64_t(~(uint32_t(key) ^ 0x80000000u)) << 32 | uint64_t(id);
}

// A row's ids whose keys are at least `bound`, by rank; `peaks` are those of groups: lane l of vector g is the greatest
// of lane l of `depth` vectors of logits.
void collect(const float* logits, int64_t size, const std::vector<i32v>& peaks, int64_t depth, int32_t bound,
             std::vector<uint64_t>& ranks) {
    for (size_t group = 0; group < peaks.size(); ++group) {
        if (max_lane(peaks[group]) < bound) continue;
        const int64_t begin = int64_t(group) * depth * kLanes, end = std::min(size, begin + depth * kLanes);
        for (int64_t i = begin; i < end; i += kLanes) {
            const i32v keys = load_keys(logits, i, size);
            if (max_lane(keys) < bound) continue;
            for (int lane = 0; lane < std::min<int64_t>(kLanes, end - i); ++lane)
                if (keys[lane] >= bound) ranks.push_back(rank(keys[lane], i + lane));
        }
    }
}

// The k-th greatest group peak bounds the k-th greatest value from below, so the rest need not be looked at.
void top_of_row(const float* logits, int64_t size, int64_t k, float* values, int64_t* ids) {
    const int64_t vectors = (size + kLanes - 1) / kLanes;
    const int64_t groups = std::max(kGroupsWanted, 2 * k) / kLanes;
    const int64_t depth = std::max<int64_t>(1, vectors / groups);
    std::vector<i32v> peaks(size_t((vectors + depth - 1) / depth));
    for (size_t group = 0; group < peaks.size(); ++group) {
        i32v peak = i32v{} + kLowest;
        for (int64_t v = int64_t(group) * depth; v < std::min(vectors, int64_t(group + 1) * depth); ++v)
            peak = max_keys(peak, load_keys(logits, v * kLanes, size));
        peaks[group] = peak;
    }
    int32_t bound = kLowest;
    if (int64_t(peaks.size()) * kLanes > k) {
        const auto* first = reinterpret_cast<const int32_t*>(peaks.data());
        std::vector<int32_t> sorted(first, first + peaks.size() * kLanes);
        std::nth_element(sorted.begin(), sorted.begin() + (k - 1), sorted.end(), std::greater<>());
        bound = sorted[size_t(k - 1)];
    }
    std::vector<uint64_t> ranks;
    ranks.reserve(size_t(2 * k));
    collect(logits, size, peaks, depth, bound, ranks);
    if (int64_t(ranks.size()) > k) std::nth_element(ranks.begin(), ranks.begin() + (k - 1), ranks.end());
    std::sort(ranks.begin(), ranks.begin() + k);
    for (int64_t i = 0; i < k; ++i) {
        ids[i] = int64_t(ranks[size_t(i)] & 0xffffffffu);
        values[i] = logits[ids[i]];
    }
}

}  // namespace

void argmax(const float* logits, int64_t rows, int64_t size, int64_t* ids) {
    const int64_t slices = (size + kSlice - 1) / kSlice;
    std::vector<int32_t> peaks(size_t(rows * slices));
    parallel_for(rows * slices, [&](int64_t task) {
        const int64_t row = task / slices, from = task % slices * kSlice;
        peaks[size_t(task)] = greatest_key(logits + row * size + from, std::min(kSlice, size - from));
    });
    for (int64_t row = 0; row < rows; ++row) {
        const auto first = peaks.begin() + row * slices;
        const auto best = std::max_element(first, first + slices);  // the first of equal ones
        const int64_t from = (best - first) * kSlice;
        ids[row] = from + first_of(logits + row * size + from, std::min(kSlice, size - from), *best);
    }
}

void top_values(const float* logits, int64_t rows, int64_t size, int64_t k, float* values, int64_t* ids) {
    parallel_for(rows, [&](int64_t row) {
        top_of_row(logits + row * size, size, k, values + row * k, ids + row * k);
    });
}

void total_mass(const float* logits, const float* peaks, int64_t rows, int64_t size, double* masses) {
    const int64_t slices = (size + kSlice - 1) / kSlice;
    std::vector<double> parts(size_t(rows * slices));
    parallel_for(rows * slices, [&](int64_t task) {
        const int64_t row = task / slices, from = task % slices * kSlice, end = std::min(size, from + kSlice);
        const float* own = logits + row * size;
        double total = 0.0;
        for (int64_t tile = from; tile < end; tile += kSlice / 8) {
            f32v sums{};
            for (int64_t i = tile; i < std::min(end, tile + kSlice / 8); i += kLanes) {
                f32v x = splat(-__builtin_inff());
                std::memcpy(&x, own + i, size_t(std::min<int64_t>(kLanes, end - i)) * sizeof(float));
                sums += exp(x - peaks[row]);
            }
            total += double(sum(sums));
        }
        parts[size_t(task)] = total;
    });
    for (int64_t row = 0; row < rows; ++row) {
        double total = 0.0;
        for (int64_t slice = 0; slice < slices; ++slice) total += parts[size_t(row * slices + slice)];
        masses[row] = total;
    }
}

void divide_rows(float* logits, int64_t size, const int64_t* chosen, const float* divisors, int64_t count) {
    const int64_t slices = (size + kSlice - 1) / kSlice;
    parallel_for(count * slices, [&](int64_t task) {
        const int64_t row = task / slices, from = task % slices * kSlice, end = std::min(size, from + kSlice);
        float* own = logits + chosen[row] * size;
        for (int64_t i = from; i < end; ++i) own[i] /= divisors[row];
    });
}

void philox_words(const int64_t* ids, const int64_t* rows, int64_t count, const int64_t* positions,
                  const int64_t* choices, const uint64_t* seeds, int64_t* words) {
    constexpr int64_t kCandidates = 2048;  // of a task
    parallel_for((count + kCandidates - 1) / kCandidates, [&](int64_t task) {
        for (int64_t i = task * kCandidates; i < std::min(count, (task + 1) * kCandidates); ++i) {
            const int64_t row = rows[i];
            uint32_t c0 = uint32_t(ids[i]), c1 = uint32_t(positions[row]), c2 = uint32_t(choices[row]), c3 = 0;
            uint32_t k0 = uint32_t(seeds[row]), k1 = uint32_t(seeds[row] >> 32);
            for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
                const uint64_t first = uint64_t(c0) * 0xD2511F53u, second = uint64_t(c2) * 0xCD9E8D57u;
                c0 = uint32_t(second >> 32) ^ c1 ^ k0, c2 = uint32_t(first >> 32) ^ c3 ^ k1;
                c1 = uint32_t(second), c3 = uint32_t(first);
            }
            words[i] = c0;
        }
    });
}

}  // namespace qwire
