// Weights that are packed straight from the files that store them.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "linear.h"

namespace qwire {

// Where rows of a tensor begin in a file, one behind the other.
struct StoredRows {
    int file;
    int64_t offset;
};

// Rows [first, first + count) of W, and where each tensor that `pack_floats`, `pack_int8` or `pack_int4` takes has them, in
// that order. `first` is a multiple of kPanel.
struct StoredPart {
    Format format;
    void* packed;
    int64_t in, first, count;
    Format source;  // of floats
    std::vector<StoredRows> tensors;
};

struct StoredFailure {
    int64_t part, tensor;  // by index
    int error;             // of errno; 0 where the file ends before the tensor does
};

// Reads and packs the parts, a panel at a time on each thread. Returns what could not be read, if anything; what is packed
// is of no use then.
std::optional<StoredFailure> pack_stored(const std::vector<StoredPart>& parts);

}  // namespace qwire
