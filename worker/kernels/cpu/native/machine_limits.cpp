#include "machine_limits.h"

#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>
#include <vector>

#include "pool.h"
#include "registers.h"
#if defined(__AMX_INT8__)
#include "tiles.h"
#endif

namespace qwire {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// Operations a second of `block`, which does `operations` a call, on all threads.
template <class Block>
double measure(double seconds, double operations, Block block) {
    const int threads = num_threads();
    std::vector<double> rates(size_t(threads), 0.0);
    const auto start = Clock::now();
    parallel_for(threads, [&](int64_t task) {
        int64_t calls = 0;
        do {
            block();
            ++calls;
        } while (seconds_since(start) < seconds);
        rates[size_t(task)] = double(calls) * operations / seconds_since(start);
    });
    double sum = 0;
    for (const double rate : rates) sum += rate;
    return sum;
}

// Independent sums: more than two multiply-adds a cycle need for their latency, as many as registers hold beside factors and
// a product.
constexpr int kChains = kRegisters == 32 ? 14 : 10;
constexpr int kLoops = 20000;

// Keeps the compiler from seeing what a register holds.
template <class V>
QWIRE_INLINE void blur(V& v) {
#if defined(__AVX512F__)
    asm volatile("" : "+v"(v));
#elif defined(__x86_64__)
    asm volatile("" : "+x"(v));
#else
    asm volatile("" : "+m"(v));
#endif
}

}  // namespace

double measure_fma(double seconds) {
    return measure(seconds, 2.0 * kLoops * kChains * kWidth, [] {
        Floats sums[kChains] = {}, x = broadcast(0.5f), y = broadcast(0.25f);
        for (int i = 0; i < kLoops; ++i)
#pragma GCC unroll 16
            for (int j = 0; j < kChains; ++j) {
                blur(x);  // else what is multiplied before it is added would be multiplied once for all sums
                sums[j] = multiply_add(x, y, sums[j]);
                blur(sums[j]);
            }
    });
}

#if defined(__AMX_INT8__)
double measure_int8(double seconds) {
    return measure(seconds, 8.0 * kLoops * 16 * 16 * 64, [] {
        static constexpr TileConfig config(64);
        _tile_loadconfig(&config);
        for (int i = 0; i < kLoops; ++i) {  // whatever the tiles hold
            _tile_dpbssd(0, 4, 6);
            _tile_dpbssd(1, 4, 7);
            _tile_dpbssd(2, 5, 6);
            _tile_dpbssd(3, 5, 7);
        }
        _tile_release();
    });
}
#elif defined(__AVX512VNNI__)
double measure_int8(double seconds) {
    return measure(seconds, 8.0 * kLoops * kChains * kWidth, [] {
        Ints sums[kChains] = {};
        Ints bytes = broadcast(0x01020304);
        const int32_t activations = 0x01010101;
        for (int i = 0; i < kLoops; ++i) {
            blur(bytes);
#pragma GCC unroll 16
            for (int j = 0; j < kChains; ++j) {
                sums[j] = dot(sums[j], quads(bytes), &activations);
                blur(sums[j]);
            }
        }
    });
}
#else
double measure_int8(double seconds) {
    return measure(seconds, 4.0 * kLoops * kChains * kWidth, [] {
        Ints sums[kChains] = {};
        Ints weights = broadcast(0x00010002), activations = broadcast(0x00030004);
        for (int i = 0; i < kLoops; ++i) {
#pragma GCC unroll 16
            for (int j = 0; j < kChains; ++j) {
                blur(activations);
                sums[j] = dot_pairs(sums[j], weights, activations);
                blur(sums[j]);
            }
        }
    });
}
#endif

double measure_read_bandwidth(double seconds) {
    constexpr int64_t kBytes = int64_t{256} << 20, kSlice = int64_t{1} << 18, kAhead = 8192;
    void* memory = mmap(nullptr, kBytes + kAhead, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    madvise(memory, kBytes + kAhead, MADV_HUGEPAGE);
    const char* data = static_cast<const char*>(memory);
    std::memset(memory, 1, kBytes + kAhead);  // else every page is the same page of zeros
    const auto read = [&](auto prefetches) {
        const auto start = Clock::now();
        parallel_for(kBytes / kSlice, [&](int64_t slice) {
            const char* from = data + slice * kSlice;
            Ints sum = {};
            for (int64_t i = 0; i < kSlice; i += 64) {
                if constexpr (prefetches) __builtin_prefetch(from + i + kAhead, 0, 0);
                for (int j = 0; j < 64; j += 4 * kWidth) sum += load<Ints>(from + i + j);
            }
            blur(sum);
        });
        return seconds_since(start);
    };
    double asked = 0, unasked = 0, bytes = 0;
    const auto start = Clock::now();
    do {
        asked += read(std::true_type());
        unasked += read(std::false_type());
        bytes += kBytes;
    } while (seconds_since(start) < seconds);
    munmap(memory, kBytes + kAhead);
    return bytes / std::min(asked, unasked);
}

}  // namespace qwire
