// Threads that share out the tasks of one call.
//
// A call's tasks are numbered and handed out by an atomic counter, so a thread that another process keeps from running
// costs what it has in hand and no more; at the beginning of calls, when that is nothing, threads let others run. Between
// calls the helpers spin for a short while, then sleep on a futex: a step is a run of calls microseconds apart, and
// between steps other processes want the cores.
#pragma once

#include <cstdint>
#include <type_traits>

namespace qwire {

// Starts over with `threads` threads, the caller's counted. Where `cpus` (one a thread) is not null, each helper is pinned
// to its own, and the caller to the first at its next call. Must not be called while a call runs.
void set_threads(int threads, const int* cpus);
int num_threads();

using Task = void (*)(void* context, int64_t task);
void run_tasks(int64_t tasks, Task task, void* context);

// Calls f(task) for each task in [0, tasks), on all threads; returns when all are done. At most 2^20 - 1 tasks. Not
// reentrant, but for one task: the caller takes part, and goes alone where there is one.
template <class F>
void parallel_for(int64_t tasks, F&& f) {
    using Function = std::remove_reference_t<F>;
    run_tasks(tasks, [](void* context, int64_t task) { (*static_cast<Function*>(context))(task); },
              const_cast<std::remove_const_t<Function>*>(&f));
}

// Memory that a call reads in `pieces` of `bytes` each, of which every thread gets a run of about as many.
struct Pieces {
    const char* data = nullptr;
    int64_t pieces = 0, bytes = 0;
};

// Says what one of the next calls will read: until the next `expect`, threads that wait fetch the beginning of their runs
// into their caches. A decode step's small operations, which one thread does, then cost less of its time.
void expect(const Pieces& pieces);

// Memory of this thread for the length of a task, 64-byte aligned; the next call on the same thread and slot may move it.
void* scratch(int slot, int64_t bytes);

}  // namespace qwire
