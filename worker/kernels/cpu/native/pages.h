// The pages of memory that weights, keys and values lie in.
#pragma once

#include <cstdint>

namespace qwire {

// Makes the system give memory to what is still the page of zeros that all share, which it would do at the first write: but
// where a read came before, it first tells all threads that the page is gone, and takes 17 µs.
void touch(char* from, int64_t bytes);

// Has the system move [from, from + bytes) into large pages (2 MiB), with what neighbours have of its first and last one:
// between matrices these are a quarter of all weights. What is there stays, and may be read and written meanwhile. Returns
// whether the system can. It takes some milliseconds a page.
bool gather_pages(void* from, int64_t bytes);

// Gives memory to all of [from, from + bytes), in large pages where the system can; what is there stays, and may be read and
// written meanwhile.
void populate(char* from, int64_t bytes);

}  // namespace qwire
