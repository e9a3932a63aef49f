#include "pages.h"

#include <algorithm>

#if defined(__linux__)
#include <sys/mman.h>

#include <cerrno>
#endif

namespace qwire {
namespace {

constexpr uintptr_t kPage = 4096, kLarge = uintptr_t{2} << 20;

}  // namespace

void touch(char* from, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += int64_t(kPage)) __atomic_fetch_or(from + at, 0, __ATOMIC_RELAXED);
    __atomic_fetch_or(from + bytes - 1, 0, __ATOMIC_RELAXED);
}

bool gather_pages([[maybe_unused]] void* from, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
    constexpr int kCollapse = 25;  // MADV_COLLAPSE, since Linux 6.1
    const auto begin = reinterpret_cast<uintptr_t>(from), end = begin + uintptr_t(bytes);
    for (uintptr_t at = begin / kLarge * kLarge; at < end; at += kLarge) {
        const bool whole = at >= begin && at + kLarge <= end;  // others fail where a mapping begins or ends
        if (madvise(reinterpret_cast<void*>(at), kLarge, kCollapse) && errno == EINVAL && whole) return false;
    }
    return true;
#else
    return false;
#endif
}

void populate(char* from, int64_t bytes) {
    char* const end = from + bytes;
#if defined(__linux__)
    // What has no page yet gets large ones at once, in a third of the time of gathering small ones.
    char* const first = from - uintptr_t(from) % kPage;
    madvise(first, size_t(end - first), MADV_HUGEPAGE);
#endif
    while (from < end) {
        const auto left = int64_t(kLarge - uintptr_t(from) % kLarge);  // of its large page
        char* const next = from + std::min(left, int64_t(end - from));
        touch(from, 1);  // what has no page at all isn't gathered
        gather_pages(from, next - from);
        touch(from, next - from);
        from = next;
    }
}

}  // namespace qwire
