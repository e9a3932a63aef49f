#include "pool.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <new>
#include <thread>
#include <vector>

namespace qwire {
namespace {

constexpr int kIndexBits = 20;  // of a job: [generation: 24][tasks: 20][next task: 20]
constexpr uint64_t kIndexMask = (uint64_t{1} << kIndexBits) - 1;
constexpr auto kSpin = std::chrono::microseconds(150);
constexpr int64_t kFetch = 512 << 10;  // bytes of what is expected that a helper fetches: half of a level-2 cache
constexpr int64_t kFetchStep = 2 << 10;
constexpr int kYieldAfter = 256;  // waits of a caller for its helpers, some 50 µs
constexpr auto kTurn = std::chrono::microseconds(100);  // between two times at which a thread lets others run

using Clock = std::chrono::steady_clock;

void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

void pin(int cpu) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    pthread_setaffinity_np(pthread_self(), sizeof set, &set);  // where it is refused, threads float
}

// Lets whoever waits for this thread's core have it, at times that suit: with a call's tasks there to be taken and none in
// hand, so that the other threads go on with them. The scheduler would choose a time by its clock, most likely within a
// task, and all others wait for that one. Beside a router and a tokenizer on the same cores, at 8 streams, threads waited for
// each other 3.3 to 4.9% of the time, and 1.6 to 2.0% with this, where the engine alone has 1.3%.
class Turn {
   public:
    void give() {
        if (Clock::now() - given_ < kTurn) return;
        sched_yield();
        given_ = Clock::now();
    }

   private:
    Clock::time_point given_{};
};

class Pool {
   public:
    Pool(int threads, const int* cpus) : threads_(threads) {
        if (cpus) caller_cpu_ = cpus[0];
        for (int i = 1; i < threads; ++i) helpers_.emplace_back([this, i, cpu = cpus ? cpus[i] : -1] { help(i, cpu); });
    }

    ~Pool() {
        stopping_.store(true);
        wake();
        for (auto& helper : helpers_) helper.join();
    }

    int threads() const { return threads_; }

    void run(int64_t tasks, Task task, void* context) {
        if (caller_cpu_ >= 0) pin(caller_cpu_), caller_cpu_ = -1;
        if (tasks == 1 || threads_ == 1) {
            for (int64_t i = 0; i < tasks; ++i) task(context, i);
            return;
        }
        task_ = task, context_ = context;
        done_.store(0, std::memory_order_relaxed);
        generation_ = (generation_ + 1) & 0xffffff;
        job_.store(generation_ << (2 * kIndexBits) | uint64_t(tasks) << kIndexBits, std::memory_order_seq_cst);
        if (sleepers_.load(std::memory_order_seq_cst) > 0) wake();
        turn_.give();
        work();
        for (int spins = 0; done_.load(std::memory_order_acquire) < tasks; ++spins)
            spins < kYieldAfter ? fetch(caller_, 0) : void(sched_yield());
    }

    // A helper may see a part of this and a part of what was there before: it then fetches what nobody needs.
    void expect(const Pieces& pieces) {
        bytes_.store(pieces.bytes, std::memory_order_relaxed);
        pieces_.store(pieces.pieces, std::memory_order_relaxed);
        expected_.store(pieces.data, std::memory_order_relaxed);
    }

   private:
    static bool open(uint64_t job) { return (job & kIndexMask) < (job >> kIndexBits & kIndexMask); }

    // Takes tasks of whatever job is current until none is left. A ticket within the job's count keeps the job from
    // ending, so the function read after it is that job's own.
    void work() {
        while (open(job_.load(std::memory_order_acquire))) {
            const uint64_t ticket = job_.fetch_add(1, std::memory_order_acq_rel);
            if (!open(ticket)) return;
            task_(context_, int64_t(ticket & kIndexMask));
            done_.fetch_add(1, std::memory_order_release);
        }
    }

    // What a thread fetches while it waits.
    struct Fetch {
        const char *expected = nullptr, *at = nullptr, *end = nullptr;
    };

    // Fetches another step of what thread `index` is expected to read, or waits about as long.
    void fetch(Fetch& own, int index) {
        const char* expected = expected_.load(std::memory_order_relaxed);
        if (expected != own.expected) {
            const int64_t pieces = pieces_.load(std::memory_order_relaxed);
            const int64_t bytes = bytes_.load(std::memory_order_relaxed);
            own = {expected, expected + pieces * index / threads_ * bytes, nullptr};
            own.end = std::min(own.at + kFetch, expected + pieces * (index + 1) / threads_ * bytes);
        }
        if (own.at >= own.end) {
            for (int i = 0; i < 16; ++i) pause();
            return;
        }
        for (int64_t i = 0; i < kFetchStep; i += 64) __builtin_prefetch(own.at + i, 0, 2);
        own.at += kFetchStep;
    }

    void help(int index, int cpu) {
        if (cpu >= 0) pin(cpu);
        Fetch own;
        Turn turn;
        auto idle_since = Clock::now();
        while (!stopping_.load(std::memory_order_relaxed)) {
            if (open(job_.load(std::memory_order_acquire))) {
                turn.give();
                work();
                idle_since = Clock::now();
                continue;
            }
            fetch(own, index);
            if (Clock::now() - idle_since > kSpin) {
                sleep();
                idle_since = Clock::now();
            }
        }
    }

    void sleep() {
        const uint32_t seen = wakes_.load();
        sleepers_.fetch_add(1, std::memory_order_seq_cst);
        if (!open(job_.load(std::memory_order_seq_cst)) && !stopping_.load())
            syscall(SYS_futex, &wakes_, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
        sleepers_.fetch_sub(1, std::memory_order_seq_cst);
    }

    void wake() {
        wakes_.fetch_add(1);
        syscall(SYS_futex, &wakes_, FUTEX_WAKE_PRIVATE, threads_, nullptr, nullptr, 0);
    }

    const int threads_;
    int caller_cpu_ = -1;
    Fetch caller_;
    Turn turn_;  // the caller's
    uint64_t generation_ = 0;
    Task task_ = nullptr;
    void* context_ = nullptr;
    std::atomic<const char*> expected_{nullptr};
    std::atomic<int64_t> pieces_{0}, bytes_{0};
    alignas(64) std::atomic<uint64_t> job_{0};
    alignas(64) std::atomic<int64_t> done_{0};
    alignas(64) std::atomic<uint32_t> wakes_{0};
    std::atomic<int> sleepers_{0};
    std::atomic<bool> stopping_{false};
    std::vector<std::thread> helpers_;
};

// Never destroyed: helpers would be joined while the process ends, when some may hold locks that nobody frees.
Pool* pool = nullptr;

Pool& current() {
    if (!pool) pool = new Pool(1, nullptr);
    return *pool;
}

struct Scratch {
    void* data = nullptr;
    int64_t size = 0;
    ~Scratch() { std::free(data); }
};

}  // namespace

void set_threads(int threads, const int* cpus) {
    delete pool;
    pool = new Pool(threads, cpus);
}

int num_threads() { return current().threads(); }

void run_tasks(int64_t tasks, Task task, void* context) {
    if (tasks > 0) current().run(tasks, task, context);
}

void expect(const Pieces& pieces) { current().expect(pieces); }

void* scratch(int slot, int64_t bytes) {
    thread_local Scratch slots[4];
    Scratch& own = slots[slot];
    if (own.size < bytes) {
        std::free(own.data);
        own.size = (bytes + 4095) / 4096 * 4096;
        own.data = std::aligned_alloc(4096, size_t(own.size));
        if (!own.data) throw std::bad_alloc();
    }
    return own.data;
}

}  // namespace qwire
