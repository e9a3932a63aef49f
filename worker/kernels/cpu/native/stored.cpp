#include "stored.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <mutex>

#include "pool.h"

namespace qwire {
namespace {

constexpr int kEnded = -1;

// Returns 0, errno's value, or kEnded.
int read_fully(int file, int64_t offset, int64_t bytes, char* to) {
    while (bytes > 0) {
        const ssize_t count = pread(file, to, size_t(bytes), offset);
        if (count < 0 && errno == EINTR) continue;
        if (count <= 0) return count < 0 ? errno : kEnded;
        to += count, offset += count, bytes -= count;
    }
    return 0;
}

// Bytes that a row takes in each of the format's tensors.
std::vector<int64_t> row_bytes(const StoredPart& part) {
    if (part.format == Format::kInt8) return {part.in, ceil_div(part.in, kInt8Group) * 2};
    if (part.format == Format::kInt4) {
        const int64_t groups = ceil_div(part.in, kInt4Group);
        return {ceil_div(part.in, 2), groups * 2, groups};
    }
    return {part.in * (part.source == Format::kFloat32 ? 4 : 2)};
}

void pack(const StoredPart& part, int64_t first, int64_t count, char* const (&rows)[3]) {
    if (part.format == Format::kInt8) {
        pack_int8(part.packed, part.in, first, count, reinterpret_cast<int8_t*>(rows[0]),
                  reinterpret_cast<uint16_t*>(rows[1]));
    } else if (part.format == Format::kInt4) {
        pack_int4(part.packed, part.in, first, count, reinterpret_cast<uint8_t*>(rows[0]),
                  reinterpret_cast<uint16_t*>(rows[1]), reinterpret_cast<uint8_t*>(rows[2]));
    } else {
        pack_floats(part.format, part.packed, part.in, first, count, part.source, rows[0]);
    }
}

}  // namespace

std::optional<StoredFailure> pack_stored(const std::vector<StoredPart>& parts) {
    std::atomic<bool> failed{false};
    std::mutex mutex;
    std::optional<StoredFailure> failure;
    for (size_t index = 0; index < parts.size() && !failed; ++index) {
        const StoredPart& part = parts[index];
        const std::vector<int64_t> sizes = row_bytes(part);
        int64_t room = 0;
        for (const int64_t size : sizes) room += ceil_div(size * kPanel, 64) * 64;
        parallel_for(ceil_div(part.count, kPanel), [&](int64_t panel) {
            if (failed.load(std::memory_order_relaxed)) return;
            const int64_t skipped = panel * kPanel, count = std::min<int64_t>(kPanel, part.count - skipped);
            char* rows[3] = {};
            char* to = static_cast<char*>(scratch(0, room));
            for (size_t i = 0; i < sizes.size(); ++i) {
                const StoredRows& tensor = part.tensors[i];
                const int error = read_fully(tensor.file, tensor.offset + skipped * sizes[i], count * sizes[i], to);
                if (error) {
                    const std::lock_guard lock(mutex);
                    if (!failure) failure = {int64_t(index), int64_t(i), error == kEnded ? 0 : error};
                    failed = true;
                    return;
                }
                rows[i] = to;
                to += ceil_div(sizes[i] * kPanel, 64) * 64;
            }
            pack(part, part.first + skipped, count, rows);  // one panel: this thread's alone
        });
    }
    return failure;
}

}  // namespace qwire
